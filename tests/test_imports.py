"""Each file imports only what stands above it; plug-ins never import one another."""

import ast
from pathlib import Path

import expunge
from expunge import registry

ROOT = Path(expunge.__file__).parent

ORDER = [
    "errors", "threads", "files", "tensors", "fields", "problem", "concepts", "templates", "probe",
    "pieces", "cluster", "run", "work", "registry", "hub", "variants", "source", "pictures", "sheet",
    "changes", "ops", "turns", "lora_names", "lora", "sampling", "model", "concept_tokens", "prior",
    "seen", "pace", "pooled", "fusion", "plain", "examples", "grounded_sam", "masks", "steering",
    "fortify", "method",
    "fingerprint", "edit", "saliency", "checkpoint", "card", "export", "merge",
    "undo", "attack", "metric", "suite", "cache", "statistics", "looks", "robust", "distances",
    "case", "page", "report", "experiment", "plan", "commands", "cli",
]  # fmt: skip
"""The core, from the ground up."""

PLUGINS = ("families", "methods", "attacks", "metrics", "emoji")


def imports(path: Path) -> set[str]:
    """The parts of expunge that a file imports when it runs; what is for types only is left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("expunge.")}


def parts(name: str) -> list[Path]:
    return (
        [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py"))
    )


def test_every_file_has_its_place():
    there = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    there -= {"__init__", "__main__", "__pycache__", "captions", "suites"}
    assert there - {"emoji"} == set(ORDER) | set(PLUGINS) - {"emoji"}


def test_the_core_imports_upwards():
    for place, name in enumerate(ORDER):
        for path in parts(name):
            allowed = {*ORDER[: place + 1], "__version__"}
            assert imports(path) <= allowed, path


def test_plugins_import_the_core_alone():
    seen = 0
    for kind in PLUGINS:
        for path in sorted((ROOT / kind).glob("*.py")):
            # A metric may use what ships with the emoji model, and a helper of its own folder.
            own = {"emoji": {"emoji"}, "metrics": {"emoji", "metrics"}, "families": {"families"}}.get(
                kind, set()
            )
            assert imports(path) <= {*ORDER, *own} - {"cli"}, path
            seen += 1
    assert seen > 4


def test_metrics_share_helpers_only():
    for path in (ROOT / "metrics").glob("*.py"):
        for name in registry.names("metrics"):
            assert f"expunge.metrics.{name}" not in path.read_text(), path


def test_ops_know_no_diffusers():
    for path in (ROOT / "ops").glob("*.py"):
        assert "diffusers" not in path.read_text().replace("no diffusers", "")


def test_the_registry_finds_one_class_a_file():
    found = 0
    for kind in ("methods", "families", "attacks", "metrics"):
        for name in registry.names(kind):
            assert registry.get(kind, name).__module__ == f"expunge.{kind}.{name}"
            assert registry.describe(kind, name).endswith(".")
            found += 1
    assert found >= 2
