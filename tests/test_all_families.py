"""What some families have that others have not; what all keep is in `test_family_contract`."""

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.base import registry
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.families.flux import Flux
from tiny import drawn_by_diffusers, flux, sd3, sdxl


def test_uce_moves_the_pooled_text_too():
    model = expunge.load(sdxl())
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    method = registry.get("methods", "uce")(ridge=0.01, general=5)
    _, pooled = expunge.erase(model, problem, method).changes
    assert pooled.layers == ("unet.add_embedding.linear_1",)
    told = [TEMPLATES["object"][0].format(word) for word in ("airplane", "sky")]
    text = model.encode([*told, "ship"])
    given = torch.cat([text.pooled, torch.randn(3, 48)], 1).double()
    airplane, _, ship = given @ pooled.matrix.double().T
    assert (airplane[:16] - given[1, :16]).norm() < 0.5 * (given[0, :16] - given[1, :16]).norm()
    assert (ship - given[2]).norm() < 0.2 * given[2, :16].norm()
    assert torch.equal(airplane[16:], given[0, 16:])


def test_sdxl_without_zeros_for_the_empty_prompt():
    pipe = sdxl(zeros=False)
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    theirs = drawn_by_diffusers(pipe, "sdxl", "ship", probe.seeds, 2, 4.0)
    torch.testing.assert_close(expunge.load(pipe).draw(probe), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pipe", [sd3(with_t5=False), sd3(use_dynamic_shifting=True)])
def test_sd3_without_t5_and_with_dynamic_shifting(pipe):
    model = expunge.load(pipe)
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    theirs = drawn_by_diffusers(pipe, "sd3", "ship", probe.seeds, 2, 4.0)
    torch.testing.assert_close(model.draw(probe), theirs, rtol=0, atol=2e-5)
    (_, clip_end), (_, t5_end) = model.encode(["ship"]).segments(0)
    assert clip_end == 2
    assert t5_end == 77 + (pipe.text_encoder_3 is not None)


def test_schnell_takes_no_guidance():
    model = expunge.load(flux(told=False))
    assert isinstance(model, Flux)
    assert model.window == 255
    one, other = (model.draw(Probe.of("ship", num_inference_steps=2, guidance_scale=g)) for g in (1, 5))
    assert torch.equal(one, other)


def test_dev_predicts_at_guidance_one():
    model = expunge.load(flux())
    text, latents = model.encode(["ship"]), torch.randn(1, 4, 8, 8)
    plain = model._guided(latents, torch.tensor(500), text, 1.0)
    assert torch.equal(model.predict(latents, 500, text), plain)
    assert not torch.equal(model._guided(latents, torch.tensor(500), text, 3.5), plain)


@pytest.mark.parametrize("make", [sd3, flux])
def test_joint_attention_is_no_cross_attention(make):
    model = expunge.load(make())
    with pytest.raises(ExpungeError, match="no cross-attention"):
        model.cross_attentions()
