"""Face ratio: the share of images with a face, by the miniature model's recogniser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from expunge.metric import Metric
from expunge.metrics._clip import resized
from expunge.metrics._miniature import ByRecogniser
from expunge.miniature.recogniser import SIZE


@dataclass(frozen=True)
class FaceRatio(ByRecogniser, Metric):
    """Whether there is a face, 1 or 0; whose it is does not matter.

    It stands beside what is asked among images with a face alone: an erasure that leaves no faces would
    otherwise be judged on a handful of images.

    Source: the celebrity protocol of Lu et al., MACE, CVPR 2024, which leaves images without a face out.
    """

    higher_is_better: ClassVar[bool] = True
    share: ClassVar[bool] = True

    folder: str = ""
    """Another recogniser's folder; by default the one that ships."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The hash of the recogniser's weights, and from which probability on there is a face."""
        return {"sha256": self._recogniser.digest, "face from": self._recogniser.thresholds.face}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return 1 for each image with a face, else 0, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        return self._recogniser(resized(images.nan_to_num(), SIZE)).has_face().float()[:, None]
