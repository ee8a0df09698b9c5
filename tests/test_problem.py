"""Concepts, problems, probes and hyper-parameters, and what they refuse."""

import dataclasses

import pytest
import torch
from PIL import Image

from expunge import Concept, ExpungeError, Probe, Problem
from expunge.base.errors import UnknownNameError
from expunge.base.fields import build
from expunge.erasing.object_masks import masks_from_folder
from expunge.erasing.reference_images import Examples, find_folder
from expunge.evaluation.experiment import _problems
from expunge.methods.uce import UCE
from expunge.model import ANCHORS
from expunge.problem import KINDS, normalize_name


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
        (lambda: UCE(num_retain_words=1.5), "num_retain_words must be a whole number"),
        (lambda: UCE(num_retain_words=True), "num_retain_words must be a whole number"),
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
    assert "did you mean 'uce'" in str(UnknownNameError("method", "UEC", ["uce"]))
    assert "known: uce" in str(UnknownNameError("method", "zzzzzz", ["uce"]))
    assert "known: none" in str(UnknownNameError("method", "zzzzzz", []))


SAME = [
    ("T\u00fcrkiye", "Tu\u0308rkiye"),
    ("cat", "c\u200bat"),
    ("cat", "cat\ufeff"),
    ("cat", "\u2066cat\u2069"),
    ("cat", "ca\u00adt"),
    ("cat", "\uff23\uff21\uff34"),
    ("flag", "\ufb02ag"),
    ("cat face", "cat\u00a0face"),
    ("cat face", "cat\u3000 face"),
    ("\u2665", "\u2665\ufe0f"),
    ("Stra\u00dfe", "STRASSE"),
    ("C\u00f4te d'Ivoire", "co\u0302te d\u2019ivoire"),
    ("Guinea-Bissau", "guinea\u2010bissau"),
    ("Guinea-Bissau", "guinea\u2011bissau"),
    ("\u017f", "s"),
    ("\u03c3", "\u03c2"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_name_in_another_spelling_is_the_same(one, other):
    assert normalize_name(one) == normalize_name(other)
    for first, second in ((one, other), (other, one)):
        with pytest.raises(ExpungeError, match="both erased and retained"):
            Problem((Concept(first, ""),), (second,))
        with pytest.raises(ExpungeError, match="erased twice"):
            Problem((Concept(first, ""), Concept(second, "")))
        with pytest.raises(ExpungeError, match="the concept itself"):
            Concept(first, second)


def test_names_that_look_different_are_different():
    scotland, england = (
        "\U0001f3f4" + "".join(chr(0xE0000 + ord(c)) for c in t) for t in ("gbsct", "gbeng")
    )
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    names = [
        scotland,
        england,
        family,
        family.replace("\u200d", ""),
        "Turkiye",
        "T\u00fcrkiye",
        "cat",
        "ca t",
    ]
    assert len({normalize_name(name) for name in names}) == len(names)
    assert Concept(family).name == family
    assert Concept(scotland).name == scotland


def test_what_nobody_sees_is_not_erased():
    concept = Concept("Tu\u0308rkiye\u200b", synonyms=("\ufeffturkey",))
    assert concept.names == ("T\u00fcrkiye", "turkey")
    with pytest.raises(ExpungeError, match="needs a name"):
        Concept("\u200b\u2060")
    persian = "\u0645\u06cc\u200c\u062e"  # a joiner that shapes letters
    assert Concept(persian).name == persian


def test_a_folder_of_images_is_found_in_another_spelling(tmp_path):
    (tmp_path / "Tu\u0308rkiye").mkdir()
    (tmp_path / "Cat").mkdir()
    assert find_folder("T\u00fcrkiye", tmp_path) == tmp_path / "Tu\u0308rkiye"
    assert find_folder("cat", tmp_path) == tmp_path / "Cat"
    assert find_folder("dog", tmp_path) == tmp_path
    (tmp_path / "CAT").mkdir()
    assert find_folder("CAT", tmp_path) == tmp_path / "CAT"
    with pytest.raises(ExpungeError, match="several folders that are called 'cat': 'CAT', 'Cat'"):
        find_folder("cat", tmp_path)


def test_an_experiment_retains_no_other_spelling_of_what_it_erases():
    first, second = _problems(["T\u00fcrkiye", "cat"], ["Tu\u0308rkiye", "dog"], "object")
    assert first.retain == ("dog",)
    assert second.retain == ("T\u00fcrkiye", "dog")


def test_masks_are_read_as_masks(tmp_path):
    """What a mask leaves transparent is not the concept, and its name may be spelled otherwise."""
    for name, mode, colour in (("Tu\u0308r", "RGB", "white"), ("b", "RGB", "white")):
        Image.new(mode, (4, 4), colour).save(tmp_path / f"{name}.png")
    masks = tmp_path / "masks"
    masks.mkdir()
    cut_out = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    cut_out.paste((255, 255, 255, 255), (0, 0, 2, 4))
    cut_out.save(masks / "T\u00fcr.png")
    cut_out.save(masks / "b.PNG")
    files = tuple(str(tmp_path / f"{name}.png") for name in ("Tu\u0308r", "b"))
    examples = Examples("cat", "a cat", torch.zeros(2, 4, 2, 2), files)
    found = masks_from_folder(masks, None, examples)
    assert found.tolist() == [[[True, True, False, False]] * 4] * 2
