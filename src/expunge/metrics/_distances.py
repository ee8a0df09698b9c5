"""The two distances between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.errors import ExpungeError


def frechet(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½) of features (n, d) and (m, d)."""
    a, b = a.double(), b.double()
    require(a, b)
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float((means + first.trace() + second.trace() - 2 * cross).clamp(min=0))


def kernel(a: Tensor, b: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (x·y/d + 1)³."""
    a, b = a.double(), b.double()
    require(a, b)
    n, m, d = len(a), len(b), a.shape[1]
    same_a, same_b, cross = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within_a = (same_a.sum() - same_a.trace()) / (n * (n - 1))
    within_b = (same_b.sum() - same_b.trace()) / (m * (m - 1))
    return float(within_a + within_b - 2 * cross.mean())


def require(a: Tensor, b: Tensor) -> None:
    if min(len(a), len(b)) < 2:
        raise ExpungeError("a distance between sets of pictures needs at least two of each")
