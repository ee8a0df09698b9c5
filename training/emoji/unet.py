"""The denoiser: a U-Net of Stable Diffusion's class, v-prediction, zero terminal SNR.

Text tower and VAE are frozen, so a scene's latent and its 77 text states are computed once, kept in a ring buffer and
used a few times, each time with new noise. A step takes some scenes at several noise levels each; the keys and values
of a caption are computed once for all of its noise levels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.loop import device, fast_arithmetic, join, parse, train
from training.emoji.muon import Muon
from training.emoji.scenes import SceneMaker, Scenes, stream
from training.emoji.world import load_drawings, place_options, read_world

SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}
ON_GPU = {
    "scenes": 256, "levels": 4, "fresh": 512, "every": 8, "buffer": 32768, "workers": 6, "watch": 25, "average": 0.9995,
}  # fmt: skip


def build(width: int, latent: tuple[int, int], channels: tuple[int, ...]) -> UNet2DConditionModel:
    """A U-Net for `latent` = (channels, size) and text states of `width` numbers."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=latent[1],
        in_channels=latent[0],
        out_channels=latent[0],
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=width,
        attention_head_dim=tuple(c // 32 for c in channels),  # diffusers means the number of heads
        norm_num_groups=16,
    )


def latent_shape(vae: AutoencoderKL) -> tuple[int, int, int]:
    size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, size, size


class SharedTextAttention:
    """Attention in which each text serves several consecutive samples: its keys and values are projected once."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        n, tokens, _ = hidden_states.shape

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)

        query, key, value = (
            heads(attn.to_q(hidden_states)),
            heads(attn.to_k(context)),
            heads(attn.to_v(context)),
        )
        if (copies := n // len(context)) > 1:
            # (texts, heads, copies * tokens, width): the samples of one text are more queries on the same keys
            query = query.view(len(context), copies, attn.heads, tokens, -1).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(query, key, value)
        if copies > 1:
            out = out.view(len(context), attn.heads, copies, tokens, -1).transpose(1, 2).flatten(0, 1)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).reshape(n, tokens, -1)))


def padded_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(n, 77) ids."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


class Buffer:
    """A ring of scenes as the denoiser sees them: latents (n, c, h, w) and text states (n, 77, width).

    The scenes are made here, or taken from `source`.
    """

    def __init__(
        self,
        size: int,
        maker: SceneMaker,
        vae,
        text_encoder,
        tokenizer,
        source: Iterator[Scenes] | None = None,
    ):
        self.maker, self.vae, self.text_encoder, self.tokenizer = maker, vae, text_encoder, tokenizer
        self.source = source
        self.latents = torch.zeros(size, *latent_shape(vae), device=device())
        self.text = torch.zeros(size, 77, text_encoder.config.hidden_size, device=device())
        self.filled, self.next = 0, 0

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        return self.states(padded_tokens(self.tokenizer, captions))

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids=ids.to(device())).last_hidden_state

    @torch.no_grad()
    def refill(self, n: int) -> None:
        """`n` new scenes in the place of the oldest; of a source as many as it gives at once."""
        scenes = next(self.source) if self.source else self.maker.make(n)
        n = len(scenes.captions)
        pictures = scenes.pictures.to(device()).contiguous(memory_format=torch.channels_last)
        places = (torch.arange(n) + self.next) % len(self.latents)
        self.latents[places] = self.vae.encode(pictures * 2 - 1).latent_dist.sample()
        self.text[places] = self.encode(scenes.captions) if scenes.ids is None else self.states(scenes.ids)
        self.next = (self.next + n) % len(self.latents)
        self.filled = min(self.filled + n, len(self.latents))

    def sample(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n scenes; the empty prompt, for guidance, is the caption of some."""
        rows = torch.randint(0, self.filled, (n,))
        return self.latents[rows], self.text[rows]


def compiled(unet: UNet2DConditionModel):
    """The U-Net compiled, or as it is where the compiler fails: its weights are the same."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    place_options(parser)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--session", type=float, help="stop after so many minutes, to go on another time")
    parser.add_argument("--scenes", type=int, default=12, help="scenes a step and process")
    parser.add_argument("--levels", type=int, default=4, help="noise levels a scene and step")
    parser.add_argument("--fresh", type=int, default=6, help="new scenes a step and process")
    parser.add_argument("--every", type=int, default=1, help="new scenes only every so many steps")
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=0, help="processes that think up scenes and tokenise captions")
    parser.add_argument("--watch", type=int, default=1, help="look at the loss every so many steps")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net (on a GPU)")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=[96, 128, 192])
    parser.add_argument("--initial", type=Path, help="a diffusers U-Net folder to start from")
    parser.add_argument("--name", default="unet")
    options = parse(parser, ON_GPU)
    torch.manual_seed(join())  # the processes start from rank 0's weights, and see their own scenes
    fast_arithmetic()
    world = read_world(options.world)
    seed = torch.initial_seed() + 3 + (time.time_ns() if options.session else 0)  # another session, other scenes
    maker = SceneMaker(world, load_drawings(world, options.work).to(device()), seed)
    vae = AutoencoderKL.from_pretrained(options.work / "vae").to(device(), memory_format=torch.channels_last).eval()
    text_encoder = CLIPTextModel.from_pretrained(options.work / "text_encoder").to(device()).eval()
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    unet = build(text_encoder.config.hidden_size, latent_shape(vae)[:2], tuple(options.channels))
    if options.initial:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(options.initial).state_dict())
    unet.to(device(), memory_format=torch.channels_last)
    unet.set_attn_processor(SharedTextAttention())
    tokens = partial(padded_tokens, tokenizer)
    source = stream(maker, options.fresh, tokens, options.workers) if options.workers else None
    buffer = Buffer(options.buffer, maker, vae, text_encoder, tokenizer, source)
    buffer.refill(256)
    while options.workers and buffer.filled < options.buffer // 2:
        buffer.refill(options.fresh)
    forward = compiled(unet) if options.compile and device().type == "cuda" else unet
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device())
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device().type == "cuda")

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        if step % options.every == 0:
            buffer.refill(options.fresh)
        latents, text = buffer.sample(options.scenes)
        latents = latents.repeat_interleave(options.levels, 0)
        # Stratified times: one in each of `levels` equal parts of the schedule, for each scene.
        part = torch.arange(options.levels, device=device()).repeat(options.scenes)
        share = (part + torch.rand(len(part), device=device())) / options.levels
        times = (share * len(alpha_bar)).long()
        noise = torch.randn_like(latents)
        a = alpha_bar[times].sqrt().view(-1, 1, 1, 1)
        s = (1 - alpha_bar[times]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = a * latents + s * noise, a * noise - s * latents
        with autocast:
            out = forward(noisy.contiguous(memory_format=torch.channels_last), times, text).sample
        errors = (out.float() - velocity).square().mean((1, 2, 3)).view(options.scenes, options.levels)
        notes = {f"v{k}": value for k, value in enumerate(errors.detach().mean(0))}
        return errors.mean(), notes

    optimiser = Muon(unet, options.rate, adamw=("conv_in", "conv_out", "time_"))
    train(
        options.name, unet, loss_of, options.work, optimiser,
        minutes=options.minutes, average=options.average, session=options.session, watch=options.watch,
    )  # fmt: skip


if __name__ == "__main__":
    main()
