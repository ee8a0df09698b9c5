"""The family's answers, against diffusers' own pipeline."""

import json
import re

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)

import expunge
from conftest import tiny_pipeline, weights
from expunge import ExpungeError, ExpungeWarning, Probe
from expunge.changes import Gated, LowRank


def drawn_by_diffusers(pipe, prompt, seeds, steps, guidance):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        [prompt] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
    ).images


V = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}


@pytest.mark.parametrize("scheduler", [{}, V])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draws_what_the_pipeline_draws(scheduler, guidance):
    pipe = tiny_pipeline(**scheduler)
    probe = Probe.of("a photo of the ship", 2, 3, num_inference_steps=4, guidance_scale=guidance)
    images = expunge.load(pipe).draw(probe)
    assert images.shape == (2, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    theirs = drawn_by_diffusers(pipe, probe.prompts[0], probe.seeds, 4, guidance)
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-5)


def test_a_sampler_with_memory():
    pipe = tiny_pipeline(**V)
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    probe = Probe.of("ship", 3, num_inference_steps=5, guidance_scale=3.0)
    images = expunge.load(pipe).draw(probe, batch_size=2)
    theirs = drawn_by_diffusers(pipe, "ship", probe.seeds, 5, 3.0)
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-5)


def test_text_layers_answer_once_a_batch_even_with_gates(model, pipe):
    key, *_ = (entry.layer for entry in model.text_entries())
    layer, asked = pipe.unet.get_submodule(key.removeprefix("unet.")), []
    hook = layer.register_forward_hook(lambda *_: asked.append(1))
    model.draw(Probe.of("ship", 4, num_inference_steps=5), batch_size=2)
    assert len(asked) == 2
    hook.remove()
    one = torch.ones(1)
    gate = Gated(
        (key,),
        torch.ones(1, 32),
        one,
        one,
        up=torch.ones(32, 1),
        down=torch.ones(1, 32),
        goal=one,
        owner=0 * one.long(),
    )
    with model.using([gate]):
        gated = model.draw(Probe.of("ship", 1, num_inference_steps=2))
        theirs = drawn_by_diffusers(pipe, "ship", [0], 2, 7.5)
    torch.testing.assert_close(gated, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(gated, model.draw(Probe.of("ship", 1, num_inference_steps=2)))
    assert pipe.unet.get_submodule(key.removeprefix("unet.")) is layer


def test_a_sampler_with_noise_of_its_own(pipe):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    probe = Probe.of("ship", 2, num_inference_steps=3)
    images = expunge.load(pipe).draw(probe)
    theirs = drawn_by_diffusers(pipe, "ship", probe.seeds, 3, 7.5)
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-5)


