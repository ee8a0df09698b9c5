"""The miniature's CLIP: its loss, what it writes, and that a metric reads what was written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from training.miniature.clip import HEADS, ImageSide, matching, shown, write_clip
from training.miniature.recogniser import Names
from training.miniature.world import read_world


@pytest.fixture
def side() -> ImageSide:
    torch.manual_seed(0)
    return ImageSide(16, Names.of(read_world())).eval()


def test_pairs_of_one_content_count_neither_way() -> None:
    logits = torch.tensor([[2.0, 5.0, -3.0], [5.0, 2.0, -3.0], [-3.0, -3.0, 2.0]])
    loss, nearest = matching(logits, ["cat", "cat", "dog"])
    wrong, none = matching(logits, ["cat", "bird", "dog"])
    assert nearest == 1
    assert none < 1  # a cat and a bird are no equals
    assert loss < wrong
    assert loss == matching(logits.clone().fill_diagonal_(2.0), ["cat", "cat", "dog"])[0]


def test_what_stands_behind_a_thing_is_not_its_content() -> None:
    cat = {"things": [{"name": "cat"}], "artist": "", "background": "sky"}
    assert shown(cat) == shown(cat | {"background": "sea"})
    assert shown(cat) != shown(cat | {"artist": "Aurelo Devrault"})
    red, blue = ({"things": [{"name": "circle", "color": c}], "artist": ""} for c in ("red", "blue"))
    assert shown(red) != shown(blue)


def test_every_text_meets_every_image(side: ImageSide) -> None:
    logits, answers = side(torch.rand(3, 3, 64, 64), torch.randn(3, 16))
    assert logits.shape == (3, 3)
    assert {head: len(row) for head, row in answers.items()} == dict.fromkeys(HEADS, 3)


def test_transformers_reads_what_is_written(side: ImageSide, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = side.image(pixel_values=images).pooler_output
        write_clip(side, tmp_path)
        tower = CLIPVisionModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        after = tower(pixel_values=images).pooler_output
    assert torch.allclose(before, after, atol=2e-2)
    assert set(load_file(tmp_path / "projections.safetensors")) >= {
        "text_projection",
        "picture_projection",
    }
