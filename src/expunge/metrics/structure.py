"""Structure: how much of the original's layout is kept, with the same prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from expunge.base.fields import bounded
from expunge.metric import Metric


@dataclass(frozen=True)
class Structure(Metric):
    """The correlation of both images at low resolution: 1 is the same layout, 0 none of it.

    Colours are kept: the channels are compared as they are, less the mean of all.
    """

    higher_is_better: ClassVar[bool] = True
    paired: ClassVar[bool] = True

    size: int = bounded(8, at_least=2)
    """The side of the reduced image, in pixels."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The version of this measure, and the size."""
        return {"version": 1, "size": self.size}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the correlation with the reference at low resolution, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: what the original drew, as `images`.

        Raises:
            TypeError: there are no references.
        """
        if references is None:
            raise TypeError("references must be a tensor of images, not None")
        a, b = (
            functional.adaptive_avg_pool2d(p.nan_to_num(), self.size).flatten(1)
            for p in (images, references)
        )
        # Less the mean: brightness alone would otherwise make all images alike.
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return functional.cosine_similarity(a, b, dim=1)[:, None]
