"""What MACE's presets leave of everything else, by their first stage alone, on the emoji model."""

import pytest
import torch

import expunge
from expunge import Concept, Probe, Problem
from expunge.emoji.detector import Detector
from expunge.methods.mace import MACE
from expunge.methods.mace.settings import COCO

WORDS = "pizza penguin guitar crown strawberry mushroom turtle owl bell balloon bicycle elephant".split()
STEPS = 6

FLAGS = [Concept(f"flag of {name}", "a flag", "identity") for name in ("France", "Italy", "Nepal")]
KEPT = tuple(f"flag of {name}" for name in ("Germany", "Spain", "Chile", "India"))
WEAPONS = tuple(Concept(name, "ground", "explicit") for name in ("pistol", "knife", "bomb"))
PLANE = (Concept("airplane", "sky"),)
PROBLEMS = {
    "object": Problem(PLANE),  # without a prior, so that nothing is retained by name
    "emoji": Problem(PLANE, ("bird", "ship")),
    "miniature": Problem(PLANE, ("bird", "ship")),
    "miniature-object": Problem(PLANE, ("bird", "ship")),
    "miniature-explicit": Problem(WEAPONS),
    "miniature-10": Problem(PLANE, ("bird", "ship")),
    "miniature-100": Problem(PLANE, ("bird", "ship")),
    "identity-1": Problem(tuple(FLAGS[:1]), KEPT),
    "identity-5": Problem(tuple(FLAGS[:2]), KEPT),
    "identity-10": Problem(tuple(FLAGS), KEPT),
    "identity-100": Problem(tuple(FLAGS), KEPT),
    "style": Problem((Concept("twemoji", "art", "style"),), ("noto", "fluent")),
    "explicit": Problem(WEAPONS),
}


@pytest.fixture(scope="module")
def shipped():
    return expunge.load("emoji")


@pytest.fixture(scope="module")
def drawn_right(shipped):
    """How sure the detector is, on average, of words that no problem names, with an edit on."""
    detector = Detector.load()
    probe = Probe(tuple(f"a photo of the {word}" for word in WORDS), tuple(range(len(WORDS))), STEPS)
    places = [detector.label_names.index(word) for word in WORDS]

    def measure(*edits):
        with shipped.using(*edits):
            labels = detector(shipped.draw(probe)).labels
        return float(labels[torch.arange(len(WORDS)), places].mean())

    return measure


@pytest.fixture(scope="module")
def before(drawn_right):
    return drawn_right()


def refined(model, name, **fields):
    """The first stage alone of a preset."""
    return expunge.erase(model, PROBLEMS[name], MACE.preset(name, stages=("refine",), **fields))


def test_every_preset_has_a_problem(before):
    assert set(PROBLEMS) == set(MACE.presets)
    assert before > 0.8  # the words are drawn to begin with


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_first_stage_alone_leaves_unrelated_prompts(shipped, drawn_right, before, name):
    assert drawn_right(refined(shipped, name)) > 0.95 * before


def test_the_square_of_the_scale_does_not(shipped, drawn_right, before):
    """As released, and without a floor: this is what a scale that counts twice does."""
    square = refined(shipped, "identity-10", refine_scale="as-released", ridge_floor=0.0)
    assert drawn_right(square) < 0.5 * before


def test_the_square_is_that_of_the_scale_of_a_sum():
    for name, scale in (("identity-5", 1e-4), ("explicit", 7e-7)):
        once, square = (MACE.preset(name, refine_scale=one) for one in ("once", "as-released"))
        assert once.refine_weight == pytest.approx(scale * COCO)
        assert square.refine_weight == pytest.approx(scale**2 * COCO)
        assert square.fuse_prior == once.fuse_prior == pytest.approx(scale * COCO)
