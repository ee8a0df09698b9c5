"""A command that is killed, and given again: a real process, a real SIGKILL, a method dropped in."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import expunge
from expunge import Concept, Edit, Problem
from expunge.base import registry
from expunge.cli.main import main

SLOW = '''
"""Slow: one random low-rank change a concept, half a second each."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.changes import LowRank
from expunge.base.fields import bounded
from expunge.method import Method


@dataclass(frozen=True)
class Slow(Method):
    """Source: none."""

    citation: ClassVar[str] = "None."
    strength: float = bounded(1.0, at_least=0)
    pause: float = bounded(0.5, at_least=0)

    def fit(self, model, problem, run):
        layer = model.text_entries()[0].layer
        shape = model.weight(layer).shape

        def make(names):
            time.sleep(self.pause)
            made = {}
            for name in names:
                g = run.generator(name)
                up, down = (torch.randn(n, 1, generator=g) for n in shape)
                made[name] = {"up": self.strength * up, "down": down.T}
            return made

        made = run.map_cached(make, [c.name for c in problem.erase], batch_size=2, label="concepts")
        return [LowRank((layer,), **tensors) for tensors in made.values()]
'''

NAMES = ["airplane", "ship", "bird", "cat", "dog", "frog", "horse", "truck"]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package with one more method in its folder, to be put first on the path."""
    root = tmp_path_factory.mktemp("package")
    source = Path(expunge.__file__).parent
    (root / "expunge" / "methods").mkdir(parents=True)
    for inside in ("", "methods"):
        for path in (source / inside).iterdir():
            if path.name not in ("methods", "__pycache__"):
                (root / "expunge" / inside / path.name).symlink_to(path)
    (root / "expunge" / "methods" / "slow.py").write_text(textwrap.dedent(SLOW))
    return root


def arguments(method, folder, *options):
    """What `expunge` is given: erase METHOD … on the tiny model."""
    named = [part for name in NAMES for part in ("--concept", f"{name}=sky")]
    return ["erase", method, *named, *options, "--model", str(folder), "-o", "e.safetensors"]


@pytest.fixture
def command(package, folder, tmp_path):
    """Starts `expunge erase METHOD …` in an empty folder."""

    def start(method, *options):
        return subprocess.Popen(
            [sys.executable, "-m", "expunge", *arguments(method, folder, *options)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def kill_with_pieces(process, folder: Path, least: int) -> None:
    """SIGKILL as soon as so many pieces are kept."""
    while process.poll() is None and len(list(folder.rglob("[!.]*.safetensors"))) < least:
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err


MACE = {
    "batch_size": 2,
    "num_images": 1,
    "num_inference_steps": 2,
    "max_train_steps": 30,
    "masks": "none",
    "learning_rate": 0.01,
}


# Another method is tried by one more row here: its name, and fields that make it quick.
@pytest.mark.parametrize(("method", "fields"), [("slow", {"strength": 0.5}), ("mace", MACE)])
def test_killed_and_given_again(command, folder, tmp_path, package, method, fields, monkeypatch, capsys):
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    work = tmp_path / "e.safetensors.work"
    kill_with_pieces(command(method, *options), work, 3)
    assert not (tmp_path / "e.safetensors").exists()
    kept = len(list(work.rglob("[!.]*.safetensors")))
    assert 3 <= kept < len(NAMES)

    monkeypatch.setattr(registry, "HERE", package / "expunge")
    monkeypatch.setattr("expunge.methods.__path__", [str(package / "expunge" / "methods")])
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(method, folder, *options), "--seed", "1"]) == 2
    said = "made by another command (other seed); delete it, or choose another output"
    assert said in capsys.readouterr().err

    again = command(method, *options)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert all(" % done" in line and "about " in line for line in err.splitlines()), (
        err
    )  # progress alone
    assert f"{kept // 2 * 2} of {len(NAMES)} were finished before" in out
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

    # Never killed, nothing kept. Of the same files: elsewhere in memory, sums may differ in a last bit.
    problem = Problem(tuple(Concept(name, "sky") for name in NAMES))
    model, erases = expunge.load(folder), registry.get("methods", method)(**fields)
    whole = expunge.erase(model, problem, erases)
    assert Edit.load(tmp_path / "e.safetensors").hash == whole.hash
