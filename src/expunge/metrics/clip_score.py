"""CLIP score: how well an image goes with its prompt, 100 times the cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from expunge.base.shipped import DEFAULT_MODEL
from expunge.metric import Metric
from expunge.metrics._clip import towers


@dataclass(frozen=True)
class ClipScore(Metric):
    """100 · max(0, cos(image, prompt)).

    Source: Hessel et al., CLIPScore, EMNLP 2021, eq. 1, scaled as in the erasure papers.
    """

    higher_is_better: ClassVar[bool] = True

    model: str = DEFAULT_MODEL
    """The shipped CLIP, or one of transformers by folder or hub id."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The CLIP and the hash of its weights."""
        return {"model": self.model, "sha256": towers(self.model).digest}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return 100 times the cosine of each image and its prompt, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: of the images.
            references: not read.
        """
        clip = towers(self.model)
        # Many images share a prompt: each is encoded once.
        distinct = list(dict.fromkeys(prompts))
        texts = clip.embed_texts(distinct)[[distinct.index(prompt) for prompt in prompts]]
        return 100 * (clip.embed_images(images) * texts).sum(1, keepdim=True).clamp(min=0)
