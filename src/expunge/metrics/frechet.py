"""Fréchet distance: how far a set of pictures is from the original's, by CLIP features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expunge.metrics._distances import frechet
from expunge.metrics._features import OfFeatures


@dataclass(frozen=True)
class Frechet(OfFeatures):
    """‖μ − μ₀‖² + tr(Σ + Σ₀ − 2 (Σ Σ₀)^½) of the picture tower's pooled output.

    Small sets give larger values: compare like with like.

    Source: Dowson, Landau 1982; as a measure of pictures Heusel et al., NeurIPS 2017.
    """

    def distance(self, rows: Tensor, reference: Tensor) -> float:
        return frechet(rows, reference)
