"""Low-rank changes: many at once in one batch, and small numbers for the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class FactorSwitch:
    """Whether low-rank changes are on; `off` switches them off for the length of a block."""

    def __init__(self) -> None:
        self.on: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the changes off for a block."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@contextmanager
def use_own_factors(
    layers: Sequence[nn.Module], ups: Sequence[Tensor], downs: Sequence[Tensor], scale: float = 1.0
) -> Iterator[FactorSwitch]:
    """Give every row of a batch the low-rank change of its problem, for the length of a block.

    In a batch of k·n rows for n problems, row i belongs to problem b = i mod n, and a layer's
    output W x_i becomes W x_i + scale · B_b (D_b x_i), as a batched product.

    Args:
        layers: linear layers that are given (k·n, …, in), and convolutions.
        ups: for each layer B, (n, out, rank).
        downs: for each layer D, (n, rank, in), or (n, rank, in · kernel height · kernel width); the
            list is read at every call, so that its entries may be replaced meanwhile.
        scale: what B D is multiplied by.
    """
    switch = FactorSwitch()
    with ExitStack() as stack:
        for i, (layer, up) in enumerate(zip(layers, ups, strict=True)):
            stack.callback(layer.register_forward_hook(_adding(up, downs, i, scale, switch)).remove)
        yield switch


def init_factors(
    layers: Sequence[nn.Module], rank: int, generators: Sequence[torch.Generator]
) -> tuple[list[Tensor], list[Tensor]]:
    """Initialise for each layer B = 0, (n, out, rank), and D normal with deviation 1/rank.

    D is (n, rank, in).

    Args:
        layers: linear layers and convolutions, these with a flattened kernel.
        rank: of the product.
        generators: one a problem, so that its factors do not depend on the others.
    """
    ups, downs = [], []
    for layer in layers:
        weight: Any = layer.weight
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        # Drawn on the CPU, so that a change is the same on every device.
        drawn = [torch.randn(rank, columns, generator=g) / rank for g in generators]
        ups.append(torch.zeros(len(drawn), rows, rank, **like))
        downs.append(torch.stack(drawn).to(**like))
    return ups, downs


def _adding(
    up: Tensor, downs: Sequence[Tensor], i: int, scale: float, switch: FactorSwitch
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
        """Apply all problems' factors in one convolution, a group of channels each."""
        # Problems become groups of channels: one call instead of one convolution a problem.
        kernels = d.flatten(0, 1).unflatten(1, (x.shape[1], *layer.kernel_size))
        beside = x.unflatten(0, (-1, n)).flatten(1, 2)
        small = conv2d(beside, kernels, None, layer.stride, layer.padding, layer.dilation, n)
        large = conv2d(small, b.flatten(0, 1)[..., None, None], groups=n)
        return large.unflatten(1, (n, -1)).flatten(0, 1)

    return add


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Scale factors so that the largest entries of B's columns and of D's rows are equal in pairs.

    The product B D stays, and half precision then keeps the most of it. Empty columns stay empty.

    Args:
        up: B, (out, rank).
        down: D, (rank, in).
    """
    left, right = up.abs().amax(0), down.abs().amax(1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return up * scale, down / scale[:, None]


def truncate(
    change: Tensor,
    rank: int | None,
    energy: float,
    metric: Tensor | None = None,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Find the nearest B D of small rank to a change of a weight, in the metric of its inputs.

        min ‖(Δ − B D) S^½‖²  over rank r;   B = U, D = Uᵀ Δ

    for the r leading left singular vectors U of Δ S^½. With S the second moment Σ e eᵀ of a layer's
    inputs e this is Σ ‖(Δ − B D) e‖²: what counts is what happens to them, not to directions that
    none of them has. One symmetric eigenvalue problem of the smaller side, in float64.

    Args:
        change: Δ, (out, in).
        rank: r; None for the smallest that keeps the energy.
        energy: the share of ‖Δ S^½‖² to keep, above 0 and at most 1.
        metric: S, (in, in), positive; None for the identity.
        floor: the size of singular values that rounding alone makes; none so small is kept.

    Returns:
        B, (out, r), and D, (r, in), float64.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    delta = change.double()
    if delta.shape[0] <= delta.shape[1]:
        seen = delta if metric is None else delta @ metric
        # The Gram matrix of the shorter side: its eigenvalues are the squared singular values.
        squares, left = _descending(seen @ delta.T)
    else:
        root = delta if metric is None else delta @ torch.linalg.cholesky(metric)
        squares, right = _descending(root.T @ root)
        left = root @ right / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    kept = left[:, : count_leading(squares, rank, energy, floor)]
    return kept, kept.T @ delta


def factor_shared(
    matrix: Tensor, most: int | None, energy: float, metric: Tensor | None, unit: float
) -> tuple[Tensor, Tensor]:
    """Factorise the leading part P Q of M − I, for all layers W M at once: W (M − I) ≈ (W P) Q.

    Args:
        matrix: M, (d, d).
        most: how many directions are needed, at most; None for as many as the energy takes.
        energy: as of `truncate`; a hundredth of what it gives away is given away here.
        metric: S, (d, d), or None.
        unit: the rounding unit of the number format that M was kept in; what its rounding alone
            would look like is left out.

    Returns:
        P, (d, n), and Q, (n, d), float64.
    """
    m = matrix.double()
    change = m - torch.eye(len(m), dtype=m.dtype)
    floor = measure_rounding_noise(m, metric, unit)
    tight = 1 - (1 - energy) / 100
    return truncate(change, most, tight, metric, floor)


def compress(
    up: Tensor, down: Tensor, moments: Tensor, rank: int | None, energy: float
) -> tuple[Tensor, Tensor]:
    """Find the nearest B D of smaller rank in a metric, without forming the product.

    Args:
        up: B, (out, n).
        down: D, (n, in).
        moments: D S Dᵀ, (n, n).
        rank: as of `truncate`.
        energy: as of `truncate`.

    Returns:
        the smaller B and D, float64.
    """
    values, vectors = _descending(moments)
    root = vectors * values.sqrt()
    gram = up.T @ up
    squares, right = _descending(root.T @ gram @ root)
    r = count_leading(squares, rank, energy, float(squares[0].sqrt()) * 1e-7)
    sides = right[:, :r] / squares[:r].sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    # Both factors stay thin: nothing of the size (out, in) is formed.
    turn = root @ sides
    return up @ turn, turn.T @ gram @ down


def measure_rounding_noise(value: Tensor, metric: Tensor | None, unit: float) -> float:
    """Estimate twice the largest singular value, in a metric, of a matrix's rounding errors.

    Measured on drawn errors, E = unit |value| u with u even between -1 and 1: ‖E S^½‖, by the power
    method.

    Args:
        value: the matrix.
        metric: S, (in, in), or None for the identity.
        unit: the rounding unit of the number format.
    """
    draw = torch.Generator().manual_seed(0)
    even = torch.rand(value.shape, generator=draw, dtype=torch.float64) * 2 - 1
    wrong = unit * value.double().abs() * even
    vector = torch.randn(len(wrong), generator=draw, dtype=torch.float64)
    size = 0.0
    for _ in range(20):
        back = wrong.T @ vector
        vector = wrong @ (back if metric is None else metric @ back)
        norm = float(vector.norm())
        if not norm:
            return 0.0
        vector, size = vector / norm, norm
    return 2 * size**0.5


def count_leading(squares: Tensor, rank: int | None, energy: float, floor: float) -> int:
    """Count the singular values that are kept, at least 1.

    Args:
        squares: (n,), in descending order.
        rank: this many; None for as few as keep the energy.
        energy: the share of their sum to keep.
        floor: none is kept that is not larger.
    """
    real = int((squares > max(floor**2, float(squares[0]) * 1e-15)).sum())
    if rank is None:
        # From the small end: what is given away may be far below the unit of the sum.
        given = squares.flip(0).cumsum(0).flip(0)
        rank = int((given > (1 - energy) * given[0]).sum())
    return max(1, min(rank, real))


def _descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, none below 0, and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


EXACT = 1024
"""Up to this width losses are measured exactly, beyond it along `PROBES` random directions."""

PROBES = 96


def draw_probes(moments: Tensor | None, inputs: int, generator: torch.Generator) -> Tensor:
    """Draw Z, (inputs, n), such that ‖A Z‖² is ‖A G^½‖² for any A: exactly, or in the mean if wide.

    Args:
        moments: G, (inputs, inputs); None for the identity.
        inputs: the width of the layer's input.
        generator: of the random directions.
    """
    noise = None
    if inputs > EXACT:
        noise = torch.randn(inputs, PROBES, generator=generator, dtype=torch.float64) / PROBES**0.5
    if moments is None:
        return torch.eye(inputs, dtype=torch.float64) if noise is None else noise
    # Moments of few texts are singular, and rounding has made some of their eigenvalues negative.
    values, vectors = torch.linalg.eigh(moments)
    there = values > values[-1] * 1e-14
    root = vectors[:, there] * values[there].sqrt()
    return root if noise is None else root @ noise[: root.shape[1]]
