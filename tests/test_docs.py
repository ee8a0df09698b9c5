"""Every command and code block of the README and the docs runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

import expunge
from conftest import tiny_pipeline, weights
from expunge import Concept, Problem
from expunge.base import registry
from expunge.checkpoints.export import export
from expunge.cli.main import main
from expunge.method import Method
from tiny import single_file

HERE = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (HERE / file).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def notes(err: str) -> list[str]:
    """What was said beside progress, of which a slow machine says more."""
    return [line for line in err.splitlines() if "% done" not in line]


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = "".join(blocks("README.md", "bash")).splitlines()
    assert len(commands) >= 5
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "expunge"
        assert main(arguments) == 0, command
    out, err = capsys.readouterr()
    assert not notes(err)
    assert "airplane" in out
    made = {path.name for path in tmp_path.iterdir()}
    wanted = {"cats.png", "no-airplane.safetensors", "after.png", "mace.safetensors"}
    assert made == wanted | {"no-airplane-lora.safetensors", "no-airplane-lora.md"}


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks("README.md", "python")
    assert len(found) >= 2
    for block in found:
        exec(block, names)
    assert names["pictures"].shape == (4, 3, 64, 64)


def test_use_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("docs/use-elsewhere.md", "bash")
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "expunge"
        assert main(arguments) == 0, command
    out, err = capsys.readouterr()
    assert not notes(err)
    for said in (
        "memory: ",
        "in all 513 prompts: about",
        "rank 32",
        "of their norm is lost, but",
        "of the erasure and",
        "For emoji alone, which is built like Stable Diffusion 1.x but smaller: diffusers loads it.",
        "airplane (becomes 'sky') by uce",
        "airplane back",
    ):
        assert said in out
    (block,) = blocks("docs/use-elsewhere.md", "python")
    names: dict = {}
    exec(block, names)
    assert names["image"].size == (64, 64)


def test_use_elsewhere_with_a_file_of_ones_own(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    single_file(tiny_pipeline(), "dream.safetensors")
    shutil.copytree(folder, "stable-diffusion-v1-5")
    edit = expunge.erase(expunge.load(folder), Problem((Concept("ship", "sky"),)))
    export(edit, "kohya", folder, "style.safetensors")
    before = {path: Path(path).read_bytes() for path in ("dream.safetensors", "style.safetensors")}
    commands = "".join(blocks("docs/use-elsewhere.md", "sh")).replace("\\\n", "").splitlines()
    assert len(commands) >= 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "expunge"
        assert main(arguments) == 0, (command, capsys.readouterr().err)
    assert {path: Path(path).read_bytes() for path in before} == before
    assert "Van Gogh (becomes 'art') by uce" in capsys.readouterr().out


def test_use_elsewhere_with_peft(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model = expunge.load("emoji")
    method = registry.get("methods", "uce")(general=5)
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)
    export(edit, "lora", "emoji", "no-airplane-lora.safetensors")
    (block,) = blocks("docs/use-elsewhere.md", "py")
    names: dict = {"DiffusionPipeline": DiffusionPipeline}
    exec(block.replace("OWNER/MODEL", str(registry.HERE / "emoji" / "pipeline")), names)
    assert any("lora" in name for name, _ in names["pipe"].unet.named_parameters())


def test_judging(tmp_path):
    (block,) = blocks("docs/judging.md", "python")
    names: dict = {}
    exec(block, names)
    assert {"erased", "synonyms", "retained"} <= set(names["prompts"])
    suite, table = blocks("docs/judging.md", "toml")
    (tmp_path / "own.toml").write_text(suite)
    assert [c.name for c in names["Suite"].read(tmp_path / "own.toml").concepts] == [
        "cat",
        "dog",
        "horse",
    ]
    (tmp_path / "table.toml").write_text(table)
    from expunge.evaluation.experiment import Experiment

    assert len(Experiment.read(tmp_path / "table.toml").jobs()) == 9
    schema = (HERE / "docs" / "judging.md").read_text().partition("## results.json")[2]
    for key in ("provenance", "cases", "methods", "left out", "differences", "larger than chance"):
        assert f"`{key}`" in schema or f".{key}" in schema or f"[].{key}" in schema


def test_extending(model, problem, tmp_path):
    (block,) = blocks("docs/extending.md", "python")
    names: dict = {"__name__": "dim"}
    exec(block, names)
    method = names["Dim"]()
    assert isinstance(method, Method)
    edit = expunge.erase(model, problem, method)
    edit.apply(model).remove()
    assert len(edit.changes) == 14
    # Saved and loaded it does the same, and it keeps what every method promises.
    edit.save(tmp_path / "dim.safetensors")
    again = expunge.Edit.load(tmp_path / "dim.safetensors")
    assert again.hash == edit.hash
    assert again.record.fields == edit.record.fields
    assert again.fits(model)
    assert expunge.erase(model, problem, method).hash == edit.hash
    before = weights(model.pipe)
    with again.apply(model):
        after = weights(model.pipe)
    changed = {key for key in before if not before[key].equal(after[key])}
    assert changed == {f"{layer}.weight" for change in edit.changes for layer in change.layers}
    assert all(tensor.equal(before[key]) for key, tensor in weights(model.pipe).items())


def test_make_targets_are_there():
    named = set(re.findall(r"make ([a-z]+)", (HERE / "README.md").read_text()))
    assert {"demo", "test", "check"} <= named
    for target in named:
        assert re.search(rf"^{target}:", (HERE / "Makefile").read_text(), re.MULTILINE)
