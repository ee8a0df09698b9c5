"""The miniature as it ships: whole, drawn from, judged, erased from, and plain about its gates."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

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
    assert (f"Not met: {'; '.join(failed)}." if failed else "Every gate is met.") in card.splitlines()


def test_the_main_job(tmp_path, capsys):
    """Fewer images than the demo draws, and the figures a little looser for it."""
    script = Path(__file__).parents[1] / "examples" / "forget_three.py"
    spec = importlib.util.spec_from_file_location("forget", script)
    example = sys.modules["forget"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = example.main(tmp_path, n=2)
    groups = example.groups_of(rows)
    assert len(groups["kept: objects"]) == 9
    for role in example.ERASED:
        assert example.mean(groups[role], "seen_before") > 0.7, role
        assert example.mean(groups[role], "seen_after") < 0.2, role
    for role in ("kept: objects", "kept: people", "kept: artists"):
        before, after = (example.mean(groups[role], f"seen_{when}") for when in ("before", "after"))
        assert before - 0.2 <= after > 0.4, role
    assert Image.open(tmp_path / "before-after.png").width > 1000
    text = (tmp_path / "index.html").read_text()
    assert not re.search(
        r'(src|href)="http', text
    )  # letters in a row prove nothing: images are in base64
    assert text.count("<img") == text.count("data:image/png") > 50
    assert "Jorvek Ambrask becomes 'a person'" in capsys.readouterr().out
