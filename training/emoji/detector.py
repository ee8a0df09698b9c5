"""Trains the detector on scenes of the real drawings and on broken pictures; measures it; writes it out.

A few (label, style) drawings are held out at first: how well it does on them says what it knows of a
label beyond the drawings it has seen. They are all of everyday objects. Once that is measured, the last
minutes show it every drawing: whoever judges a style must know what each thing looks like in it.

    python -m training.emoji.detector --work training/emoji/made --minutes 6 --whole 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from rich import print_json
from safetensors.torch import save as to_bytes
from torch import Tensor

from expunge.base.files import replacing
from expunge.emoji.detector import FOLDER, NOTHING, Detector, DetectorConfig, Network, Recognition
from training.emoji import broken
from training.emoji.loop import device, train
from training.emoji.scenes import SceneMaker
from training.emoji.world import Drawings, World, load_drawings, place_options, read_world

WIDTHS = (24, 40, 80, 160)
HELD_OUT_PAIRS = 12
BROKEN = 0.2  # the share of broken pictures in training
ROUND_TRIP = 0.3  # the share of pictures that went through the VAE, once there is one
Pair = tuple[int, int]  # label, style


@dataclass(frozen=True)
class Examples:
    """n pictures and what is true of them."""

    pictures: Tensor  # (n, 3, 64, 64) in [0, 1]
    labels: Tensor  # (n, labels) 0 or 1
    styles: Tensor  # (n, styles) 0 or 1
    broken: Tensor  # (n,) 0 or 1

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.pictures, self.labels, self.styles, self.broken

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(*(tensor[rows] for tensor in self.tensors))

    @classmethod
    def join(cls, parts: Sequence[Examples]) -> Examples:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))


# -- drawings and scenes ---------------------------------------------------------------------------------------------


def split(world: World, drawings: Drawings) -> tuple[Drawings, list[Pair], list[Pair]]:
    """The drawings to train on, their (label, style) pairs, and the pairs held out: at most one a label."""
    pairs = list(zip(drawings.label.tolist(), drawings.style.tolist(), strict=True))
    rng = random.Random(7)
    objects = [world.index(label.name) for label in world.group("objects")]
    chosen = [label for label in objects if sum(label == other for other, _ in pairs) >= 3]
    held_out = []
    for k, label in enumerate(rng.sample(chosen, HELD_OUT_PAIRS)):
        styles = [style for other, style in pairs if other == label]
        held_out.append((label, styles[k % len(styles)]))
    keep = torch.tensor([pair not in held_out for pair in pairs])
    seen = Drawings(drawings.pixels[keep], drawings.label[keep], drawings.style[keep])
    return seen, [pair for pair in pairs if pair not in held_out], held_out


class Alone(SceneMaker):
    """Scenes of one object each, taken evenly from given (label, style) pairs."""

    def __init__(self, world: World, drawings: Drawings, seed: int, pairs: Sequence[Pair]) -> None:
        super().__init__(world, drawings, seed)
        self.pairs = pairs

    def one(self) -> tuple[list[tuple[int, int, str]], str, str]:
        *_, background, _ = super().one()
        return [(*self.rng.choice(self.pairs), "")], background, ""


def real(maker: SceneMaker, n: int) -> Examples:
    scenes = maker.make(n)
    return Examples(scenes.pictures, scenes.labels, scenes.styles, torch.zeros(n))


def spoil(examples: Examples, flags: Tensor, kind: str | None = None) -> Examples:
    """The same pictures broken in one way, or each in a way of its own; nothing is in them any more."""
    kinds = list(broken.KINDS)
    which = (
        torch.randint(len(kinds), (len(examples),)) if kind is None else torch.full((len(examples),), kinds.index(kind))
    )
    is_flag = (examples.labels @ flags) > 0
    pictures = examples.pictures.clone()
    for k, name in enumerate(kinds):
        rows = which == k
        if rows.any():
            pictures[rows] = broken.KINDS[name](examples.pictures[rows])
        if name in broken.KEEPS_FLAGS and (rows & is_flag).any():
            pictures[rows & is_flag] = broken.melt(examples.pictures[rows & is_flag])
    return Examples(pictures, 0 * examples.labels, 0 * examples.styles, torch.ones(len(examples)))


class RoundTrips:
    """A pool of pictures that went through the VAE, some of their latents muddled; renewed little by little."""

    def __init__(self, vae: AutoencoderKL, maker: SceneMaker, size: int) -> None:
        self.vae, self.maker = vae.eval(), maker
        self.pool = Examples.join([self.fresh(32) for _ in range(size // 32)])
        self.oldest = 0

    @torch.no_grad()
    def fresh(self, n: int, muddled: float = BROKEN) -> Examples:
        examples = real(self.maker, n)
        latents = self.vae.encode(examples.pictures.to(self.vae.device) * 2 - 1).latent_dist.mean.cpu()
        bad = (torch.rand(n) < muddled).float()
        slight = 0.25 * torch.rand(n, 1, 1, 1) * torch.randn_like(latents)
        latents = torch.where(bad.view(n, 1, 1, 1) > 0, broken.muddle(latents), latents + slight)
        pictures = (self.vae.decode(latents.to(self.vae.device)).sample.cpu() / 2 + 0.5).clamp(0, 1)
        good = 1 - bad.view(n, 1)
        return Examples(pictures, examples.labels * good, examples.styles * good, bad)

    def take(self, n: int, renew: int) -> Examples:
        """n of the pool at random, after `renew` new ones have taken the place of the oldest."""
        if renew:
            places = (self.oldest + torch.arange(renew)) % len(self.pool)
            for old, new in zip(self.pool.tensors, self.fresh(renew).tensors, strict=True):
                old[places] = new
            self.oldest = (self.oldest + renew) % len(self.pool)
        return self.pool[torch.randint(len(self.pool), (n,))]


# -- training --------------------------------------------------------------------------------------------------------


def losses(network: Network, examples: Examples) -> dict[str, Tensor]:
    """Cross-entropy of every answer, summed over labels and over styles; a broken picture has no style to name."""
    labels, styles, unrecognisable = network(examples.pictures.contiguous(memory_format=torch.channels_last))
    bce = F.binary_cross_entropy_with_logits
    style = bce(styles, examples.styles, reduction="none").sum(1) * (1 - examples.broken)
    return {
        "label": bce(labels, examples.labels, reduction="none").sum(1).mean(),
        "style": style.mean(),
        "broken": bce(unrecognisable, examples.broken),
    }


def to_device(examples: Examples) -> Examples:
    return Examples(*(tensor.to(device()) for tensor in examples.tensors))


def save(folder: Path, weights: dict[str, Tensor], settings: DetectorConfig) -> None:
    """Float16 weights and the settings beside them."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights.items()}
    with replacing(folder / "model.safetensors") as file:
        file.write_bytes(to_bytes({name: t.cpu().contiguous() for name, t in half.items()}))
    save_settings(folder, settings)


