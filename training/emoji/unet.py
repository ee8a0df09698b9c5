"""The denoiser: a U-Net of Stable Diffusion's class, v-prediction, zero terminal SNR.

Text tower and VAE are frozen, so a scene's latent and its 77 text states are computed once, kept in a ring buffer and
used a few times, each time with new noise. A step takes some scenes at several noise levels each; the keys and values
of a caption are computed once for all of its noise levels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.loop import device, join, train
from training.emoji.muon import Muon
from training.emoji.scenes import SceneMaker
from training.emoji.world import load_drawings, read_world

SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "num_train_timesteps": 1000,
}


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

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if (copies := n // len(context)) > 1:
            # (texts, heads, copies * tokens, width): the samples of one text are more queries on the same keys
            query = query.view(len(context), copies, attn.heads, tokens, -1).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(query, key, value)
        if copies > 1:
            out = out.view(len(context), attn.heads, copies, tokens, -1).transpose(1, 2).flatten(0, 1)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).reshape(n, tokens, -1)))


class Buffer:
    """A ring of scenes as the denoiser sees them: latents (n, c, h, w) and text states (n, 77, width)."""

    def __init__(self, size: int, maker: SceneMaker, vae, text_encoder, tokenizer):
        self.maker, self.vae, self.text_encoder, self.tokenizer = maker, vae, text_encoder, tokenizer
        self.latents = torch.zeros(size, *latent_shape(vae), device=device())
        self.text = torch.zeros(size, 77, text_encoder.config.hidden_size, device=device())
        self.filled, self.next = 0, 0
        self.empty = self.encode([""])[0]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return self.text_encoder(input_ids=ids.input_ids.to(device())).last_hidden_state

    @torch.no_grad()
    def refill(self, n: int) -> None:
        scenes = self.maker.make(n)
        pictures = scenes.pictures.to(device()).contiguous(memory_format=torch.channels_last)
        places = (torch.arange(n) + self.next) % len(self.latents)
        self.latents[places] = self.vae.encode(pictures * 2 - 1).latent_dist.sample()
        self.text[places] = self.encode(scenes.captions)
        self.next = (self.next + n) % len(self.latents)
        self.filled = min(self.filled + n, len(self.latents))

    def sample(self, n: int, drop: float) -> tuple[torch.Tensor, torch.Tensor]:
        """n scenes; a share `drop` of them without its caption (the empty prompt's states instead)."""
        rows = torch.randint(0, self.filled, (n,))
        text = self.text[rows]
        text[torch.rand(n) < drop] = self.empty
        return self.latents[rows], text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/emoji/work"))
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--scenes", type=int, default=12, help="scenes a step and process")
    parser.add_argument("--levels", type=int, default=4, help="noise levels a scene and step")
    parser.add_argument("--fresh", type=int, default=6, help="new scenes a step and process")
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--drop", type=float, default=0.1)
    parser.add_argument("--channels", type=int, nargs="+", default=[96, 128, 192])
    parser.add_argument("--initial", type=Path, help="a diffusers U-Net folder to start from")
    parser.add_argument("--name", default="unet")
    options = parser.parse_args()
    torch.manual_seed(join())  # the processes start from rank 0's weights, and see their own scenes
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    world = read_world()
    maker = SceneMaker(world, load_drawings(world, options.work), seed=torch.initial_seed() + 3)
    vae = AutoencoderKL.from_pretrained(options.work / "vae").to(device(), memory_format=torch.channels_last).eval()
    text_encoder = CLIPTextModel.from_pretrained(options.work / "text_encoder").to(device()).eval()
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    unet = build(text_encoder.config.hidden_size, latent_shape(vae)[:2], tuple(options.channels))
    if options.initial:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(options.initial).state_dict())
    unet.to(device(), memory_format=torch.channels_last)
    unet.set_attn_processor(SharedTextAttention())
    buffer = Buffer(options.buffer, maker, vae, text_encoder, tokenizer)
    buffer.refill(256)
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(device())
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device().type == "cuda")

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        buffer.refill(options.fresh)
        latents, text = buffer.sample(options.scenes, options.drop)
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
            out = unet(noisy.contiguous(memory_format=torch.channels_last), times, text).sample
        errors = (out.float() - velocity).square().mean((1, 2, 3)).view(options.scenes, options.levels)
        notes = {f"v{k}": value for k, value in enumerate(errors.detach().mean(0).tolist())}
        return errors.mean(), notes

    optimiser = Muon(unet, options.rate, adamw=("conv_in", "conv_out", "time_"))
    train(options.name, unet, loss_of, options.work, optimiser, minutes=options.minutes, average=0.998)


if __name__ == "__main__":
    main()
