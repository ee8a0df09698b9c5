"""What the miniature's recogniser is taught, and what counts as right."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.miniature import broken
from training.miniature.artists import PALETTES, TECHNIQUES
from training.miniature.loop import write
from training.miniature.recogniser import Names, Recogniser, joined, keep, losses, spoil, truth_of
from training.miniature.world import read_world

WORLD = read_world()
NAMES = Names.of(WORLD)
PERSON, ARTIST = WORLD.named[3], WORLD.artists[5]
SCENES = [
    {
        "things": [
            {"kind": "object", "name": "cat", "style": "twemoji"},
            {"kind": "person", "name": PERSON.name, "person": 3},
        ],
        "artist": ARTIST.name,
    },
    {"things": [{"kind": "person", "name": "", "person": 250}], "artist": ""},
    {"things": [{"kind": "shape", "name": "heart", "color": "red"}], "artist": ""},
]


def test_what_is_true_of_a_scene() -> None:
    truth = truth_of(SCENES, WORLD, NAMES)
    assert [NAMES.things[k] for k in truth["things"][0].nonzero()[:, 0]] == ["cat"]
    assert [NAMES.people[k] for k in truth["people"][0].nonzero()[:, 0]] == [PERSON.name]
    assert [NAMES.things[k] for k in truth["things"][2].nonzero()[:, 0]] == ["heart"]
    assert truth["people"][1].sum() == 0
    assert truth["face"][:, 0].tolist() == [1, 1, 0]
    assert [NAMES.palettes[k] for k in truth["palette"]] == [ARTIST.palette, "none", "none"]
    assert [NAMES.techniques[k] for k in truth["technique"]] == [ARTIST.technique, "none", "none"]
    assert truth["styles"].sum(1).tolist() == [1, 0, 0]
    assert truth["palette"][1] == len(PALETTES)
    assert truth["technique"][1] == len(TECHNIQUES)


def test_nothing_is_in_a_broken_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(24, 3, 64, 64)
    before = images.clone()
    truth = spoil(images, truth_of(SCENES * 8, WORLD, NAMES))
    assert truth["broken"].tolist() == [[1]] * 24
    assert truth["things"].sum() == truth["people"].sum() == truth["face"].sum() == 0
    assert ((images - before).abs().amax((1, 2, 3)) > 0.05).all()
    assert images.min() >= -1e-5
    assert images.max() <= 1 + 1e-5


def test_a_broken_images_artist_does_not_count() -> None:
    truth = truth_of(SCENES, WORLD, NAMES)
    right = {head: torch.full((3, size), -30.0) for head, size in NAMES.sizes.items()}
    for head in ("things", "people", "styles", "face"):
        right[head] = 60 * truth[head] - 30
    for head in ("palette", "technique"):
        right[head] = right[head].scatter(1, truth[head][:, None], 30.0)
    assert sum(losses(right, truth).values()) < 1e-6
    wrong = right | {"palette": -right["palette"]}
    assert losses(wrong, truth)["palette"] > 1
    truth["broken"][:] = 1
    assert losses(wrong, truth)["palette"] == 0
    assert losses(wrong, truth)["broken"] > 1


def test_every_head_answers() -> None:
    net = Recogniser(NAMES.sizes, (8, 8, 16, 16)).eval()
    with torch.no_grad():
        answers = net(torch.rand(2, 3, 64, 64))
    assert {head: answer.shape[1] for head, answer in answers.items()} == NAMES.sizes
    both = joined([truth_of(SCENES[:1], WORLD, NAMES), truth_of(SCENES[1:], WORLD, NAMES)])
    for head, value in truth_of(SCENES, WORLD, NAMES).items():
        assert torch.equal(both[head], value)


def test_wear_changes_little_and_breaking_much() -> None:
    torch.manual_seed(1)
    image = torch.zeros(8, 3, 64, 64)
    image[:, 0, 16:48, 16:48] = 1
    assert (broken.weather(image) - image).abs().mean() < 0.1
    assert (broken.muddle(torch.randn(8, 4, 16, 16)).std() - 1).abs() < 0.5


def test_what_is_kept_can_be_begun_with(tmp_path: Path) -> None:
    net = Recogniser(NAMES.sizes)
    average = net.state_dict()
    write({"average": average, "step": 7, "spent": 60.0}, tmp_path / "recogniser.pt")
    keep(tmp_path, "recogniser", tmp_path / "kept")
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    other = Recogniser(NAMES.sizes)
    other.load_state_dict(weights)
    for key, value in other.state_dict().items():
        assert torch.allclose(value, average[key], rtol=1e-3, atol=1e-6), key
    with pytest.raises(SystemExit, match=r"There is no .*other\.pt"):
        keep(tmp_path, "other", tmp_path / "kept")
