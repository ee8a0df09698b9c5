"""The miniature as it ships: whole, drawn from, judged, erased from, and plain about its gates."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import expunge
from expunge import Concept, Probe, Problem
from expunge.base import files
from expunge.miniature import recogniser
from expunge.miniature.recogniser import Recogniser

FOLDER = Path(recogniser.__file__).parent
WORDS = ("airplane", "frog", "truck", "ship")


@pytest.fixture(scope="module")
def miniature():
    return expunge.load("miniature")


@pytest.fixture(scope="module")
def judge():
    return Recogniser.load()


def test_weights_are_small_and_whole():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 110e6
    assert max(sizes) <= 16 * 2**20
    files.check_weights(FOLDER / "pipeline")


def test_is_an_ordinary_diffusers_folder(miniature):
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    made = torch.Generator().manual_seed(0)
    image = pipe("a photo of the frog", generator=made, output_type="pt", **settings).images
    drawn = miniature.draw(Probe.of("a photo of the frog", **settings))
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-3)


def test_erases_the_frog_and_keeps_the_others(miniature, judge):
    problem = Problem((Concept("frog"),), ("airplane", "truck", "ship"))
    edit = expunge.erase(miniature, problem)
    probe = Probe.of([f"a photo of the {word}" for word in WORDS], n=4)
    wanted = [word for word in WORDS for _ in range(4)]
    before = judge(miniature.draw(probe)).top("things")
    with miniature.using(edit):
        after = judge(miniature.draw(probe)).top("things")
    frogs = [at for at, word in enumerate(wanted) if word == "frog"]
    others = [at for at, word in enumerate(wanted) if word != "frog"]
    assert sum(before[at] == "frog" for at in frogs) >= 3  # the judge does see it before
    assert sum(after[at] == "frog" for at in frogs) <= 1
    right = sum(before[at] == wanted[at] for at in others)
    assert right >= 8
    assert sum(after[at] == wanted[at] for at in others) >= right - 3


def test_the_card_names_the_gates_that_are_not_met():
    gates = json.loads((FOLDER / "gates.json").read_text(encoding="utf-8"))["gates"]
    failed = [row["gate"] for row in gates if row["least"] is not None and row["value"] < row["least"]]
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert (f"Not met: {', '.join(failed)}." if failed else "Every gate is met.") in card.splitlines()
