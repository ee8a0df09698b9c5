"""What every family keeps: the families are those of the folder, against diffusers' own pipelines.

What is silently wrong elsewhere is caught here: text entries that read something else than the text that
methods are given, masks that do not reach the denoiser, and drawings that are not the pipeline's.
"""

import contextlib

import pytest
import torch

import expunge
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.base import registry
from expunge.base.fields import build, leaves
from expunge.changes import find_layer
from expunge.checkpoints import text_moments
from expunge.checkpoints.cost_estimate import estimate_model
from expunge.checkpoints.export import export
from expunge.erasing.caption_gram import text_hash
from expunge.erasing.concept_tokens import last_tokens
from expunge.erasing.parameters import select_parameters
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.ops.attention import read_attention
from expunge.runtime.cost import Cost
from expunge.text import Text
from quick import QUICK, quick
from tiny import PIPELINES, VARIANTS, drawn_by_diffusers, loaded

FAMILIES = registry.list_names("families")
pytestmark = pytest.mark.filterwarnings("ignore:this model was distilled to draw without guidance")


def test_every_family_has_a_tiny_pipeline():
    assert set(FAMILIES) == set(PIPELINES)


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    return {**PIPELINES, **VARIANTS}[family]()


@pytest.fixture
def model(pipe, family):
    return loaded(pipe, family)


@pytest.fixture
def latents(model):
    return torch.randn(2, *model._latent_shape, generator=torch.Generator().manual_seed(5))


