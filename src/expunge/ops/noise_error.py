"""The error of a denoiser's prediction, as every method that trains on predictions counts it.

ACE's harden and fortify give it raw predictions (v where a model predicts v), the others noise.

    squared      m = mean of (ε − ε')² over a sample's numbers
    hellinger    8 σ² (1 − exp(−m / 8 σ²))

Two Gaussians with means ε and ε' and variance σ² have the KL divergence m/2σ² a number, which is the
squared error, and the squared Hellinger distance 1 − exp(−m/8σ²). Both agree where m is small; the
second is bounded, so that a sample with a large error pulls less than its error says, and none pulls
without end.

Source: Novello, Fontana, Cinque, Gündüz, Tonello, arXiv 2509.21167. Ours are the factor 8 σ², which
makes a small error the squared one, so that weights of terms keep their meaning, and the variance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Loss = Literal["squared", "hellinger"]
"""How an error of a prediction counts."""

VARIANCE = 0.005
"""σ² of the Hellinger distance, in units of the noise's own variance: the error counts less from about
m = 8 σ² = 0.04 on, which is how far predictions for different things are apart in late steps."""


def measure_error(found: Tensor, wanted: Tensor, scale: Tensor, loss: Loss = "squared") -> Tensor:
    """Compute the error of each sample in ε: (n,), float32 or finer.

    >>> found, wanted = torch.tensor([[0.1], [9.0]]), torch.zeros(2, 1)
    >>> squared, bounded = (measure_error(found, wanted, torch.ones(2), x) for x in Loss.__args__)
    >>> [round(float(x), 4) for x in squared], [round(float(x), 4) for x in bounded]
    ([0.01, 81.0], [0.0088, 0.04])

    Args:
        found: predictions, (n, …), raw as the network gives them.
        wanted: what they should be, (n, …).
        scale: (n,), what an error of a prediction is worth in ε.
        loss: how the error counts.
    """
    # Wide before the square: half precision squares underflow.
    difference = (found - wanted).to(scale.dtype).flatten(1)
    return bound_error(scale.square() * difference.square().mean(1), loss)


def bound_error(squared: Tensor, loss: Loss) -> Tensor:
    """Count squared errors, (n,), as a loss says; a squared error is left as it is."""
    if loss == "squared":
        return squared
    most = 8 * VARIANCE
    # expm1 keeps the digits of small errors.
    return -most * torch.expm1(-squared / most)


def average_error(difference: Tensor, loss: Loss) -> Tensor:
    """Average the errors of predictions that are off by some differences, (n, …), over samples: ()."""
    if loss == "squared":
        return difference.square().mean()
    return bound_error(difference.square().flatten(1).mean(1), loss).mean()
