"""What the distances between sets of pictures share: the features of a CLIP's picture tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expunge.metric import Distance, read_pictures
from expunge.metrics._clip import towers


@dataclass(frozen=True)
class OfFeatures(Distance):
    """A distance between the picture tower's pooled outputs of two sets of pictures."""

    model: str = "emoji"
    """The shipped CLIP, or one of transformers by folder or hub id."""

    @property
    def looked_at(self) -> Mapping[str, Any]:
        digest = towers(self.model).digest
        return {"features": f"picture tower of the CLIP {self.model}, pooled", "sha256": digest}

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.looked_at

    def measure(
        self, pictures: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        return towers(self.model).features(pictures)


@dataclass(frozen=True)
class FromOriginalOrReal(OfFeatures):
    """Such a distance from what the original draws, or from real pictures."""

    against: str = ""
    """A folder of real pictures; by default what the original draws for the same prompts and seeds."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {**self.looked_at, "against": self.against or "the original's pictures"}

    def real(self) -> Tensor | None:
        if not self.against:
            return None
        size = towers(self.model).size
        return towers(self.model).features(read_pictures(self.against, (size, size)))
