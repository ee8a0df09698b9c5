"""The folder is the list: a file in `methods/` is a method, and so for the other plug-ins.

Listing reads names and first lines only and imports nothing, so it is fast.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError, unknown

HERE = Path(__file__).parents[1]

KINDS = ("methods", "models", "families", "attacks", "metrics", "suites")
"""What can be listed."""


def names(kind: str) -> list[str]:
    """The names of all plug-ins of a kind, in order.

    >>> "uce" in names("methods")
    True

    Raises:
        ExpungeError: there is no such kind.
    """
    if kind not in KINDS:
        raise unknown("list of", kind, KINDS)
    if kind == "models":
        return sorted(folder.parent.name for folder in HERE.glob("*/pipeline"))
    if kind == "suites":
        return sorted(path.stem for path in (HERE / kind).glob("*.toml"))
    files = [*(HERE / kind).glob("*.py"), *(file.parent for file in (HERE / kind).glob("*/__init__.py"))]
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def _file(kind: str, name: str) -> Path:
    """Where a plug-in is defined: a file, or a folder's `__init__.py`."""
    file = HERE / kind / f"{name}.py"
    return file if file.exists() else HERE / kind / name / "__init__.py"


def describe(kind: str, name: str) -> str:
    """The first line a plug-in says about itself."""
    if kind == "suites":
        first = (HERE / kind / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
        return first.lstrip("# ")
    file = HERE / name / "__init__.py" if kind == "models" else _file(kind, name)
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else None
    return (text or "").splitlines()[0] if text else ""


def declared(kind: str, name: str, attribute: str) -> dict[str, str]:
    """What a plug-in's class says in one table of plain texts, read without importing it.

    >>> declared("methods", "mace", "needs")
    {'suppress': 'cross-attention'}
    """
    for node in ast.walk(ast.parse(_file(kind, name).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == attribute and node.value is not None:
                return dict(ast.literal_eval(node.value))
    return {}


def suits(method: str) -> str:
    """On which families a method works, and what of it on the others, in words.

    >>> suits("uce")
    'every family'
    """
    needs = declared("methods", method, "needs")
    said: dict[str, list[str]] = {}
    for family in names("families"):
        lacks = declared("families", family, "missing_capabilities")
        missing = [stage for stage, need in needs.items() if need in lacks]
        said.setdefault(", ".join(missing), []).append(family)
    if list(said) == [""]:
        return "every family"
    parts = [
        f"{', '.join(families)}: {'all of it' if not missing else f'without its stage {missing}'}"
        for missing, families in sorted(said.items())
    ]
    return "; ".join(parts)


def get(kind: str, name: str) -> type[Any]:
    """The class of a plug-in: the one public class its file defines.

    Raises:
        ExpungeError: there is no such plug-in; the nearest is named.
    """
    if name not in names(kind):
        singular = "family" if kind == "families" else kind[:-1]
        raise unknown(singular, name, names(kind))
    module = importlib.import_module(f"expunge.{kind}.{name}")
    base = _contract(kind)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ExpungeError(f"{module.__name__} must define one {base.__name__}, not {len(found)}")
    return found[0]


def _contract(kind: str) -> type[Any]:
    """The abstract class that the plug-ins of a kind fulfil."""
    module = "model" if kind == "families" else kind[:-1]
    return getattr(importlib.import_module(f"expunge.{module}"), module.capitalize())
