"""Plug-ins from other packages, methods that are registered nowhere, and suites from folders."""

import json
import sys
from dataclasses import dataclass

import pytest

import expunge
from expunge import Concept, Edit, ExpungeError, Problem
from expunge.base import registry
from expunge.base.errors import ExpungeWarning
from expunge.changes import LowRank
from expunge.checkpoints.loading import find_family
from expunge.cli.main import main
from expunge.method import Method

BLUR = '''"""Blur: take away what a layer makes of its first input."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.changes import LowRank
from expunge.method import Method


@dataclass(frozen=True)
class Blur(Method):
    """Blur."""

    citation: ClassVar[str] = "None."
    needs: ClassVar = {"blur": "cross-attention"}
    strength: float = 0.5
    """How much is taken."""

    @property
    def reads_anchor(self):
        return False

    def fit(self, model, problem, run):
        layer = model.text_entries()[0].layer
        out, width = model.weight(layer).shape
        return [LowRank((layer,), self.strength * torch.ones(out, 1), torch.ones(1, width))]
'''

METRIC = '''"""Brightness: the mean of all channels."""

from dataclasses import dataclass

from expunge.metric import Metric


@dataclass(frozen=True)
class Brightness(Metric):
    """Brightness."""

    higher_is_better = True
    share = True

    @property
    def provenance(self):
        return {"version": 1}

    def measure(self, images, prompts, references=None):
        return images.mean((1, 2, 3))[:, None]
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package: `package("name", {"file.py": text}, methods={"blur": "module:Blur"})`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def install(name, files, **groups):
        for file, text in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(text, encoding="utf-8")
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8"
        )
        lines = []
        for kind, points in groups.items():
            lines += [f"[expunge.{kind}]", *(f"{key} = {value}" for key, value in points.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        registry._read_entry_points.cache_clear()

    yield install
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(site)):
            del sys.modules[module]
    registry._read_entry_points.cache_clear()


@pytest.mark.parametrize("value", ["blurring.one:Blur", "blurring.one"])
def test_a_method_of_another_package_works_as_one_of_ours(package, folder, tmp_path, capsys, value):
    package("blur-pack", {"blurring/__init__.py": "", "blurring/one.py": BLUR}, methods={"blur": value})
    assert "blur" in registry.list_names("methods")
    assert registry.describe("methods", "blur") == (
        "Blur: take away what a layer makes of its first input. (blur-pack)"
    )
    heads, *rows = registry.tabulate_coverage()
    flux = next(row for row in rows if row[0] == "flux")
    assert flux[heads.index("blur")] == "without blur"
    assert "blurring.one" not in sys.modules  # listing imports nothing
    edit = str(tmp_path / "e.safetensors")
    erase = ("erase", "blur", "--concept", "airplane", "--strength", "0.25", "--model", str(folder))
    assert main([*erase, "-o", edit]) == 0
    loaded = Edit.load(edit)
    assert (loaded.record.method, loaded.record.fields) == ("blur", {"strength": 0.25})
    assert not loaded.record.reads_anchor  # as the plug-in answers
    assert float(loaded.changes[0].up[0, 0]) == 0.25
    assert main(["list", "methods"]) == 0
    assert "(blur-pack)" in capsys.readouterr().out
    assert main(["erase", "blurr", "--concept", "airplane", "-o", edit]) == 2
    assert "did you mean 'blur'?" in capsys.readouterr().err


def test_a_metric_of_another_package_is_found(package):
    package("bright", {"bright.py": METRIC}, metrics={"brightness": "bright:Brightness"})
    assert registry.get("metrics", "brightness")().provenance == {"version": 1}
    assert "brightness" not in registry.list_names("methods")


@pytest.mark.parametrize(
    ("files", "value", "reason"),
    [
        ({}, "nowhere.at_all:Blur", "ModuleNotFoundError: No module named 'nowhere'"),
        ({"broken.py": "1 / 0"}, "broken:Blur", "ZeroDivisionError: division by zero"),
        ({"broken.py": "import sys; sys.exit(3)"}, "broken:Blur", "SystemExit: 3"),
        ({"broken.py": "def f(:"}, "broken:Blur", "SyntaxError"),
        ({"broken.py": BLUR}, "broken:Blurr", "AttributeError"),
        ({"broken.py": BLUR}, "broken:torch", "broken:torch is not a Method"),
        ({"broken.py": "class Blur: pass"}, "broken:Blur", "broken:Blur is not a Method"),
        ({"broken.py": "x = 1"}, "broken", "broken must define one Method, not 0"),
        ({"broken.py": BLUR}, "bro ken!", "ModuleNotFoundError"),
    ],
)
def test_a_broken_plug_in_is_one_sentence_with_its_package(
    package, capsys, tmp_path, folder, files, value, reason
):
    package("bad-pack", files, methods={"blur": value})
    with pytest.raises(ExpungeError) as caught:
        registry.get("methods", "blur")
    message = str(caught.value)
    assert message.startswith("the method 'blur' of the package bad-pack is broken: ")
    assert reason in message
    assert "\n" not in message
    out = str(tmp_path / "e.safetensors")
    concept = ("--concept", "airplane=sky", "--model", str(folder), "-o", out)
    assert main(["erase", "blur", *concept]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["list", "methods"]) == 0  # it spoils nothing else
    assert "blur" in capsys.readouterr().out
    assert main(["erase", "uce", *concept]) == 0


def test_a_name_that_is_taken_is_refused(package):
    package("uce-pack", {"other.py": BLUR}, methods={"uce": "other:Blur"})
    with pytest.raises(ExpungeError, match="expunge and uce-pack each have a method named 'uce'"):
        registry.get("methods", "uce")
    assert "uce-pack" in registry.describe("methods", "uce")
    assert registry.get("methods", "esd").__name__ == "ESD"
    package("one", {"blur_one.py": BLUR}, methods={"blur": "blur_one:Blur"})
    package("two", {"blur_two.py": BLUR}, methods={"blur": "blur_two:Blur"})
    with pytest.raises(ExpungeError, match="(one and two|two and one) each have a method named 'blur'"):
        registry.get("methods", "blur")


def test_a_broken_family_leaves_the_others_alone(package):
    package("families", {}, families={"lost": "lost:Family", "sdxl": "lost:Family"})
    with pytest.warns(ExpungeWarning) as caught:
        found = find_family("StableDiffusionPipeline")
    assert found.__name__ == "StableDiffusion"
    told = [str(one.message) for one in caught]
    assert any("the family 'lost' of the package families is broken" in text for text in told)
    assert any("each have a family named 'sdxl'" in text for text in told)


@dataclass(frozen=True)
class Halve(Method):
    """A method that no package has."""

    citation = "None."
    strength: float = 0.5

    def fit(self, model, problem, run):
        entry = model.text_entries()[0].layer
        weight = model.weight(entry)
        return [LowRank((entry,), -self.strength * weight, torch_eye(weight.shape[1]))]


def torch_eye(width):
    import torch

    return torch.eye(width)


def test_a_method_of_a_script_is_recorded_under_its_own_name(model, tmp_path, monkeypatch):
    problem = Problem((Concept("airplane", "sky"),))
    for module in ("__main__", "ipykernel_launcher", Halve.__module__):
        monkeypatch.setattr(Halve, "__module__", module)
        edit = expunge.erase(model, problem, Halve(), work=tmp_path / "e.work")
        assert edit.record.method == "Halve"
    edit.save(tmp_path / "e.safetensors")
    monkeypatch.delattr(sys.modules[__name__], "Halve")
    loaded = Edit.load(tmp_path / "e.safetensors")
    assert (loaded.record.method, loaded.record.fields) == ("Halve", {"strength": 0.5})
    assert loaded.record.reads_anchor
    assert loaded.fits(model)


def test_a_method_of_a_script_does_not_take_a_plug_ins_name():
    uce = type("uce", (Halve,), {"__module__": "__main__", "__qualname__": "test_x.<locals>.uce"})
    assert registry.name_of("methods", uce) == "__main__.uce"
    assert registry.name_of("methods", registry.get("methods", "uce")) == "uce"
    assert registry.name_of("attacks", registry.get("attacks", "embedding")) == "embedding"


SUITE = """# My own concepts.
version = 1
[concepts]
airplane = {}
ship = {}
[templates]
erased = ["a {}"]
retained = ["a {}"]
[sizes.quick]
erased = 2
retained = 2
"""


def test_suites_of_a_folder(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "planes.toml").write_text(SUITE, encoding="utf-8")
    (mine / "known.toml").write_text('known_as = "planes"\n' + SUITE, encoding="utf-8")
    assert main(["list", "suites", "--include", "mine"]) == 0
    out = capsys.readouterr().out
    assert "planes" in out
    assert "My own concepts." in out
    assert main(["list", "suites"]) == 0
    assert "planes" not in capsys.readouterr().out  # for one command alone
    erase = ("erase", "uce", "--concept", "airplane=sky", "--model", str(folder))
    assert main([*erase, "-o", "e.safetensors"]) == 0
    judge = ("evaluate", "e.safetensors", "--suite", "known", "-o", "report", "--model", str(folder))
    assert main(judge) == 2
    assert "there is no suite 'known'" in capsys.readouterr().err
    assert main([*judge, "--include", "mine"]) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    assert [case["suite"]["name"] for case in results["cases"]] == ["known"]


def test_an_experiment_finds_the_suites_of_a_folder(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "planes.toml").write_text(SUITE, encoding="utf-8")
    (tmp_path / "table.toml").write_text(
        f'model = "{folder.as_posix()}"\nsuites = ["planes"]\nconcepts = ["airplane"]\n'
        '[[methods]]\nname = "uce"\n',
        encoding="utf-8",
    )
    assert main(["run", "table.toml"]) == 2
    assert "there is no suite 'planes'" in capsys.readouterr().err
    assert main(["run", "table.toml", "--include", "mine"]) == 0
    assert (tmp_path / "table" / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "cannot read the suites in"),
        ("empty", "holds no suite"),
        ("taken", "two suites are named 'object'"),
    ],
)
def test_a_folder_of_suites_that_cannot_be_used_is_one_sentence(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "object.toml").write_text(SUITE, encoding="utf-8")
    assert main(["list", "suites", "--include", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