def save_settings(folder: Path, settings: DetectorConfig) -> None:
    with replacing(folder / "config.json") as file:
        file.write_text(
            json.dumps(dataclasses.asdict(settings), ensure_ascii=False, indent=1) + "\n",
            encoding="utf8",
        )


# -- thresholds and measures -----------------------------------------------------------------------------------------


def calibrate(
    settings: DetectorConfig, two: Recognition, truth: Tensor, scenes: Recognition, empty: Recognition
) -> DetectorConfig:
    """Thresholds at 1 % false alarms.

    Bounded, since a label that nothing is ever taken for would else be seen at a probability of 0.001. A plain
    background looks always the same, so that of unrecognisable pictures is rounded up: the next above, not at it.
    """
    alarm = max(seen.unrecognisable.quantile(0.99).item() for seen in (scenes, empty))
    absent = [two.labels[truth[:, k] == 0, k] for k in range(truth.shape[1])]
    return dataclasses.replace(
        settings,
        thresholds=tuple(round(float(p.quantile(0.99).clamp(0.1, 0.9)), 3) for p in absent),
        nothing=round(float(empty.labels.amax(1).quantile(0.99).clamp(0.05, 0.3)), 3),
        unrecognisable=min(max(math.ceil(100 * alarm) / 100, 0.1), 0.9),
    )


def share(right: Tensor) -> dict[str, float]:
    return {"share": round(right.float().mean().item(), 4), "n": right.numel()}


def alone_right(seen: Recognition, truth: Examples) -> Tensor:
    """(n,) bool: the best answer is the one object of the scene."""
    names = seen.settings.label_names
    return torch.tensor([
        answer == names[label] for answer, label in zip(seen.top(), truth.labels.argmax(1).tolist(), strict=True)
    ])  # fmt: skip


def both_right(seen: Recognition, truth: Examples) -> dict[str, dict[str, float]]:
    """Two-object scenes: both in the best two, both above their thresholds, and false alarms a label."""
    wanted = truth.labels.bool()
    best = torch.zeros_like(wanted).scatter(1, seen.labels.topk(2, 1).indices, True)
    above = seen.labels >= torch.tensor(seen.settings.thresholds)
    return {
        "both in the best two": share((best | ~wanted).all(1)),
        "both above threshold": share((above | ~wanted).all(1)),
        "false alarms a label": share(above[~wanted]),
    }


