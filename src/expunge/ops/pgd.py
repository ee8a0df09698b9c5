"""Projected gradient descent on text embeddings: the bounded attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STRIDE = 0.25
"""The first step, as a share of the radius; steps shrink as 1/√step."""


def minimise_in_ball(
    objective: Callable[[Tensor], Tensor],
    start: Tensor,
    radius: float,
    steps: int,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise an objective over rows near `start`, by some gradient steps.

        min_δ f(x + δ),     ‖δ_token‖ ≤ radius · ‖x_token‖ for every token

    Every token takes normalised gradient steps of its own; every row keeps the best point on its path,
    the start included, so that more steps never do worse. Rows are independent.

    >>> start = torch.ones(1, 1, 2)
    >>> found, value = minimise_in_ball(lambda x: x[..., 0].square().sum(1), start, 0.5, 20)
    >>> round(float(found[0, 0, 0]), 2)
    0.29

    Args:
        objective: returns (n,) for rows (n, tokens, d).
        start: x, (n, tokens, d).
        radius: at least 0; a share of each token's norm.
        steps: gradient steps, at least 0.
        first: δ to begin at, (n, tokens, d), within the bound; by default 0.

    Returns:
        The best rows, and their objectives (n,).

    Source: Madry et al., ICLR 2018, arXiv 1706.06083, with the Euclidean norm a token.
    """
    start = start.detach()
    reach = radius * start.norm(dim=-1, keepdim=True)
    shift = torch.zeros_like(start) if first is None else first.detach().to(start)
    best, least = shift, torch.full(start.shape[:1], torch.inf, device=start.device)
    for step in range(steps + 1):
        moved = (start + shift).requires_grad_()
        with torch.enable_grad():
            values = objective(moved)
            # Rows are independent, so the gradient of the sum holds each row's own.
            (gradient,) = torch.autograd.grad(values.sum(), moved)
        values = values.detach().to(least)
        better = values < least
        best = torch.where(better[:, None, None], shift, best)
        least = torch.where(better, values, least)
        if step == steps or radius == 0:
            break
        # Steps shrink, so that the last ones settle instead of circling the minimum.
        length = STRIDE * reach / (step + 1) ** 0.5
        shift = step_in_ball(shift, gradient, length, reach)
    return start + best, least


def draw_in_ball(start: Tensor, radius: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a random δ within the bound for each row: a direction and a length for each token.

    Args:
        start: x, (n, tokens, d).
        radius: a share of each token's norm.
        generators: one a row, on the CPU, so that a row's δ depends neither on the batch nor the device.
    """
    shape = start.shape[1:]
    drawn = torch.stack([torch.randn(shape, generator=g) for g in generators])
    lengths = torch.stack([torch.rand((*shape[:-1], 1), generator=g) for g in generators])
    unit = drawn / drawn.norm(dim=-1, keepdim=True).clamp(min=1e-20)
    return (lengths * unit).to(start) * radius * start.norm(dim=-1, keepdim=True)


def step_in_ball(shift: Tensor, gradient: Tensor, length: Tensor, reach: Tensor) -> Tensor:
    """Move shifts one step down, every token's within its ball.

    Args:
        shift: (n, tokens, d).
        gradient: as `shift`; each token's is normalised.
        length: of the step, (n, tokens, 1).
        reach: of the ball, (n, tokens, 1).
    """
    # Normalised: gradients of different models and tokens differ by orders of magnitude.
    shift = shift - length * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-20)
    return shift * (reach / shift.norm(dim=-1, keepdim=True).clamp(min=1e-20)).clamp(max=1)
