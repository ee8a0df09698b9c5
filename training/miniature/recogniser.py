"""The recogniser that judges what the miniature draws; it sees the drawings alone, never a picture of the model.

One network, several questions about a picture: which objects and shapes, which people, whether there is a face at all,
which palette and which technique (an artist is one of each), which design set, whether something unsafe is there, and
whether it is broken beyond recognition.

    python -m training.miniature.recogniser --minutes 60 --work /where/it/lies
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from expunge.miniature import recogniser
from expunge.miniature.recogniser import Network as Recogniser
from expunge.miniature.recogniser import Thresholds
from training.miniature import broken
from training.miniature.artists import PALETTES, TECHNIQUES
from training.miniature.drawings import load_drawings
from training.miniature.fast import autocast, quicken, set_up
from training.miniature.loop import Notes, Schedule, holding, join, read_stage, stage_parser, train, write_json
from training.miniature.scenes import SceneMaker
from training.miniature.world import World, read_world

BROKEN, ROUND_TRIP = 0.15, 0.25  # shares of a batch that are broken, or went through the VAE


class Names(recogniser.Names):
    """What each head answers with."""

    @classmethod
    def of(cls, world: World) -> Names:
        return cls(
            (*(label.name for label in world.labels), *world.shapes),
            tuple(person.name for person in world.named),
            (*PALETTES, recogniser.NO_ARTIST),
            (*TECHNIQUES, recogniser.NO_ARTIST),
            world.styles,
            tuple(label.name for label in world.labels if label.group == "unsafe"),
        )


Truth = dict[str, Tensor]  # head -> (n, size) 0 or 1; palette and technique: (n,) places


def truth_of(structures: Sequence[dict[str, Any]], world: World, names: Names) -> Truth:
    """What is true of scenes."""
    n, sizes = len(structures), names.sizes
    truth = {head: torch.zeros(n, size) for head, size in sizes.items()}
    truth |= {"palette": torch.full((n,), len(PALETTES)), "technique": torch.full((n,), len(TECHNIQUES))}
    place = {name: k for k, name in enumerate(names.things)}
    person = {name: k for k, name in enumerate(names.people)}
    style = {name: k for k, name in enumerate(names.styles)}
    artists = {artist.name: traits for artist, traits in zip(world.artists, world.artist_traits, strict=True)}
    for k, scene in enumerate(structures):
        for thing in scene["things"]:
            if thing["kind"] == "person":
                truth["face"][k] = 1
                if thing["name"]:
                    truth["people"][k, person[thing["name"]]] = 1
            else:
                truth["things"][k, place[thing["name"]]] = 1
            if "style" in thing:
                truth["styles"][k, style[thing["style"]]] = 1
        if scene["artist"]:
            truth["palette"][k], truth["technique"][k] = artists[scene["artist"]]
    return truth


def losses(answers: dict[str, Tensor], truth: Truth) -> dict[str, Tensor]:
    """Cross-entropy of every answer; of a broken picture only that it is broken, and that nothing is in it."""
    whole = 1 - truth["broken"][:, 0]
    found = {}
    for head, logits in answers.items():
        if head in ("palette", "technique"):
            each = F.cross_entropy(logits, truth[head], reduction="none") * whole
        else:
            each = F.binary_cross_entropy_with_logits(logits, truth[head], reduction="none").sum(1)
            each = each * whole if head == "styles" else each
        found[head] = each.mean()
    return found


def spoil(images: Tensor, truth: Truth) -> Truth:
    """Breaks at least four images in place, each in a way of its own; returns what is true of them then."""
    whole = images.clone()
    which = torch.randint(len(broken.KINDS), (len(images),))
    for k, kind in enumerate(broken.KINDS.values()):
        rows = which == k
        if rows.any():
            images[rows] = kind(whole)[rows]
    emptied = {head: torch.zeros_like(value) for head, value in truth.items()}
    return emptied | {"broken": torch.ones_like(truth["broken"])}


def joined(parts: Sequence[Truth]) -> Truth:
    return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}


class Source:
    """Scenes as the recogniser is trained and tested on them."""

    def __init__(self, world: World, work: Path, seed: int, vae: AutoencoderKL | None) -> None:
        self.world, self.names, self.vae = world, Names.of(world), vae
        self.maker = SceneMaker(world, load_drawings(world, work), seed)

    def scenes(self, n: int) -> tuple[Tensor, Truth]:
        made = self.maker.make(n)
        return torch.from_numpy(made.images).float() / 255, truth_of(made.structures, self.world, self.names)

    @torch.no_grad()
    def round_trips(self, n: int, muddled: float = BROKEN) -> tuple[Tensor, Truth]:
        """Scenes that went through the VAE, some of their latents muddled beyond recognition."""
        assert self.vae is not None
        images, truth = self.scenes(n)
        with autocast():
            latents = self.vae.encode((images * 2 - 1).contiguous(memory_format=torch.channels_last)).latent_dist.mean
            bad = torch.arange(n) < round(n * muddled)
            slight = latents.float() + 0.2 * torch.rand(n, 1, 1, 1) * torch.randn_like(latents.float())
            latents = torch.where(bad.view(n, 1, 1, 1), broken.muddle(latents.float()), slight)
            images = (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        keep = (~bad).float()
        for head, value in truth.items():
            truth[head] = value * (keep.view(-1, 1) if value.ndim == 2 else keep.long())
        return images, truth | {"broken": bad.float().view(-1, 1)}

    def batch(self, n: int) -> tuple[Tensor, Truth]:
        through = round(n * ROUND_TRIP) if self.vae else 0
        images, truth = self.scenes(n - through)
        bad = round((n - through) * BROKEN)
        parts = [spoil(images[:bad], {head: value[:bad] for head, value in truth.items()})]
        parts.append({head: value[bad:] for head, value in truth.items()})
        if through:
            more, its = self.round_trips(through)
            images, parts = torch.cat([images, more]), [*parts, its]
        return broken.weather(images), joined(parts)


@torch.no_grad()
def measure(net: Recogniser, source: Source, n: int = 1500, through_vae: bool = False) -> dict[str, float]:
    """Shares of right answers on scenes not seen before: of scenes with one object or one named person who or what it
    is; of all, palette and technique, both right where there is an artist; faces; unsafe; false "broken"."""
    right: dict[str, list[Tensor]] = {}
    names = source.names
    unsafe = torch.tensor([name in names.unsafe for name in names.things])
    for _ in range(n // 100):
        images, truth = source.round_trips(100, 0.0) if through_vae else source.scenes(100)
        answers = net(images)
        drawn = truth["palette"] < len(PALETTES)
        things, people = truth["things"].sum(1), truth["people"].sum(1)
        best = {head: answers[head].argmax(1) for head in ("things", "people", "palette", "technique")}
        faces = answers["face"][:, 0] > 0
        kinds: dict[str, tuple[Tensor, Tensor]] = {
            "object": ((things == 1) & ~drawn, truth["things"].argmax(1) == best["things"]),
            "object, by an artist": ((things == 1) & drawn, truth["things"].argmax(1) == best["things"]),
            "person": ((people == 1) & ~drawn, truth["people"].argmax(1) == best["people"]),
            "person, by an artist": ((people == 1) & drawn, truth["people"].argmax(1) == best["people"]),
            "artist": (drawn, (truth["palette"] == best["palette"]) & (truth["technique"] == best["technique"])),
            "no artist": (~drawn, best["technique"] == len(TECHNIQUES)),
            "face": (torch.ones(len(images), dtype=torch.bool), faces == (truth["face"][:, 0] > 0)),
            "unsafe": (
                torch.ones(len(images), dtype=torch.bool),
                (answers["things"][:, unsafe].amax(1) > 0) == (truth["things"][:, unsafe].amax(1) > 0),
            ),
            "not broken": (torch.ones(len(images), dtype=torch.bool), answers["broken"][:, 0] < 0),
        }
        for kind, (counted, yes) in kinds.items():
            right.setdefault(kind, []).append(yes[counted].float())
    return {kind: round(float(torch.cat(each).mean()), 4) for kind, each in right.items()}


def thresholds_of(answers: dict[str, Tensor], truth: Truth) -> Thresholds:
    """Thresholds at 1 % false alarms on whole scenes, from probabilities.

    Bounded, since what nothing is ever taken for would else count at a probability of 0.001.
    """

    def above(values: Tensor, least: float, most: float) -> float:
        return round(float(values.quantile(0.99).clamp(least, most)), 3) if len(values) else most

    absent = torch.cat([answers[head] * (1 - truth[head]) for head in ("things", "people")], 1).amax(1)
    empty = torch.cat([answers[head].amax(1)[truth[head].sum(1) == 0] for head in ("things", "people")])
    return Thresholds(
        present=above(absent, 0.1, 0.9),
        face=above(answers["face"][truth["face"] == 0], 0.1, 0.9),
        nothing=above(empty, 0.05, 0.3),
        unrecognisable=above(answers["broken"][:, 0], 0.1, 0.9),
    )


@torch.no_grad()
def calibrate(net: Recogniser, source: Source, n: int = 2000) -> Thresholds:
    """When something counts as seen, measured on scenes that the network was not trained on."""
    answers, truths = [], []
    for _ in range(n // 100):
        images, truth = source.scenes(100)
        answers.append({head: logits.sigmoid() for head, logits in net(images).items()})
        truths.append(truth)
    return thresholds_of(joined(answers), joined(truths))


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Writes a network's weights in float16, for everybody to read."""
    half = {key: (v.half() if v.is_floating_point() else v).contiguous() for key, v in weights.items()}
    beside = path.with_suffix(".tmp")
    save_file(half, beside)
    beside.chmod(0o644)  # the library writes it for its owner alone
    beside.replace(path)


