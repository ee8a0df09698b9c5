"""The image cache: drawn once, the same from the cache, whole whatever happens."""

import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tokenizers import Tokenizer

import expunge
from expunge import ExpungeError, ExpungeWarning
from expunge.evaluation.image_cache import Cache, quantise
from expunge.evaluation.image_source import Request, Source, encode_residual
from expunge.fingerprint import hash_for_images
from tiny import PIPELINES, flux, sdxl

ASKED = [Request(prompt, seed, 2, 3.0) for prompt in ("a ship", "a cat") for seed in (0, 1)]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def edit(model, problem):
    return expunge.erase(model, problem, "uce")


def test_an_image_is_the_same_drawn_and_from_the_cache(model, cache):
    fresh = cache.draw(Source(model), ASKED)
    again = cache.draw(Source(model), ASKED)
    assert cache.drawn == 4
    assert torch.equal(fresh, again)
    assert torch.equal(fresh, (fresh * 255).round() / 255)
    probe = expunge.Probe.of(["a ship", "a cat"], 2, 0, 2, 3.0)
    torch.testing.assert_close(fresh, model.draw(probe), atol=0.5 / 255 + 1e-6, rtol=0)
    assert len(list(cache.folder.glob("*/*.png"))) == 4


def test_an_address_hangs_on_everything(model, edit, pipe):
    from conftest import tiny_pipeline

    plain = Source(model)
    sources = [plain, Source(model, (edit,)), Source(expunge.load(tiny_pipeline(seed=1)))]
    requests = [
        ASKED[0],
        Request("a boat", 0, 2, 3.0),
        Request("a ship", 1, 2, 3.0),
        Request("a ship", 0, 3, 3.0),
        Request("a ship", 0, 2, 4.0),
        Request("a ship", 0, 2, 3.0, "the sky"),
    ]
    found = [plain.address(request) for request in requests]
    found += [source.address(ASKED[0]) for source in sources[1:]]
    pipe.scheduler.register_to_config(steps_offset=0)
    found.append(Source(model).address(ASKED[0]))
    assert len(set(found)) == len(found)
    pipe.scheduler.register_to_config(steps_offset=1)
    assert Source(expunge.load(tiny_pipeline())).address(ASKED[0]) == found[0]


def test_images_drawn_in_another_number_format_are_other_images(model, cache):
    before = cache.draw(Source(model), ASKED)
    with model.autocasting(torch.bfloat16):
        rounded = cache.draw(Source(model), ASKED)
        assert model.dtype == torch.float32
    assert cache.drawn == 8
    assert model.autocast is None
    # Rounded, and no more than that.
    assert 0 < (before - rounded).abs().mean() < 0.02
    assert torch.equal(cache.draw(Source(model), ASKED), before)


def test_edits_lie_on_the_model_only_while_it_draws(model, edit, cache):
    before = hash_for_images(model)
    plain, edited = cache.draw(Source(model), ASKED), cache.draw(Source(model, (edit,)), ASKED)
    assert not torch.equal(plain, edited)
    with edit.apply(model), pytest.raises(ExpungeError, match="take it off"):
        Source(model)
    del model.__dict__["_hash"]
    assert hash_for_images(model) == before


