"""Pixel distance: how far an image is from the original's of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from expunge.metric import Metric


@dataclass(frozen=True)
class PixelDistance(Metric):
    """The root of the mean square difference of all channels, in [0, 1]; 0 for the same image."""

    higher_is_better: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The version of this measure."""
        return {"version": 1}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the root mean squared difference from the reference, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: what the original drew, as `images`.

        Raises:
            TypeError: there are no references.
        """
        if references is None:
            raise TypeError("references must be a tensor of images, not None")
        # Broken images count as black: nan would spoil the mean.
        difference = images.nan_to_num() - references.nan_to_num()
        return difference.flatten(1).square().mean(1, keepdim=True).sqrt()
