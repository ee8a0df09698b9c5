"""Erasing one after another, and taking one concept out of many again."""

import dataclasses

import pytest
import torch

import expunge
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Problem
from expunge.checkpoints.merge import merge
from expunge.cli.main import main
from expunge.erasure import restore_concept
from quick import quick

CLOSED = ("uce", "rece", "speed", "oce", "double_projections")
FIRST = Problem((Concept("airplane", "sky"), Concept("truck", "street")), ("ship",))
SECOND = Problem((Concept("cat", "ground"),), ("horse",))

pytestmark = pytest.mark.filterwarnings("ignore:names that share words")


def closed(name):
    """A closed form, with few words and, where it has one, some weight on what is retained."""
    few = {"speed": {"num_retain_words": 30}, "oce": {"captions": ""}}.get(
        name, {"num_retain_words": 30}
    )
    return quick(name, **few)


@torch.no_grad()
def sent(model, prompts, *edits):
    """Where every text entry sends the last tokens of prompts."""
    text = model.encode(prompts)
    e = text.embeddings[torch.arange(len(text)), text.content_mask.sum(1)].double()
    with model.using(*edits):
        return torch.cat([e @ model.weight(x.layer).double().T for x in model.text_entries()], 1)


def came_back(model, first, after, names):
    """The share of the way back from where the first edit sends names to where they went before it."""
    there, erased, now = (sent(model, names, *edits) for edits in ((), (first,), (after,)))
    back = there - erased
    return float((((now - erased) * back).sum(1) / back.square().sum(1)).max())


@pytest.mark.parametrize("name", CLOSED)
def test_what_was_erased_does_not_come_back(wide, name):
    method = closed(name)
    first = expunge.erase(wide, FIRST, method)
    second = expunge.erase(wide, SECOND, method, onto=first)
    names = ["airplane", "truck"]
    # RECE also looks for what its second refit leaves, and so moves more.
    assert came_back(wide, first, second, names) < (0.08 if name == "rece" else 0.02)
    # The new concept goes, about as it would alone.
    alone = expunge.erase(wide, SECOND, method)
    moved = [(sent(wide, ["cat"], e) - sent(wide, ["cat"])).norm() for e in (second, alone)]
    assert moved[0] > 0.5 * moved[1]
    # What the first retains stays.
    ship = sent(wide, ["ship"], first)
    assert (sent(wide, ["ship"], second) - ship).norm() < 0.1 * ship.norm()


def test_without_the_constraints_it_would(wide):
    """The same second problem, solved on the edited model and told nothing of the first."""
    method = closed("uce").replace(ridge=1.0, num_retain_words=0)
    close = Problem((Concept("jet", "ground"),))
    first = expunge.erase(wide, FIRST, method)
    with wide.using(first):
        told_nothing = expunge.erase(wide, close, method)
    stacked = Edit((*first.changes, *told_nothing.changes), first.record)
    kept = expunge.erase(wide, close, method, onto=first)
    names = ["airplane", "truck"]
    assert came_back(wide, first, kept, names) < 0.5 * came_back(wide, first, stacked, names)


def test_the_record_tells_of_both(wide, tmp_path):
    first = expunge.erase(wide, FIRST, closed("uce"))
    second = expunge.erase(wide, SECOND, closed("speed"), onto=first)
    second.save(tmp_path / "both.safetensors")
    again = Edit.load(tmp_path / "both.safetensors")
    assert again.hash == second.hash
    assert [c.name for c in again.record.problem.erase] == ["airplane", "truck", "cat"]
    assert again.record.problem.retain == ("ship", "horse")
    assert again.record.onto == dataclasses.replace(first.record, fields=again.record.onto.fields)
    assert again.record.onto_changes == len(first.changes)
    assert again.fits(wide)
    # An edit that stands alone has the record that earlier versions read.
    assert "onto" not in first.record.to_dict()


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (Problem((Concept("Ship", "sky"),)), "'Ship' cannot be erased onto this edit, which retains it"),
        (Problem((Concept("jet", "", synonyms=("truck",)),)), "'truck' is erased by this edit already"),
        (Problem((Concept("cat", ""),), ("airplane",)), "'airplane' cannot be retained onto this edit"),
        (Problem((Concept("cat", "truck"),)), "'cat' cannot become 'truck', which this edit erases"),
    ],
)
def test_a_contradiction_is_refused(wide, problem, says):
    first = expunge.erase(wide, FIRST, closed("uce"))
    with pytest.raises(ExpungeError, match=says) as error:
        expunge.erase(wide, problem, closed("uce"), onto=first)
    assert "\n" not in str(error.value)


