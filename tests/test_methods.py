"""What every method keeps, over the registry; then what each one computes."""

import dataclasses
import functools
from typing import ClassVar

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Probe, Problem
from expunge.base import registry
from expunge.base.fields import build, build_from_record, flatten, leaves
from expunge.erasing.prompt_templates import RETAINED
from expunge.methods.ant import ANT
from expunge.methods.ant.masked_weights import MaskedWeights
from expunge.methods.uce import TEMPLATES, UCE
from quick import quick

METHODS = registry.list_names("methods")


def test_the_folder_is_the_list():
    folder = registry.HERE / "methods"
    found = {file.stem for file in folder.glob("*.py")} | {
        file.parent.name for file in folder.glob("*/__init__.py")
    }
    assert set(METHODS) == {name for name in found if not name.startswith("_")}
    assert len(METHODS) >= 3  # a contract over an empty list holds for nobody


@pytest.fixture(params=METHODS)
def method(request):
    return quick(request.param)


class TestContract:
    def test_says_what_it_is(self, method):
        assert method.citation
        assert "Source:" in type(method).__doc__
        assert registry.describe("methods", type(method).__module__.rpartition(".")[2])

    def test_is_frozen(self, method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.ridge = 1

    def test_presets_fit(self, method):
        for name, values in method.presets.items():
            preset = type(method).preset(name)
            fields = flatten(preset)
            assert all(fields[k] == v for k, v in values.items() if k != "about")
            assert isinstance(values.get("about", ""), str)

    def test_leaves_the_model_as_it_was(self, model, problem, method):
        before, parameters = weights(model.pipe), list(model.pipe.unet.parameters())
        expunge.erase(model, problem, method)
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        assert all(a is b for a, b in zip(parameters, model.pipe.unet.parameters(), strict=True))

    def test_same_seed_same_edit(self, model, problem, method):
        first, second = (expunge.erase(model, problem, method, seed=3) for _ in range(2))
        assert first.hash == second.hash
        assert first.record.base == second.record.base

    def test_survives_saving(self, model, problem, method, tmp_path):
        edit = expunge.erase(model, problem, method, seed=3)
        edit.save(tmp_path / "edit.safetensors")
        again = Edit.load(tmp_path / "edit.safetensors")
        assert again.hash == edit.hash
        assert again.record.problem == edit.record.problem
        assert again.record.seed == 3
        assert again.record.method == registry.name_of("methods", type(method))
        assert again.fits(model)
        probe = Probe.of("airplane", num_inference_steps=2)
        drawn = []
        for one in (edit, again):
            with model.using(one):
                drawn.append(model.draw(probe))
        assert torch.equal(*drawn)

    def test_the_erased_moves_more_than_the_retained(self, model, wide, problem, method):
        # Random text embeddings are nearly one direction, which a rotation cannot keep and move at once:
        # a method may show what it does on a trained text encoder and a wider denoiser instead.
        assert specificity(model, problem, method) > 2 or specificity(wide, problem, method) > 2


def specificity(model, problem, method):
    """How much further images of the erased move than those of the retained."""
    edit = expunge.erase(model, problem, method)
    probe = Probe.of(["airplane", "ship", "bird"], n=2, num_inference_steps=3)
    before = model.draw(probe)
    with model.using(edit):
        after = model.draw(probe)
    assert torch.equal(model.draw(probe), before)
    erased, *retained = (after - before).abs().flatten(1).mean(1).reshape(3, 2).mean(1)
    return erased / max(retained)


def plain_uce(model, erased, anchored, retained, words, method):
    """The paper's equation, layer by layer, summed prompt by prompt, with an explicit inverse."""
    solved = {}

    @functools.cache
    def read(prompt):
        return model.encode([prompt])

    for entry in model.text_entries():
        layer = model.pipe.unet.get_submodule(entry.layer.removeprefix("unet."))
        w = layer.weight.detach().double()
        left, right = method.ridge * w, method.ridge * torch.eye(w.shape[1], dtype=torch.float64)

        def add(old, new, scale, w=w):
            nonlocal left, right
            left = left + scale * w @ new.double().T @ old.double()
            right = right + scale * old.double().T @ old.double()

        for old, new in zip(erased, anchored, strict=True):
            old, new = read(old), read(new)
            i, j = int(old.content_mask.sum()), int(new.content_mask.sum())
            n = 1 if method.positions == "last" else 77 - max(i, j)
            add(old.embeddings[0, i : i + n], new.embeddings[0, j : j + n], 1 / len(erased))
        for prompts in retained:
            for prompt in prompts:
                rows = read(prompt).embeddings[0]
                add(rows, rows, method.retain_scale / len(prompts))
        for word in words:
            rows = read(word).embeddings[0]
            add(rows, rows, method.retain_words_scale / len(words))
        solved[entry.layer] = left @ torch.linalg.inv(right)
    return solved


@pytest.mark.parametrize("positions", ["last-and-after", "last"])
def test_uce_against_a_slow_reading_of_its_equation(model, positions):
    method = UCE(
        0.7, retain_scale=2.0, num_retain_words=10**6, retain_words_scale=0.5, positions=positions
    )
    problem = Problem((Concept("airplane", "the blue sky", synonyms=("jet",)),), ("ship",))
    (change,) = expunge.erase(model, problem, method).changes
    erased = [t.format(name) for name in ("airplane", "jet") for t in TEMPLATES["object"]]
    anchored = [t.format("the blue sky") for _ in range(2) for t in TEMPLATES["object"]]
    kept = [[t.format(name) for t in RETAINED] for name in ("ship", "the blue sky")]
    words = [word for word in model.vocabulary() if word not in ("airplane", "jet")]
    assert len(words) > 20
    solved = plain_uce(model, erased, anchored, [[""], *kept], words, method)
    assert set(change.layers) == set(solved)
    for layer, plain in solved.items():
        w = model.pipe.unet.get_submodule(layer.removeprefix("unet.")).weight.detach()
        ours = change.weight(w).double()
        assert (ours - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize("retain", [("ship", "dog"), ()])
@pytest.mark.parametrize(
    ("preset", "last", "retain_scale"), [("original", False, 0.1), ("rewrite", True, 1.0)]
)
def test_uce_as_published(model, preset, last, retain_scale, retain):
    """λ = 0.5; every name is one prompt with the weight 1 and an anchor of its concept's own."""
    concepts = (
        Concept("airplane", "the blue sky", "identity", ("jet",)),
        Concept("horse", "", "object"),
        Concept("white bird", "art", "style"),
    )
    (change,) = expunge.erase(model, Problem(concepts, retain), UCE.preset(preset)).changes

    def own(prompt):
        text = model.encode([prompt])
        rows, i = text.embeddings[0].double(), int(text.content_mask.sum())
        return rows[i : i + 1] if last else rows[i:]

    left = right = 0.5 * torch.eye(32, dtype=torch.float64)
    for name, anchor in (("airplane", "the blue sky"), ("jet", "the blue sky"), ("horse", ""),
                         ("white bird", "art")):  # fmt: skip
        e, a = own(name), own(anchor)
        n = min(len(e), len(a))
        left, right = left + a[:n].T @ e[:n], right + e[:n].T @ e[:n]
    for prompt in retain or (() if last else ("",)):
        r = own(prompt) if last else model.encode([prompt]).embeddings[0].double()
        left, right = left + retain_scale * r.T @ r, right + retain_scale * r.T @ r
    solution = left @ torch.linalg.inv(right)
    assert (solution - torch.eye(32)).norm() > 0.1
    torch.testing.assert_close(change.matrix.double(), solution, rtol=1e-4, atol=1e-4)


def test_uce_needs_a_prompt_for_what_is_retained():
    with pytest.raises(ExpungeError, match="retain_templates is empty"):
        UCE(retain_templates=())
    with pytest.raises(ExpungeError, match="one {} for the concept"):
        UCE(retain_templates=("no place",))


def test_uce_stores_one_matrix_for_all_layers(model, problem):
    (change,) = expunge.erase(model, problem, "uce").changes
    assert change.kind == "right"
    assert change.matrix.shape == (32, 32)
    assert len(change.layers) == 14


def test_a_large_ridge_erases_nothing(model, problem):
    (change,) = expunge.erase(model, problem, UCE(ridge=1e9)).changes
    torch.testing.assert_close(change.matrix, torch.eye(32), rtol=0, atol=1e-5)


def test_a_tiny_ridge_and_nothing_retained_is_singular(model):
    method = UCE(ridge=1e-30, retain_scale=0, num_retain_words=0)
    with pytest.raises(ExpungeError, match="raise the ridge"):
        expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)


def test_several_concepts_and_the_empty_anchor(model):
    problem = Problem((Concept("airplane", ""), Concept("horse"), Concept("art", kind="style")))
    edit = expunge.erase(model, problem)
    assert [c.anchor for c in edit.record.problem.erase] == ["", "sky", ""]


@pytest.mark.parametrize("where", ["name", "anchor", "synonym", "retain", "template"])
def test_names_longer_than_the_window(model, where):
    long = "ship " * 76
    concept = Concept(
        long if where == "name" else "airplane",
        long if where == "anchor" else "sky",
        synonyms=(long,) if where == "synonym" else (),
    )
    method = UCE(templates=("ship " * 75 + "{}",)) if where == "template" else "uce"
    with pytest.raises(ExpungeError, match="7[67] tokens, and this model reads no more than 75"):
        expunge.erase(model, Problem((concept,), (long,) if where == "retain" else ()), method)


class Preset(UCE):
    """A method with presets."""

    presets: ClassVar = {
        "soft": {"about": "little", "ridge": 500.0, "num_retain_words": 3},
        "wrong": {"rigde": 1.0},
    }


def test_presets():
    assert Preset.preset("soft") == Preset(ridge=500.0, num_retain_words=3)
    assert Preset.preset("soft", ridge=2.0, positions="last") == Preset(
        2.0, num_retain_words=3, positions="last"
    )
    with pytest.raises(ExpungeError, match="no preset 'sotf'; did you mean 'soft'"):
        Preset.preset("sotf")
    with pytest.raises(ExpungeError, match="did you mean 'ridge'"):
        Preset.preset("wrong")
    with pytest.raises(ExpungeError, match="ridge must be above 0"):
        Preset.preset("soft", ridge=-1)
    ours = ", ".join(f"miniature{of}" for of in ("", "-10", "-100", "-explicit", "-object"))
    with pytest.raises(ExpungeError, match=f"no preset 'soft'; known: {ours}, original, rewrite"):
        UCE.preset("soft")


@pytest.mark.parametrize("where", ["name", "anchor", "synonym", "retain"])
def test_names_that_the_tokenizer_drops(model, where):
    lost = "🐈🐈"  # the tiny tokenizer knows ASCII alone
    concept = Concept(
        lost if where == "name" else "airplane",
        lost if where == "anchor" else "sky",
        synonyms=(lost,) if where == "synonym" else (),
    )
    with pytest.raises(ExpungeError, match="tokenizer knows no character of '🐈🐈'"):
        expunge.erase(model, Problem((concept,), (lost,) if where == "retain" else ()))
    assert model.knows("🐈 cat")
    assert not model.knows("<|endoftext|>")


def test_a_warning_of_shared_words(model):
    method = UCE(num_retain_words=1)
    problem = Problem((Concept("cat", "sky"),), ("a cat and a dog",))
    with pytest.warns(ExpungeWarning, match=r"change with it: 'cat' in 'a cat and a dog' \(retained\)$"):
        expunge.erase(model, problem, method)
    problem = Problem((Concept("cat", ""), *(Concept(f"cat {w}", "") for w in "abcde")))
    with pytest.warns(ExpungeWarning, match=r"'cat c' \(erased too\) and 2 more$") as warned:
        expunge.erase(model, problem, method)
    assert len(warned) == 1


class TestGroupsOfFields:
    """Fields that belong together are a dataclass of their own; from the outside they stand flat."""

    def test_every_leaf_has_a_name_of_its_own(self, method):
        names = [field.name for field in leaves(type(method))]
        assert len(set(names)) == len(names)
        assert set(flatten(method)) == set(names)

    def test_flat_values_make_the_same_method(self, method):
        assert type(method).of(**flatten(method)) == method
        assert build_from_record(type(method), flatten(method)) == method

    def test_a_table_of_the_group_is_read_too(self):
        nested = build(ANT, {"low_rank": {"rank": 3}, "alpha": 2.0, "turn": -2.0})
        assert nested == ANT.of(rank=3, alpha=2.0, turn=-2.0)
        assert (nested.low_rank.rank, nested.low_rank.alpha) == (3, 2.0)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"maps": 3}, r"'maps' is one of its weights: ANT\(weights=MaskedWeights\(maps=…\)\)"),
            ({"rank": 3}, r"'rank' is one of its low_rank: .* or ANT.of\(rank=…\)"),
            ({"steps": 3}, "'steps' is named 'max_train_steps' now"),
            ({"map_sample": 3}, "did you mean 'map_samples'"),
            ({"weights": 3}, "weights must be a MaskedWeights, not 3"),
        ],
    )
    def test_a_field_that_is_elsewhere_is_answered_with_its_place(self, given, says):
        with pytest.raises(ExpungeError, match=says):
            ANT(**given)

    def test_a_group_and_its_fields_are_not_both_given(self):
        with pytest.raises(ExpungeError, match="weights is given whole; 'maps' belongs within it"):
            build(ANT, {"weights": MaskedWeights(), "maps": 3})
        with pytest.raises(ExpungeError, match="did you mean 'map_samples'"):
            build(ANT, {"weights": {"map_sample": 3}})

    def test_a_record_has_the_fields_flat_as_before(self, model):
        problem = Problem((Concept("airplane", "sky"),))
        edit = expunge.erase(model, problem, quick("ant", max_train_steps=0))
        assert edit.record.fields["rank"] == 1
        assert edit.record.fields["maps"] == MaskedWeights().maps
        assert not edit.record.reads_anchor

    def test_a_copy_changes_a_field_wherever_it_is(self):
        method = ANT.of(rank=3).replace(rank=4, turn=-2.0)
        assert (method.low_rank.rank, method.turn) == (4, -2.0)
        with pytest.raises(ExpungeError, match="rank must be at least 1"):
            method.replace(rank=0)

    def test_an_old_name_still_loads_and_is_answered_with_the_new(self, method):
        usual = flatten(type(method)())
        for old, new in method.renamed.items():
            assert build_from_record(type(method), {old: usual[new]}) == type(method)()
            with pytest.raises(ExpungeError, match=f"'{old}' is named '{new}' now"):
                build(type(method), {old: usual[new]})
