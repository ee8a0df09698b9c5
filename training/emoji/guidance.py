"""Chooses how the model is sampled: which guidance and steps draw nearest to the drawings that are asked for.

Every picture, of one object in a named style on a named plain background, is compared with all drawings in all styles on
that background; the nearest in squared distance is what it shows. No judge of the gates takes part.

    python -m training.emoji.guidance --guidance 2 3 4 6
    python -m training.emoji.guidance --guidance 3 --steps 8 12 20
"""

from __future__ import annotations

import argparse
import itertools
import random

from torch import Tensor

from expunge.checkpoints.load import load
from expunge.model import Model
from expunge.probe import Probe
from training.emoji.export import pipeline
from training.emoji.scenes import COLOURS, Plan, SceneMaker
from training.emoji.world import load_drawings, place_options, read_world


def drawings_on(maker: SceneMaker, things: list[tuple[int, int]], background: int) -> Tensor:
    """(n, 3, 64, 64): each (label, style) alone, in the middle, of the usual size."""
    n = len(things)
    plan = Plan([""] * n, [background] * n, [2.0] * n, [[thing] for thing in things], [[(0.88, 0.5, 0.5)]] * n)
    return maker.paint(plan).pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place_options(parser)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--name", default="unet")
    options = parser.parse_args()
    world = read_world(options.world)
    maker = SceneMaker(world, load_drawings(world, options.work), 0)
    things = [(label, style) for label, styles in enumerate(maker.by_label) for style in styles]
    rng = random.Random(1)
    asked = [
        (
            rng.choice([t for t in things if world.labels[t[0]].group != "flags"]),
            rng.randrange(len(COLOURS)),
        )
        for _ in range(options.pictures)
    ]
    prompts = [
        f"a photo of the {world.labels[label].names[0]} in {world.styles[style]} style on a {tuple(COLOURS)[k]} background"
        for (label, style), k in asked
    ]
    references = [drawings_on(maker, things, k) for k in range(len(COLOURS))]
    model: Model = load(pipeline(options.work, options.name))
    for guidance, steps in itertools.product(options.guidance, options.steps):
        probe = Probe(tuple(prompts), tuple(range(len(prompts))), steps, guidance)
        pictures = model.draw(probe, batch_size=32)
        label_right = style_right = distance = 0.0
        for picture, (thing, background) in zip(pictures, asked, strict=True):
            distances = (references[background] - picture).square().mean((1, 2, 3))
            label, _ = things[int(distances.argmin())]
            same = [i for i, (other, _) in enumerate(things) if other == thing[0]]  # its label in all styles
            nearest = things[same[int(distances[same].argmin())]]
            label_right += label == thing[0]
            style_right += nearest == thing
            distance += float(distances[things.index(thing)])
        n = len(prompts)
        print(
            f"guidance {guidance:g}, {steps} steps: nearest drawing has the label in {100 * label_right / n:.0f} %, among those of the label"
            f" the style in {100 * style_right / n:.0f} %, distance to the drawing asked for {distance / n:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