def test_gates_and_other_weights_are_refused_and_training_warns(model, problem):
    other = Problem((Concept("horse", "sky"),))
    gated = expunge.erase(model, problem, quick("ace", stages=("gate",)))
    with pytest.raises(ExpungeError, match=r"the edit \(ace\) has gates"):
        expunge.erase(model, other, closed("uce"), onto=gated)
    first = expunge.erase(model, problem, closed("uce"))
    foreign = Edit(first.changes, dataclasses.replace(first.record, base="0" * 64))
    with pytest.raises(ExpungeError, match="made from other weights"):
        expunge.erase(model, other, closed("uce"), onto=foreign)
    with pytest.warns(ExpungeWarning, match="ESD reads nothing to retain"):
        trained = expunge.erase(model, other, quick("esd", max_train_steps=1), onto=first)
    # The network that is trained is the edited one: what it starts from is the first edit.
    layer = model.text_entries()[0].layer
    with model.using(first):
        edited = model.weight(layer).clone()
    with model.using(trained):
        assert (model.weight(layer) - edited).abs().max() < 2e-3
    with pytest.raises(ExpungeError, match="esd draws or trains"):
        restore_concept(model, trained, "horse")


class TestRestore:
    @pytest.mark.parametrize("name", CLOSED)
    def test_it_is_as_if_never_asked_for(self, wide, name):
        method = closed(name)
        both = expunge.erase(wide, FIRST, method, seed=3)
        ours = restore_concept(wide, both, "TRUCK")
        rest = dataclasses.replace(FIRST, erase=FIRST.erase[:1])
        assert ours.hash == expunge.erase(wide, rest, method, seed=3).hash
        assert ours.record.problem == rest
        # The rest is as it was, and the truck is nearly back.
        assert came_back(wide, both, ours, ["airplane"]) < 0.35
        assert came_back(wide, both, ours, ["truck"]) > 0.65

    def test_from_any_step_of_several(self, wide):
        uce, speed = closed("uce"), closed("speed")
        first = expunge.erase(wide, FIRST, uce)
        both = expunge.erase(wide, SECOND, speed, onto=first)
        assert restore_concept(wide, both, "cat").hash == first.hash
        left = expunge.erase(wide, dataclasses.replace(FIRST, erase=FIRST.erase[1:]), uce)
        wanted = expunge.erase(wide, SECOND, speed, onto=left)
        ours = restore_concept(wide, both, "airplane")
        assert ours.hash == wanted.hash
        assert [c.name for c in ours.record.problem.erase] == ["truck", "cat"]
        alone = expunge.erase(wide, Problem((Concept("dog", "sky"),)), uce)
        built = expunge.erase(wide, SECOND, uce, onto=alone)
        assert [c.name for c in restore_concept(wide, built, "dog").record.problem.erase] == ["cat"]

    def test_what_cannot_be_restored(self, wide):
        edit = expunge.erase(wide, FIRST, closed("uce"))
        with pytest.raises(
            ExpungeError, match="no concept in this edit 'airplan'; did you mean 'airplane'"
        ):
            restore_concept(wide, edit, "airplan")
        one = expunge.erase(wide, SECOND, closed("uce"))
        with pytest.raises(ExpungeError, match="erases nothing but 'cat'"):
            restore_concept(wide, one, "cat")
        with pytest.raises(ExpungeError, match="merged from others"):
            restore_concept(wide, merge(wide, [edit, one]), "cat")


def test_on_the_command_line(folder, tmp_path, capsys):
    one, two, out = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two", "out"))
    uce = ["erase", "uce", "--num-retain-words", "5", "--model", str(folder)]
    assert main([*uce, "--concept", "airplane=sky", "--retain", "ship", "-o", one]) == 0
    assert main([*uce, "--concept", "cat=", "--onto", one, "-o", two]) == 0
    assert [c.name for c in Edit.load(two).record.problem.erase] == ["airplane", "cat"]
    assert main([*uce, "--concept", "ship=sky", "--onto", one, "-o", out]) == 2
    assert "cannot be erased onto this edit" in capsys.readouterr().err
    undo = ["undo", two, "--original", str(folder), "-o", out]
    assert main([*undo, "--concept", "cst"]) == 2
    assert "did you mean 'cat'" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*undo, "--concept", "airplane"]) == 0
    assert "airplane back; still erased: cat" in capsys.readouterr().out
    assert [c.name for c in Edit.load(out).record.problem.erase] == ["cat"]
    assert main(["info", two]) == 0
    assert "an edit by uce that erases airplane" in " ".join(capsys.readouterr().out.split())