def test_a_run_that_was_stopped_goes_on(model, cache, monkeypatch):
    monkeypatch.setattr("expunge.evaluation.image_cache.BATCH", 1)
    drawn = []

    def stop(self, requests, progress):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(requests)
        return original(self, requests, progress)

    original = Source.draw
    monkeypatch.setattr(Source, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.draw(Source(model), ASKED)
    monkeypatch.setattr(Source, "draw", original)
    again = Cache(cache.folder.parent)
    assert again.draw(Source(model), ASKED).shape[0] == 4
    assert again.drawn == 2
    assert not list(cache.folder.glob("*/.*"))


@pytest.mark.parametrize("harm", ["cut", "empty", "other pixels"])
def test_a_damaged_image_is_drawn_again_and_said(model, cache, harm):
    fresh = cache.draw(Source(model), ASKED)
    address = Source(model).address(ASKED[1])
    cache.keep_scores(address, {"x": torch.ones(1)})
    path = cache.path(address)
    if harm == "other pixels":
        path.write_bytes(cache.path(Source(model).address(ASKED[0])).read_bytes()[:-40] + bytes(40))
    else:
        path.write_bytes(path.read_bytes()[: 60 if harm == "cut" else 0])
    with pytest.warns(ExpungeWarning, match="'a ship', seed 1, is damaged; drawn again"):
        again = cache.draw(Source(model), ASKED)
    assert torch.equal(fresh, again)
    assert cache.drawn == 5
    assert cache.read_scores(address) == {}


def test_numbers_lie_beside_the_image(cache):
    address = "ab" * 32
    assert cache.read_scores(address) == {}
    cache.keep_scores(address, {"one": torch.tensor([1.0, 2.0])})
    cache.keep_scores(address, {"two": torch.tensor([0.1])})
    found = cache.read_scores(address)
    assert found["one"].tolist() == [1, 2]
    assert torch.equal(found["two"], torch.tensor([0.1]))
    cache.path(address, ".safetensors").write_bytes(b"nonsense")
    assert cache.read_scores(address) == {}


def test_the_oldest_go_first(model, cache):
    import os

    cache.draw(Source(model), ASKED)
    paths = [cache.path(Source(model).address(request)) for request in ASKED]
    for age, path in enumerate(paths):
        os.utime(path, (1e9 + age, 1e9 + age))
    cache.draw(Source(model), ASKED[:1])  # used: now the newest
    limit = sum(path.stat().st_size for path in (paths[0], paths[3]))
    assert cache.prune(limit) == 2
    assert [path.is_file() for path in paths] == [True, False, False, True]
    assert cache.prune(10**9) == 0


def test_what_is_no_number_stays_none(model, cache, monkeypatch):
    bad = torch.full((1, 3, 16, 16), torch.nan)
    monkeypatch.setattr(type(model), "draw", lambda *_, **__: bad)
    fresh, again = (cache.draw(Source(model), ASKED[:1]) for _ in range(2))
    assert fresh.isnan().all()
    assert again.isnan().all()
    assert cache.drawn == 1
    assert [image.dtype for image in quantise(torch.cat([bad, bad * 0 + 1]))] == [torch.int16] * 2


def test_the_residual_keeps_the_end_and_the_padding(model):
    prompt, stand_in = "a photo of the airplane", "the sky"
    text, concept, other = (
        encode_residual(model, [prompt], stand_in),
        model.encode([prompt]),
        model.encode([stand_in]),
    )
    own, end = int(other.content_mask[0].sum()), 1 + int(concept.content_mask[0].sum())
    assert text.embeddings.shape == concept.embeddings.shape
    assert torch.equal(text.embeddings[0, : 1 + own], other.embeddings[0, : 1 + own])
    kept = concept.embeddings.shape[1] - end
    assert torch.equal(text.embeddings[0, 1 + own : 1 + own + kept], concept.embeddings[0, end:])
    longer = encode_residual(model, [stand_in], prompt)
    assert longer.embeddings.shape == concept.embeddings.shape
    assert torch.equal(longer.embeddings[0, end:], other.embeddings[0, 1 + own :][: 77 - end])


def test_a_full_disk_is_one_sentence(model, tmp_path):
    (tmp_path / "pictures").write_text("in the way")
    with pytest.raises(ExpungeError, match="cannot write"):
        Cache(tmp_path).draw(Source(model), ASKED[:1])


def settings():
    """Everything besides weights that changes images: what it is called, and how it is set."""

    def add_token(model):
        model.pipe.tokenizer.add_tokens(["blorp"])

    def other_merges(model):
        from conftest import tiny_tokenizer

        model.pipe.tokenizer = tiny_tokenizer()
        state = json.loads(model.pipe.tokenizer.backend_tokenizer.to_str())
        state["model"]["merges"] = state["model"]["merges"][::-1]
        model.pipe.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))

    def betas(model):
        model.pipe.scheduler.alphas_cumprod = model.pipe.scheduler.alphas_cumprod * 0.9

    def circular(model):
        model.pipe.unet.conv_in.padding_mode = "circular"

    return {
        "a token more": add_token,
        "other merges": other_merges,
        "another padding token": lambda m: setattr(m.pipe.tokenizer, "pad_token", "!"),
        "a shorter window": lambda m: setattr(m.pipe.tokenizer, "model_max_length", 20),
        "padding at the left": lambda m: setattr(m.pipe.tokenizer, "padding_side", "left"),
        "a family's setting": lambda m: setattr(m, "max_sequence_length", 128),
        "FreeU": lambda m: m.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        "tiles": lambda m: m.pipe.vae.enable_tiling(),
        "padding of convolutions": circular,
        "the autoencoder's scale": lambda m: m.pipe.vae.register_to_config(scaling_factor=0.5),
        "the scheduler's kind": lambda m: setattr(
            m.pipe, "scheduler", EulerDiscreteScheduler.from_config(m.pipe.scheduler.config)
        ),
        "a setting of the scheduler": lambda m: m.pipe.scheduler.register_to_config(
            rescale_betas_zero_snr=True
        ),
        "a noise schedule set by hand": betas,
        "the size": lambda m: setattr(m, "sample_size", 4),
        "the number format": lambda m: setattr(m, "autocast", torch.bfloat16),
        "weights written to": lambda m: m.pipe.unet.conv_in.weight.detach().mul_(1.5),
        "weights replaced": lambda m: setattr(
            m.pipe.unet.conv_in, "weight", torch.nn.Parameter(m.pipe.unet.conv_in.weight.detach() * 2)
        ),
    }


@pytest.mark.parametrize("name", settings())
def test_an_address_hangs_on_all_that_is_set(model, name):
    before = Source(model).address(ASKED[0])
    assert Source(model).address(ASKED[0]) == before
    settings()[name](model)
    assert Source(model).address(ASKED[0]) != before


def test_the_empty_prompt_of_sdxl_and_the_window_of_flux_are_other_images(cache):
    for make, change in (
        (sdxl, lambda m: m.pipe.register_to_config(force_zeros_for_empty_prompt=False)),
        (flux, lambda m: setattr(m, "max_sequence_length", 16)),
    ):
        model, asked = expunge.load(make()), [Request("a ship", 0, 2, 4.0)]
        before, drawn = cache.draw(Source(model), asked), cache.drawn
        change(model)
        assert not torch.equal(cache.draw(Source(model), asked), before)
        assert cache.drawn == drawn + 1


@pytest.mark.parametrize("family", PIPELINES)
def test_drawing_and_saving_change_no_address(family, cache, tmp_path):
    PIPELINES[family]().save_pretrained(tmp_path / "first")
    model = expunge.load(tmp_path / "first")
    # Some are made to draw smaller than they are loaded, and so large they are not drawn with here.
    sized = family in ("flux", "flux2", "qwen_image", "chroma", "z_image", "wan")
    before = Source(model).identity
    if not sized:
        cache.draw(Source(model), [Request("a ship", 0, 1, 3.0)])
    model.encode(["a cat", "a very long prompt of many words"])
    assert Source(model).identity == before
    model.pipe.save_pretrained(tmp_path / "model")
    assert Source(expunge.load(tmp_path / "model")).identity == before
