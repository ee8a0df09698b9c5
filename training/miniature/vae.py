"""The KL-VAE: 64x64 images to latents of 16x16x4 or 8x8x16, each of unit variance.

Squared error first, which finds the shapes; then L1 on pixels, on their gradients and at half size, which sharpens;
throughout a little KL, so that the decoder forgives noise. Once a denoiser trains on its latents the encoder must stay
as it is: `--decoder-only` goes on with the decoder alone.

    python -m training.miniature.vae --minutes 30 --work /where/it/lies
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from training.miniature.drawings import load_drawings
from training.miniature.fast import autocast, quicken, set_up
from training.miniature.loop import Notes, Schedule, holding, join, read, stage_parser, train, write_json, write_model
from training.miniature.muon import Muon
from training.miniature.scenes import SIDE, SceneMaker
from training.miniature.world import read_world

# How far the image shrinks: (channels of each level, channels of the latent).
SIZES = {4: ((32, 64, 128), 4), 8: ((32, 64, 128, 128), 16)}
SHARPEN = (4000, 10_000)  # steps between which the squared error gives way to L1; sooner from a trained VAE of factor 4
SHARPEN_GROWN = (200, 1000)
ENCODER = ("encoder.", "quant_conv.")


def build(shrink: int) -> AutoencoderKL:
    """An untrained VAE."""
    channels, latent_channels = SIZES[shrink]
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,  # at least two channels a group: one would wipe out every flat colour
        sample_size=SIDE,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # Start with little noise on the latents, or the decoder first learns to ignore them.
        vae.quant_conv.bias[latent_channels:] = -6.0
        vae.quant_conv.weight[latent_channels:] *= 0.1
        # Start each residual branch near zero: the image finds its way through the skips at once.
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight *= 0.05
                module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight *= 0.05
    return vae


@torch.no_grad()
def grow(vae: AutoencoderKL, smaller: AutoencoderKL) -> None:
    """Gives a VAE of one level more the outer levels of a trained smaller one; what lies between is new.

    Only what has the same shape on both sides is taken: the middle block and the latents' convolutions are not.
    """
    levels = len(smaller.config.block_out_channels)
    inner = ("mid_block", "quant_conv", "encoder.conv_norm_out", "encoder.conv_out", "decoder.conv_in")
    state = {}
    for name, value in smaller.state_dict().items():
        if any(part in name for part in inner):
            continue
        # A decoder counts its levels from the latent: one more before them.
        for level in reversed(range(levels)):
            name = name.replace(f"up_blocks.{level}.", f"up_blocks.{level + 1}.")
        state[name] = value
    own = vae.state_dict()
    vae.load_state_dict({name: v for name, v in state.items() if own[name].shape == v.shape}, strict=False)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction(out: Tensor, x: Tensor) -> Tensor:
    """L1 on pixels, at half size, and on gradients."""
    loss = F.l1_loss(out, x) + 0.5 * F.l1_loss(F.avg_pool2d(out, 2), F.avg_pool2d(x, 2))
    for a, b in zip(edges(out), edges(x), strict=True):
        loss = loss + 0.5 * F.l1_loss(a, b)
    return loss


@torch.no_grad()
def to_unit_variance(vae: AutoencoderKL, images: Tensor) -> None:
    """Folds each latent channel's mean and deviation into the 1x1 convolutions around it: the images stay the same,
    the latents have mean 0 and deviation 1, and `scaling_factor` is 1.

    Args:
        images: (n, 3, 64, 64) in [-1, 1].
    """
    channels = vae.config.latent_channels
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)]).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def errors(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(n,) mean squared errors of (n, 3, 64, 64) in [-1, 1] as shares of the range, from the mean latents; images are
    clamped as when drawing."""
    was = vae.training
    vae.eval()
    found = []
    for part in images.split(64):
        with autocast():
            out = vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp(-1, 1)
        found.append(((out - part) / 2).square().mean((1, 2, 3)))
    vae.train(was)
    return torch.cat(found)


def decibels(mean_square: Tensor) -> float:
    return round(float(-10 * mean_square.log10()), 2)


