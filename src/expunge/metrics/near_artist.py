"""Near artist: one of palette and technique of the artist in the prompt, and not the other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.metric import Metric
from expunge.metrics._clip import resized
from expunge.metrics._miniature import ByRecogniser
from expunge.miniature.recogniser import SIZE
from expunge.problem import match_whole


@dataclass(frozen=True)
class NearArtist(ByRecogniser, Metric):
    """Whether an image is nearly by the artist whom its prompt names: half of what makes that artist.

    Of the miniature model's artists each is a palette and a technique. An image of both is the artist's,
    and the judge says so; one of either is near. 0 where the prompt names no artist.
    """

    higher_is_better: ClassVar[bool] = False
    share: ClassVar[bool] = True

    folder: str = ""
    """Another recogniser's folder; by default the one that ships."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The hash of the recogniser's weights."""
        return {"sha256": self._recogniser.digest, "artists": len(self._recogniser.artists)}

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return 1 for each image with just one of the two traits, else 0, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: of the images.
            references: not read.
        """
        one = self._recogniser
        found = one(resized(images.nan_to_num(), SIZE)).top_traits()
        pattern = re.compile("|".join(map(match_whole, one.artists)), re.IGNORECASE)
        by = {artist.casefold(): traits for artist, traits in one.artists.items()}
        near = torch.zeros(len(images), 1)
        for row, (prompt, traits) in enumerate(zip(prompts, found, strict=True)):
            if match := pattern.search(prompt):
                wanted = by[" ".join(match[0].split()).casefold()]
                near[row] = float(sum(a == b for a, b in zip(wanted, traits, strict=True)) == 1)
        return near
