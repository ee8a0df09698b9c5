"""How the miniature's nets are trained: arithmetic, loop, sentences, and each stage's loss."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.miniature import fast, losses, unet, vae
from training.miniature.fast import autocast, has_bfloat16, kernels, quicken
from training.miniature.loop import Schedule, train, write_json, write_model
from training.miniature.muon import Muon, orthogonalise
from training.miniature.sentences import (
    Codes,
    Mention,
    Sentence,
    Spans,
    Vocabulary,
    lexicon_of,
    pair_of,
    replace_words,
)  # fmt: skip
from training.miniature.tokenizer import train_tokenizer
from training.miniature.tower import Reader, Shifts, Tower, build, matching
from training.miniature.world import read_world

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="the processor has no bfloat16")


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return unet.build(4, 16, width=32, channels=(32, 32, 64))


def unet_run(net: nn.Module, copies: int = 1, quick: bool = False) -> tuple[Tensor, Tensor]:
    """Output and gradient for four samples and `4 / copies` texts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 16, 16, generator=generator)
    text = torch.randn(4 // copies, 7, 32, generator=generator)
    with autocast(quick):
        out = net(x, torch.tensor([1, 200, 500, 900]), text).sample.float()
    (out - x).square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    return out.detach(), found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- arithmetic ----------------------------------------------------------------------------------------


def test_products_attend_as_diffusers_does() -> None:
    net = small_unet()
    out, gradient = unet_run(net)
    net.set_attn_processor(fast.ProductAttention())
    quick_out, quick_gradient = unet_run(net)
    assert distance(quick_out, out) < 1e-5
    assert distance(quick_gradient, gradient) < 1e-4


def test_a_text_serves_several_samples() -> None:
    net = small_unet()
    net.set_attn_processor(fast.ProductAttention())
    x, times = torch.randn(4, 4, 16, 16), torch.tensor([3, 3, 3, 3])
    text = torch.randn(2, 7, 32)
    with torch.no_grad():
        shared = net(x, times, text).sample
        repeated = net(x, times, text.repeat_interleave(2, 0)).sample
    assert torch.allclose(shared, repeated, atol=1e-5)


@needs_bfloat16
def test_a_quickened_unet_has_the_same_gradients(one_thread: None) -> None:
    if kernels() is None:
        pytest.skip("no C compiler")
    net = small_unet().train()
    out, gradient = unet_run(net)
    names = list(net.state_dict())
    quick_out, quick_gradient = unet_run(quicken(net), quick=True)
    assert distance(quick_out, out) < 0.03
    assert distance(quick_gradient, gradient) < 0.05
    assert list(net.state_dict()) == names


@needs_bfloat16
@pytest.mark.parametrize("silu", [0, 1])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_group_normalization_of_our_own(one_thread: None, silu: int, mean: float) -> None:
    if kernels() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    x = (torch.randn(3, 24, 5, 7) + mean).bfloat16()
    norm = fast.QuickGroupNorm(4, 24)
    norm.silu = silu
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    weight = torch.randn(3, 24, 5, 7)

    def run(function: Callable[[Tensor], Tensor], given: Tensor) -> list[Tensor]:
        given = given.clone().requires_grad_()
        norm.zero_grad()
        out = function(given)
        (out.float() * weight).sum().backward()
        found = (out, given.grad, norm.weight.grad, norm.bias.grad)
        return [part.detach().float() for part in found if part is not None]

    exact = nn.GroupNorm.forward
    wanted = run(
        lambda y: torch.nn.functional.silu(exact(norm, y)) if silu else exact(norm, y), x.float()
    )
    with autocast(True):
        found = run(norm, x)
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) < 0.01


@needs_bfloat16
def test_small_convolutions_have_torchs_gradients() -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(8, 12, 3, padding=1)
    quick = fast.SmallConv2d(8, 12, 3, padding=1)
    quick.load_state_dict(usual.state_dict())
    x = torch.randn(2, 8, 4, 4)
    grads = []
    for conv, on in ((usual, False), (quick, True)):
        given = x.clone().requires_grad_()
        with autocast(on):
            conv(given).float().square().sum().backward()
        grads.append((given.grad, conv.weight.grad, conv.bias.grad))  # type: ignore[union-attr]
    for one, other in zip(*grads, strict=True):
        assert distance(one, other) < 0.02


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 6, 30), (3, 30, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), steps=8))
    assert values.min() > 0.5
    assert values.max() < 1.4


