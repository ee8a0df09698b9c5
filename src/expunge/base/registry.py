"""Find plug-ins by name: a file in `methods/` is a method, and so for the other kinds.

Methods, families, attacks and metrics may also come from another installed package, which names them
in its entry points; the name in front is what the command line calls the plug-in:

    [project.entry-points."expunge.methods"]
    blur = "my_package.blur:Blur"

Suites may come from folders that `include_suites` adds. Listing reads names and docstrings and imports
no plug-in, so it is fast.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError

HERE = Path(__file__).parents[1]
"""The folder of the package `expunge`."""

KINDS = ("methods", "models", "families", "attacks", "metrics", "suites")
"""The kinds of thing that can be listed."""

EXTENSIBLE = ("methods", "families", "attacks", "metrics")
"""The kinds that other packages may add to, through the entry points `expunge.KIND`."""

_included: ContextVar[tuple[Path, ...]] = ContextVar("included", default=())


@dataclass(frozen=True)
class _Foreign:
    """A plug-in of another package, as its entry point names it."""

    name: str
    package: str
    """The name of the installed distribution."""
    value: str
    """Where it is: "my_package.blur:Blur", or "my_package.blur" for the one class in there."""

    @property
    def module(self) -> str:
        """The module that defines the plug-in."""
        return self.value.partition(":")[0].strip()


def list_names(kind: str) -> list[str]:
    """Return the names of all plug-ins of a kind, in order.

    >>> "uce" in list_names("methods")
    True

    Raises:
        ExpungeError: there is no such kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("list of", kind, KINDS)
    if kind == "suites":
        return sorted(_find_suites())
    return sorted({*_list_own(kind), *(one.name for one in _find_foreign(kind))})


def describe(kind: str, name: str) -> str:
    """Return the first line that a plug-in says of itself; of a foreign one, its package, too.

    A foreign plug-in that cannot be used is described by the reason.
    """
    if kind == "suites":
        first, *_ = [*find_suite(name).read_text("utf-8", "replace").splitlines(), ""]
        return first.lstrip("# ") if first.startswith("#") else ""
    try:
        file = _find_file(kind, name)
    except ExpungeError as error:
        return str(error)
    line = ((_read_docstring(file) or "").splitlines() or [""])[0]
    package = next((one.package for one in _find_foreign(kind) if one.name == name), "")
    return f"{line} ({package})".lstrip() if package else line


def read_declared(kind: str, name: str, attribute: str) -> dict[str, str]:
    """Read a table of plain texts from the source of a plug-in's class, without importing it.

    >>> read_declared("methods", "mace", "needs")
    {'suppress': 'cross-attention'}

    Args:
        kind: the kind of the plug-in.
        name: its name.
        attribute: the class variable that holds the table.

    Returns:
        The table, of the class itself or of one of expunge's that it inherits from; empty where there
        is none, or the source cannot be read.
    """
    try:
        return _read_table(_find_file(kind, name), attribute)
    except ExpungeError:
        return {}


