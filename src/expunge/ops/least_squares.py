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

LARGEST_CONDITION = 1e13
"""Beyond this condition number, fewer than three digits of a float64 solution are right."""


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum left rightᵀ over the rows of two (n, d) tensors: (d, d), float64."""
    return left.double().T @ right.double()


def gram(rows: Tensor, blocks: int = 6) -> Tensor:
    """Sum e eᵀ over the rows of (n, d): (d, d), float64; `outer(rows, rows)` in half the work.

    The sum is symmetric, so only the blocks on and below its diagonal are computed.

    Args:
        rows: (n, d).
        blocks: into how many the sum is cut along a side.
    """
    rows = rows.double()
    below = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    places = torch.arange(rows.shape[1]).tensor_split(blocks)
    for place in filter(len, places):
        start, end = int(place[0]), int(place[-1]) + 1
        # One strip of blocks at a time keeps the products large enough for fast matrix kernels.
        below[start:, start:end] = rows[:, start:].T @ rows[:, start:end]
    return below.tril() + below.tril(-1).T


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
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    kept = prior.double() + ridge * eye
    return _divided(cross.double() + kept, gram.double() + kept, ridge)


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


def _divided(left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Compute left · right⁻¹ for a symmetric positive right (d, d), by Cholesky.

    Args:
        left: (n, d).
        right: (d, d).
        ridge: λ within `right`, for the message.

    Raises:
        ExpungeError: right is singular or nearly so.
    """
    # Symmetrised, since sums in other orders differ in the last bit; _ex, to raise our own message.
    lower, failed = torch.linalg.cholesky_ex((right + right.T) / 2)
    if not failed:
        # The 1-norm: as telling as the spectral one here, without an eigenvalue problem.
        norm = torch.linalg.matrix_norm(right, 1)
        condition = float(norm * torch.linalg.matrix_norm(torch.cholesky_inverse(lower), 1))
    if failed or not condition < LARGEST_CONDITION:
        how = "singular" if failed else f"nearly singular (condition {condition:.0e})"
        raise ExpungeError(
            f"the erasure's equations are {how}: raise the ridge from {ridge:g}, or retain more prompts"
        )
    # X R = L with R symmetric, so Xᵀ solves R Xᵀ = Lᵀ.
    return torch.cholesky_solve(left.T, lower).T