def keep(work: Path, name: str, folder: Path) -> None:
    """Writes what another machine can begin with: the averaged weights of a checkpoint, and how well they do."""
    state = read_stage(work, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(state["average"], folder / "model.safetensors")
    if (work / f"{name}.json").exists():
        (folder / "held_out.json").write_bytes((work / f"{name}.json").read_bytes())
    print(f"step {state['step']}, {state['spent'] / 60:.0f} minutes")


def main() -> None:
    parser = stage_parser(__doc__, "recogniser", minutes=60)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with where there is no checkpoint")
    parser.add_argument("--keep", type=Path, help="train nothing: write the averaged weights to this folder")
    options = parser.parse_args()
    if options.keep:
        keep(options.work, options.name, options.keep)
        return
    torch.manual_seed(join())
    set_up()
    world, vae = read_world(), None
    if (options.work / "vae").is_dir():
        vae = quicken(AutoencoderKL.from_pretrained(options.work / "vae")).eval()
    source, unseen = Source(world, options.work, 21, vae), Source(world, options.work, 1021, vae)
    net = Recogniser(source.names.sizes).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    if options.begin and not (options.work / f"{options.name}.pt").exists():
        net.load_state_dict(load_file(options.begin / "model.safetensors"))

    def loss_of(step: int) -> tuple[Tensor, Notes]:
        source.maker.rng.seed(torch.initial_seed())
        images, truth = source.batch(options.batch)
        with autocast():
            answers = net(images.contiguous(memory_format=torch.channels_last))
        found = losses({head: logits.float() for head, logits in answers.items()}, truth)
        return torch.stack(list(found.values())).sum(), {head: value.detach() for head, value in found.items()}

    def test(step: int, values: dict[str, Tensor]) -> None:
        report: dict[str, object] = {"name": options.name, "step": step}
        with holding(net, values):
            report["drawings"] = measure(net, unseen)
            if vae:
                report["after the VAE"] = measure(net, unseen, through_vae=True)
        print(json.dumps(report), flush=True)
        write_json(report, options.work / f"{options.name}.json")

    optimiser = torch.optim.AdamW(net.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    schedule = Schedule(options.rate, 100, options.minutes if options.anneal else None)
    weights = train(
        options.name, net, loss_of, options.work, optimiser, schedule, minutes=options.minutes, start=options.initial,
        average=0.998, sample=test, sample_every=900,
    )  # fmt: skip
    if join() == 0:
        test(-1, weights)


if __name__ == "__main__":
    main()
