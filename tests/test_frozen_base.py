"""A denoiser kept in 8 or 4 bits: it predicts nearly the same, and text entries train on it."""

import pytest
import torch

import expunge
import tiny
from expunge import Concept, ExpungeError, Problem
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.cost_estimate import count_operations, estimate, estimate_model
from expunge.ops.frozen_linear import FrozenLinear, NF4Linear
from expunge.ops.quantisation import quantise_int8, quantise_nf4
from quick import quick

PROBLEM = Problem((Concept("airplane", "sky"),))


def size(model):
    tensors = (*model.network.parameters(), *model.network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_size(model):
    """The bytes of a denoiser's parameters, and of the buffers that hold rounded weights."""
    frozen = [m for m in model.network.modules() if isinstance(m, FrozenLinear)]
    tensors = [*model.network.parameters(), *(t for m in frozen for t in m.buffers(recurse=False))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module", params=["stable_diffusion", "z_image"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    tiny.PIPELINES[request.param]().save_pretrained(path)
    (path / "expunge.json").write_text('{"sample_size": 8, "max_sequence_length": 64}')
    return path


@pytest.mark.parametrize(
    ("form", "round_to", "share", "error"),
    [("int8", quantise_int8, 0.9, 0.1), ("nf4", quantise_nf4, 0.85, 0.5)],
)
def test_it_is_smaller_and_predicts_nearly_the_same(folder, form, round_to, share, error):
    whole, rounded = expunge.load(folder), expunge.load(folder, quantise=form)
    assert size(rounded) < share * size(whole)
    layers = [(n, m) for n, m in rounded.network.named_modules() if isinstance(m, FrozenLinear)]
    assert len(layers) > 5
    for name, layer in layers:
        assert layer.form == form
        # The numbers of the condition `quantisation`.
        torch.testing.assert_close(layer.weight, round_to(whole.network.get_submodule(name).weight))
    for entry in whole.text_entries():
        assert torch.equal(whole.weight(entry.layer), rounded.weight(entry.layer))
    latents = torch.randn(1, *whole._latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model.predict(latents, 500, model.encode(["ship"])) for model in (whole, rounded))
    assert 0 < float((one - other).norm() / one.norm()) < error


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_plan_knows_it_before_and_after_loading(folder, form):
    whole, rounded = expunge.load(folder), expunge.load(folder, quantise=form)
    plan = estimate(Checkpoint.find(folder), torch.float32, "cpu", quantise=form)
    loaded = estimate_model(rounded)
    assert plan.quantised_bytes == loaded.quantised_bytes == {"denoiser": parameter_size(rounded)}
    before = estimate_model(whole)
    saved = parameter_size(whole) - parameter_size(rounded)
    assert plan.memory == loaded.memory == before.memory - saved
    # As many operations as before: the time stays.
    assert plan.parameters == loaded.parameters == before.parameters
    assert count_operations(rounded) == count_operations(whole)


@pytest.mark.parametrize("shape", [(3, 5), (8, 64), (10, 96)])
def test_nf4_takes_four_bits_and_a_scale_for_64(shape):
    linear = torch.nn.Linear(*shape[::-1])
    layer = NF4Linear(linear)
    assert torch.equal(layer.weight, quantise_nf4(linear.weight.detach()))
    held = sum(t.numel() * t.element_size() for t in (layer.packed, layer.scale))
    assert held == layer.count_bytes(*shape)
    if shape[0] * shape[1] % 64 == 0:
        assert held == 4.5 / 8 * shape[0] * shape[1]
    x = torch.randn(2, shape[1], requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.sum(0))
    assert not [p for name, p in layer.named_parameters() if name != "bias"]


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_what_text_enters_through_is_trained_and_fits_the_whole_model(folder, form):
    whole, rounded = expunge.load(folder), expunge.load(folder, quantise=form)
    refines = bool(whole.text_refiner)
    more = {"train_on": "text-refiner"} if refines else {"part": "x-strict"}
    edit = expunge.erase(rounded, PROBLEM, quick("esd", **more, max_train_steps=2))
    assert edit.fits(whole)
    weights = [change for change in edit.changes if change.parameter == "weight"]
    before = whole.weight(weights[0].layers[0])
    assert not torch.equal(weights[0].weight(before), before)
    with pytest.raises(
        ExpungeError, match=f"kept in {form}, where only the layers that text enters through"
    ):
        expunge.erase(rounded, PROBLEM, quick("esd", part="u", max_train_steps=2))


def test_what_is_no_form(folder):
    with pytest.raises(ExpungeError, match="no form to quantise to 'int9'; did you mean 'int8'"):
        expunge.load(folder, quantise="int9")
    with pytest.raises(ExpungeError, match="taken as it is: leave quantise out"):
        expunge.load(tiny.tiny_pipeline(), quantise="int8")
