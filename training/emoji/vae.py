"""The KL-VAE: 64x64 pictures to 8x8 latents of 8 channels, each of unit variance.

L1 on pixels, on their gradients and at half size, plus a little KL (sum form) so that the decoder forgives noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training.emoji.loop import device, train
from training.emoji.scenes import SceneMaker
from training.emoji.world import load_drawings, read_world

LATENT = {"channels": 8, "size": 8}


def build() -> AutoencoderKL:
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=LATENT["channels"],
        layers_per_block=1,
        norm_num_groups=4,  # of 8 channels: one channel a group would wipe out every flat colour
        sample_size=64,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # start with little noise on the latents, or the decoder first learns to ignore them
        vae.quant_conv.bias[LATENT["channels"] :] = -6.0
        vae.quant_conv.weight[LATENT["channels"] :] *= 0.1
    return vae


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    loss = F.l1_loss(out, x) + 0.5 * F.l1_loss(F.avg_pool2d(out, 2), F.avg_pool2d(x, 2))
    for a, b in zip(edges(out), edges(x), strict=True):
        loss = loss + 0.5 * F.l1_loss(a, b)
    return loss


@torch.no_grad()
def to_unit_variance(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Folds each latent channel's mean and deviation into the 1x1 convolutions around it: the pictures stay the same,
    the latents have mean 0 and deviation 1, and `scaling_factor` is 1."""
    channels = LATENT["channels"]
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/emoji/work"))
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term, both terms summed over elements")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    world = read_world()
    maker = SceneMaker(world, load_drawings(world, options.work), seed=1)
    vae = build().to(device(), memory_format=torch.channels_last)
    # KL weight with mean-reduced terms: latent numbers over picture numbers.
    kl_weight = options.kl * LATENT["channels"] * LATENT["size"] ** 2 / (3 * 64 * 64)

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        x = maker.make(options.batch).pictures.to(device()).contiguous(memory_format=torch.channels_last) * 2 - 1
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = reconstruction(out, x)
        mse = F.mse_loss(out.detach(), x) / 4
        return loss + kl_weight * kl, {"loss": loss.item(), "kl": kl.item(), "psnr": -10 * mse.log10().item()}

    weights = train("vae", vae, loss_of, options.work, minutes=options.minutes, rate=options.rate)
    vae.load_state_dict(weights)
    vae.eval()
    pictures = SceneMaker(world, load_drawings(world, options.work), seed=99).make(256).pictures.to(device())
    to_unit_variance(vae, pictures)
    vae.save_pretrained(options.work / "vae")


if __name__ == "__main__":
    main()
