"""The closed form that most erasures share: refit a linear layer through its input.

    min_W'  Σ ‖W' eᶠ − W eᵍ‖² + Σ ‖W' eᵖ − W eᵖ‖² + λ ‖W' − W‖²

is solved by W' = W M, with one matrix for every layer that reads the same embeddings,

    M = (C + P + λI) (G + P + λI)⁻¹,     C = Σ eᵍ eᶠᵀ,  G = Σ eᶠ eᶠᵀ,  P = Σ eᵖ eᵖᵀ.

The sums are additive: build them in any pieces and in any order.

Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 1–4; UCE (Gandikota et al., WACV 2024,
arXiv 2308.14761), eq. 4–7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError

FLOOR = 0.03
"""The least ridge of an erasure that has such a floor: see `apply_floor`."""

SOLVABLE = 1e-6
"""A floor that changes no result visibly, and leaves no equations singular."""

CHUNK = 2**25
"""How many numbers are made float64 at a time: a quarter of a gigabyte."""

LARGEST_CONDITION = 1e13
"""Beyond this condition number, fewer than three digits of a float64 solution are right."""


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum left rightᵀ over the rows of two (n, d) tensors: (d, d), float64."""
    return left.double().T @ right.double()


def gram(rows: Tensor, blocks: int = 6) -> Tensor:
    """Sum e eᵀ over the rows of (n, d): (d, d), float64; `outer(rows, rows)` in half the work.

    Args:
        rows: (n, d).
        blocks: into how many the sum is cut along a side.
    """
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    add_gram(total, rows, blocks=blocks)
    return mirror(total)


