"""The model that ships: loaded, drawn, erased from, end to end."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import expunge
from expunge import Concept, Probe, Problem
from expunge.base import files
from expunge.cli.main import main

HERE = Path(__file__).parents[1]
FOLDER = Path(expunge.__file__).parent / "emoji" / "pipeline"


@pytest.fixture(scope="module")
def emoji():
    return expunge.load("emoji")


@pytest.fixture(scope="module")
def detector():
    from expunge.emoji.detector import Detector

    return Detector.load()


def test_is_listed(capsys):
    assert main(["list", "models"]) == 0
    assert "emoji" in capsys.readouterr().out


def test_is_an_ordinary_diffusers_folder(emoji):
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    probe = Probe.of("a photo of the cat", num_inference_steps=3, guidance_scale=4.0)
    image = pipe(
        "a photo of the cat",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close(emoji.draw(probe), image, rtol=0, atol=1e-3)


def test_weights_are_small_and_whole():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 72e6
    assert max(sizes) <= 16 * 2**20
    files.check_weights(FOLDER)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_copy_is_one_sentence(damage, tmp_path, monkeypatch, capsys):
    shutil.copytree(FOLDER, tmp_path / "emoji" / "pipeline")
    shard = max((tmp_path / "emoji").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    monkeypatch.setattr("expunge.base.registry.HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["draw", "a cat", "--model", "emoji", "-o", "cat.png"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert shard.name in err
    assert not (tmp_path / "cat.png").exists()


def test_erases_the_airplane_and_keeps_the_others(emoji, detector):
    problem = Problem((Concept("airplane"),), ("bird", "cat", "dog", "horse"))
    edit = expunge.erase(emoji, problem)
    probe = Probe.of(["a photo of the airplane", "a photo of the cat", "a photo of the dog"], n=6)
    before = detector(emoji.draw(probe)).top()
    with emoji.using(edit):
        after = detector(emoji.draw(probe)).top()
    assert before[:6].count("airplane") >= 5  # the detector does see it before
    assert after[:6].count("airplane") <= 1
    for word, start in (("cat", 6), ("dog", 12)):
        kept = [a == b for a, b in zip(after, before, strict=True)][start : start + 6]
        assert before[start : start + 6].count(word) >= 4
        assert sum(kept) >= 4
