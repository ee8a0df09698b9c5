"""Rooms import only what stands below them; plug-ins never import one another."""

import ast
import tomllib
from pathlib import Path

import pytest

import expunge
from expunge.base import registry

ROOT = Path(expunge.__file__).parent

ORDER = (
    "base", "text",
    "ops", "problem", "probe", "metric", "runtime", "changes",
    "model",
    "families", "fingerprint", "method",
    "edit", "erasing",
    "methods", "checkpoints", "erasure", "tuning", "unlearning",
    "attack", "attacks",
    "metrics", "evaluation",
    "cli",
    "studio",
)  # fmt: skip
"""The rooms, from the ground up: each imports only what stands before it."""

SHIPPED = ("emoji", "miniature")
"""The models that ship: their judges, and what else is theirs."""

APART = {"__init__", "__main__", "__pycache__", "captions", "suites", *SHIPPED}
"""What is no room: the front door, and what ships."""


def imports(path: Path) -> set[str]:
    """The rooms that a file imports when it runs; what is for types only is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("expunge.")} - {"__version__"}


def files(room: str) -> list[Path]:
    """The files of a room: one, or those of its folder."""
    own = ROOT / f"{room}.py"
    return [own] if own.exists() else sorted((ROOT / room).rglob("*.py"))


def test_every_room_has_its_place():
    there = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert there - APART == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_what_stands_before_it(room):
    before = {*ORDER[: ORDER.index(room) + 1], *(SHIPPED if room == "metrics" else ())}
    assert files(room)
    for path in files(room):
        assert imports(path) <= before, path


@pytest.mark.parametrize("kind", ["families", "methods", "attacks", "metrics"])
def test_plugins_never_import_one_another(kind):
    plugins = registry.list_names(kind)
    assert plugins
    for path in (ROOT / kind).rglob("*.py"):
        own = path.relative_to(ROOT / kind).parts[0].removesuffix(".py")
        for name in set(plugins) - {own}:
            assert f"expunge.{kind}.{name}" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("model", SHIPPED)
def test_what_ships_needs_no_room_but_the_lowest(model):
    assert files(model)
    for path in files(model):
        assert imports(path) <= {"base", "ops", model}, path


def test_ops_know_no_diffusers():
    for path in (ROOT / "ops").glob("*.py"):
        assert "diffusers" not in path.read_text().replace("no diffusers", "")


def test_the_registry_finds_one_class_a_file():
    found = 0
    for kind in ("methods", "families", "attacks", "metrics"):
        for name in registry.list_names(kind):
            assert registry.get(kind, name).__module__ == f"expunge.{kind}.{name}"
            assert registry.describe(kind, name).endswith(".")
            found += 1
    assert found >= 2


def test_the_version_stands_in_one_place():
    project = ROOT.parents[1] / "pyproject.toml"
    table = tomllib.loads(project.read_text(encoding="utf-8"))
    assert "version" not in table["project"]
    assert table["project"]["dynamic"] == ["version"]
    file = project.parent / table["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{expunge.__version__}"' in file.read_text(encoding="utf-8")