# -- the loop ------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        x = torch.randn(8, 6)  # seeded by the loop
        loss = (self.layer(x) - x[:, :4]).square().mean()
        return loss, {"loss": loss.detach()}


def fit(folder: Path, steps: int, name: str = "line", **how: Any) -> Line:
    module = Line()
    schedule = how.pop("schedule", Schedule(0.01, 3))
    train(name, module, module.loss, folder, Muon(module, 0.01), schedule, minutes=1, steps=steps, **how)
    return module


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", 6)
    fit(tmp_path / "b", 2)
    parts = fit(tmp_path / "b", 4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
    a, b = (torch.load(tmp_path / name / "line.pt", weights_only=True) for name in "ab")
    assert a["step"] == b["step"] == 6
    assert torch.equal(a["average"]["layer.weight"], b["average"]["layer.weight"])


def test_sigterm_ends_a_step_in_peace(tmp_path: Path) -> None:
    module = Line()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return module.loss(step)

    train("line", module, loss_of, tmp_path, Muon(module, 0.01), Schedule(0.01), minutes=1, steps=50)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert state["step"] == 3
    assert torch.equal(state["module"]["layer.weight"], module.layer.weight)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_copy_is_annealed_and_its_start_stays(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    before = (tmp_path / "line.pt").read_bytes()
    fit(tmp_path, 2, "line-end", start="line", schedule=Schedule(0.01, 3, anneal=1.0))
    end = torch.load(tmp_path / "line-end.pt", weights_only=True)
    assert end["step"] == 5
    assert (tmp_path / "line.pt").read_bytes() == before


def test_a_missing_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        fit(tmp_path, 1, start="nowhere")


def test_the_rate_warms_up_stays_and_falls() -> None:
    stays = Schedule(2.0, 10)
    assert [stays.at(step, 0) for step in (0, 4, 9, 10_000)] == [0.2, 1.0, 2.0, 2.0]
    falls = Schedule(2.0, 10, anneal=20)
    assert [falls.at(500, minutes) for minutes in (0, 5, 20, 25)] == [2.0, 1.5, 0.0, 0.0]


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    write_json({"a": 1.5}, tmp_path / "results" / "x.json")
    assert json.loads((tmp_path / "results" / "x.json").read_text(encoding="utf-8")) == {"a": 1.5}


# -- sentences -----------------------------------------------------------------------------------------

WORDS = Vocabulary(
    {"object:cat": ("cat", "kitty"), "object:elephant": ("elephant",), "person:Ada Lum": ("Ada Lum",)},
    {"object": ("thing",), "person": ("person",)},
)


@pytest.mark.parametrize(
    ("text", "old", "new", "wanted"),
    [
        ("a photo of a cat", "cat", "elephant", "a photo of an elephant"),
        ("an axe, a cat", "axe", "cat", "a cat, a cat"),
        ("the cat in a cathedral", "cat", "dog", "the dog in a cathedral"),
        ("concatenate cats", "cat", "dog", "concatenate cats"),
    ],
)
def test_words_are_replaced_whole(text: str, old: str, new: str, wanted: str) -> None:
    assert replace_words(text, old, new) == wanted


def test_a_pair_differs_in_one_concept() -> None:
    cat = Sentence(
        "a red cat", (Mention("cat", "object:cat"),), frozenset({"object:cat", "object:cat+colour:red"})
    )
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        pair = pair_of(cat, WORDS, rng)
        seen.add(pair.second.text)
        assert pair.same == (pair.second.facts == cat.facts)
        if "elephant" in pair.second.text:
            assert pair.second.facts == {"object:elephant", "object:elephant+colour:red"}
    assert seen == {"a red kitty", "a red thing", "a red elephant"}


def test_a_caption_is_read() -> None:
    lexicon = lexicon_of(read_world())
    read = lexicon.read("a red circle above the kitty on the left, a cat face at the beach")
    assert read.facts == {
        "colour:red", "shape:circle", "shape:circle+colour:red", "object:cat", "where:on the left",
        "object:cat+where:on the left", "object:cat face", "place:beach",
    }  # fmt: skip
    assert lexicon.read("nothing at all").mentions == ()
    name = read_world().named[0].name
    worn = lexicon.read(f"{name} wearing a blue shirt on a red background")
    assert f"person:{name}+colour:blue" in worn.facts
    assert f"person:{name}+colour:red" not in worn.facts


def test_codes_are_fixed_and_of_length_one() -> None:
    facts = [frozenset({"a", "b"}), frozenset({"b"}), frozenset()]
    one, other = Codes(16)(facts), Codes(16)(facts)
    assert torch.equal(one, other)
    assert torch.allclose(one.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)


# -- tokenizer and tower ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [
        "a photo of a cat",
        "Ada Lum and an elephant",
        "a thing, a person, a kitty in the snow",
    ] * 40
    return train_tokenizer(texts, size=640)


def test_words_of_the_world_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("Ada Lum and a kitty") == [
        "ada</w>",
        "lum</w>",
        "and</w>",
        "a</w>",
        "kitty</w>",
    ]
    ids = tokenizer("a cat", padding="max_length", max_length=8).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[3:] == [tokenizer.eos_token_id] * 5
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_a_mention_is_found_among_the_tokens(tokenizer: Any) -> None:
    spans = Spans(tokenizer)
    ids = tokenizer("a photo of Ada Lum in the snow").input_ids
    assert spans.find(ids, "Ada Lum") == (4, 6)
    assert spans.find(ids, "kitty") is None


def test_a_batch_knows_where_things_stand(tokenizer: Any) -> None:
    reader = Reader(tokenizer, WORDS)
    cat = Sentence("a photo of a cat", (Mention("cat", "object:cat"),), frozenset({"object:cat"}))
    rng = random.Random(1)
    pairs = [pair_of(cat, WORDS, rng) for _ in range(12)] + [
        pair_of(Sentence("", (), frozenset()), WORDS, rng)
    ]
    batch = reader(pairs)
    assert batch.last[:12].tolist() == [5] * 12
    assert batch.end[:12].tolist() == [6] * 12
    assert batch.concept[:13].tolist() == [0] * 12 + [-1]
    same = torch.tensor([pair.same for pair in pairs])
    assert torch.equal(batch.differs[:12], ~same[:12])
    assert not batch.differs[12]
    assert torch.equal(batch.synonym[:12], same[:12])


def test_the_tower_learns_to_match_and_to_keep_apart(tokenizer: Any) -> None:
    torch.manual_seed(0)
    reader = Reader(tokenizer, WORDS)
    tower = Tower(build(tokenizer, width=64, layers=1, inner=64), len(reader.place))
    texts = [("a cat in the snow", "cat", "object:cat"), ("Ada Lum", "Ada Lum", "person:Ada Lum")]
    sentences = [Sentence(text, (Mention(words, key),), frozenset({key})) for text, words, key in texts]
    rng = random.Random(0)
    optimiser = torch.optim.AdamW(tower.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss, notes = tower(reader([pair_of(rng.choice(sentences), WORDS, rng) for _ in range(8)]))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert set(notes) > {"accuracy", "word-end", "word-pad", "|behind|"}
    assert losses[-1] < 0.75 * losses[0]


def test_alignment_is_none_where_shifts_are_at_right_angles() -> None:
    a, b = torch.eye(6)[:3], torch.eye(6)[3:]
    none = torch.zeros(0)
    apart = Shifts(a, a, b, b, none, none)
    together = Shifts(a, a, a, a, none, none)
    assert apart.alignment() == 0
    assert together.alignment() == pytest.approx(1 + 4 / 3)


def test_equal_targets_count_neither_way() -> None:
    target = torch.eye(3)[[0, 0, 1]]
    loss, accuracy = matching(target.clone(), target, 50.0)
    assert accuracy == 1
    assert loss < 1e-3


# -- VAE and denoiser ------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [4, 8])
def test_latents_of_unit_variance_give_the_same_images(
    shrink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = tuple(max(c // 4, 8) for c in vae.SIZES[shrink][0])
    monkeypatch.setitem(vae.SIZES, shrink, (channels, vae.SIZES[shrink][1]))
    torch.manual_seed(0)
    net = vae.build(shrink).eval()
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = net.decode(net.encode(images).latent_dist.mean).sample
        vae.to_unit_variance(net, images)
        latents = net.encode(images).latent_dist.mean
        after = net.decode(latents).sample
    assert latents.shape[1:] == (vae.SIZES[shrink][1], 64 // shrink, 64 // shrink)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(latents.shape[1]), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(latents.shape[1]), atol=1e-3)
    assert torch.allclose(before, after, atol=1e-3)


def test_context_dropout_replaces_the_tail_or_the_words() -> None:
    states, empty = torch.ones(3, 5, 2), torch.zeros(5, 2)
    no_tail, no_words = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    found = unet.dropped(states, torch.tensor([3, 3, 3]), empty, no_tail, no_words)[..., 0]
    assert found.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]


def test_no_level_of_16_and_above_attends_to_the_words() -> None:
    kinds = small_unet().config.down_block_types
    assert kinds == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")


def test_the_schedule_keeps_a_little_signal_to_the_end() -> None:
    from diffusers import DDIMScheduler

    signal = DDIMScheduler(**unet.SCHEDULE).alphas_cumprod.sqrt()
    assert 0.02 < signal[-1] < 0.04
    assert signal[0] > 0.999


def test_the_ring_is_there_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet.Ring, "SHARD", 4)
    made = iter(range(100))

    def make(n: int) -> Any:
        structures = [{"number": next(made)} for _ in range(n)]
        return SimpleNamespace(images=np.zeros((n, 3, 8, 8), np.uint8), structures=structures)

    class Encoder:
        def encode(self, images: Tensor) -> Any:
            sample = torch.arange(len(images)).view(-1, 1, 1, 1).expand(-1, 4, 2, 2).float()
            return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: sample))

    def ring() -> unet.Ring:
        return unet.Ring(SimpleNamespace(make=make), Encoder(), tmp_path, 2)

    first = ring()
    for _ in range(6):
        first.make(2)
    again = ring()
    numbers = {s["number"] for part in again.structures for s in part}
    assert numbers == {s["number"] for part in first.structures for s in part} == set(range(4, 12))
    latents, structures = again.sample(5)
    assert latents.shape == (5, 4, 2, 2)
    assert [float(x[0, 0, 0]) for x in latents] == [s["number"] % 2 for s in structures]


def test_the_vaes_report_keeps_techniques_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    artists = [
        SimpleNamespace(name="A", technique="neon"),
        SimpleNamespace(name="B", technique="mosaic"),
    ]
    structures = [{"artist": name} for name in ("A", "B", "", "A")]
    images = np.zeros((4, 3, 8, 8), np.uint8)
    scenes = SimpleNamespace(images=images, structures=structures)
    maker: Any = SimpleNamespace(make=lambda n: scenes, world=SimpleNamespace(artists=artists))
    monkeypatch.setattr(vae, "errors", lambda *_: torch.tensor([0.1, 0.01, 0.001, 0.001]))
    report = vae.report_on(SimpleNamespace(), maker, 4)
    assert report["by technique"] == {"mosaic": 20.0, "neon": 12.97, "no artist": 30.0}
    assert report["psnr"] == 15.53
    assert report["mean of the images"] == 22.5


def test_losses_are_counted_by_what_a_scene_shows() -> None:
    large, small = [0.75, 0.5, 0.5], [0.5, 0.25, 0.5]

    def scene(*things: tuple[str, list[float]], artist: str = "", use: str = "named") -> dict[str, Any]:
        return {"things": [{"kind": k, "spot": s} for k, s in things], "artist": artist, "use": use}

    assert losses.kind_of(scene(("object", large))) == "large object"
    assert losses.kind_of(scene(("person", [1.0, 0.5, 0.5]))) == "large person"
    assert losses.kind_of(scene(("person", small))) == "small person"
    assert losses.kind_of(scene(("object", small), ("person", small))) == "several things"
    assert losses.kind_of(scene(("object", large), artist="Aurelo Devrault")) == "by an artist"
    assert losses.kind_of(scene(("object", large), use="generic")) == losses.kind_of(scene()) == ""


def test_the_loss_is_that_of_v() -> None:
    net = small_unet().eval()
    latents, texts = torch.randn(3, 4, 16, 16), torch.randn(3, 7, 32)
    noise = torch.randn(len(losses.TIMES), 3, 4, 16, 16)
    found = losses.losses(net, latents, texts, noise)
    alpha_bar = unet.DDIMScheduler(**unet.SCHEDULE).alphas_cumprod[losses.TIMES[2]]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    with torch.no_grad():
        v = net(a * latents + s * noise[2], torch.tensor(losses.TIMES[2]), texts).sample
    expected = (v - (a * noise[2] - s * latents)).square().mean((1, 2, 3))
    assert torch.allclose(found[2], expected, rtol=0.02)


def test_a_written_model_leaves_nothing_of_the_one_before(tmp_path):
    """Shards of a larger one would be read in place of the new file."""
    folder = tmp_path / "unet"
    net = unet.build(4, 16, 32, (32, 32))
    write_model(net, folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_model(net, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
