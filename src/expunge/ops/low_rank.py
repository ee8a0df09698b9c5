"""Low-rank changes: many at once in one batch, and small numbers for the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def each_its_own(
    layers: Sequence[nn.Module], ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> Iterator[None]:
    """Give every row of a batch a low-rank change of its own, for the length of a block.

    Row b of a layer's answer W x_b becomes W x_b + B_b (D_b x_b), as a batched product.

    Args:
        layers: linear layers that are given (n, tokens, in).
        ups: for each layer B, (n, out, rank).
        downs: for each layer D, (n, rank, in).
    """
    with ExitStack() as stack:
        for layer, up, down in zip(layers, ups, downs, strict=True):
            stack.callback(layer.register_forward_hook(_adding(up, down)).remove)
        yield


def _adding(up: Tensor, down: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0]
        return output + (x @ down.to(x.dtype).mT) @ up.to(x.dtype).mT

    return add


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product B D, the largest entry of each column of B as large as that of D's row.

    Half precision then keeps the most of it. Empty columns stay empty.

    Args:
        up: B, (out, rank).
        down: D, (rank, in).
    """
    left, right = up.abs().amax(0), down.abs().amax(1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return up * scale, down / scale[:, None]


def truncated(change: Tensor, rank: int | None, energy: float) -> tuple[Tensor, Tensor, float, float]:
    """The nearest B D of small rank to a change of a weight.

        min ‖Δ − B D‖²  over rank r;   B = Δ V, D = Vᵀ for the r leading right singular vectors V

    One symmetric eigenvalue problem of the smaller side, in float64.

    Args:
        change: Δ, (out, in).
        rank: r; None for the smallest that keeps the energy.
        energy: the share of ‖Δ‖² to keep, above 0 and at most 1.

    Returns:
        B, (out, r), and D, (r, in), float64; ‖Δ − B D‖² and ‖Δ‖².

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    delta = change.double()
    wide = delta.shape[0] < delta.shape[1]
    values, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)
    squares, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(delta.square().sum())
    if rank is None:
        short = squares.cumsum(0) < energy * squares.sum() * (1 - 1e-15)
        rank = min(int(short.sum()) + 1, int((squares > squares[0] * 1e-15).sum()))
    leading = vectors[:, :rank]
    up, down = (leading, leading.T @ delta) if wide else (delta @ leading, leading.T)
    return up, down, float((delta - up @ down).square().sum()), total
