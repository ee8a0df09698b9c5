"""The KL-VAE: 64x64 pictures to 8x8 latents of 8 channels, each of unit variance.

Squared error first, which finds the shapes; then L1 on pixels, on their gradients and at half size, which sharpens;
throughout a little KL, so that the decoder forgives noise.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from training.emoji.loop import device, fast_arithmetic, parse, train
from training.emoji.muon import Muon
from training.emoji.scenes import SceneMaker, stream
from training.emoji.world import load_drawings, place_options, read_world

# How far the picture shrinks: (channels of each level, channels of the latent).
SIZES = {4: ((16, 32, 64), 4), 8: ((8, 16, 48, 96), 8)}
ON_GPU = {"batch": 128, "workers": 3, "watch": 25}


def build(shrink: int = 8) -> AutoencoderKL:
    channels, latent_channels = SIZES[shrink]
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,  # one channel a group would wipe out every flat colour
        sample_size=64,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # Start with little noise on the latents, or the decoder first learns to ignore them.
        vae.quant_conv.bias[latent_channels:] = -6.0
        vae.quant_conv.weight[latent_channels:] *= 0.1
        # Start each residual branch near zero: the picture finds its way through the skips at once.
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight *= 0.05
                module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight *= 0.05
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
    channels = vae.config.latent_channels
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
    place_options(parser)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--shrink", type=int, default=8, choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes that think up scenes")
    parser.add_argument("--watch", type=int, default=1, help="look at the loss every so many steps")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--name", default="vae")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term, both terms summed over elements")
    options = parse(parser, ON_GPU)
    torch.manual_seed(0)
    fast_arithmetic()
    world = read_world(options.world)
    drawings = load_drawings(world, options.work).to(device())
    scenes = stream(SceneMaker(world, drawings, seed=1), options.batch, workers=options.workers)
    vae = build(options.shrink).to(device(), memory_format=torch.channels_last)
    # KL weight with mean-reduced terms: latent numbers over picture numbers.
    kl_weight = options.kl * vae.config.latent_channels / (3 * options.shrink**2)

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        x = next(scenes).pictures.contiguous(memory_format=torch.channels_last) * 2 - 1
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        squared = F.mse_loss(out, x)
        sharpen = min(max((progress - 0.15) / 0.3, 0.0), 1.0)
        loss = (1 - sharpen) * squared + sharpen * reconstruction(out, x)
        psnr = -10 * (squared.detach() / 4).log10()
        return loss + kl_weight * kl, {"loss": loss.detach(), "kl": kl.detach(), "psnr": psnr}

    optimiser = Muon(vae, options.rate, adamw=("conv_in", "conv_out"))
    weights = train(options.name, vae, loss_of, options.work, optimiser, minutes=options.minutes, watch=options.watch)
    vae.load_state_dict(weights)
    vae.eval()
    pictures = SceneMaker(world, drawings, seed=99).make(256).pictures
    to_unit_variance(vae, pictures)
    vae.save_pretrained(options.work / options.name)


if __name__ == "__main__":
    main()
