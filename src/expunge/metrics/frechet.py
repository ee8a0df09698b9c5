"""Fréchet distance: how far a set of images is from the original's, by CLIP features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expunge.metric import SetDistance
from expunge.metrics._distances import frechet
from expunge.metrics._features import FromOriginalOrReal


@dataclass(frozen=True)
class Frechet(FromOriginalOrReal):
    """‖μ − μ₀‖² + tr(Σ + Σ₀ − 2 (Σ Σ₀)^½) of the image tower's pooled output.

    It is too large by about c/n for sets of n images: compare sets of one size. Its interval says
    how far chance moves the value at this n, not where the distance of endless sets lies.

    Source: Dowson, Landau 1982; as a measure of images Heusel et al., NeurIPS 2017.
    """

    def distance(self, rows: Tensor, reference: Tensor) -> SetDistance:
        """Return the distance of two sets of rows, (n, width) and (m, width)."""
        return frechet(rows, reference)
