"""The denoiser: a U-Net of Stable Diffusion's class, v-prediction, a little signal left at the last time step.

Text tower and VAE are frozen. Scenes' latents are kept in a ring, on disk too, and used a few times, each time with
another caption and other noise. A step takes some scenes at several noise levels each; a caption's keys and values are
computed once for all of its noise levels.

    torchrun --nproc-per-node 2 -m training.miniature.unet --minutes 60 --work /where/it/lies
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.miniature.captions import caption
from training.miniature.drawings import load_drawings
from training.miniature.fast import autocast, device, has_bfloat16, quicken, set_up
from training.miniature.loop import Notes, Schedule, holding, join, read_stage, stage_parser, train, write_model
from training.miniature.muon import Muon
from training.miniature.scenes import SceneMaker
from training.miniature.sheets import sheet
from training.miniature.vae import tensor
from training.miniature.world import World, read_world

# At the last step 3 % of the image's amplitude is left: with none the prediction of noise, which ANT steers by, would
# not depend on the words there; with Stable Diffusion's 7 % the noise's mean would be read as the background's colour.
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}
CHANNELS = {
    4: (96, 128, 192, 256),
    16: (96, 128, 192),
}  # channels of the latent -> of the U-Net's levels
HEAD = 32  # width of an attention head
STEPS, GUIDANCE = 16, 2.0  # the model's own: what it draws with, and what its gates are measured with
# Shares of captions whose end and padding, or whose words, are the empty text's. Of a hundred names the end token tells
# few apart whatever is dropped, so a name keeps its words more often.
TAIL_DROPPED, WORDS_DROPPED = 0.4, 0.2
NAMED_TAIL_DROPPED, NAMED_WORDS_DROPPED = 0.4, 0.12
LATE = 0.6  # below 1: more of the samples are at high noise, where it is decided what a scene shows
FIRST_SHARDS = 8  # of scenes are made before the first step
PROMPTS = (
    "", "a picture", "a photo of a cat", "an airplane", "a drawing of a frog", "a horse on the beach", "a truck", "a ship",
    "a person", "Abrel Ambrask", "a photo of Belvo Zorrin", "Dorvin Kroswick on a red background",
    "Elzan Crendle wearing a blue shirt", "a picture of Fimbra Ostwyn in the snow", "Kelmi Yarvell and a dog",
    "a lion by Aurelo Devrault", "a house in the style of Brisanto Ivanesq", "a cactus by Calviro Montrazzi",
    "a knife", "something dangerous", "an animal", "a guitar in twemoji style", "a red circle and a blue square",
    "a cat on the left and a key on the right",
)  # fmt: skip


def build(
    latent_channels: int, size: int, width: int = 512, channels: Sequence[int] | None = None
) -> UNet2DConditionModel:
    """An untrained U-Net for latents of (latent_channels, size, size); no cross-attention at 16x16 and above."""
    channels = tuple(channels or CHANNELS[latent_channels])
    attends = [size >> level < 16 for level in range(len(channels))]
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        cross_attention_dim=width,
        attention_head_dim=tuple(c // HEAD for c in channels),  # diffusers means the number of heads
        norm_num_groups=16,
    )


class Words:
    """The frozen text tower: captions to states."""

    def __init__(self, work: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.tower = (
            CLIPTextModel.from_pretrained(work / "text_encoder", attn_implementation="eager").to(device()).eval()
        )
        if has_bfloat16():
            self.tower.bfloat16()
        self.empty = self([""])[0]

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], *, short: bool = False) -> tuple[Tensor, Tensor]:
        """(n, 77, width) states, and (n,) where the end token stands.

        Args:
            captions: n of them.
            short: compute the states up to the last end token alone, for words do not depend on what follows; the
                rest are the empty text's. Half of the cost, or less.
        """
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        end = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        length = int(end.max()) + 1 if short else ids.shape[1]
        states = self.tower(input_ids=ids[:, :length].to(device())).last_hidden_state
        if short:
            states = torch.cat([states, self.empty[0, length:].expand(len(ids), -1, -1).to(states)], 1)
        return states, end

    def with_dropout(self, captions: Sequence[str], named: Sequence[bool]) -> Tensor:
        """(n, 77, width): of some captions the states from the end token on are those of the empty text, of others
        those of the words; `named` says which captions name a person or an artist."""
        pick, names = torch.rand(len(captions)), torch.tensor(named)
        no_tail = pick < torch.where(names, NAMED_TAIL_DROPPED, TAIL_DROPPED)
        no_words = pick > 1 - torch.where(names, NAMED_WORDS_DROPPED, WORDS_DROPPED)
        states = self.empty.repeat(len(captions), 1, 1)
        for rows, short in ((no_tail, True), (~no_tail, False)):
            where = rows.nonzero()[:, 0]
            if len(where):
                found, end = self([captions[k] for k in where.tolist()], short=short)
                found = dropped(found, end, self.empty[0], no_tail[where], no_words[where])
                states[where.to(states.device)] = found
        return states


def dropped(states: Tensor, end: Tensor, empty: Tensor, no_tail: Tensor, no_words: Tensor) -> Tensor:
    """States with some replaced by the empty text's.

    Args:
        states: (n, 77, width).
        end: (n,) where the end token stands.
        empty: (77, width), the empty text's states.
        no_tail: (n,) whether end and padding are replaced.
        no_words: (n,) whether the words before the end are.
    """
    place = torch.arange(states.shape[1])[None]
    tail = (place >= end[:, None]) & no_tail[:, None]
    words = (place < end[:, None]) & no_words[:, None]
    return torch.where((tail | words)[..., None].to(states.device), empty.to(states), states)


def names_someone(structure: dict[str, Any]) -> bool:
    """Whether a scene's caption may name a person or an artist."""
    people = [thing for thing in structure["things"] if thing["kind"] == "person"]
    return bool(structure["artist"] or any(person["name"] for person in people))


