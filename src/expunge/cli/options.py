"""Read the options of a command with tyro, and turn its complaints into one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.fields import leaves
from expunge.cli.loading_options import LoadingOptions

T = TypeVar("T")

SHIELD = "\uf8ff"
"""A private-use character put before a value that begins with a hyphen, so that tyro reads it as one."""

REPHRASED = {
    r": invalid literal for int\(\) with base 10: ('.*')": r" must be a whole number, not \1",
    r": could not convert string to float: ('.*')": r" must be a number, not \1",
    r": no type matching .*<class '\w+'>( must be .*)": r"\1",
}
"""Python's and tyro's messages about a value: {pattern: replacement}."""


def parse_options(
    options: type[T], command: str, arguments: Sequence[str], *, complete: bool = True
) -> T:
    """Read a command's options.

    Args:
        options: a dataclass, one field an option.
        command: its name, for messages: "erase uce".
        arguments: what follows the command's name.
        complete: whether `options` holds all options there are; if not, unknown ones are ignored.

    Raises:
        ExpungeError: an option is unknown or missing, or its value does not fit.
    """
    complaint = io.StringIO()
    arguments = _shield(options, arguments)
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, rest = tyro.cli(
                options,
                prog=f"expunge {command}",
                args=arguments,
                return_unknown_args=True,
                config=(OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        if complete:
            check_options(options, command, arguments)
        raise ExpungeError(_remove_shields(_shorten(complaint.getvalue(), command))) from None
    if rest and complete:
        check_options(options, command, rest)
        raise ExpungeError(f"{command} does not know what to do with {_remove_shields(rest[0])!r}")
    return _unshield(parsed)


def read_value(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of one option before the others are parsed; given twice, the last counts."""
    for place, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name == option:
            following = next(iter(arguments[place + 1 :]), "-")
            return value if equals else None if following.startswith("-") else following
    return None


def check_options(options: Any, command: str, arguments: Sequence[str]) -> None:
    """Check that every option among the arguments exists.

    Args:
        options: a dataclass, one field an option; its field `method` may hold a method with options.
        command: its name, for messages.
        arguments: what follows the command's name.

    Raises:
        ExpungeError: one does not exist: its new name if it was renamed, the reason where the method
            gives one, or the nearest one.
    """
    method = {f.name: f.default for f in dataclasses.fields(options)}.get("method")
    names = {**getattr(options, "renamed", {}), **getattr(method, "renamed", {})}
    renamed = {f"--{old.replace('_', '-')}": new for old, new in names.items()}
    for name in find_unknown_options(options, arguments):
        if name in renamed:
            now = f"--{renamed[name].replace('_', '-')}"
            raise ExpungeError(f"the option {name} of {command} is named {now} now")
        if reason := getattr(method, "absent", {}).get(name.removeprefix("--").replace("-", "_")):
            raise ExpungeError(f"{command} has no option {name}: {reason}")
        known = {f"--{f.name.replace('_', '-')}" for f in _list_fields(options)}
        raise UnknownNameError(f"option of {command}", name, known)


def find_unknown_options(options: Any, arguments: Sequence[str]) -> list[str]:
    """Return the options among the arguments that the dataclass `options` has no field for."""
    known = {f.name.replace("_", "-") for f in _list_fields(options)}
    names = [argument.partition("=")[0] for argument in arguments]
    given = [name for name in names if name.startswith("--")]
    # -seed was meant for --seed
    single = [n for n in names if n.startswith("-") and len(n) > 2 and n[1:] in known]
    return [name for name in given if not {name[2:], name[2:].removeprefix("no-")} & known] + single


def _list_fields(options: Any) -> Iterator[dataclasses.Field[Any]]:
    """Yield the fields of an options class, with those of its method and of model loading."""
    for field in dataclasses.fields(options):
        if field.name == "method" and dataclasses.is_dataclass(field.default):
            yield from leaves(type(field.default))  # not the name of one, as forecast takes it
        elif field.name == "loading":
            yield from dataclasses.fields(LoadingOptions)
        else:
            yield field


def _shield(options: Any, arguments: Sequence[str]) -> list[str]:
    """Put a shield before every value that begins with a hyphen, such as the prompt "-5 cats".

    An argument counts as a value if it has a space before any equals sign, follows `--`, is a word
    with one hyphen that names no option, or is a number where no option waits for its value.
    """
    fields = list(_list_fields(options))
    switches = {
        f"--{f.name.replace('_', '-')}" for f in fields if f.default is False or f.default is True
    }
    known = {f"--{f.name.replace('_', '-')}" for f in fields} | {"--help", "-h", "-o", "-n"}
    known |= {f"--no-{switch[2:]}" for switch in switches}
    shielded: list[str] = []
    before = ""
    for place, argument in enumerate(arguments):
        waits = before in known - switches  # the option before this argument still lacks its value
        option, equals, value = argument.partition("=")
        if argument == "--" and not waits:
            return [*shielded, *(SHIELD + rest for rest in arguments[place + 1 :])]
        if equals and option in known:
            argument = f"{option}={SHIELD * value.startswith('-') * (not _is_number(value))}{value}"
        elif argument.startswith("-") and argument not in known:
            one_hyphen = not argument.startswith("--")
            mistyped = one_hyphen and f"-{argument}" in known
            short = one_hyphen and not waits and argument[:2] in known and argument[2:].isdigit()  # -n3
            if _is_number(argument):
                is_value = not waits  # tyro reads a negative number after an option by itself
            else:
                is_value = " " in option or (one_hyphen and not mistyped and not short)
            argument = SHIELD * is_value + argument
        shielded.append(argument)
        before = argument if argument in known else ""
    return shielded


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _remove_shields(text: str) -> str:
    return text.replace(SHIELD, "")


def _unshield(value: T) -> T:
    """Return parsed options, or a value among them, without shields."""
    plain: Any = value
    if isinstance(value, str):
        plain = value.removeprefix(SHIELD)
    elif isinstance(value, (tuple, list)):
        plain = type(value)(map(_unshield, value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: _unshield(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
        same = all(changed[name] == getattr(value, name) for name in changed)
        plain = value if same else dataclasses.replace(value, **changed)
    return plain


def _shorten(complaint: str, command: str) -> str:
    """Return the gist of tyro's boxed message as one sentence."""
    lines = [line.strip("│| ") for line in complaint.splitlines()[1:]]  # the first is a title
    rule = re.compile(r"[─-]{3}|╰")
    while lines and rule.match(lines[0]):
        del lines[0]
    gist = list(itertools.takewhile(lambda line: not rule.match(line), filter(None, lines)))
    if gist and gist[0].startswith("Missing from"):
        return f"{command} needs {gist[1]}"
    text = re.sub(r"^Error parsing (method: )?", "", " ".join(gist)).rstrip(".")
    for pattern, ours in REPHRASED.items():
        text = re.sub(pattern, ours, text)
    return f"{command}: {text[:1].lower()}{text[1:]}" if text else f"{command}: bad options"
