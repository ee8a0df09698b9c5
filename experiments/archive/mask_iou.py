"""How well the masks that MACE reads off the model's own attention cover what they should.

Real drawings lie on plain backgrounds, so that their true outline, the alpha, is known. Each is
encoded, noised as when attention is read, and masked as the method does it; the truth is the alpha
averaged over a latent pixel, at least one half. Beside the IoU of the masks stands what the mask
"everywhere" reaches, and the same images read with the words of another object. How masks are read
was chosen on forty objects; their mean stands beside that of the others, which counts.
Writes `experiments/results/mask_iou.json` and `mask_iou.png`.

    python experiments/archive/mask_iou.py [--drawings training/emoji/made]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

import expunge
from expunge import Model
from expunge.base.files import replacing
from expunge.erasing import object_masks
from expunge.erasing.reference_images import Examples
from expunge.fingerprint import hash_for_images
from expunge.ops.otsu import otsu
from expunge.runtime.context import RunContext

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE.parent))  # the recipe of the emoji model is no part of the package

from training.emoji.scenes import COLOURS, IMAGE, colour  # noqa: E402
from training.emoji.world import WORLD, Drawings, Label, load_drawings, read_world  # noqa: E402


@dataclass(frozen=True)
class Shown:
    """One object, drawn in all its styles."""

    word: str
    num_images: Tensor
    """(n, 3, 64, 64)"""
    alpha: Tensor
    """(n, 64, 64)"""


def shown(label: Label, drawings: Drawings, index: int, rng: random.Random) -> Shown:
    """An object's drawings, as large and as far from the middle as in training, on plain colours."""
    images, alphas = [], []
    for which in (drawings.label == index).nonzero()[:, 0].tolist():
        size = rng.uniform(0.82, 0.94)
        slack = (1 - size) / 4
        x, y = (0.5 + rng.uniform(-slack, slack) for _ in range(2))
        theta = torch.tensor([[[1 / size, 0, (1 - 2 * x) / size], [0, 1 / size, (1 - 2 * y) / size]]])
        places = affine_grid(theta, [1, 4, IMAGE, IMAGE], align_corners=False)
        rgba = grid_sample(drawings.pixels[which][None].float() / 255, places, align_corners=False)[0]
        ground = torch.tensor(colour(COLOURS[rng.choice(tuple(COLOURS))]))[:, None, None]
        images.append((rgba[:3] + (1 - rgba[3:]) * ground).clamp(0, 1))
        alphas.append(rgba[3])
    return Shown(label.names[0], torch.stack(images), torch.stack(alphas))


def seen(model: Model, one: Shown, word: str) -> Tensor:
    """The attention that the method reads, (n, h, w), with a word that may be another object's."""
    prompt = f"a photo of the {word}"
    examples = Examples(word, prompt, model.encode_images(one.num_images))
    tokens = model.encode([prompt]).content_mask.shape[1]
    behind = torch.arange(tokens)[None] > model.count_tokens("a photo of the")
    return object_masks.measure_attention(model, examples, behind, RunContext(0))


def masked(attention: Tensor) -> Tensor:
    """The masks that the method makes of it, (n, h, w)."""
    return attention > otsu(attention.flatten(1))[..., None]


def iou(some: Tensor, others: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| of each of n masks: (n,)."""
    some, others = some.flatten(1).bool(), others.flatten(1).bool()
    return (some & others).sum(1) / (some | others).sum(1).clamp(min=1)


def contact_sheet(model: Model, objects: Sequence[Shown]) -> Image.Image:
    """A row an object: the drawing, the attention, the mask, the truth."""
    rows = []
    for one in objects:
        attention = seen(model, one, one.word)[:1]
        low, high = attention.aminmax()
        parts = [one.num_images[0]]
        parts += [
            interpolate(m[:, None].float(), (IMAGE, IMAGE), mode="nearest")[0].expand(3, -1, -1)
            for m in ((attention - low) / (high - low), masked(attention), one.alpha[:1] >= 0.5)
        ]
        rows.append(torch.cat(parts, 2))
    half = (len(rows) + 1) // 2
    rows += [torch.ones_like(rows[0])] * (2 * half - len(rows))
    columns = [torch.cat(rows[:half], 1), torch.cat(rows[half:], 1)]
    gap = torch.ones(3, columns[0].shape[1], 8)
    pixels = torch.cat([columns[0], gap, columns[1]], 2)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--drawings", type=Path, default=HERE.parent / "training" / "emoji" / "made")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "mask_iou.json")
    options = parser.parse_args()
    world, rng = read_world(WORLD), random.Random(0)
    drawings, model = load_drawings(world, options.drawings), expunge.load("emoji")
    further = world.group("objects")
    chosen_on = [label.names[0] for label in further[:40]]
    labels = [*world.group("ten"), *world.group("unsafe"), *further[40:], *further[:40]]
    objects = [shown(label, drawings, world.index(label.name), rng) for label in labels]
    each: dict[str, dict[str, float]] = {}
    for place, one in enumerate(objects):
        found = masked(seen(model, one, one.word))
        other = masked(seen(model, one, objects[(place + 1) % len(objects)].word))
        truth = avg_pool2d(one.alpha[:, None], IMAGE // found.shape[-1])[:, 0] >= 0.5
        fine = interpolate(found[:, None].float(), (IMAGE, IMAGE), mode="nearest")[:, 0]
        measured = {
            "IoU": iou(found, truth),
            "IoU at 64 × 64": iou(fine, one.alpha >= 0.5),
            "everywhere": iou(torch.ones_like(truth), truth),
            "of another word": iou(other, truth),
            "covered": found.float().mean((1, 2)),
            "truth": truth.float().mean((1, 2)),
        }
        each[one.word] = {name: round(float(values.mean()), 3) for name, values in measured.items()}
        print(one.word, each[one.word], flush=True)

    def mean(words: Sequence[str]) -> dict[str, float]:
        return {name: round(sum(each[w][name] for w in words) / len(words), 3) for name in measured}

    record: dict[str, Any] = {
        "mean over objects": mean([word for word in each if word not in chosen_on]),
        "mean over those it was chosen on": mean(chosen_on),
        "pictures": sum(len(one.num_images) for one in objects),
        "log-SNRs": object_masks.LOG_SNRS,
        "pixels of the coarsest map": object_masks.SMALLEST,
        "model sha256": hash_for_images(model),
        "versions": {name: version(name) for name in ("expunge", "torch", "diffusers")},
        "each": each,
    }
    print({name: value for name, value in record.items() if name.startswith("mean")})
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
    contact_sheet(model, objects[:28]).save(options.to.with_suffix(".png"))


if __name__ == "__main__":
    main()