def add_gram(total: Tensor, rows: Tensor, weights: Tensor | None = None, blocks: int = 6) -> None:
    """Add Σ w e eᵀ to a sum, on and below its diagonal alone: see `mirror`.

    The sum is symmetric, so only those blocks are computed, and nothing else of its size is formed.

    Args:
        total: (d, d), float64, is added to.
        rows: e, (n, d).
        weights: w, (n,); None for 1.
        blocks: into how many the sum is cut along a side.
    """
    lot = max(1, CHUNK // rows.shape[1])
    for start_row in range(0, len(rows), lot):
        part = rows[start_row : start_row + lot].double()
        if weights is not None:
            part = part * weights[start_row : start_row + lot, None].sqrt()
        # One strip of blocks at a time keeps the products large enough for fast matrix kernels.
        for start, end in _strips(rows.shape[1], blocks):
            # In place: a product of its own would be as large as the strip.
            total[start:, start:end].addmm_(part[:, start:].T, part[:, start:end])


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add Σ left rightᵀ over the rows of two (n, d) tensors to a sum (d, d), float64."""
    # In one product where it is small: strips are for widths at which a copy of the sum is dear.
    blocks = 6 if total.numel() > CHUNK else 1
    for l_part, r_part in zip(
        *(x.split(max(1, CHUNK // x.shape[1])) for x in (left, right)), strict=True
    ):
        l_part, r_part = l_part.double(), r_part.double()
        for start, end in _strips(total.shape[1], blocks):
            total[:, start:end].addmm_(l_part.T, r_part[:, start:end])


def mirror(total: Tensor, blocks: int = 6) -> Tensor:
    """Complete a symmetric sum of which only what is on and below the diagonal is right, in place."""
    for start, end in _strips(len(total), blocks):
        square = total[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
        total[start:end, end:] = total[end:, start:end].T
    return total


def _strips(width: int, blocks: int) -> list[tuple[int, int]]:
    """Cut a width into parts of almost equal size: their starts and ends."""
    places = torch.arange(width).tensor_split(blocks)
    return [(int(place[0]), int(place[-1]) + 1) for place in places if len(place)]


def apply_floor(ridge: float, floor: float, gram: Tensor) -> float:
    """Raise λ to at least `floor` times the mean of G's diagonal.

    Few prompts leave most directions of a text space empty. Without λ, what such a direction does
    follows from round-off and from what little of the prompts reaches it; a floor keeps it in place.

    >>> apply_floor(0.5, 1e-3, 6000 * torch.eye(3))
    6.0

    Args:
        ridge: λ, in units of a squared embedding.
        floor: a share, at least 0; with 0, λ stays as it is.
        gram: G, (d, d), the sum over what is erased.
    """
    return max(ridge, floor * float(gram.diagonal().double().mean()))


def solve_right_factor(cross: Tensor, gram: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Solve for M = (C + P + λI) (G + P + λI)⁻¹.

    One Cholesky factorisation in float64; no images, no gradients.

    >>> eye = torch.eye(3)
    >>> torch.allclose(solve_right_factor(0 * eye, 0 * eye, 0 * eye, ridge=2.0), eye.double())
    True

    Args:
        cross: C, (d, d), the sum of anchor · erasedᵀ.
        gram: G, (d, d), the sum of erased · erasedᵀ.
        prior: P, (d, d), the sum of retained · retainedᵀ.
        ridge: λ, at least 0, in units of a squared embedding; large values pull M to the identity.

    Returns:
        M, (d, d), float64.

    Raises:
        ExpungeError: the system is singular or nearly so; a larger ridge helps.
    """

    def add_kept(total: Tensor) -> Tensor:
        kept = prior.to(torch.float64, copy=True).expand_as(total).contiguous()
        kept.diagonal().add_(ridge)
        return kept.add_(total)

    # In place and one after the other: at a width of 7680 each of these takes half a gigabyte.
    lower = _factor(add_kept(gram), ridge)
    return _solve(add_kept(cross), lower)


def solve_fusion(
    matrix: Tensor, gram: Tensor, prior: Tensor, ridge: float, moved: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve for one weight that acts as each of many low-rank changes on the rows it was made for.

        min_W*  Σᵢ Σ_e ‖W* e − (W M + BᵢDᵢ) e‖² + Σ ‖W* eᵖ − W eᵖ‖² + λ ‖W* − W M‖²

    is solved, with Gᵢ = Σ e eᵀ over the rows of change i and K = (Σᵢ Gᵢ + P + λI)⁻¹, by

        W* = W M₂ + Σᵢ Bᵢ (Dᵢ Gᵢ K),     M₂ = (M (Σᵢ Gᵢ + λI) + P) K:

    one factorisation for all layers and changes together.

    Args:
        matrix: M, (d, d); the identity where the weight was not refined.
        gram: Σᵢ Gᵢ, (d, d).
        prior: P, (d, d).
        ridge: λ, at least 0, in units of a squared embedding.
        moved: Dᵢ Gᵢ of any number of changes and layers, stacked, (n, d); see `multiply_by_gram`.

    Returns:
        M₂, (d, d), and Dᵢ Gᵢ K, (n, d), both float64.

    Raises:
        ExpungeError: the system is singular or nearly so; a larger ridge helps.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 7, in another order of summation.
    """
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    gram, prior = gram.double(), prior.double()
    # M₂ and all D G K share the right side, so one solve serves the matrix and every factor.
    first = matrix.double() @ (gram + ridge * eye) + prior
    solved = _divided(torch.cat([first, moved.double()]), gram + prior + ridge * eye, ridge)
    return solved[: len(first)], solved[len(first) :]


def multiply_by_gram(down: Tensor, rows: Tensor) -> Tensor:
    """Multiply D by G = Σ e eᵀ: (k, d), float64.

    As (D Eᵀ) E it needs no G, and while k is below d/2 it is the cheaper way.

    Args:
        down: D, (k, d).
        rows: e, (n, d).
    """
    rows = rows.double()
    return (down.double() @ rows.T) @ rows


def pad_right_factor(matrix: Tensor, inputs: int) -> Tensor:
    """Pad M with the identity, for a layer whose input holds more than the rows M is for.

    >>> pad_right_factor(torch.tensor([[2.0]]), 2)
    tensor([[2., 0.],
            [0., 1.]])
    """
    return torch.block_diag(matrix, torch.eye(inputs - len(matrix), dtype=matrix.dtype))


def _factor(right: Tensor, ridge: float) -> Tensor:
    """Compute the Cholesky factor of a symmetric positive right (d, d), which is used up.

    Args:
        right: (d, d).
        ridge: λ within `right`, for the message.

    Raises:
        ExpungeError: right is singular or nearly so.
    """
    if not torch.equal(right, right.T):
        # Sums in other orders differ in the last bit.
        right = (right + right.T) / 2
    return _factor_and_inverse(right, ridge)[0]


def invert(right: Tensor, ridge: float) -> Tensor:
    """Compute the inverse of a symmetric positive right (d, d), which is used up.

    It costs d³ operations, a third of solving for d right sides.

    Args:
        right: (d, d), float64.
        ridge: λ within `right`, for the message.

    Raises:
        ExpungeError: right is singular or nearly so.
    """
    return _factor_and_inverse(right, ridge)[1]


def _factor_and_inverse(right: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Compute the Cholesky factor and the inverse, which the condition number needs anyway."""
    # The 1-norm: as telling as the spectral one here, without an eigenvalue problem.
    norm = torch.linalg.matrix_norm(right, 1)
    info = torch.empty((), dtype=torch.int32, device=right.device)
    lower, failed = torch.linalg.cholesky_ex(right, out=(right, info))  # _ex, to raise our own message
    inverse = lower if failed else torch.cholesky_inverse(lower)
    condition = 0.0 if failed else float(norm * torch.linalg.matrix_norm(inverse, 1))
    require_solvable(bool(failed), condition, ridge)
    return lower, inverse


def _solve(left: Tensor, lower: Tensor) -> Tensor:
    """Compute left · right⁻¹ from the Cholesky factor of right; left is used up where it is large.

    Args:
        left: (n, d).
        lower: (d, d).
    """
    # X R = L with R symmetric, so Xᵀ solves R Xᵀ = Lᵀ.
    if left.numel() <= CHUNK:
        return torch.cholesky_solve(left.T, lower).T
    for start, end in _strips(len(left), 6):
        left[start:end] = torch.cholesky_solve(left[start:end].T, lower).T
    return left


def _divided(left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Compute left · right⁻¹ for a symmetric positive right (d, d), by Cholesky; both are used up.

    Args:
        left: (n, d).
        right: (d, d).
        ridge: λ within `right`, for the message.

    Raises:
        ExpungeError: right is singular or nearly so.
    """
    return _solve(left, _factor(right, ridge))


def require_solvable(singular: bool, condition: float, ridge: float) -> None:
    """Check that equations have a solution of which some digits are right.

    Args:
        singular: whether their factorisation failed.
        condition: their condition number.
        ridge: λ within them, for the message.

    Raises:
        ExpungeError: they are singular or nearly so.
    """
    if singular or not condition < LARGEST_CONDITION:
        how = "singular" if singular else f"nearly singular (condition {condition:.0e})"
        raise ExpungeError(
            f"the erasure's equations are {how}: raise the ridge from {ridge:g}, or retain more prompts"
        )
