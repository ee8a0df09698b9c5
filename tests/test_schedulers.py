"""Another scheduler, where a suite or a method demands one."""

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

import expunge
import tiny
from conftest import tiny_pipeline
from expunge import Concept, ExpungeError, Problem
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.evaluation.suite import Suite
from expunge.methods.uce import UCE
from expunge.probe import Probe
from expunge.runtime.schedulers import parse_scheduler, replace_scheduler

TABLE = {
    "version": 1,
    "model": "emoji",  # whose CLIP judges
    "score": "H_c",
    "scheduler": "DDIM",
    "num_inference_steps": 3,
    "judge": "clip_zeroshot",
    "question": "probability",
    "templates": {"erased": ["a photo of the {}"]},
    "sizes": {"quick": {"erased": 2, "retained": 2}},
    "concepts": {"airplane": {}, "ship": {}},
    "options": {"clip_zeroshot": {"classes": ["airplane", "ship"], "scale": 1e-9}},
}
PROBE = Probe.of("a photo of the ship", n=2, num_inference_steps=3)


@pytest.fixture
def pndm():
    """Stable Diffusion's own scheduler, as its folder has it."""
    pipe = tiny_pipeline()
    pipe.scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        steps_offset=1)  # fmt: skip
    return expunge.load(pipe)


def test_names():
    for name in ("DDIM", "ddim", "DDIMScheduler", " DDIM "):
        assert parse_scheduler(name) == "DDIM"
    with pytest.raises(ExpungeError, match="no scheduler 'DDDIM'; did you mean 'DDIM'"):
        parse_scheduler("DDDIM")


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "PNDM"])
def test_images_are_those_of_that_scheduler(pndm, name):
    """Against a pipeline that was given the scheduler by hand."""
    drawn = pndm.with_scheduler(name).draw(PROBE)
    other = tiny_pipeline()
    other.scheduler = replace_scheduler(pndm.pipe.scheduler, name, "it")
    assert type(other.scheduler).__name__ == f"{name}Scheduler"
    torch.testing.assert_close(drawn, expunge.load(other).draw(PROBE))
    assert type(pndm.pipe.scheduler) is PNDMScheduler
    assert torch.equal(pndm.draw(PROBE), pndm.with_scheduler("").draw(PROBE))


def test_latents_are_not_cut_to_pixels(pndm):
    """A configuration that says nothing of cutting means none: DDIM's default is for pixels."""
    config = pndm.with_scheduler("DDIM").pipe.scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert config.beta_start == 0.00085
    said = DDIMScheduler(clip_sample=True, steps_offset=1, set_alpha_to_one=False)
    euler = EulerDiscreteScheduler.from_config(said.config)
    assert replace_scheduler(euler, "DDIM", "it").config.clip_sample  # said, and so kept
    assert replace_scheduler(said, "ddim", "it") is said


def test_an_edit_lies_on_both(pndm):
    edit = expunge.erase(pndm, Problem((Concept("ship", "sky"),)), UCE(num_retain_words=20))
    sampled = pndm.with_scheduler("DDIM")
    before = sampled.draw(PROBE)
    with sampled.using(edit):
        assert not torch.equal(sampled.draw(PROBE), before)
    assert torch.equal(sampled.draw(PROBE), before)
    assert sampled.network is pndm.network


@pytest.mark.parametrize(("family", "own"), [("sd3", "FlowMatchEulerDiscrete"), ("flux", "FlowMatch")])
def test_flow_matching_has_no_ddim(family, own):
    model = expunge.load(getattr(tiny, family)())
    with pytest.raises(ExpungeError, match=f"DDIM is for models that predict noise, .* its own, {own}"):
        model.with_scheduler("DDIM")
    with pytest.raises(ExpungeError, match="predict noise"):
        edit = expunge.erase(model, Problem((Concept("ship", "sky"),)), UCE(num_retain_words=20))
        evaluate(model, [edit], [Suite.from_table(TABLE, "told")])
    assert model.with_scheduler("FlowMatchEulerDiscreteScheduler") is model


def test_noise_has_no_flow(pndm):
    with pytest.raises(ExpungeError, match="models that learn a flow, and StableDiffusion is one of th"):
        pndm.with_scheduler("FlowMatchEulerDiscrete")


def test_a_suite_demands_its_scheduler(pndm, tmp_path):
    """Drawn with it, cached by it, and said in the results, suite by suite."""
    edit = expunge.erase(pndm, Problem((Concept("ship", "sky"),)), UCE(num_retain_words=20))
    suite = Suite.from_table(TABLE, "told")
    own = dataclasses.replace(suite, name="own", scheduler="")
    cache = Cache(tmp_path)
    report = evaluate(pndm, [edit], [suite, own], cache=cache)
    assert cache.drawn == 2 * 2 * 4  # nothing of the one serves the other
    table = json.loads(json.dumps(report.to_dict()))
    assert [case["sampler"]["class"] for case in table["cases"]] == ["DDIMScheduler", "PNDMScheduler"]
    assert table["provenance"]["sampler"]["class"] == "DDIMScheduler"
    assert table["cases"][0]["sampler"]["num_inference_steps"] == 3
    sampled = pndm.with_scheduler("DDIM")
    asked = [Request("a photo of the ship", seed, 3, pndm.guidance_scale) for seed in (0, 1)]
    drawn = cache.draw(Source(sampled), asked)
    assert cache.drawn == 16
    probe = Probe.of("a photo of the ship", n=2, num_inference_steps=3)
    torch.testing.assert_close(drawn, sampled.draw(probe), atol=3e-3, rtol=0)
    assert Source(pndm).address(asked[0]) != Source(sampled).address(asked[0])
