"""What every family keeps, over the registry, against diffusers' own pipelines; then what each has."""

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.base import registry
from expunge.base.fields import build
from expunge.changes import find_layer
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.families.flux import Flux
from quick import QUICK, quick
from tiny import PIPELINES, flux, sd3, sdxl

FAMILIES = registry.list_names("families")


def test_every_family_has_a_tiny_pipeline():
    assert set(FAMILIES) == set(PIPELINES)
    assert len(FAMILIES) >= 4


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    return PIPELINES[family]()


@pytest.fixture
def model(pipe):
    return expunge.load(pipe)


def states(pipe):
    return {
        f"{name}.{key}": tensor.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


def drawn_by_diffusers(pipe, prompt, seeds, steps, guidance):
    pipe.set_progress_bar_config(disable=True)
    size = {} if hasattr(pipe, "unet") or hasattr(pipe.transformer.config, "sample_size") else {
        "height": 16, "width": 16
    }  # fmt: skip
    return pipe(
        [prompt] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **size,
    ).images


class TestContract:
    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_draws_what_the_pipeline_draws(self, model, pipe, guidance):
        probe = Probe.of("a photo of the ship", 2, 3, num_inference_steps=3, guidance_scale=guidance)
        images = model.draw(probe)
        assert images.shape == (2, 3, 16, 16)
        assert images.std() > 0.01
        theirs = drawn_by_diffusers(pipe, probe.prompts[0], probe.seeds, 3, guidance)
        torch.testing.assert_close(images, theirs, rtol=0, atol=2e-5)

    def test_text_moves_the_image(self, model):
        ship, bird = (
            model.draw(Probe.of(word, num_inference_steps=2, guidance_scale=3.0))
            for word in ("ship", "bird")
        )
        assert (ship - bird).abs().max() > 1e-3

    def test_own_tokens_and_ends(self, model):
        prompts = ["airplane", "a photo of the ship", ""]
        text = model.encode(prompts)
        assert (
            sum(text.segment_lengths)
            == text.embeddings.shape[1]
            == text.content_mask.shape[1]
            == text.ids.shape[1]
        )
        for row in range(3):
            for own, end in text.segments(row):
                marked = text.content_mask[row, own].nonzero().flatten() + own.start
                assert marked.tolist() == list(range(end - len(marked), end))
        assert [int(text.content_mask[row].any()) for row in range(3)] == [1, 1, 0]
        again = model.encode(prompts[::-1])
        assert torch.equal(again.embeddings[2], text.embeddings[0])

    def test_time_goes_from_image_to_noise(self, model):
        level = model.log_snr()
        assert (level.diff() <= 0).all()
        shape = model.encode_images(torch.rand(1, 3, 16, 16)).shape
        latents, noise = torch.randn(shape), torch.randn(shape)
        late = model.add_noise(latents, noise, torch.tensor([len(level) - 2]))
        early = model.add_noise(latents, noise, torch.tensor([1]))
        assert (early - latents).norm() < (early - noise).norm()
        assert (late - noise).norm() < (late - latents).norm()

    def test_noise_has_the_variance_that_log_snr_says(self, model):
        shape = model.encode_images(torch.rand(1, 3, 16, 16)).shape
        one, zero = torch.ones(shape), torch.zeros(shape)
        t = torch.tensor([len(model.log_snr()) // 2])
        signal, noise = (model.add_noise(a, b, t).double().mean() for a, b in ((one, zero), (zero, one)))
        found = 2 * torch.log(signal / noise)
        torch.testing.assert_close(found, model.log_snr()[t[0]], rtol=1e-4, atol=1e-4)

    def test_a_trajectory_yields_what_the_denoiser_is_given(self, model):
        text, seen = model.encode(["ship"]), []
        hook = model.network.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        points = list(model.trajectory(text, [0], num_inference_steps=3, guidance_scale=1.0))
        hook.remove()
        assert [t for t, _ in points] == [*model.timesteps(3), 0]
        for (_, latents), given in zip(points, seen, strict=False):
            if latents.shape == given.shape:
                assert torch.equal(latents, given)
            torch.testing.assert_close(latents.norm(), given.norm())

    def test_the_prediction_is_that_of_the_denoiser(self, model):
        shape = model.encode_images(torch.rand(2, 3, 16, 16)).shape
        text = model.encode(["ship", "bird"])
        both = model.predict(torch.ones(shape), torch.tensor([500, 300]), text)
        alone = model.predict(torch.ones(shape)[1:], 300, text[[1]])
        assert both.shape == shape
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)

    def test_entries_are_layers_that_read_text(self, model):
        text = model.encode(["ship"])
        for entry in model.text_entries():
            assert model.weight(entry.layer).shape[1] == text.embeddings.shape[-1]
        for entry in model.pooled_entries():
            assert model.weight(entry.layer).shape[1] >= text.pooled.shape[-1]
        assert (text.pooled is not None) == bool(model.pooled_entries())

    # Random text encoders leave more of a concept than is passed over in silence.
    @pytest.mark.filterwarnings("ignore:the vector of the whole prompt keeps")
    @pytest.mark.parametrize("name", registry.list_names("methods"))
    def test_a_method_works_or_says_why_not(self, model, family, name):
        kind = registry.get("methods", name)
        rough = dict(QUICK.get(name, {}))
        needs = registry.read_declared("methods", name, "needs")
        lacks = registry.read_declared("families", family, "missing_capabilities")
        assert (needs, lacks) == (dict(kind.needs), dict(model.missing_capabilities))
        missing = [stage for stage, need in needs.items() if need in lacks]
        # Nothing is retained: random text encoders tell no words apart, and ACE would refuse.
        problem = Problem((Concept("airplane", "sky"),))
        if missing:
            stages = getattr(kind, "stages", ())
            whole = {"stages": tuple(dict.fromkeys((*stages, *missing)))} if stages else {}
            with pytest.raises(ExpungeError, match=lacks[needs[missing[0]]]):
                expunge.erase(model, problem, quick(name, **whole))
            rest = tuple(stage for stage in stages if stage not in missing)
            if not rest:
                return
            rough["stages"] = rest
        before = states(model.pipe)
        edit = expunge.erase(model, problem, build(kind, rough))
        assert all(torch.equal(before[key], tensor) for key, tensor in states(model.pipe).items())
        text = model.encode(["airplane"])
        changed = {layer for change in edit.changes for layer in change.layers}
        layer = next(entry.layer for entry in model.text_entries() if entry.layer in changed)
        with model.using(edit):
            after = find_layer(model.pipe, layer)(text.embeddings)
        assert (after - find_layer(model.pipe, layer)(text.embeddings)).abs().max() > 1e-4

    def test_uce(self, model):
        before = states(model.pipe)
        problem = Problem((Concept("airplane", "sky"),), ("ship", "bird"))
        method = registry.get("methods", "uce")(ridge=1.0, general=5)
        edit, again = (expunge.erase(model, problem, method) for _ in range(2))
        assert edit.hash == again.hash
        assert all(torch.equal(before[k], t) for k, t in states(model.pipe).items())
        probe = Probe.of(["airplane", "ship", "bird"], 2, num_inference_steps=2, guidance_scale=3.0)
        original = model.draw(probe)
        with model.using(edit):
            moved = (model.draw(probe) - original).abs().flatten(1).mean(1).reshape(3, 2).mean(1)
        assert moved[0] > 2 * max(moved[1:])
        assert torch.equal(model.draw(probe), original)


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
    theirs = drawn_by_diffusers(pipe, "ship", probe.seeds, 2, 4.0)
    torch.testing.assert_close(expunge.load(pipe).draw(probe), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pipe", [sd3(with_t5=False), sd3(use_dynamic_shifting=True)])
def test_sd3_without_t5_and_with_dynamic_shifting(pipe):
    model = expunge.load(pipe)
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    theirs = drawn_by_diffusers(pipe, "ship", probe.seeds, 2, 4.0)
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