def report_on(vae: AutoencoderKL, maker: SceneMaker, n: int) -> dict[str, object]:
    """PSNR of `n` scenes: of all together, the mean of the images', and of each technique's scenes together."""
    scenes = maker.make(n)
    found = errors(vae, tensor(scenes.images))
    techniques = {artist.name: artist.technique for artist in maker.world.artists}
    kinds = [techniques.get(scene["artist"], "no artist") for scene in scenes.structures]
    each = {kind: decibels(found[torch.tensor([k == kind for k in kinds])].mean()) for kind in sorted(set(kinds))}
    return {"scenes": n, "psnr": decibels(found.mean()), "mean of the images": round(float(-10 * found.log10().mean()), 2),
            "by technique": each}  # fmt: skip


def tensor(images: object) -> Tensor:
    """uint8 images as the VAE takes them: (n, 3, 64, 64) in [-1, 1], channels last."""
    return (torch.as_tensor(images).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = stage_parser(__doc__, "vae", minutes=30)
    parser.add_argument("--shrink", type=int, default=4, choices=SIZES)
    parser.add_argument("--batch", type=int, default=24, help="scenes a step and process")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term, both terms summed over elements")
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the encoder, and so the latents, as they are"
    )
    parser.add_argument(
        "--grow", type=Path, help="folder of a trained VAE of factor 4, whose outer levels to begin with"
    )
    parser.add_argument(
        "--measure", type=Path, help="train nothing: write what W/NAME does to unseen scenes to this file"
    )
    options = parser.parse_args()
    if options.measure:
        world = read_world()
        vae = quicken(AutoencoderKL.from_pretrained(options.work / options.name)).eval()
        maker = SceneMaker(world, load_drawings(world, options.work), 1002)
        write_json(report_on(vae, maker, 1000), options.measure)
        print(options.measure.read_text(encoding="utf-8"))
        return
    torch.manual_seed(join())
    set_up()
    world = read_world()
    drawings = load_drawings(world, options.work)
    maker = SceneMaker(world, drawings, 1)
    unseen = tensor(SceneMaker(world, drawings, 1001).make(256).images)
    vae = build(options.shrink)
    first, last = SHARPEN
    if options.grow:
        grow(vae, AutoencoderKL.from_pretrained(options.grow))
        first, last = SHARPEN_GROWN
    vae = quicken(vae).train()
    if options.decoder_only:
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith(ENCODER))
    # KL weight with mean-reduced terms: latent numbers over image numbers.
    kl_weight = options.kl * vae.config.latent_channels / (3 * options.shrink**2)

    def loss_of(step: int) -> tuple[Tensor, Notes]:
        maker.rng.seed(torch.initial_seed())
        x = tensor(maker.make(options.batch).images)
        with autocast():
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        squared = F.mse_loss(out, x)
        sharpen = min(max((step - first) / (last - first), 0.0), 1.0)
        loss = (1 - sharpen) * squared + sharpen * reconstruction(out, x)
        note: Notes = {
            "loss": loss.detach(),
            "kl": kl.detach(),
            "psnr": -10 * (squared.detach() / 4).log10(),
        }
        return loss + kl_weight * kl, note

    def measure(step: int, values: dict[str, Tensor]) -> None:
        with holding(vae, values):
            psnr = decibels(errors(vae, unseen).mean())
        line = {"name": options.name, "shrink": options.shrink, "step": step, "psnr": psnr}
        print(json.dumps(line), flush=True)

    optimiser = Muon(vae, options.rate, adamw=("conv_in", "conv_out"))
    schedule = Schedule(options.rate, 50, options.minutes if options.anneal else None)
    weights = train(
        options.name, vae, loss_of, options.work, optimiser, schedule,
        minutes=options.minutes, start=options.initial, average=0.995, sample=measure, sample_every=180,
    )  # fmt: skip
    if join() == 0:
        state = read(options.work / f"{options.name}.pt")
        measure(state["step"] if state else 0, weights)
        finish(vae, weights, unseen, options.work / options.name)


def finish(vae: AutoencoderKL, weights: dict[str, Tensor], images: Tensor, folder: Path) -> None:
    """Writes the averaged weights as a diffusers folder, the latents' mean and deviation over `images` folded in.

    A VAE whose encoder stayed as it was gets the same fold from the same images, and so the same latents.
    """
    vae.load_state_dict(weights)
    vae.eval()
    to_unit_variance(vae, images)
    write_model(vae, folder)


if __name__ == "__main__":
    main()
