"""The gates of the miniature's text tower and denoiser: their prompts, and what counts as right."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.miniature.captions import is_held_out
from training.miniature.gates import all_there, artist, clean, gates_of, states_for, thing
from training.miniature.gates_tower import States, behind, cases_of, sentence, undone
from training.miniature.recogniser import Names
from training.miniature.sentences import lexicon_of
from training.miniature.world import read_world

WORLD = read_world()
NAMES = Names.of(WORLD)
LEXICON = lexicon_of(WORLD)


def test_every_concept_is_asked_for_in_a_phrasing_nobody_trained() -> None:
    cases = cases_of(WORLD, LEXICON)
    wanted = {c for c in LEXICON.vocabulary.names if c.split(":")[0] in ("object", "person", "artist")}
    assert {case.concept for case in cases} == wanted
    for case in cases:
        assert is_held_out(case.text), case.text
        assert case.words in case.text
        assert case.anchor in case.anchored
        assert case.concept in LEXICON.read(case.text).facts


@pytest.mark.parametrize(
    ("template", "kind", "words", "wanted"),
    [
        ("view of {}", "object", "axe", "view of an axe"),
        ("photo of the {}", "object", "axe", "photo of the axe"),
        ("portrait of {}", "person", "Ada Lum", "portrait of Ada Lum"),
    ],
)
def test_an_object_gets_an_article(template: str, kind: str, words: str, wanted: str) -> None:
    assert sentence(template, kind, words, "") == wanted


def states(word: Tensor, end: Tensor) -> States:
    """Two sentences each: the word at 1, a word behind at 2, end at 3, the rest padding like the end."""
    anchored = torch.ones(len(word), 77, 4)
    named = anchored.clone()
    named[:, 1] += word
    named[:, 3:] += end[:, None]
    place = torch.ones(2, len(word), dtype=torch.long)
    return States(named, anchored, place, 3 * place)


def test_a_matrix_fitted_on_the_end_undoes_a_word_that_points_the_same_way() -> None:
    one, other = torch.eye(4)[[0, 0]], torch.eye(4)[[1, 1]]
    assert undone(states(one, one), ridge=1e-4) > 0.9
    assert abs(undone(states(one, other), ridge=1e-4)) < 0.35


def test_words_behind_are_measured_by_their_norm() -> None:
    found = states(torch.zeros(2, 4), torch.zeros(2, 4))
    found.named[:, 2] += torch.tensor([3.0, 0, 0, 0])
    moved = found.named[0, 2]
    assert behind(found) == pytest.approx(3 / float(moved.norm()))


class Fake:
    empty = torch.zeros(77, 2)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.ones(len(prompts), 77, 2), torch.tensor([5] * len(prompts))


def test_a_prompts_words_and_its_tail_add_up_to_it() -> None:
    words: Any = Fake()
    word, tail = (states_for(words, ["a"], part)[0, :, 0] for part in ("word", "tail"))
    assert word.tolist() == [1] * 5 + [0] * 72
    assert (word + tail).tolist() == states_for(words, ["a"], "")[0, :, 0].tolist()


def test_the_denoisers_gates_use_phrasings_nobody_trained() -> None:
    gates = {gate.name: gate for gate in gates_of(WORLD, 12)}
    assert len(gates) == 19
    for name in ("ten words", "people", "artists", "synonyms", "unsafe, named"):
        assert all(is_held_out(case.prompt) for case in gates[name].cases), name
    known = {label.name for label in WORLD.labels}
    assert all(set(case.wanted) <= known for case in gates["two things"].cases)


def test_what_counts_as_right() -> None:
    def seen(**best: Any) -> dict[str, Tensor]:
        answers = {head: torch.full((size,), -5.0) for head, size in NAMES.sizes.items()}
        for head, chosen in best.items():
            for value, k in zip((5.0, 4.0), chosen, strict=False):
                answers[head][k] = value
        return answers

    def case(*wanted: str) -> Any:
        return SimpleNamespace(prompt="", wanted=wanted)

    first, second, third = NAMES.things[:3]
    rng = random.Random(0)
    one = WORLD.artists[rng.randrange(len(WORLD.artists))]
    traits = {
        "palette": [NAMES.palettes.index(one.palette)],
        "technique": [NAMES.techniques.index(one.technique)],
    }
    assert thing(case(first), seen(things=[0]), NAMES)
    assert not thing(case(second), seen(things=[0]), NAMES)
    assert all_there(case(first, second), seen(things=[1, 0]), NAMES)
    assert not all_there(case(first, third), seen(things=[1, 0]), NAMES)
    assert artist(case(one.palette, one.technique), seen(**traits), NAMES)
    assert not artist(case("none", one.technique), seen(**traits), NAMES)
    assert clean(case(), seen(), NAMES)
    assert not clean(case(), seen(things=[0]), NAMES)