def test_an_image_depends_on_its_own_row_alone(model):
    probe = Probe(("ship", "bird", "ship"), (4, 5, 6), num_inference_steps=3)
    together, alone = model.draw(probe), model.draw(probe, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    only = model.draw(Probe(("ship",), (6,), num_inference_steps=3))
    torch.testing.assert_close(only[0], together[2], rtol=0, atol=1e-5)


def test_a_probe_may_bring_its_own_text(model):
    probe = Probe.of("ship", 2, num_inference_steps=2)
    attacked = Probe(("?", "?"), probe.seeds, 2, text=model.encode(["ship", "ship"]))
    assert torch.equal(model.draw(attacked), model.draw(probe))


def test_drawing_tells_progress(model):
    told = []
    model.draw(
        Probe.of("ship", 3, num_inference_steps=2), batch_size=2, progress=lambda *a: told.append(a)
    )
    done = [n for _, n, _ in told]
    assert done == sorted(done)
    assert told[-1] == ("drawing", 6, 6)


def test_encode_marks_own_tokens(model):
    text = model.encode(["airplane", "a photo of the ship", "", "airplane"])
    assert text.embeddings.shape == (4, 77, 32)
    assert text.content_mask.sum(1).tolist() == [model.count_tokens(prompt) for prompt in text.prompts]
    assert text.content_mask.sum(1)[[0, 2]].tolist() == [1, 0]
    assert torch.equal(text.embeddings[0], text.embeddings[3])
    assert not text.content_mask[:, 0].any()
    assert text[[1]].prompts == ("a photo of the ship",)


def test_a_long_prompt_is_cut_and_said(model):
    long = "ship " * 76
    with pytest.warns(ExpungeWarning, match="76 tokens; the model reads the first 75"):
        text = model.encode([long])
    assert text.content_mask.sum() == 75
    with pytest.raises(ExpungeError, match="76 tokens, and this model reads no more than 75"):
        model.require_window([long])
    model.require_window(["ship " * 75])


def test_text_entries_are_the_cross_attention(model, pipe):
    entries = model.text_entries()
    assert len(entries) == 14
    assert sum(entry.role == "key" for entry in entries) == 7
    for entry in entries:
        layer = pipe.unet.get_submodule(entry.layer.removeprefix("unet."))
        assert layer.in_features == 32


def test_denoise_stops_on_the_way(model):
    text = model.encode(["ship"])
    whole = list(model.trajectory(text, [0], num_inference_steps=4))
    assert len(whole) == 5
    for until in (0, 2, 4):
        t, latents = model.denoise(text, [0], until=until, num_inference_steps=4)
        assert t == whole[until][0]
        torch.testing.assert_close(latents, whole[until][1])
    with pytest.raises(ExpungeError, match="until must be 0 to 4"):
        model.denoise(text, [0], until=5, num_inference_steps=4)


def test_predict_has_gradients_through_changes(model):
    key = next(entry.layer for entry in model.text_entries())
    up = torch.zeros(8, 1, requires_grad=True)
    latents, text = torch.randn(2, 4, 8, 8), model.encode(["ship", "bird"])
    with model.using([LowRank((key,), up, torch.ones(1, 32))]):
        model.predict(latents, 500, text).square().sum().backward()
    assert up.grad.abs().max() > 0


def test_vocabulary_is_whole_words(model):
    words = model.vocabulary()
    assert {"airplane", "ship", "horse"} <= set(words)
    assert all(word.isalpha() for word in words)


def test_load_reads_a_folder_and_its_settings(folder, tmp_path):
    import shutil

    path = shutil.copytree(folder, tmp_path / "mine")
    settings = {"num_inference_steps": 3, "guidance_scale": 2, "anchors": {"object": "ship"}}
    (path / "expunge.json").write_text(json.dumps(settings))
    model = expunge.load(path)
    assert model.name == "mine"
    assert (model.num_inference_steps, model.guidance_scale) == (3, 2.0)
    assert model.anchors["object"] == "ship"
    assert model.anchors["style"] == "art"
    before, original = weights(model.pipe), weights(tiny_pipeline())
    assert all(torch.equal(before[k], v) for k, v in original.items())
    (path / "expunge.json").write_text("[]")
    with pytest.raises(ExpungeError, match="not a JSON table"):
        expunge.load(path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(ExpungeError, match=f"no device '{device}'; give auto or cpu"):
        expunge.load(folder, device=device)


def test_load_refuses(folder, tmp_path):
    import shutil

    with pytest.raises(ExpungeError, match="no model 'emojy'"):
        expunge.load("emojy")
    with pytest.raises(ExpungeError, match=r"no model_index\.json"):
        expunge.load(tmp_path)
    file = tmp_path / "x.safetensors"
    file.write_text("")
    with pytest.raises(ExpungeError, match="not a whole safetensors file"):
        expunge.load(file)
    path = shutil.copytree(folder, tmp_path / "cut")
    shard = path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ExpungeError, match="not a whole safetensors file"):
        expunge.load(path)
    shard.unlink()
    with pytest.raises(ExpungeError, match="cannot load"):
        expunge.load(path)
    shard.write_bytes(whole)
    (path / "unet" / "config.json").write_text("{")
    with pytest.raises(ExpungeError, match="cannot load"):
        expunge.load(path)
    other = DDPMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(4,),
            norm_num_groups=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        DDPMScheduler(),
    )
    with pytest.raises(ExpungeError, match="no family knows the pipeline DDPMPipeline"):
        expunge.load(other)


def test_a_trajectory_yields_what_the_denoiser_is_given(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    model, given = expunge.load(pipe), []
    predict = model.predict
    model.predict = lambda latents, t, text: given.append(latents) or predict(latents, t, text)
    text = model.encode(["ship"])
    points = list(model.trajectory(text, [0], num_inference_steps=3, guidance_scale=1.0))
    assert all(torch.equal(a, b) for (_, a), b in zip(points, given, strict=False))
    assert float(points[0][1].std()) == pytest.approx(1, abs=0.1)
    assert [t for t, _ in points[:-1]] == list(model.timesteps(3))


def samplers():
    import diffusers

    names = ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler",
             "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"]  # fmt: skip
    return [getattr(diffusers, name) for name in names]


@pytest.mark.parametrize("sampler", samplers(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_extreme_numbers_of_steps(pipe, sampler, spacing):
    more = {"skip_prk_steps": True} if "PNDM" in sampler.__name__ else {}
    pipe.scheduler = sampler.from_config(pipe.scheduler.config, timestep_spacing=spacing, **more)
    model = expunge.load(pipe)
    model.predict = lambda latents, t, text: torch.zeros_like(latents)
    text, taken = model.encode(["cat"]), []
    for steps in (1, 1000):
        refused = None
        try:
            with torch.no_grad():
                *_, (t, latents) = model.trajectory(text, [0], num_inference_steps=steps)
        except ExpungeError as error:
            refused = str(error)
        if refused:
            said = re.fullmatch(
                rf"this model's sampler, {sampler.__name__}, cannot take {steps} steps?; (\d+) it can",
                refused,
            )
            assert said, refused
            with torch.no_grad():
                *_, (t, latents) = model.trajectory(text, [0], num_inference_steps=int(said[1]))
        else:
            taken.append(steps)
        assert t == 0
        assert bool(latents.isfinite().all())
    assert taken[0] == 1


def test_a_thousand_steps_of_ddim_is_one_sentence(folder, tmp_path, capsys):
    from expunge.cli.main import main

    command = ["draw", "a cat", "--model", str(folder), "-o", str(tmp_path / "x.png")]
    assert main([*command, "--steps", "1000"]) == 2
    assert capsys.readouterr().err == (
        "expunge: this model's sampler, DDIMScheduler, cannot take 1000 steps; 999 it can\n"
    )
    assert not (tmp_path / "x.png").exists()
