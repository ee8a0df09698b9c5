"""A training step of the miniature's nets beside the first edition's arithmetic, in one run, in turn.

The first edition trains in float32 with `scaled_dot_product_attention`; the miniature as
`training/miniature/fast.py` says. The same U-Net and VAE, the same inputs, forward and backward, one
thread; the seconds are the processor's, since others may use it at the same time, and the figure of
speed is the median of the rounds' ratios. How far the gradients are from float32's is measured, too.
Writes `benchmarks/results/miniature_training.json`. To reach: twice as fast.

    OMP_NUM_THREADS=1 python benchmarks/miniature_training.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.base.files import replacing
from training.emoji.unet import SharedTextAttention
from training.miniature import unet, vae
from training.miniature.fast import autocast, has_bfloat16, kernels, quicken, set_up

SAMPLES, TEXTS, IMAGES = 96, 24, 8
RESULT = Path(__file__).parent / "results" / "miniature_training.json"
Step = Callable[[nn.Module, bool], Tensor]


def denoiser_step(net: nn.Module, quick: bool) -> Tensor:
    """The loss of `SAMPLES` noisy latents with `TEXTS` captions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, 16, 16, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    text, times = torch.randn(TEXTS, 77, 512, generator=generator), torch.arange(SAMPLES) * 10
    with autocast(quick and has_bfloat16()):
        out = net(x, times, text).sample
    return (out.float() - x).square().mean()


def vae_step(net: nn.Module, quick: bool) -> Tensor:
    """The loss of `IMAGES` images."""
    x = torch.rand(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    with autocast(quick and has_bfloat16()):
        out = net.decode(net.encode(x).latent_dist.mean).sample  # type: ignore[operator]
    return vae.reconstruction(out.float(), x)


def gradient(net: nn.Module, step: Step, quick: bool) -> Tensor:
    """All gradients of a step in one vector."""
    step(net, quick).backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad(set_to_none=True)
    return found


def compare(old: nn.Module, new: nn.Module, step: Step, samples: int, rounds: int) -> dict[str, Any]:
    """The seconds of a step of both nets, which have the same weights, in turn."""
    a, b = gradient(old, step, False), gradient(new, step, True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for net, quick in ((old, False), (new, True)):
            before = time.process_time()
            gradient(net, step, quick)
            seconds[quick].append(time.process_time() - before)
    ratios = [first / second for first, second in zip(seconds[False], seconds[True], strict=True)]
    return {
        "parameters": sum(p.numel() for p in new.parameters()),
        "first edition, samples a second": round(samples / statistics.median(seconds[False]), 1),
        "miniature, samples a second": round(samples / statistics.median(seconds[True]), 1),
        "times as fast": round(statistics.median(ratios), 2),
        "least and most": [round(min(ratios), 2), round(max(ratios), 2)],
        "gradient's relative error": round(float((b - a).norm() / a.norm()), 4),
    }


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent / "results" / "miniature_training.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_up()
    nets: list[tuple[str, Callable[[], Any], Step, int]] = [
        ("denoiser", lambda: unet.build(4, 16), denoiser_step, SAMPLES),
        ("VAE", lambda: vae.build(4), vae_step, IMAGES),
    ]
    rows: dict[str, Any] = {}
    for name, build, step, samples in nets:
        torch.manual_seed(0)
        old = build().to(memory_format=torch.channels_last).train()
        new = build().train()
        new.load_state_dict(old.state_dict())
        if name == "denoiser":
            old.set_attn_processor(SharedTextAttention())
        rows[name] = compare(old, quicken(new), step, samples, options.rounds)
    report = {
        **rows,
        "bfloat16": has_bfloat16(),
        "kernels": kernels() is not None,
        "rounds": options.rounds,
        "threads": 1,
        "versions": {package: version(package) for package in ("torch", "diffusers")},
    }
    print(json.dumps(report, indent=1))
    with replacing(options.to) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