def _read_table(file: Path, attribute: str) -> dict[str, str]:
    """Read a table from the classes of a source file, or from those of expunge's that they inherit."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == attribute and node.value is not None:
                # A table that is computed, not written out, cannot be read.
                with contextlib.suppress(ValueError, TypeError):
                    return dict(ast.literal_eval(node.value))
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    bases = {ast.unparse(base) for one in classes for base in one.bases}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and bases & {alias.name for alias in node.names}:
            package, *parts = (node.module or "").split(".")
            if package == "expunge" and (
                found := _read_table(HERE.joinpath(*parts).with_suffix(".py"), attribute)
            ):
                return found
    return {}


def tabulate_coverage() -> list[list[str]]:
    """Return which methods work on which families, ready to print.

    A first row holds the methods' names; then, for each family, its name, and for each method "yes", or
    which of its stages it is without.

    >>> [row[0] for row in tabulate_coverage()[1:]] == list_names("families")
    True
    """
    methods = list_names("methods")
    needs = {method: read_declared("methods", method, "needs") for method in methods}
    rows = [["", *methods]]
    for family in list_names("families"):
        lacks = read_declared("families", family, "missing_capabilities")
        missing = (", ".join(s for s, need in needs[m].items() if need in lacks) for m in methods)
        rows.append([family, *(f"without {stages}" if stages else "yes" for stages in missing)])
    return rows


def get(kind: str, name: str) -> type[Any]:
    """Return the class of a plug-in: the one public class that its module defines.

    Raises:
        ExpungeError: there is no such plug-in (the nearest is named), two have this name, or that of
            another package is broken: the message names the package and the reason.
    """
    if name not in list_names(kind):
        raise UnknownNameError(_singular(kind), name, list_names(kind))
    foreign = _choose(kind, name)
    contract = _load_contract(kind)
    if foreign is not None:
        return _load_foreign(kind, foreign, contract)
    module = importlib.import_module(f"expunge.{kind}.{name}")
    return _find_class(module, contract)


def load_all(kind: str) -> dict[str, type[Any]]:
    """Return the classes of all plug-ins of a kind that work, by name, expunge's own first.

    A plug-in of another package that is broken, or has a name that is taken, is left out with an
    ExpungeWarning.
    """
    contract = _load_contract(kind)
    found = {
        name: _find_class(importlib.import_module(f"expunge.{kind}.{name}"), contract)
        for name in sorted(_list_own(kind))
    }
    for one in _find_foreign(kind):
        try:
            _choose(kind, one.name)
            found[one.name] = _load_foreign(kind, one, contract)
        except ExpungeError as error:
            warnings.warn(f"{error}; it is left out", ExpungeWarning, stacklevel=2)
    return found


def name_of(kind: str, cls: type[Any]) -> str:
    """Return the name that a plug-in's class is recorded under.

    It is the name that `get` takes; of a class that is not registered, such as one from a notebook or
    a script, the name of the class, with its module in front where a plug-in has this name already.
    """
    package, _, name = cls.__module__.rpartition(".")
    if package == f"expunge.{kind}" and name in _list_own(kind):
        return name
    for one in _find_foreign(kind):
        target = one.value.partition(":")[2].strip().split("[")[0].strip()
        if one.module == cls.__module__ and target in ("", cls.__qualname__):
            return one.name
    own = cls.__qualname__.rpartition(".")[2]
    return f"{cls.__module__}.{own}" if own in list_names(kind) else own


@contextlib.contextmanager
def include_suites(folders: Sequence[str | Path]) -> Iterator[None]:
    """Find suites in these folders, too, for the length of a block: every `.toml` file is one.

    Raises:
        ExpungeError: one is not a folder or holds no suite, or two suites have one name.
    """
    token = _included.set((*_included.get(), *map(Path, folders)))
    try:
        _find_suites()
        yield
    finally:
        _included.reset(token)


def find_suite(name: str, model: str = "", otherwise: str = "") -> Path:
    """Return the file of a suite, `model`'s own first; `otherwise`'s own where none has the name itself.

    Raises:
        ExpungeError: there is none of this name; the nearest is named.
    """
    suites = _find_suites()
    names = (f"{model}/{name}", name, f"{otherwise}/{name}")
    if found := [suites[one] for one in names if one in suites]:
        return found[0]
    short = [one.partition("/")[2] for one in suites if one.startswith(f"{model or otherwise}/")]
    raise UnknownNameError("suite", name, [*short, *suites])


def _find_suites() -> dict[str, Path]:
    """Return the file of every suite, those that ship and those of the included folders."""
    found = {path.stem: path for path in (HERE / "suites").glob("*.toml")}
    found |= {f"{path.parents[1].name}/{path.stem}": path for path in HERE.glob("*/suites/*.toml")}
    taken = {name.rpartition("/")[2]: "one that ships" for name in found}
    for folder in dict.fromkeys(path.resolve() for path in _included.get()):
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".toml")
        except OSError as error:
            raise ExpungeError(
                f"cannot read the suites in {folder}: {error.strerror or error}"
            ) from None
        if not files:
            raise ExpungeError(f"{folder} holds no suite: a suite is a .toml file")
        for path in files:
            if path.stem in taken:
                raise ExpungeError(
                    f"two suites are named {path.stem!r}: {path} and {taken[path.stem]}; rename the file"
                )
            found[path.stem], taken[path.stem] = path, str(path)
    return found


def _singular(kind: str) -> str:
    return "family" if kind == "families" else kind[:-1]


def _list_own(kind: str) -> list[str]:
    """Return the names of the plug-ins of a kind that expunge itself has."""
    if kind == "models":
        return [folder.parent.name for folder in HERE.glob("*/pipeline")]
    files = [*(HERE / kind).glob("*.py"), *(file.parent for file in (HERE / kind).glob("*/__init__.py"))]
    # A name that begins with an underscore is what several plug-ins share.
    return [path.stem for path in files if not path.stem.startswith("_")]


def _find_foreign(kind: str) -> tuple[_Foreign, ...]:
    """Return the plug-ins of a kind that other packages name in their entry points."""
    return _read_entry_points(kind, tuple(sys.path)) if kind in EXTENSIBLE else ()


@functools.lru_cache(maxsize=32)
def _read_entry_points(kind: str, path: tuple[str, ...]) -> tuple[_Foreign, ...]:
    """As `_find_foreign`, once for every `sys.path`: reading them may take a tenth of a second."""
    found = []
    for point in importlib.metadata.entry_points(group=f"expunge.{kind}"):
        try:
            package = str(point.dist.name) if point.dist else ""
        except Exception:  # metadata without a name
            package = ""
        found.append(_Foreign(point.name, package or "an unnamed package", point.value))
    return tuple(dict.fromkeys(found))  # one package may be on the path twice


def _choose(kind: str, name: str) -> _Foreign | None:
    """Return the foreign plug-in of this name; None for one of expunge's own.

    Raises:
        ExpungeError: two have this name, so that nobody could say which one an edit was made with.
    """
    foreign = [one for one in _find_foreign(kind) if one.name == name]
    owners = [*["expunge"] * (name in _list_own(kind)), *(one.package for one in foreign)]
    if len(owners) > 1:
        raise ExpungeError(
            f"{' and '.join(owners)} each have a {_singular(kind)} named {name!r}: uninstall"
            f" {owners[-1]}, or rename it in its entry points"
        )
    return foreign[0] if foreign else None


def _find_file(kind: str, name: str) -> Path:
    """Return the source file of a plug-in, importing nothing.

    Raises:
        ExpungeError: it is another package's and cannot be found, or two have this name.
    """
    if kind == "models":
        return HERE / name / "__init__.py"
    foreign = _choose(kind, name)
    if foreign is None:
        file = HERE / kind / f"{name}.py"
        return file if file.exists() else HERE / kind / name / "__init__.py"
    # `find_spec` of a submodule would import its package, so only the first part is looked up so.
    first, *rest = foreign.module.split(".")
    try:
        spec = importlib.util.find_spec(first)
        for part in rest:
            folders = spec.submodule_search_locations if spec else None
            spec = importlib.machinery.PathFinder.find_spec(part, folders) if folders else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise _make_broken_error(kind, foreign, f"there is no module {foreign.module!r}")
    return Path(spec.origin or "")


def _read_docstring(file: Path) -> str | None:
    """Return the docstring of a source file; None if it has none or cannot be read."""
    try:
        return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return None


def _load_foreign(kind: str, foreign: _Foreign, contract: type[Any]) -> type[Any]:
    """Import a plug-in of another package.

    Raises:
        ExpungeError: it cannot be imported, or is not a class of this kind.
    """
    target = foreign.value.partition(":")[2].strip().split("[")[0].strip()
    try:
        found: Any = importlib.import_module(foreign.module)
        for part in filter(None, target.split(".")):
            found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # another package's code may raise anything, SystemExit included
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _make_broken_error(
            kind, foreign, f"{type(error).__name__}{f': {reason}' if reason else ''}"
        ) from error
    if not target:
        try:
            return _find_class(found, contract)
        except ExpungeError as error:
            raise _make_broken_error(kind, foreign, str(error)) from None
    if not (inspect.isclass(found) and issubclass(found, contract)):
        raise _make_broken_error(kind, foreign, f"{foreign.value} is not a {contract.__name__}")
    return found


def _make_broken_error(kind: str, foreign: _Foreign, reason: str) -> ExpungeError:
    return ExpungeError(
        f"the {_singular(kind)} {foreign.name!r} of the package {foreign.package} is broken: {reason}"
    )


def _find_class(module: ModuleType, contract: type[Any]) -> type[Any]:
    """Return the one class of a module that fulfils a contract.

    Raises:
        ExpungeError: the module defines none, or several.
    """
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, contract) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ExpungeError(f"{module.__name__} must define one {contract.__name__}, not {len(found)}")
    return found[0]


def _load_contract(kind: str) -> type[Any]:
    """Return the abstract class that the plug-ins of a kind subclass."""
    module = "model" if kind == "families" else kind[:-1]
    return getattr(importlib.import_module(f"expunge.{module}"), module.capitalize())
