"""What the distances between sets of images share: the features of a CLIP's image tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expunge.base.shipped import DEFAULT_MODEL
from expunge.metric import Distance, read_images
from expunge.metrics._clip import towers


@dataclass(frozen=True)
class OfFeatures(Distance):
    """A distance between the image tower's pooled outputs of two sets of images."""

    model: str = DEFAULT_MODEL
    """The shipped CLIP, or one of transformers by folder or hub id."""

    @property
    def feature_key(self) -> Mapping[str, Any]:
        """Cache key of the rows."""
        # In the words of earlier versions: rows that they have kept are found by it.
        digest = towers(self.model).digest
        return {"features": f"picture tower of the CLIP {self.model}, pooled", "sha256": digest}

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What its numbers hang on: see the keys."""
        digest = towers(self.model).digest
        return {"features": f"image tower of the CLIP {self.model}, pooled", "sha256": digest}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the image tower's pooled output, (n, width).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        return towers(self.model).features(images)


@dataclass(frozen=True)
class FromOriginalOrReal(OfFeatures):
    """Such a distance from what the original draws, or from real images."""

    against: str = ""
    """A folder of real images; by default what the original draws for the same prompts and seeds."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What its numbers hang on: see the keys."""
        return {**super().provenance, "against": self.against or "the original's images"}

    def load_real(self) -> Tensor | None:
        """Return the features of the images in `against`, (m, width), or None."""
        if not self.against:
            return None
        size = towers(self.model).size
        return towers(self.model).features(read_images(self.against, (size, size)))
