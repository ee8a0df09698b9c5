"""Kernel distance: how far a set of images is from the original's, by CLIP features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expunge.metric import SetDistance
from expunge.metrics._distances import kernel
from expunge.metrics._features import FromOriginalOrReal


@dataclass(frozen=True)
class Kid(FromOriginalOrReal):
    """The unbiased squared maximum mean discrepancy with a cubic kernel, on the tower's pooled output.

    Its expectation does not hang on the number of images; it can fall below zero.

    Source: Bińkowski et al., Demystifying MMD GANs, ICLR 2018, eq. 4.
    """

    def distance(self, rows: Tensor, reference: Tensor) -> SetDistance:
        """Return the distance of two sets of rows, (n, width) and (m, width)."""
        return kernel(rows, reference)
