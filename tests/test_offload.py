"""Parts that take turns: where they are while others work, and that nothing else changes."""

import pytest
import torch

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Probe, Problem
from expunge.base import registry
from expunge.checkpoints.offload import OffloadHook, offload_idle_parts
from expunge.ops.finetune import frozen
from quick import quick
from tiny import PIPELINES


class Told(OffloadHook):
    """A turn without an accelerator: the weights of what has left are out of reach."""

    def move(self, part, device):
        for parameter in part.parameters():
            if device == self.execution_device and hasattr(parameter, "away"):
                parameter.data = parameter.away
                del parameter.away
            elif device != self.execution_device and not hasattr(parameter, "away"):
                parameter.away, parameter.data = parameter.data, torch.empty(0)


HERE = torch.device("cpu", 0)  # another than the "cpu" that is left for


def away(pipe):
    """The parts that have left."""
    return {
        name
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and hasattr(next(part.parameters()), "away")
    }


@pytest.fixture(params=list(PIPELINES))
def both(request):
    """The same model twice, the second one's parts in turn."""
    plain, turning = (expunge.load(PIPELINES[request.param]()) for _ in range(2))
    offload_idle_parts(turning.pipe, turning.denoiser, HERE, Told)
    return plain, turning


def test_the_denoiser_works_with_all_others_away(both):
    plain, model = both
    probe = Probe.of(["ship", "bird"], 1, num_inference_steps=2)
    encoders = {part for part in model.pipe.components if part.startswith("text_encoder")}
    seen = []
    model.network.register_forward_hook(lambda *_: seen.append(away(model.pipe)))
    for _ in range(2):
        assert torch.equal(model.draw(probe), plain.draw(probe))
        assert away(model.pipe) == encoders  # the autoencoder was the last to work
        text = model.encode(["ship"])
        assert torch.equal(text.embeddings, plain.encode(["ship"]).embeddings)
        assert away(model.pipe) == {"vae"}
    assert len(seen) >= 4
    assert all(one == {*encoders, "vae"} for one in seen)


def test_what_gradients_flow_back_through_stays(both):
    found = []
    for model in both:
        vectors = [vector.requires_grad_() for vector in model.word_vectors("ship")]
        latents = torch.ones(1, *model._latent_shape)
        with frozen(model.parameters()):
            model.predict(latents, 500, model.encode(["bird"]))
            text = model.encode_with(["a photo of the ship"], "ship", vectors)
            error = model.predict(latents, 500, text).square().sum()
            found.append(torch.autograd.grad(error, vectors))
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", registry.list_names("methods"))
def test_a_method_makes_the_same_edit(name):
    method = quick(name)
    problem = Problem((Concept("airplane", "sky"), Concept("horse", "sky")), ("ship",))
    edits = []
    for turning in (False, True):
        model = expunge.load(tiny_pipeline())
        if turning:
            offload_idle_parts(model.pipe, model.denoiser, HERE, Told)
        edits.append(expunge.erase(model, problem, method))
    assert edits[0].hash == edits[1].hash