def states(pipe):
    return {
        f"{name}.{key}": tensor.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


@contextlib.contextmanager
def inputs_of(model, layers):
    """The first input of each layer, by its name, of every run inside the block."""
    seen = {layer: [] for layer in layers}
    hooks = [
        find_layer(model.pipe, layer).register_forward_pre_hook(
            lambda _, given, layer=layer: seen[layer].append(given[0].detach().clone())
        )
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draws_what_the_pipeline_draws(model, pipe, family, guidance):
    probe = Probe.of("a photo of the ship", 2, 3, num_inference_steps=3, guidance_scale=guidance)
    images = model.draw(probe)
    assert images.std() > 0.01
    theirs = drawn_by_diffusers(pipe, family, probe.prompts[0], probe.seeds, 3, guidance)
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)


def test_draws_at_its_own_settings(model, pipe, family):
    steps, guidance = model.num_inference_steps, model.guidance_scale
    assert 1 <= steps <= 50
    assert guidance >= 1
    (image,) = model.draw(Probe.of("ship", num_inference_steps=min(steps, 4)))
    (theirs,) = drawn_by_diffusers(pipe, family, "ship", [0], min(steps, 4), guidance)
    torch.testing.assert_close(image, theirs, rtol=0, atol=1e-4)


def test_text_moves_the_image(model):
    ship, bird = (
        model.draw(Probe.of(word, num_inference_steps=2, guidance_scale=3.0))
        for word in ("ship", "bird")
    )
    assert (ship - bird).abs().max() > 1e-3


def test_text_entries_read_the_embeddings(model, latents):
    """A norm or a projection in between would make every closed form silently wrong."""
    text = model.encode(["a photo of the ship"])
    entries = [entry.layer for entry in model.text_entries()]
    assert entries
    with torch.no_grad(), inputs_of(model, entries) as seen:
        model.predict(latents[:1], 500, text)
    places = text.read[0].nonzero().flatten()
    for layer in entries:
        assert len(seen[layer]) == 1, f"{layer} is asked {len(seen[layer])} times"
        rows = seen[layer][0].flatten(0, -2)
        torch.testing.assert_close(rows[places], text.embeddings[0, places], rtol=0, atol=1e-6)


def test_text_entries_read_the_same_when_the_pipeline_draws(model, pipe, family):
    text = model.encode(["a photo of the ship"])
    entries = [entry.layer for entry in model.text_entries()]
    with inputs_of(model, entries) as seen:
        drawn_by_diffusers(pipe, family, "a photo of the ship", [3], 1, 1.0)
    places = text.read[0].nonzero().flatten()
    for layer in entries:
        rows = seen[layer][0].flatten(0, -2)
        torch.testing.assert_close(rows[places], text.embeddings[0, places], rtol=1e-4, atol=1e-4)


def test_pooled_entries_read_the_pooled_vectors(model, latents):
    text = model.encode(["a photo of the ship"])
    entries = [entry.layer for entry in model.pooled_entries()]
    assert (text.pooled is not None) == bool(entries)
    with torch.no_grad(), inputs_of(model, entries) as seen:
        model.predict(latents[:1], 500, text)
    for layer in entries:
        given = seen[layer][0][:, : text.pooled.shape[1]]
        torch.testing.assert_close(given, text.pooled, rtol=0, atol=1e-6)


def test_the_text_that_is_not_read_has_no_say(model, latents):
    """The attention mask reaches the denoiser."""
    text = model.encode(["ship", "a photo of the ship"])
    if text.attention_mask is None:
        pytest.skip("the denoiser reads every token")
    assert not text.read.all()
    assert not text.embeddings[~text.read].any()
    loud = Text(
        text.prompts,
        text.embeddings,
        text.content_mask,
        text.ids,
        text.pooled,
        text.eos_index,
        text.segment_lengths,
        text.attention_mask,
    )
    object.__setattr__(loud, "embeddings", torch.where(text.read[..., None], text.embeddings, 7.0))
    with torch.no_grad():
        plain, shouted = (model.predict(latents, 500, x) for x in (text, loud))
    torch.testing.assert_close(plain, shouted, rtol=0, atol=1e-6)


def test_own_tokens_and_ends(model):
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
            if len(marked):
                assert text.read[row, marked].all()
    assert [int(text.content_mask[row].any()) for row in range(3)] == [1, 1, 0]
    again = model.encode(prompts[::-1])
    torch.testing.assert_close(again.embeddings[2], text.embeddings[0], rtol=1e-5, atol=1e-5)


def test_own_tokens_are_those_that_are_counted(model):
    for prompt in ("airplane", "a photo of the ship"):
        text = model.encode([prompt])
        # Of several encoders, one is the one that counts.
        counts = [int(text.content_mask[0, own].sum()) for own, _ in text.segments(0)]
        assert model.count_tokens(prompt) in counts


def test_the_phrase_and_what_ends_the_prompt_tell_it(model):
    """Where the concept stands: its last token differs from another's, and so does what is behind it."""
    one, other = (model.encode([f"a photo of the {word}"]) for word in ("ship", "bird"))
    differs = (one.embeddings - other.embeddings)[0].abs().amax(-1) > 1e-6
    for (own, end), _ in zip(one.segments(0), other.segments(0), strict=True):
        if one.content_mask[0, own].any():
            assert differs[end - 1]
            if end < own.stop and one.read[0, end]:
                assert differs[end]


def test_a_prompt_over_the_window_is_cut_and_said(model):
    long = " ".join(["ship"] * (model.window + 5))
    with pytest.warns(expunge.ExpungeWarning, match=f"the model reads the first {model.window}"):
        text = model.encode([long])
    assert text.embeddings.isfinite().all()
    with pytest.raises(ExpungeError, match=f"reads no more than {model.window}"):
        model.require_window([long])
    model.require_window(["ship " * (model.window - 1) + "ship"])


def test_time_goes_from_image_to_noise(model, latents):
    level = model.log_snr()
    assert level.dtype == torch.float64
    assert (level.diff() <= 0).all()
    assert level.diff()[:-1].max() < 0
    assert len(model.noise_scale()) == len(level)
    clean, noise = latents
    late = model.add_noise(clean[None], noise[None], torch.tensor([len(level) - 2]))
    early = model.add_noise(clean[None], noise[None], torch.tensor([1]))
    assert (early - clean).norm() < (early - noise).norm()
    assert (late - noise).norm() < (late - clean).norm()
    assert all(0 <= t < len(level) for t in model.timesteps(5))


def test_noise_has_the_variance_that_log_snr_says(model, latents):
    one, zero = torch.ones_like(latents), torch.zeros_like(latents)
    t = torch.full((2,), len(model.log_snr()) // 2)
    signal, noise = (model.add_noise(a, b, t).double().mean() for a, b in ((one, zero), (zero, one)))
    found = 2 * torch.log(signal / noise)
    torch.testing.assert_close(found, model.log_snr()[t[0]], rtol=1e-4, atol=1e-4)


def test_images_and_latents(model):
    images = model.decode(torch.zeros(1, *model._latent_shape))
    assert images.ndim == 4
    assert model.encode_images(images).shape == (1, *model._latent_shape)
    with pytest.raises(ExpungeError, match="this model draws"):
        model.encode_images(torch.zeros(1, 3, 5, 7))


def test_a_trajectory_yields_what_the_denoiser_is_given(model):
    text, given = model.encode(["ship"]), []
    guided = model._guided
    model._guided = lambda latents, *rest: given.append(latents) or guided(latents, *rest)
    points = list(model.trajectory(text, [0], num_inference_steps=3, guidance_scale=1.0))
    assert [t for t, _ in points] == [*model.timesteps(3), 0]
    assert all(torch.equal(a, b) for (_, a), b in zip(points, given, strict=False))


def test_the_prediction_is_that_of_each_row_alone(model, latents):
    text = model.encode(["ship", "a photo of the bird"])
    ones = torch.ones_like(latents)
    with torch.no_grad():
        both = model.predict(ones, torch.tensor([500, 300]), text)
        alone = model.predict(ones[1:], 300, text[[1]])
    assert both.shape == latents.shape
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_attention_adds_up_over_what_is_read(model, family, latents):
    if why := model.missing_capabilities.get("cross-attention"):
        with pytest.raises(ExpungeError, match=why):
            model.cross_attentions()
        return
    text = model.encode(["ship", "a photo of the bird"])
    attentions = model.cross_attentions()
    assert 2 * len(attentions) == len(model.text_entries())
    with torch.no_grad():
        maps = read_attention(attentions, lambda a: a, lambda: model.predict(latents, 500, text))
    for found in maps:
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        assert not found.movedim(-1, 1)[~text.read].any()


# Random text encoders leave more of a concept than is passed over in silence.
@pytest.mark.filterwarnings("ignore:the vector of the whole prompt keeps")
def test_ace_finds_the_gate_in_the_attention(model):
    if "cross-attention" in model.missing_capabilities:
        pytest.skip("there is no cross-attention")
    method = quick("ace", reduction="attention", stages=("gate",), num_retain_words=12)
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)
    layers = {layer for change in edit.changes for layer in change.layers}
    assert {entry.layer for entry in model.text_entries() if entry.role == "key"} <= layers


def test_what_can_be_trained_is_behind_the_text(model):
    """A layer that is part of `encode` gets no gradient from a prediction, and is never trained."""
    ahead = tuple(f"{model.denoiser}.{name}." for name in model.read_ahead)
    trained = select_parameters(model, "denoiser")
    assert trained
    assert not [name for name in trained if ahead and name.startswith(ahead)]


# Random text encoders leave more of a concept than is passed over in silence.
@pytest.mark.filterwarnings("ignore:the vector of the whole prompt keeps")
@pytest.mark.parametrize("name", registry.list_names("methods"))
def test_a_method_works_or_says_why_not(model, family, name, latents):
    kind = registry.get("methods", name)
    fast = dict(QUICK.get(name, {}))
    needs = registry.read_declared("methods", name, "needs")
    module = type(model).__module__.rpartition(".")[2]
    lacks = registry.read_declared("families", module, "missing_capabilities")
    assert (needs, lacks) == (dict(kind.needs), dict(model.missing_capabilities))
    # A few words and no captions tell enough.
    few = {"num_retain_words": 12, "captions": ""}
    fast |= {field.name: few[field.name] for field in leaves(kind) if field.name in few}
    missing = [stage for stage, need in needs.items() if need in lacks]
    # Nothing is retained: random text encoders tell no words apart, and ACE would refuse.
    problem = Problem((Concept("airplane", "sky"),))
    if missing:
        stages = getattr(kind, "stages", ())
        whole = {"stages": tuple(dict.fromkeys((*stages, *missing)))} if stages else {}
        with pytest.raises(ExpungeError, match=lacks[needs[missing[0]]]):
            expunge.erase(model, problem, build(kind, {**fast, **whole}))
        rest = tuple(stage for stage in stages if stage not in missing)
        if not rest:
            return
        fast["stages"] = rest
    before = states(model.pipe)
    edit = expunge.erase(model, problem, build(kind, fast))
    assert all(torch.equal(before[key], tensor) for key, tensor in states(model.pipe).items())
    prompts = ["airplane", *(way.format("airplane") for way in TEMPLATES["object"][:8])]
    changed = {layer for change in edit.changes for layer in change.layers}
    entries = [entry.layer for entry in model.text_entries()]
    layer = next((entry for entry in entries if entry in changed), entries[0])

    def said():
        """What the text makes of a layer that reads it, and of the prediction."""
        text = model.encode(prompts)
        with torch.no_grad():
            predicted = model.predict(latents[[0] * len(text)], 500, text)
        return torch.cat([find_layer(model.pipe, layer)(text.embeddings).flatten(), predicted.flatten()])

    with model.using(edit):
        after = said()
    assert (after - said()).abs().max() > 1e-4


def test_an_edit_moves_what_it_erases_and_is_saved_and_loaded(model, tmp_path):
    before = states(model.pipe)
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    method = quick("uce", ridge=0.01, num_retain_words=0)
    edit, again = (expunge.erase(model, problem, method) for _ in range(2))
    assert edit.hash == again.hash
    assert all(torch.equal(before[k], t) for k, t in states(model.pipe).items())
    edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(tmp_path / "edit.safetensors")
    assert read.hash == edit.hash
    assert read.fits(model)
    probe = Probe.of(["airplane", "ship", "bird"], 2, num_inference_steps=2, guidance_scale=3.0)
    original = model.draw(probe)
    with model.using(edit):
        edited = model.draw(probe)
    with model.using(read):
        torch.testing.assert_close(model.draw(probe), edited, rtol=0, atol=1e-6)
    assert (edited - original)[:2].abs().max() > 1e-4
    assert torch.equal(model.draw(probe), original)
    entry = model.text_entries()[0].layer
    weight = model.weight(entry).double()
    with model.using(edit):
        after = find_layer(model.pipe, entry).weight.detach().double()
    told = [TEMPLATES["object"][0].format(word) for word in ("airplane", "sky")]
    airplane, sky = last_tokens(model.encode(told)).unflatten(0, (2, -1))
    # Where the concept went in the layer itself, of the way to its anchor.
    left = (airplane @ after.T - sky @ weight.T).norm()
    assert left < 0.98 * (airplane @ weight.T - sky @ weight.T).norm()


def test_a_folder_is_loaded_and_draws_the_same(pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path / "tiny")
    model, again = loaded(pipe, family), loaded(tmp_path / "tiny", family)
    assert type(again) is type(model)
    if hasattr(pipe, "default_sample_size"):
        again.pipe.default_sample_size = pipe.default_sample_size
    probe = Probe.of("a photo of the ship", num_inference_steps=2, guidance_scale=2.0)
    torch.testing.assert_close(again.draw(probe), model.draw(probe), rtol=0, atol=1e-5)


# Random text encoders keep what is retained no better than the concept.
@pytest.mark.filterwarnings("ignore::expunge.ExpungeWarning")
def test_an_edit_leaves_as_a_lora_and_as_a_folder(pipe, family, tmp_path, monkeypatch):
    monkeypatch.setattr(text_moments, "MAX_MULTIPLICATIONS", 0)  # few captions tell enough
    pipe.save_pretrained(tmp_path / "tiny")
    model = loaded(tmp_path / "tiny", family)
    method = quick("uce", num_retain_words=0)
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)
    done = export(edit, "lora", tmp_path / "tiny", tmp_path / "x.safetensors", energy=1.0,
                  dtype=torch.float32)  # fmt: skip
    assert done.error < 1e-3
    assert "For " in done.notes[-1]
    export(edit, "diffusers", tmp_path / "tiny", tmp_path / "edited")
    by_lora = expunge.load(tmp_path / "tiny", lora=[(tmp_path / "x.safetensors", 1.0)])
    by_folder = expunge.load(tmp_path / "edited")
    with model.using(edit):
        for entry in model.text_entries():
            wanted = find_layer(model.pipe, entry.layer).weight.detach()
            for other in (by_lora, by_folder):
                torch.testing.assert_close(other.weight(entry.layer), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.filterwarnings("ignore::expunge.ExpungeWarning")
def test_the_work_is_estimated(model):
    made = estimate_model(model, work=Cost(prompts=10, predictions=4))
    assert 0 < made.seconds(Cost(prompts=10, predictions=4)) < 1e6
    assert set(made.parameters) >= {"denoiser", "autoencoder"}


def test_a_text_refiner_sees_text_alone_and_no_time(model, latents):
    if not model.text_refiner:
        with pytest.raises(ExpungeError, match="no layers that see text alone and no time"):
            select_parameters(model, "text-refiner")
        return
    text, seen = model.encode(["ship", "a photo of the bird"]), []
    layers = sorted({name.rpartition(".")[0] for name in select_parameters(model, "text-refiner")})
    hooks = [
        find_layer(model.pipe, layer).register_forward_hook(lambda *x: seen.append(x[2].clone()))
        for layer in layers
    ]
    with torch.no_grad():
        model.predict(latents, 900, text)
        model.predict(latents.flip(0) + 1, 100, text)
    for hook in hooks:
        hook.remove()
    half = len(seen) // 2
    assert half >= len(layers)
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize("name", ["esd", "ant"])
def test_training_is_confined_to_the_text_refiner(model, name):
    more = {"trained": "weights", "maps": 2, "map_samples": 1} if name == "ant" else {}
    method = quick(name, **more, max_train_steps=2, learning_rate=1e-2, train_on="text-refiner")
    problem = Problem((Concept("airplane", "sky"),))
    if not model.text_refiner:
        with pytest.raises(ExpungeError, match="no layers that see text alone and no time"):
            expunge.erase(model, problem, method)
        return
    edit = expunge.erase(model, problem, method)
    begins = tuple(f"{model.denoiser}.{layer}" for layer in model.text_refiner)
    changed = {layer for change in edit.changes for layer in change.layers}
    assert changed
    assert all(layer.startswith(begins) for layer in changed)
    probe = Probe.of("airplane", num_inference_steps=1)
    before = model.draw(probe)
    with model.using(edit):
        assert not torch.equal(model.draw(probe), before)


@pytest.mark.parametrize(
    ("name", "more"), [("mace", {"stages": ("refine", "fuse")}), ("ace", {"stages": ("gate", "harden")})]
)
def test_maces_and_aces_last_stages_are_in_the_text_refiner_as_they_are(name, more):
    model = loaded(PIPELINES["z_image"](), "z_image")
    with pytest.raises(ExpungeError, match="has no field 'train_on': .*layer through which text enters"):
        quick(name, train_on="text-refiner")
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), quick(name, **more))
    begins = tuple(f"{model.denoiser}.{layer}" for layer in model.text_refiner)
    assert all(layer.startswith(begins) for change in edit.changes for layer in change.layers)


def test_low_rank_changes_have_no_place_in_a_text_refiner():
    model = loaded(PIPELINES["z_image"](), "z_image")
    method = quick("ant", train_on="text-refiner", trained="low-rank")
    with pytest.raises(
        ExpungeError, match="train_on 'text-refiner' has no say: set trained to 'weights'"
    ):
        expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)


def test_what_a_prior_follows_from_has_a_hash_of_its_own(model, pipe):
    """What stands between prompts and embeddings: another projection, another template, more tokens."""
    before = text_hash(model, ["a ship"])
    assert text_hash(model, ["a ship"]) == before
    assert text_hash(model, ["a bird"]) != before
    for name in model.read_ahead:
        parameter = next(iter(model.network.get_submodule(name).parameters()))
        was = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(1)
            assert text_hash(model, ["a ship"]) != before
            parameter.copy_(was)
    if hasattr(model, "max_sequence_length"):
        model.max_sequence_length += 1
        assert text_hash(model, ["a ship"]) != before