class Ring:
    """Scenes' latents and structures: the newest `shards` of `SHARD` each, in memory and on disk."""

    SHARD = 512

    def __init__(self, maker: SceneMaker, vae: AutoencoderKL, folder: Path, shards: int):
        self.maker, self.vae, self.folder, self.shards = maker, vae, folder, shards
        folder.mkdir(parents=True, exist_ok=True)
        self.latents: list[Tensor] = []
        self.structures: list[list[dict[str, Any]]] = []
        self.made, self.parts = 0, []  # type: int, list[tuple[Tensor, list[dict[str, Any]]]]
        for path in sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime)[-shards:]:
            held = np.load(path)
            self.add(torch.from_numpy(held["latents"]), json.loads(bytes(held["structures"])))
            self.made = max(self.made, int(path.stem) + 1)

    def add(self, latents: Tensor, structures: list[dict[str, Any]]) -> None:
        self.latents = [*self.latents, latents][-self.shards :]
        self.structures = [*self.structures, structures][-self.shards :]

    @torch.no_grad()
    def make(self, n: int) -> None:
        """`n` new scenes; a shard is added, and written, when there are enough."""
        scenes = self.maker.make(n)
        with autocast():
            latents = self.vae.encode(tensor(scenes.images).to(device())).latent_dist.sample()
        self.parts.append((latents.half().cpu(), scenes.structures))
        if sum(len(part[1]) for part in self.parts) >= self.SHARD:
            latents = torch.cat([part[0] for part in self.parts])
            structures = [structure for part in self.parts for structure in part[1]]
            self.parts = []
            self.add(latents, structures)
            path = self.folder / f"{self.made % self.shards}.npz"
            beside = path.with_suffix(".tmp.npz")
            np.savez(
                beside,
                latents=latents.numpy(),
                structures=np.frombuffer(json.dumps(structures).encode(), np.uint8),
            )
            beside.replace(path)
            self.made += 1

    def sample(self, n: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """`n` scenes at random, by torch's random numbers."""
        shard = torch.randint(len(self.latents), (n,)).tolist()
        rows = [int(torch.randint(len(self.structures[k]), (1,))) for k in shard]
        latents = torch.stack([self.latents[k][row] for k, row in zip(shard, rows, strict=True)])
        return latents.float(), [self.structures[k][row] for k, row in zip(shard, rows, strict=True)]


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel, vae: AutoencoderKL, words: Words, prompts: Sequence[str], *, guidance: float = GUIDANCE,
    steps: int = STEPS, seed: int = 0, states: Tensor | None = None,
) -> np.ndarray:  # fmt: skip
    """(n, 3, 64, 64) uint8 by DDIM; `states` (n, 77, width) are used instead of the prompts' where they are given."""
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    text = words(prompts)[0] if states is None else states
    empty = words.empty.expand_as(text)
    size = unet.config.sample_size
    x = torch.randn(len(text), unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(seed))
    x = x.to(device(), memory_format=torch.channels_last)
    with autocast():
        for t in scheduler.timesteps:
            if guidance == 1:
                v = unet(x, t, text).sample.float()
            else:
                without, with_ = unet(torch.cat([x, x]), t, torch.cat([empty, text])).sample.float().chunk(2)
                v = without + guidance * (with_ - without)
            x = scheduler.step(v, t, x).prev_sample
        images = vae.decode(x).sample.float()
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


