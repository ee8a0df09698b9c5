"""A denoiser kept in 8 bits: it predicts nearly the same, and what text enters through trains on it."""

import pytest
import torch

import expunge
import tiny
from expunge import Concept, ExpungeError, Problem
from expunge.ops.int8_linear import Int8Linear
from expunge.ops.quantisation import quantise_int8
from quick import quick

PROBLEM = Problem((Concept("airplane", "sky"),))


def size(model):
    tensors = (*model.network.parameters(), *model.network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module", params=["stable_diffusion", "z_image"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    tiny.PIPELINES[request.param]().save_pretrained(path)
    (path / "expunge.json").write_text('{"sample_size": 8, "max_sequence_length": 64}')
    return path


def test_it_is_smaller_and_predicts_nearly_the_same(folder):
    whole, rounded = expunge.load(folder), expunge.load(folder, quantise="int8")
    assert size(rounded) < 0.9 * size(whole)
    layers = [(n, m) for n, m in rounded.network.named_modules() if isinstance(m, Int8Linear)]
    assert len(layers) > 5
    for name, layer in layers:
        torch.testing.assert_close(layer.weight, quantise_int8(whole.network.get_submodule(name).weight))
    for entry in whole.text_entries():
        assert torch.equal(whole.weight(entry.layer), rounded.weight(entry.layer))
    latents = torch.randn(1, *whole._latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model.predict(latents, 500, model.encode(["ship"])) for model in (whole, rounded))
    assert 0 < float((one - other).norm() / one.norm()) < 0.1


def test_what_text_enters_through_is_trained_and_fits_the_whole_model(folder):
    whole, rounded = expunge.load(folder), expunge.load(folder, quantise="int8")
    refines = bool(whole.text_refiner)
    more = {"train_on": "text-refiner"} if refines else {"part": "x-strict"}
    edit = expunge.erase(rounded, PROBLEM, quick("esd", **more, max_train_steps=2))
    assert edit.fits(whole)
    weights = [change for change in edit.changes if change.parameter == "weight"]
    before = whole.weight(weights[0].layers[0])
    assert not torch.equal(weights[0].weight(before), before)
    with pytest.raises(
        ExpungeError, match="kept in int8, where only the layers that text enters through"
    ):
        expunge.erase(rounded, PROBLEM, quick("esd", part="u", max_train_steps=2))


def test_what_is_no_form(folder):
    with pytest.raises(ExpungeError, match="there is no form to quantise to 'int9'.*int8"):
        expunge.load(folder, quantise="int9")
    with pytest.raises(ExpungeError, match="taken as it is: leave quantise out"):
        expunge.load(tiny.tiny_pipeline(), quantise="int8")
