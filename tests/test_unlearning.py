"""`expunge.unlearn`: a diffusers pipeline in, the same one, or a copy, without the concept out."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import expunge
from conftest import tiny_pipeline, weights
from expunge import Concept, ExpungeError, Problem
from expunge.base import registry
from expunge.base.fields import flatten
from expunge.method import Method
from expunge.methods.ace import ACE
from expunge.methods.uce import UCE

PROMPT = "airplane"


@torch.no_grad()
def draw(pipe, prompt=PROMPT):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt").images


def differ(one, other):
    """The names of the tensors in which two states differ."""
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_in_place_it_is_what_the_edit_makes(pipe, tmp_path):
    twin = tiny_pipeline()
    edit = expunge.erase(
        twin, Problem((Concept("airplane", "sky"),), ("ship",)), UCE(num_retain_words=5)
    )
    with edit.apply(twin):
        expected = weights(twin)
    found = expunge.unlearn(pipe, "airplane", anchor="sky", retain="ship", num_retain_words=5)
    assert found is pipe
    assert not differ(weights(pipe), expected)
    assert differ(weights(pipe), weights(twin))
    # It is a model of its own: nothing of the original is kept, and it can be saved and unlearned again.
    assert not any(hasattr(p, "expunge_base") for p in pipe.unet.parameters())
    pipe.save_pretrained(tmp_path / "own")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "own", safety_checker=None)
    torch.testing.assert_close(draw(again), draw(pipe))
    once = weights(pipe)
    expunge.unlearn(pipe, "horse", num_retain_words=5)
    assert differ(once, weights(pipe))


def test_a_copy_shares_what_does_not_change(pipe):
    before = weights(pipe)
    found = expunge.unlearn(pipe, "airplane", num_retain_words=5, copy=True)
    assert type(found) is type(pipe)
    assert found is not pipe
    assert found.unet is not pipe.unet
    assert found.components["unet"] is found.unet
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert getattr(found, part) is getattr(pipe, part)
    assert not differ(before, weights(pipe))
    own = {p.data_ptr() for p in pipe.unet.parameters()}
    assert not own & {p.data_ptr() for p in found.unet.parameters()}
    changed = differ(before, weights(found))
    assert changed
    assert all("attn2" in name for name in changed)


@pytest.mark.parametrize("copy", [False, True])
def test_gates_stay_on_the_pipeline_that_is_returned(pipe, copy):
    method = ACE(stages=("gate",), num_retain_words=20)
    original = draw(pipe)
    found = expunge.unlearn(pipe, "airplane", method, retain=["ship", "bird"], copy=copy)
    assert (found is pipe) is not copy
    assert not torch.allclose(draw(found), original, atol=1e-3)
    if copy:
        assert torch.equal(draw(pipe), original)
    twin = tiny_pipeline()
    edit = expunge.erase(twin, Problem((Concept("airplane"),), ("ship", "bird")), method)
    with edit.apply(twin):
        assert torch.equal(draw(twin), draw(found))


def test_a_copy_of_a_changed_pipeline(pipe):
    expunge.unlearn(pipe, "airplane", num_retain_words=5)
    with expunge.erase(pipe, Problem((Concept("ship"),)), UCE(num_retain_words=5)).apply(pipe):
        there = weights(pipe)
        found = expunge.unlearn(pipe, "horse", num_retain_words=5, copy=True)
        assert not differ(there, weights(pipe))
    assert differ(there, weights(found))


def test_several_concepts(pipe):
    several = ["airplane", Concept("horse", "ship", synonyms=("dog",))]
    twin = tiny_pipeline()
    with expunge.erase(twin, Problem((Concept("airplane"), several[1])), UCE(num_retain_words=5)).apply(
        twin
    ):
        expected = weights(twin)
    assert not differ(expected, weights(expunge.unlearn(pipe, several, num_retain_words=5)))


def test_erase_takes_a_pipeline_as_it_is(pipe, problem):
    edit = expunge.erase(pipe, problem, UCE(num_retain_words=5))
    assert edit.record.family == "StableDiffusion"
    assert edit.fits(pipe)


@pytest.mark.parametrize(
    ("arguments", "fields", "said"),
    [
        (("",), {}, "a concept needs a name"),
        (([],), {}, "there is no concept to erase"),
        ((3,), {}, "concept must be a name, a Concept, or a list of them, not 3"),
        (([None],), {}, "concept must be a name"),
        (("airplane", "ucee"), {}, "no method 'ucee'; did you mean 'uce'"),
        (("airplane",), {"num_retain_word": 5}, "did you mean 'num_retain_words'"),
        (("airplane",), {"kind": "objekt"}, "did you mean 'object'"),
        (("airplane",), {"anchor": "Airplane"}, "the anchor of 'airplane' is the concept itself"),
        (("airplane",), {"retain": "airplane"}, "cannot be both erased and retained"),
        (("airplane",), {"method": UCE(), "num_retain_words": -1}, "num_retain_words must be"),
        ((Concept("airplane"),), {"anchor": "sky"}, "anchor is for concepts given by name"),
    ],
)
def test_bad_arguments_leave_the_pipeline_as_it_was(pipe, arguments, fields, said):
    before = weights(pipe)
    with pytest.raises(ExpungeError, match=said):
        expunge.unlearn(pipe, *arguments, **fields)
    assert not differ(before, weights(pipe))


@pytest.mark.parametrize("function", [expunge.erase, expunge.unlearn])
def test_what_is_no_pipeline(function, problem):
    what = problem if function is expunge.erase else "airplane"
    with pytest.raises(ExpungeError, match=r"not 'emoji': load it first, with expunge.load\('emoji'\)"):
        function("emoji", what)
    with pytest.raises(ExpungeError, match="no family knows the pipeline Tensor"):
        function(torch.zeros(1), what)


def test_an_offloaded_pipeline_is_not_copied(pipe):
    pipe.unet._hf_hook = object()  # as accelerate marks what it moves
    with pytest.raises(ExpungeError, match=r"offloaded \(unet\) cannot be copied: .* copy=False"):
        expunge.unlearn(pipe, "airplane", copy=True)


def test_no_field_of_a_method_is_an_argument_of_unlearn():
    arguments = set(expunge.unlearn.__kwdefaults__)
    for name in registry.list_names("methods"):
        kind: type[Method] = registry.get("methods", name)
        assert not arguments & flatten(kind()).keys(), name