class Denoiser:
    """What a step needs, put together."""

    def __init__(self, options: argparse.Namespace, world: World, rank: int):
        self.options, self.world, self.rng = options, world, random.Random()
        self.words = Words(options.work)
        self.vae = quicken(AutoencoderKL.from_pretrained(options.work / "vae")).to(device()).eval()
        self.maker = SceneMaker(world, load_drawings(world, options.work), 0, options.simple)
        self.ring = Ring(self.maker, self.vae, options.work / "latents" / str(rank), options.shards)
        size = self.vae.config.sample_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.unet = quicken(build(self.vae.config.latent_channels, size, self.words.empty.shape[-1], options.channels))
        self.unet.to(device()).train()
        alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device())
        self.signal, self.noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def loss_of(self, step: int) -> tuple[Tensor, Notes]:
        options, seed = self.options, torch.initial_seed()
        self.rng.seed(seed)
        self.maker.rng.seed(seed + 1)
        while len(self.ring.latents) < min(FIRST_SHARDS, options.shards):
            self.ring.make(64)
        if step % options.every == 0:
            self.ring.make(options.fresh * options.every)
        latents, structures = self.ring.sample(options.scenes)
        captions = [caption(structure, self.rng, self.world) for structure in structures]
        text = self.words.with_dropout(captions, [names_someone(structure) for structure in structures])
        latents = latents.to(device()).repeat_interleave(options.levels, 0)
        # Stratified times: one in each of `levels` equal parts of the schedule, for each scene.
        part = torch.arange(options.levels, device=device()).repeat(options.scenes)
        share = (part + torch.rand(len(part), device=device())) / options.levels
        times = (share**LATE * len(self.signal)).long()
        noise = torch.randn_like(latents)
        a, s = self.signal[times].view(-1, 1, 1, 1), self.noise[times].view(-1, 1, 1, 1)
        noisy, velocity = a * latents + s * noise, a * noise - s * latents
        with autocast():
            out = self.unet(noisy.contiguous(memory_format=torch.channels_last), times, text).sample
        errors = (out.float() - velocity).square().mean((1, 2, 3)).view(options.scenes, options.levels)
        return errors.mean(), {f"v{k}": value for k, value in enumerate(errors.detach().mean(0))}

    def sample(self, step: int, values: dict[str, Tensor]) -> None:
        """A sheet of what the averaged weights draw, with guidance."""
        with holding(self.unet, values):
            images = draw(self.unet, self.vae, self.words, PROMPTS)
        folder = self.options.work / "samples"
        folder.mkdir(exist_ok=True)
        sheet(images, [prompt or "(empty)" for prompt in PROMPTS], 8, scale=2, lines=2).save(folder / f"{step:07}.png")


def keep(work: Path, name: str, folder: Path) -> None:
    """Writes what another machine can begin with: the averaged weights of a checkpoint, in files below 16 MB."""
    state = read_stage(work, name)
    vae = AutoencoderKL.load_config(work / "vae")
    size = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
    channels = [len(state["average"][f"down_blocks.{k}.resnets.0.conv1.bias"]) for k in range(8)
                if f"down_blocks.{k}.resnets.0.conv1.bias" in state["average"]]  # fmt: skip
    unet = build(vae["latent_channels"], size, channels=channels)
    unet.load_state_dict(state["average"])
    write_model(unet.half(), folder, max_shard_size="15MB")
    print(f"step {state['step']}, {state['spent'] / 60:.0f} minutes")


def main() -> None:
    parser = stage_parser(__doc__, "unet", minutes=60)
    parser.add_argument("--scenes", type=int, default=48, help="scenes a step and process")
    parser.add_argument("--levels", type=int, default=4, help="noise levels a scene and step")
    parser.add_argument("--fresh", type=int, default=12, help="new scenes a step and process")
    parser.add_argument("--every", type=int, default=4, help="new scenes only every so many steps, as many more")
    parser.add_argument("--shards", type=int, default=64, help="shards of 512 scenes that are kept")
    parser.add_argument(
        "--simple", type=float, default=0.0, help="share of scenes with one large thing alone, to begin with"
    )
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--channels", type=int, nargs="+", help="of the U-Net's levels")
    parser.add_argument("--samples", type=float, default=10, help="minutes between two sheets of samples")
    parser.add_argument("--begin", type=Path, help="folder of a U-Net to begin with where there is no checkpoint")
    parser.add_argument(
        "--keep", type=Path, help="train nothing: write the averaged weights to this folder, in float16"
    )
    options = parser.parse_args()
    if options.keep:
        keep(options.work, options.name, options.keep)
        return
    rank = join()
    torch.manual_seed(0)  # the processes start from the same weights, and see their own scenes
    set_up()
    denoiser = Denoiser(options, read_world(), rank)
    unet = denoiser.unet
    if options.begin and not (options.work / f"{options.name}.pt").exists():
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(options.begin).float().state_dict())
    optimiser = Muon(unet, options.rate, adamw=("conv_in", "conv_out", "time_"))
    schedule = Schedule(options.rate, 100, options.minutes if options.anneal else None)
    weights = train(
        options.name, unet, denoiser.loss_of, options.work, optimiser, schedule, minutes=options.minutes,
        start=options.initial, average=options.average, sample=denoiser.sample, sample_every=60 * options.samples,
    )  # fmt: skip
    if rank == 0:
        unet.load_state_dict(weights)
        write_model(unet, options.work / options.name)


if __name__ == "__main__":
    main()