def measure(detector: Detector, world: World, sets: dict[str, Examples]) -> dict[str, object]:
    """The detector's own accuracies on scenes it has not seen."""
    flags = torch.tensor([float(label.group == "flags") for label in world.labels])
    report: dict[str, object] = {}
    for where in [name for name in ("scenes", "round trips") if name in sets]:
        alone = sets[where]
        seen = detector(alone.pictures)
        right, label = alone_right(seen, alone), alone.labels.argmax(1)
        group = [world.labels[k].group for k in label.tolist()]
        report[f"label top-1, {where}"] = {
            "all": share(right),
            **{g: share(right[torch.tensor([g == other for other in group])]) for g in dict.fromkeys(group)},
        }
        report[f"style top-1, {where}"] = share(seen.styles.argmax(1) == alone.styles.argmax(1))
        report[f"false alarms of unrecognisable, {where}"] = share(seen.broken())
    report["two objects"] = both_right(detector(sets["two"].pictures), sets["two"])
    empty = torch.tensor([answer == NOTHING for answer in detector(sets["empty"].pictures).top()])
    report["empty background, nothing seen"] = share(empty)
    kinds = {name: spoil(sets["scenes"], flags, name).pictures[:300] for name in broken.KINDS}
    if "muddled" in sets:
        kinds["muddled latents"] = sets["muddled"].pictures
    report["unrecognisable, recall"] = {name: share(detector(pictures).broken()) for name, pictures in kinds.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place_options(parser)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--minutes", type=float, default=6, help="without the drawings held out")
    parser.add_argument("--whole", type=float, default=4, help="then so many with every drawing")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--tests", type=int, default=2000, help="scenes in each set it is measured on")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    world = read_world(options.world)
    drawings = load_drawings(world, options.work)
    seen, seen_pairs, held_out = split(world, drawings)
    flags = torch.tensor([float(label.group == "flags") for label in world.labels])
    network = Network(len(world.labels), len(world.styles), WIDTHS).to(device())
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    vae = None
    if (options.work / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(options.work / "vae").to(device(), memory_format=torch.channels_last)
    else:
        print("There is no VAE yet: training without round trips through it.")

    def trained(name: str, drawings: Drawings, minutes: float, rate: float) -> dict[str, Tensor]:
        """The network's averaged weights after so many minutes on scenes of these drawings."""
        pool = RoundTrips(vae, SceneMaker(world, drawings, seed=11), size=1024) if vae else None
        maker = SceneMaker(world, drawings, seed=12, objects=(0.08, 0.60, 0.32))

        def loss_of(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
            from_pool = round(options.batch * ROUND_TRIP) if pool else 0
            bad = round((options.batch - from_pool) * BROKEN)
            fresh = real(maker, options.batch - from_pool)
            parts = [spoil(fresh[:bad], flags), fresh[bad:]]
            if pool:
                parts.append(pool.take(from_pool, renew=6))
            batch = Examples.join(parts)
            batch = dataclasses.replace(batch, pictures=broken.weather(batch.pictures))
            loss = losses(network, to_device(batch))
            return torch.stack(list(loss.values())).sum(), {name: value.item() for name, value in loss.items()}

        optimiser = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        return train(name, network, loss_of, options.work, optimiser, minutes=minutes)

    names = tuple(label.name for label in world.labels)
    settings = DetectorConfig(
        names, world.styles, WIDTHS, thresholds=(0.5,) * len(names), nothing=0.2, unrecognisable=0.5
    )

    def shipped(weights: dict[str, Tensor]) -> Detector:
        """What lies in the folder is what is measured."""
        save(options.out, weights, settings)
        return Detector.load(options.out)

    weights = trained("detector", seen, options.minutes, options.rate)
    network.load_state_dict(weights)
    torch.manual_seed(3000)
    unseen = real(Alone(world, drawings, 3001, held_out), options.tests // 4)
    detector = shipped(weights)
    pairs = detector(unseen.pictures)
    of_pairs = {
        "label top-1": share(alone_right(pairs, unseen)),
        "style top-1": share(pairs.styles.argmax(1) == unseen.styles.argmax(1)),
    }
    if options.whole:
        detector = shipped(trained("detector-whole", drawings, options.whole, options.rate / 3))
        seen, seen_pairs = drawings, [*seen_pairs, *held_out]

    def sets_of(seed: int) -> dict[str, Examples]:
        n = options.tests
        torch.manual_seed(seed)
        sets = {
            "scenes": real(Alone(world, seen, seed, seen_pairs), n),
            "two": real(SceneMaker(world, seen, seed + 2, objects=(0, 0, 1)), n),
            "empty": real(SceneMaker(world, seen, seed + 3, objects=(1, 0, 0)), n // 4),
        }
        if vae:
            trips = RoundTrips(vae, Alone(world, seen, seed + 4, seen_pairs), size=32)
            sets["round trips"] = Examples.join([trips.fresh(32, muddled=0) for _ in range(max(n // 128, 1))])
            sets["muddled"] = Examples.join([trips.fresh(32, muddled=1) for _ in range(max(n // 256, 1))])
        return sets

    sets = sets_of(seed=1000)
    two, empty = (detector(sets[name].pictures) for name in ("two", "empty"))
    scenes = detector(torch.cat([sets[name].pictures for name in ("scenes", "round trips", "two") if name in sets]))
    settings = calibrate(settings, two, sets["two"].labels, scenes, empty)
    save_settings(options.out, settings)

    report = measure(Detector.load(options.out), world, sets_of(seed=2000))
    report["unseen (label, style) pairs, before the whole was shown"] = of_pairs
    report["pairs held out"] = [f"{names[label]} in {world.styles[style]}" for label, style in held_out]
    report["made with"] = {
        "minutes": options.minutes,
        "minutes with every drawing": options.whole,
        "drawings": len(seen.pixels),
        "round trips": bool(vae),
        "parameters": sum(p.numel() for p in network.parameters()),
        "torch": version("torch"),
    }
    with replacing(options.out / "held_out.json") as file:
        file.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    print_json(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
