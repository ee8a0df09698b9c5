"""The CLIP of the miniature: an image tower for scenes, matched to the end state of the frozen text tower.

The pairwise sigmoid loss (Zhai et al., ICCV 2023, eq. 1), every caption against every image of the batch. Pairs that show
the same things by the same artist count neither way, whatever stands behind them. Beside it the image tower tells what is
in the scene, so that it tells one person from another sooner.

    python -m training.miniature.clip --work /where/it/lies --minutes 30
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from training.miniature.captions import caption
from training.miniature.fast import autocast, has_bfloat16, set_up
from training.miniature.gates_tower import sentence, templates_for
from training.miniature.loop import Notes, Schedule, holding, join, stage_parser, train, write_json, write_model
from training.miniature.recogniser import Names, Source, losses, truth_of, write_weights
from training.miniature.scenes import SceneMaker, Structure
from training.miniature.tower import SHARED
from training.miniature.world import World, read_world

HEADS = ("things", "people", "face", "palette", "technique", "styles")  # what the image tower tells beside the matching
TELLING = 0.1  # weight of that


def build(width: int = 192, layers: int = 4) -> CLIPVisionModel:
    """An untrained image tower for 64x64 pixels: patches of 8."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            image_size=64,
            patch_size=8,
            projection_dim=SHARED,
        )
    )


class ImageSide(nn.Module):
    """What is trained: the image tower, and both projections into the space where images and captions meet."""

    def __init__(self, width: int, names: Names):
        super().__init__()
        self.image = build()
        inner = self.image.config.hidden_size
        self.text_projection = nn.Linear(width, SHARED, bias=False)
        self.image_projection = nn.Linear(inner, SHARED, bias=False)
        self.heads = nn.ModuleDict({head: nn.Linear(inner, names.sizes[head]) for head in HEADS})
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-8.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, n) logits of every text (n, width) against every image (n, 3, 64, 64) in [0, 1], and the heads' answers."""
        pooled = self.image(pixel_values=images * 2 - 1).pooler_output
        a, b = F.normalize(self.text_projection(texts), dim=1), F.normalize(self.image_projection(pooled), dim=1)
        logits = a.float() @ b.float().T * self.scale.exp() + self.bias
        return logits, {head: layer(pooled).float() for head, layer in self.heads.items()}


def shown(structure: Structure) -> tuple[frozenset[str], str]:
    """What a caption may name: two scenes of which it is the same are no negative pair."""
    things = (f"{thing.get('color', '')} {thing['name']}" for thing in structure["things"])
    return frozenset(things), structure["artist"]


def matching(logits: Tensor, contents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The sigmoid loss, and how often a text's own image is its nearest; equal contents count neither way."""
    own = torch.eye(len(contents))
    place = {content: k for k, content in enumerate(dict.fromkeys(contents))}
    kind = torch.tensor([place[content] for content in contents])
    other = (kind[:, None] == kind[None]).float() - own
    loss = F.binary_cross_entropy_with_logits(logits, own, weight=1 - other, reduction="sum") / len(own)
    nearest = (logits - 1e4 * other).argmax(1) == torch.arange(len(own))
    return loss, nearest.float().mean()


class Texts:
    """The frozen text tower's pooled end states."""

    def __init__(self, work: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        dtype = torch.bfloat16 if has_bfloat16() else torch.float32
        self.tower = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=dtype).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(n, width); the tower is causal, so padding beyond the longest caption would change nothing."""
        ids = self.tokenizer(list(captions), padding="longest", truncation=True, max_length=77, return_tensors="pt")
        return self.tower(input_ids=ids.input_ids).pooler_output.float()


@torch.no_grad()
def measure(side: ImageSide, texts: Texts, world: World, maker: SceneMaker, n: int = 200) -> dict[str, float]:
    """How often the right name is nearest to an unseen scene of one thing, in phrasings that no caption has.

    Of 10 words, 100 people and 100 artists that the suites erase and retain.
    """
    rng = random.Random(3)
    ten = [world.labels[k].name for k in world.groups["ten"]]
    choices = {
        "object": ten,
        "person": [person.name for person in world.named[:100]],
        "artist": [artist.name for artist in world.artists[:100]],
    }
    right: dict[str, float] = {}
    for kind, names in choices.items():
        scenes: list[Structure] = []
        while len(scenes) < n:
            scene = maker.structure()
            things = scene["things"]
            name = scene["artist"] if kind == "artist" else things[0]["name"] if len(things) == 1 else ""
            if scene["use"] == "named" and name in names and (kind == "artist" or not scene["artist"]):
                scenes.append(scene | {"name": name})
        template = rng.choice(templates_for(kind))
        words = F.normalize(side.text_projection(texts([sentence(template, kind, name, "") for name in names])), dim=1)
        images = torch.from_numpy(maker.paint(scenes)).float() / 255
        pooled = side.image(pixel_values=images * 2 - 1).pooler_output
        nearest = (F.normalize(side.image_projection(pooled), dim=1) @ words.T).argmax(1).tolist()
        hits = [names[k] == scene["name"] for k, scene in zip(nearest, scenes, strict=True)]
        right[f"{kind}, of {len(names)}"] = round(sum(hits) / n, 4)
    return right


def write_clip(side: ImageSide, folder: Path) -> None:
    """Writes the image tower as transformers reads it, and the projections, in float16."""
    write_model(side.image.half(), folder)
    projections = {
        "text_projection": side.text_projection.weight, "picture_projection": side.image_projection.weight,
        "scale": side.scale, "bias": side.bias,
    }  # fmt: skip
    write_weights({name: value.detach() for name, value in projections.items()}, folder / "projections.safetensors")


def main() -> None:
    parser = stage_parser(__doc__, "clip", minutes=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(join())
    set_up()
    world, rng = read_world(), random.Random()
    source, unseen = Source(world, options.work, 31, None), Source(world, options.work, 1031, None)
    texts = Texts(options.work)
    side = ImageSide(texts.tower.config.hidden_size, source.names).train()

    def loss_of(step: int) -> tuple[Tensor, Notes]:
        rng.seed(torch.initial_seed())
        source.maker.rng.seed(torch.initial_seed() + 1)
        structures: list[Structure] = []
        while len(structures) < options.batch:
            scene = source.maker.structure()
            if scene["use"] == "named":  # the empty caption, and words that say nothing, fit any image
                structures.append(scene)
        images = torch.from_numpy(source.maker.paint(structures)).float() / 255
        captions = texts([caption(structure, rng, world) for structure in structures])
        with autocast():
            logits, answers = side(images, captions)
        pairs, nearest = matching(logits, [shown(structure) for structure in structures])
        told = torch.stack(list(losses(answers, truth_of(structures, world, source.names)).values())).sum()
        return pairs + TELLING * told, {"pairs": pairs.detach(), "told": told.detach(), "nearest": nearest}

    def test(step: int, values: dict[str, Tensor]) -> None:
        with holding(side, values):
            report = {"name": options.name, "step": step, "nearest": measure(side, texts, world, unseen.maker)}
        print(json.dumps(report), flush=True)
        write_json(report, options.work / f"{options.name}.json")

    optimiser = torch.optim.AdamW(side.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = Schedule(options.rate, 200, options.minutes if options.anneal else None)
    weights = train(
        options.name, side, loss_of, options.work, optimiser, schedule, minutes=options.minutes, start=options.initial,
        average=0.998, sample=test, sample_every=600,
    )  # fmt: skip
    if join() == 0:
        test(-1, weights)
        side.load_state_dict(weights)
        write_clip(side, options.work / "clip")


if __name__ == "__main__":
    main()
