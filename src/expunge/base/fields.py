"""Hyper-parameters as dataclass fields, which Python, the command line and TOML files share."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from expunge.base.errors import ExpungeError

T = TypeVar("T")


def bounded(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a number field with its range, which `check_fields` enforces.

    Args:
        default: the default value.
        at_least: the least value allowed.
        above: a value that the field must exceed.
        at_most: the greatest value allowed.
    """
    limits = {"at least": at_least, "above": above, "at most": at_most}
    return dataclasses.field(
        default=default, metadata={word: limit for word, limit in limits.items() if limit is not None}
    )


def check_fields(instance: Any) -> None:
    """Check every field of a dataclass instance against its type and range.

    Lists become tuples where a tuple is declared, and integers become floats where a float is
    declared, so that values from TOML and the command line fit.

    Raises:
        ExpungeError: a value does not fit; the message names the field, the value and what is allowed.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = _fit_type(getattr(instance, field.name), hints[field.name], field.name)
        for word, limit in field.metadata.items():
            inside = {
                "at least": lambda v, x: v >= x,
                "above": lambda v, x: v > x,
                "at most": lambda v, x: v <= x,
            }[word](value, limit)
            if not inside:
                raise ExpungeError(f"{field.name} must be {word} {limit:g}, not {value!r}")
        object.__setattr__(instance, field.name, value)  # the dataclass is frozen


def groups(cls: type[Any]) -> dict[str, type[Any]]:
    """Find the fields of a dataclass that are dataclasses themselves: settings that belong together.

    From the outside, on the command line, in TOML and in records, their fields stand among the others.
    """
    hints = typing.get_type_hints(cls)
    kinds: dict[str, Any] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {n: k for n, k in kinds.items() if isinstance(k, type) and dataclasses.is_dataclass(k)}


def leaves(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """List the fields of a dataclass, with those of its groups in the place of each group."""
    grouped, found = groups(cls), []
    for field in dataclasses.fields(cls):
        found += leaves(grouped[field.name]) if field.name in grouped else [field]
    return found


def flatten(instance: Any) -> dict[str, Any]:
    """Return the values of a dataclass instance by field, those of its groups among the others."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        values |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def require_known(cls: type[Any], names: Iterable[str], known: Sequence[str], what: str = "") -> None:
    """Check that fields are there.

    Args:
        cls: the dataclass.
        names: of the fields.
        known: the names that it takes.
        what: what an error calls the dataclass; by default the words of its name.

    Raises:
        ExpungeError: a field has another name now, or there is none such; the nearest is named, or the
            reason.
    """
    renamed = getattr(cls, "renamed", {})
    for name in names:
        if name not in known and name in renamed:
            raise ExpungeError(
                f"{what or _split_words(cls)}: the field {name!r} is named {renamed[name]!r} now"
            )
        if name not in known and name in (absent := getattr(cls, "absent", {})):
            raise ExpungeError(f"{what or _split_words(cls)} has no field {name!r}: {absent[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ExpungeError(f"{what or _split_words(cls)} has no field {name!r}{hint}")


def build(cls: type[T], values: Mapping[str, Any], what: str = "") -> T:
    """Build an instance of `cls` from a mapping such as a TOML table.

    Fields of its groups stand among the others, or in a table of the group's name.

    Args:
        cls: a dataclass.
        values: its fields.
        what: what a message calls it, in the file's words; by default those of the class's name.

    Raises:
        ExpungeError: an unknown key (the nearest field is named), or a value that does not fit.
    """
    grouped = groups(cls)
    own = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.init and f.name not in grouped]
    within = {name: [field.name for field in leaves(kind)] for name, kind in grouped.items()}
    known = [*own, *(name for names in within.values() for name in names)]
    require_known(cls, values, [*known, *grouped], what)
    found = {key: value for key, value in values.items() if key in own}
    for group, names in within.items():
        inside = {key: value for key, value in values.items() if key in names}
        table = values.get(group, {})
        if isinstance(table, Mapping):
            inside = {**table, **inside}
        elif inside:
            raise ExpungeError(f"{group} is given whole; {next(iter(inside))!r} belongs within it")
        else:
            found[group] = table
        if inside:
            found[group] = build(grouped[group], inside, what or _split_words(cls))
    return cls(**found)


def _split_words(cls: type) -> str:
    """Return the words of a class's name: the author of a TOML table has never seen the class.

    >>> _split_words(type("_SuiteConcept", (), {})), _split_words(type("UCE", (), {}))
    ('a suite concept', 'UCE')
    """
    name = cls.__name__.strip("_")
    if name.isupper():
        return name
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def build_from_record(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build an instance of `cls` from the record of an older version, whose field names may be old.

    Raises:
        ExpungeError: an unknown key, or a value that does not fit.
    """
    renamed = getattr(cls, "renamed", {})
    return build(cls, {renamed.get(key, key): value for key, value in values.items()})


def _fit_type(value: Any, kind: Any, name: str) -> Any:
    """Return a value as the declared type of its field.

    Raises:
        ExpungeError: it does not fit; the message names the field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = " or ".join(repr(a) for a in arguments)
        raise ExpungeError(f"{name} must be {allowed}, not {value!r}{hint}")
    if origin in (types.UnionType, typing.Union):  # only ever "X or None"
        return None if value is None else _fit_type(value, arguments[0], name)
    if dataclasses.is_dataclass(kind) and isinstance(value, typing.cast(type, kind)):
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_fit_type(item, arguments[0], name) for item in value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise ExpungeError(f"{name} must be finite, not {value!r}")
    # Not `isinstance`: True is an int, and nobody who writes rank = true means rank 1.
    if kind in (bool, int, str) and type(value) is kind:
        return value
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    grouped = dataclasses.is_dataclass(kind) and isinstance(kind, type)
    said = f"a {kind.__name__}" if grouped else words.get(kind, "a list of text")
    raise ExpungeError(f"{name} must be {said}, not {value!r}")


def format_value(value: Any) -> str:
    """Return a field's value in words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "default"
    return str(float(f"{value:.4g}")) if isinstance(value, float) else str(value) or "none"


def format_values(values: Mapping[str, Any]) -> str:
    """Return fields with their values in words."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
