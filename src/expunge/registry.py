"""The folder is the list: a file in `methods/` is a method, and so for the other plug-ins.

Listing reads names and first lines only and imports nothing, so it is fast.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError, unknown
from expunge.files import check_weights

HERE = Path(__file__).parent

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
    pattern = "*.toml" if kind == "suites" else "*.py"
    return sorted(path.stem for path in (HERE / kind).glob(pattern) if not path.stem.startswith("_"))


def describe(kind: str, name: str) -> str:
    """The first line a plug-in says about itself."""
    if kind == "suites":
        first = (HERE / kind / f"{name}.toml").read_text().splitlines()[0]
        return first.lstrip("# ")
    file = HERE / name / "__init__.py" if kind == "models" else HERE / kind / f"{name}.py"
    text = ast.get_docstring(ast.parse(file.read_text())) if file.exists() else None
    return (text or "").splitlines()[0] if text else ""


def model_folder(model: str | Path) -> tuple[Path | None, str]:
    """The folder of a model, its weight files whole, or None for a hub id; and what to call it.

    Raises:
        ExpungeError: there is no such model, or a file of it is missing or cut short.
    """
    shipped = names("models")
    path = HERE / model / "pipeline" if str(model) in shipped else Path(model)
    if not path.is_dir():
        if isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/", "~")):
            return None, model
        if path.exists():
            raise ExpungeError(f"{model} is a file, not a diffusers folder")
        raise unknown("model", str(model), shipped)
    if not (path / "model_index.json").is_file():
        raise ExpungeError(f"{path} is not a diffusers folder: it has no model_index.json")
    check_weights(path)
    return path, str(model) if str(model) in shipped else path.resolve().name


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
