"""Low-rank changes: many at once in one batch, and small numbers for the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class Switch:
    """Whether changes are on; `off` takes them off for the length of a block."""

    def __init__(self) -> None:
        self.on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@contextmanager
def each_its_own(
    layers: Sequence[nn.Module], ups: Sequence[Tensor], downs: Sequence[Tensor], scale: float = 1.0
) -> Iterator[Switch]:
    """Give every row of a batch the low-rank change of its problem, for the length of a block.

    In a batch of k·n rows for n problems, row i belongs to problem b = i mod n, and a layer's
    answer W x_i becomes W x_i + scale · B_b (D_b x_i), as a batched product.

    Args:
        layers: linear layers that are given (k·n, …, in), and convolutions.
        ups: for each layer B, (n, out, rank).
        downs: for each layer D, (n, rank, in), or (n, rank, in · kernel height · kernel width); the
            list is read at every call, so that its entries may be replaced meanwhile.
        scale: what B D is multiplied by.
    """
    switch = Switch()
    with ExitStack() as stack:
        for i, (layer, up) in enumerate(zip(layers, ups, strict=True)):
            stack.callback(layer.register_forward_hook(_adding(up, downs, i, scale, switch)).remove)
        yield switch


def first_factors(
    layers: Sequence[nn.Module], rank: int, generators: Sequence[torch.Generator]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer B = 0, (n, out, rank), and D normal with deviation 1/rank, (n, rank, in).

    Args:
        layers: linear layers and convolutions, these with a flattened kernel.
        rank: of the product.
        generators: one a problem.
    """
    ups, downs = [], []
    for layer in layers:
        weight: Any = layer.weight
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        drawn = [torch.randn(rank, columns, generator=g) / rank for g in generators]
        ups.append(torch.zeros(len(drawn), rows, rank, **like))
        downs.append(torch.stack(drawn).to(**like))
    return ups, downs


def _adding(
    up: Tensor, downs: Sequence[Tensor], i: int, scale: float, switch: Switch
) -> Callable[..., Tensor]:
    n = len(up)

    def add(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not switch.on:
            return output
        x = given[0]
        d, b = downs[i].to(x), scale * up.to(x)
        if isinstance(layer, nn.Conv2d):
            return output + _convolved(layer, x, d, b)
        x = x.unflatten(0, (-1, n))
        flat = x.flatten(2, -2) if x.ndim > 3 else x[..., None, :]
        return output + ((flat @ d.mT) @ b.mT).reshape(output.shape)

    def _convolved(layer: nn.Conv2d, x: Tensor, d: Tensor, b: Tensor) -> Tensor:
        """All problems in one convolution, a group of channels each."""
        kernels = d.flatten(0, 1).unflatten(1, (x.shape[1], *layer.kernel_size))
        beside = x.unflatten(0, (-1, n)).flatten(1, 2)
        small = conv2d(beside, kernels, None, layer.stride, layer.padding, layer.dilation, n)
        large = conv2d(small, b.flatten(0, 1)[..., None, None], groups=n)
        return large.unflatten(1, (n, -1)).flatten(0, 1)

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
