"""Distribution alignment: how far what the erased prompt draws is from what its anchor draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from expunge.metric import SetDistance
from expunge.metrics._distances import kernel
from expunge.metrics._features import OfFeatures


@dataclass(frozen=True)
class Alignment(OfFeatures):
    """The kernel distance from what the original draws of the anchor: 0 is the same distribution.

    The anchor is drawn twice, with the seeds of the erased prompt and with as many further ones. All
    three numbers compare n images with the n of the further seeds:

        erased      what is drawn for the erased prompt
        floor       the anchor's own images: what chance leaves
        ceiling     what the original draws for the erased prompt: nothing erased

    Anchors are the edit's own, or the suite's where edits are compared at one anchor.

    Source: the aim of ACE (arXiv 2504.11850), p(x | concept) = p(x | neutral); the distance is that of
    Bińkowski et al., ICLR 2018, eq. 4, unbiased at any n.
    """

    from_anchor: ClassVar[bool] = True

    def distance(self, rows: Tensor, reference: Tensor) -> SetDistance:
        """Return the distance of two sets of rows, (n, width) and (m, width)."""
        return kernel(rows, reference)
