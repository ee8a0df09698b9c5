"""Weights rounded to few bits, as loaders of large models round them, and kept in their dtype.

This is *fake* quantisation: the numbers are those that a quantised weight stands for, the arithmetic
stays what it was. It shows what rounding does to an erasure, and nothing about speed or memory.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64
"""Entries of a weight that share one scale in 4 bits, as in QLoRA."""


def quantise_int8(weight: Tensor) -> Tensor:
    """Round a weight to 8 bits, symmetric, with one scale for each output channel.

    >>> quantise_int8(torch.tensor([[1.27, 0.014]])).tolist()[0][1] - 0.01 < 1e-6
    True

    Args:
        weight: (out, …).

    Returns:
        The rounded weight, same shape and dtype.
    """
    rows = weight.flatten(1).float()
    scale = scale_rows(rows)
    return ((rows / scale).round().clamp(-127, 127) * scale).reshape(weight.shape).to(weight.dtype)


def scale_rows(rows: Tensor) -> Tensor:
    """Return the scale of each row in 8 bits, its largest entry over 127: (n, 1).

    Args:
        rows: (n, d), float32.
    """
    # A row of zeros has no scale; any serves.
    return rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127


def quantise_nf4(weight: Tensor) -> Tensor:
    """Round a weight to the 16 levels of NormalFloat-4, in blocks of 64 with one scale each.

    Args:
        weight: any shape; blocks run over its flattened form, the last may be shorter.

    Returns:
        The rounded weight, same shape and dtype.

    Source: QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), appendix E.
    """
    return restore_nf4(*round_nf4(weight), weight.shape).to(weight.dtype)


def round_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to the numbers of its levels, and the scales of its blocks.

    Args:
        weight: as in `quantise_nf4`.

    Returns:
        (blocks, 64), uint8, from 0 to 15, and (blocks, 1), float32.
    """
    flat = weight.flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scale = padded.abs().amax(1, keepdim=True).clamp_min(1e-12)
    levels = normal_levels().to(flat.device)
    # Between two levels the middle decides: rounding to the nearest.
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(padded / scale, middles).to(torch.uint8), scale


def restore_nf4(numbers: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """Make a weight from what `round_nf4` returned, in its shape, float32.

    Args:
        numbers: of levels, (blocks, 64).
        scale: (blocks, 1).
        shape: the weight's.
    """
    levels = normal_levels().to(numbers.device)
    return (levels[numbers.int()] * scale).flatten()[: shape.numel()].reshape(shape)


@cache
def normal_levels() -> Tensor:
    """Return NormalFloat-4's levels: (16,), float32, from −1 to 1, with 0 among them.

    Quantiles of a normal distribution, eight above 0 and seven below, so that each level stands for
    as many of a normal weight's entries; scaled to ±1.

    >>> normal_levels()[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2  # the outermost probability, the mean of both halves'
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
    return (levels / levels.max()).sort().values.float()
