"""The two distances between sets of features, each with what every row of them does to it."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.metric import SetDistance

BLOCK = 1024  # rows of the kernel held at once


def frechet(a: Tensor, b: Tensor) -> SetDistance:
    """Compute the Fréchet distance of two sets of features, a (n, d) and b (m, d).

        ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b) − 2 ‖A Bᵀ‖_*, where A = (a − μ_a)/√(n − 1) and B likewise.

    The nuclear norm ‖A Bᵀ‖_* is tr (Σ_a^½ Σ_b Σ_a^½)^½; with A = Q R it is that of R_a R_bᵀ = U S Vᵀ.
    The influence of row i of a is n ‖A_i‖² + 2 (a_i − μ_a)·(μ_a − μ_b) − n Σ_j (P ∘ A Bᵀ)_ij, less its
    mean, with P = Q_a U Vᵀ Q_bᵀ.
    """
    a, b = a.double(), b.double()  # a small difference of large traces
    require(a, b)
    x, y, between = a - a.mean(0), b - b.mean(0), a.mean(0) - b.mean(0)
    left, right = x / (len(a) - 1) ** 0.5, y / (len(b) - 1) ** 0.5
    # By QR, the product is as small as the sets and not as the features are wide.
    (qa, ra), (qb, rb) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vt = torch.linalg.svd(ra @ rb.T, full_matrices=False)
    there = s > 1e-9 * s[0]  # what is not there has no direction: fewer rows than columns
    u, vt = u[:, there], vt[there]
    shared_a = (qa @ (u @ (vt @ rb)) * left).sum(1)
    shared_b = (qb @ (vt.T @ (u.T @ ra)) * right).sum(1)
    value = between.square().sum() + left.square().sum() + right.square().sum() - 2 * s.sum()
    return SetDistance(
        max(float(value), 0.0),
        centred(len(a) * (left.square().sum(1) - shared_a) + 2 * x @ between),
        centred(len(b) * (right.square().sum(1) - shared_b) - 2 * y @ between),
    )


def kernel(a: Tensor, b: Tensor) -> SetDistance:
    """Compute the unbiased squared maximum mean discrepancy of a (n, d) and b (m, d).

    The kernel is k(x, y) = (x·y/d + 1)³.

    It is mean k(a, a') + mean k(b, b') − 2 mean k(a, b) over pairs of different rows; the influence of
    a row x of a is 2 (mean k(x, a') − mean k(x, b)), less its mean.
    """
    a, b = a.double(), b.double()
    require(a, b)
    own_a, own_b = _means(a, a), _means(b, b)
    a_to_b, b_to_a = _means(a, b), _means(b, a)
    value = own_a.mean() + own_b.mean() - 2 * a_to_b.mean()
    return SetDistance(float(value), centred(2 * (own_a - a_to_b)), centred(2 * (own_b - b_to_a)))


def _means(a: Tensor, b: Tensor) -> Tensor:
    """For each row of a its mean kernel with the rows of b, but for itself."""
    width = a.shape[1]
    sums = torch.cat([((part @ b.T / width + 1) ** 3).sum(1) for part in a.split(BLOCK)])
    if a is not b:
        return sums / len(b)
    return (sums - (a.square().sum(1) / width + 1) ** 3) / (len(a) - 1)


def centred(values: Tensor) -> Tensor:
    """Return the values less their mean."""
    return values - values.mean()


def require(a: Tensor, b: Tensor) -> None:
    """Check that both sets are large enough for a variance.

    Raises:
        ExpungeError: one has fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ExpungeError("a distance between sets of images needs at least two of each")
