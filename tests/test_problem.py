"""Concepts, problems, probes and hyper-parameters, and what they refuse."""

import dataclasses

import pytest

from expunge import Concept, ExpungeError, Probe, Problem
from expunge.errors import unknown
from expunge.fields import build
from expunge.methods.uce import UCE
from expunge.model import ANCHORS
from expunge.problem import KINDS


def test_overlaps_are_of_whole_words():
    problem = Problem(
        (
            Concept("cat", synonyms=("kitty cat",)),
            Concept("Cat face"),
            Concept("Guinea", kind="identity"),
            Concept("♥"),
        ),
        ("flag of equatorial guinea", "caterpillar", "face", "a face, of a cat", "♥ and ♠"),
    )
    assert problem.overlaps() == [
        ("cat", "Cat face"),
        ("cat", "a face, of a cat"),
        ("Cat face", "a face, of a cat"),
        ("Guinea", "flag of equatorial guinea"),
    ]
    assert Problem((Concept("cat"),), ("dog",)).overlaps() == []


def test_parse():
    assert Concept.parse("airplane") == Concept("airplane")
    assert Concept.parse("airplane=") == Concept("airplane", "")
    assert Concept.parse(" airplane | aircraft = the sky ", "style") == Concept(
        "airplane", "the sky", "style", ("aircraft",)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concept(""), "name"),
        (lambda: Concept("  "), "name"),
        (lambda: Concept("cat", synonyms=("",)), "name"),
        (lambda: Concept("cat", kind="objct"), "did you mean 'object'"),
        (lambda: Concept(3), "name must be text, not 3"),
        (lambda: Concept("cat", "Cat"), "anchor .* is the concept itself"),
        (lambda: Problem(()), "no concept"),
        (lambda: Problem((Concept("cat"), Concept("CAT"))), "erased twice"),
        (lambda: Problem((Concept("cat"),), ("a dog", "Cat ")), "both erased and retained"),
        (lambda: Problem((Concept("cat", synonyms=("kitty",)),), ("kitty",)), "both erased"),
        (lambda: Problem((Concept("cat"),), ("",)), "empty"),
        (lambda: Problem((Concept("cat"),), "dog"), "list of prompts"),
        (lambda: Probe((), ()), "at least one"),
        (lambda: Probe(("a",), (1, 2)), "1 prompts has 2 seeds"),
        (lambda: Probe(("a",), (-1,)), "seed"),
        (lambda: Probe.of("a", n=0), "at least 1"),
        (lambda: Probe.of("a", num_inference_steps=0), "num_inference_steps"),
        (lambda: Probe.of("a", guidance_scale=float("nan")), "guidance_scale"),
        (lambda: UCE(ridge=0), "ridge must be above 0, not 0"),
        (lambda: UCE(ridge="x"), "ridge must be a number, not 'x'"),
        (lambda: UCE(ridge=float("inf")), "ridge must be finite"),
        (lambda: UCE(general=1.5), "general must be a whole number"),
        (lambda: UCE(general=True), "general must be a whole number"),
        (lambda: UCE(positions="lst"), "did you mean 'last'"),
        (lambda: UCE(templates=("no place",)), "template"),
        (lambda: UCE(templates="a {}"), "templates must be a list of text"),
        (lambda: build(UCE, {"rigde": 1}), "no field 'rigde'; did you mean 'ridge'"),
        (lambda: build(UCE, {"zzz": 1}), "it has ridge, "),
    ],
)
def test_refused(make, message):
    with pytest.raises(ExpungeError, match=message):
        make()


def test_fields_fit_what_files_and_terminals_give():
    method = build(UCE, {"ridge": 1, "templates": ["a {}"]})
    assert (method.ridge, method.templates) == (1.0, ("a {}",))
    assert isinstance(method.ridge, float)


def test_open_anchors_are_chosen_by_kind():
    problem = Problem(tuple(Concept(f"x{i}", kind=kind) for i, kind in enumerate(KINDS)))
    assert [c.anchor for c in problem.with_anchors(ANCHORS).erase] == [ANCHORS[k] for k in KINDS]
    given = Problem((Concept("airplane", ""), Concept("sky")))
    assert [c.anchor for c in given.with_anchors(ANCHORS).erase] == ["", ""]


def test_a_problem_survives_json():
    problem = Problem((Concept("a", "b", "style", ("c",)), Concept("d")), ("e",))
    assert Problem.from_dict(dataclasses.asdict(problem)) == problem


def test_a_probe_gives_every_prompt_the_same_seeds():
    probe = Probe.of(["a", "b"], n=2, seed=5)
    assert (probe.prompts, probe.seeds) == (("a", "a", "b", "b"), (5, 6, 5, 6))
    assert len(probe) == 4


def test_an_unknown_name_is_a_conversation():
    assert "did you mean 'uce'" in str(unknown("method", "UEC", ["uce"]))
    assert "known: uce" in str(unknown("method", "zzzzzz", ["uce"]))
    assert "known: none" in str(unknown("method", "zzzzzz", []))
