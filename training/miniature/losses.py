"""A denoiser's losses on scenes that it never saw, by what they show and by noise: finer than any gate.

The scenes, their captions and the noise are the same for every checkpoint, so that a difference of one in a hundred counts.

    python -m training.miniature.losses --work /where/it/lies unet unet-end
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from training.miniature.captions import caption
from training.miniature.drawings import load_drawings
from training.miniature.fast import autocast, quicken, set_up
from training.miniature.loop import read_stage
from training.miniature.scenes import CELLS, LARGE, SceneMaker, Structure
from training.miniature.unet import SCHEDULE, Words, build
from training.miniature.vae import tensor
from training.miniature.world import WORK, World, read_world

SEED = 1777
TIMES = (250, 500, 700, 850, 950)  # of 1,000 steps
ROWS = 64  # scenes at once


def kind_of(structure: Structure) -> str:
    """What a scene is counted as; "" for those that no caption names, and for empty ones."""
    things = structure["things"]
    if structure["use"] != "named" or not things or things[0]["kind"] == "shape":
        return ""
    if structure["artist"]:
        return "by an artist"
    if len(things) > 1:
        return "several things"
    return f"{'large' if things[0]['spot'][0] >= LARGE / CELLS else 'small'} {things[0]['kind']}"


def unseen_scenes(maker: SceneMaker, count: int) -> dict[str, list[Structure]]:
    """`count` scenes of each kind."""
    found: dict[str, list[Structure]] = {
        kind: []
        for kind in ("large object", "large person", "small object", "small person", "several things", "by an artist")
    }
    while any(len(scenes) < count for scenes in found.values()):
        structure = maker.structure()
        kind = kind_of(structure)
        if kind and len(found[kind]) < count:
            found[kind].append(structure)
    return found


@torch.no_grad()
def losses(unet: UNet2DConditionModel, latents: Tensor, texts: Tensor, noise: Tensor) -> Tensor:
    """(times, n) squared errors of v, for latents (n, c, h, w), texts (n, 77, width) and noise (times, n, c, h, w)."""
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod
    found = []
    for time, drawn in zip(TIMES, noise, strict=True):
        signal, amount = alpha_bar[time].sqrt(), (1 - alpha_bar[time]).sqrt()
        errors = []
        for x, n, text in zip(latents.split(ROWS), drawn.split(ROWS), texts.split(ROWS), strict=True):
            noisy = (signal * x + amount * n).contiguous(memory_format=torch.channels_last)
            with autocast():
                v = unet(noisy, torch.tensor(time), text).sample.float()
            errors.append((v - (signal * n - amount * x)).square().mean((1, 2, 3)))
        found.append(torch.cat(errors))
    return torch.stack(found)


def scenes_of(world: World, work: Path, count: int) -> tuple[list[str], Tensor, Tensor]:
    """The kind, the latents and the text states of each scene."""
    maker, rng, words = SceneMaker(world, load_drawings(world, work), SEED), random.Random(SEED), Words(work)
    vae = quicken(AutoencoderKL.from_pretrained(work / "vae")).eval()
    scenes = unseen_scenes(maker, count)
    structures = [structure for each in scenes.values() for structure in each]
    captions = [caption(structure, rng, world) for structure in structures]
    with torch.no_grad(), autocast():
        images = tensor(maker.paint(structures)).split(ROWS)
        latents = torch.cat([vae.encode(some).latent_dist.mode().float() for some in images])
    texts = torch.cat([words(captions[at : at + ROWS])[0] for at in range(0, len(captions), ROWS)])
    return [kind for kind, each in scenes.items() for _ in each], latents, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="the denoiser's stages, whose averaged weights are taken"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="where checkpoints and drawings lie")
    parser.add_argument("--count", type=int, default=48, help="scenes of each kind")
    options = parser.parse_args()
    set_up()
    kinds, latents, texts = scenes_of(read_world(), options.work, options.count)
    noise = torch.randn(len(TIMES), *latents.shape, generator=torch.Generator().manual_seed(SEED))
    table = Table("stage", "step", "scenes", "all", *(f"t {time}" for time in TIMES))
    for name in options.names:
        state = read_stage(options.work, name)
        unet = quicken(build(latents.shape[1], latents.shape[-1], texts.shape[-1]))
        unet.load_state_dict(state["average"])
        errors = losses(unet.eval(), latents, texts, noise)
        for kind in dict.fromkeys(kinds):
            of_kind = errors[:, torch.tensor([one == kind for one in kinds])]
            numbers = [of_kind.mean(), *of_kind.mean(1)]
            table.add_row(name, str(state["step"]), kind, *(f"{float(number):.4f}" for number in numbers))
    Console(width=105).print(table)


if __name__ == "__main__":
    main()
