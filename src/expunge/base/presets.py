"""Presets: field values that belong together, in a TOML file beside the class they are meant for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import read_toml

Presets = Mapping[str, Mapping[str, Any]]
"""For each preset, by name, the values of the fields it sets, and `about`: what it is for, in a line."""


def read_presets(module: str | Path) -> Presets:
    """Read the presets of a module: `NAME.toml` beside `NAME.py`, `presets.toml` in a package's folder.

    Each table is a preset. Its `about` says in a line what the preset is for; `extends` names the table,
    or the list of tables, whose values it starts from, where the later one counts if two set a field;
    the rest are values of fields. A table whose name begins with an underscore is there to be extended
    and is no preset.

    >>> from expunge.base.registry import HERE
    >>> presets = read_presets(HERE / "methods" / "oce.py")
    >>> list(presets), presets["style"]["erase_scale"]
    (['object', 'identity', 'style', 'explicit', 'miniature-10', 'miniature-100'], 500.0)

    Args:
        module: the module's `__file__`.

    Returns:
        The presets in the order of the file, with tuples in place of TOML's lists.

    Raises:
        ExpungeError: there is no such file, or it is no TOML; something in it is no table; a preset has
            no `about`; or `extends` names a table that is not there, or leads in a circle.
    """
    module = Path(module)
    packaged = module.name == "__init__.py"
    path = module.with_name("presets.toml") if packaged else module.with_suffix(".toml")
    tables = read_toml(path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ExpungeError(f"{path}: {name} must be a table of field values, [{name}]")
    presets = {}
    for name in tables:
        if name.startswith("_"):
            continue
        values = _extended(tables, name, path, ())
        if not isinstance(values.get("about"), str):
            raise ExpungeError(f"{path}: the preset {name!r} lacks about: a line on what it is for")
        presets[name] = MappingProxyType(values)
    return MappingProxyType(presets)


def _extended(
    tables: Mapping[str, Mapping[str, Any]], name: str, path: Path, above: tuple[str, ...]
) -> dict[str, Any]:
    """Collect a table's values, those of the tables it extends first.

    Args:
        tables: of the file, by name.
        name: the table.
        path: the file, for messages.
        above: the tables that led here.
    """
    if name not in tables:
        raise ExpungeError(
            f"{path}, extends of {above[-1]!r}: {UnknownNameError('table', name, tables)}"
        )
    if name in above:
        raise ExpungeError(f"{path}: extends leads in a circle: {' → '.join([*above, name])}")
    own = dict(tables[name])
    bases = own.pop("extends", ())
    values: dict[str, Any] = {}
    # What a preset is for is its own to say: `about` is not handed down.
    for base in (bases,) if isinstance(bases, str) else bases:
        values |= _extended(tables, base, path, (*above, name))
    values.pop("about", None)
    return values | {field: tuple(v) if isinstance(v, list) else v for field, v in own.items()}
