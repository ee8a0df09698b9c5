"""The closed form that most erasures share: refit a linear layer's input.

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

from expunge.errors import ExpungeError

LARGEST_CONDITION = 1e13
"""Beyond this, less than three digits of a float64 solution are right."""


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ left rightᵀ over the rows of two (n, d) tensors, as (d, d) in float64."""
    return left.double().T @ right.double()


def right_factor(cross: Tensor, gram: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """M = (C + P + λI) (G + P + λI)⁻¹.

    One Cholesky factorisation in float64; no pictures, no gradients.

    >>> eye = torch.eye(3)
    >>> torch.equal(right_factor(0 * eye, 0 * eye, 0 * eye, ridge=2.0), eye.double())
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
    left, right = cross.double() + kept, gram.double() + kept
    lower, failed = torch.linalg.cholesky_ex((right + right.T) / 2)
    if not failed:
        norm = torch.linalg.matrix_norm(right, 1)
        condition = float(norm * torch.linalg.matrix_norm(torch.cholesky_inverse(lower), 1))
    if failed or not condition < LARGEST_CONDITION:
        how = "singular" if failed else f"nearly singular (condition {condition:.0e})"
        raise ExpungeError(
            f"the erasure's equations are {how}: raise the ridge from {ridge:g}, or retain more prompts"
        )
    # M R = L with R symmetric, so Mᵀ solves R Mᵀ = Lᵀ.
    return torch.cholesky_solve(left.T, lower).T
