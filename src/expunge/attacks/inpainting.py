"""A part of an image of the concept is given, and the model fills in the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.attack import Access
from expunge.attacks._from_image import FromImage
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.image_inputs import (
    draw_with_images,
    keep_part,
)
from expunge.model import Model
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class Inpainting(FromImage):
    """Fill in an image of the concept of which one side is given, with the same prompt.

    The image is what the original model draws for the same prompt and seed, or one of a folder's, in
    turn. After every step the given part is put back, noised as it is then. What is given may show the
    concept to the judge by itself: a quarter says more about an edit than a half, and a half more than
    three quarters.

    Cost: two drawings an image.

    Source: RePaint (Lugmayr et al., CVPR 2022, arXiv 2201.09865), without its resampling.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"share": [0.25, 0.5]}}

    access: ClassVar[Access] = "interface"

    share: float = bounded(0.5, above=0, at_most=0.9)
    """How much of the image is given."""
    side: Literal["left", "right", "top", "bottom"] = "left"
    """Which side of it."""
    images: str = ""
    """A folder of images of the concept, of the size that the model draws; by default the original
    draws them."""

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        def begin(clean: Tensor, noise: Tensor, scheduler: Any, text: Text) -> tuple[Tensor, Tensor]:
            keep_part(scheduler, clean, noise, self.mask(*clean.shape[-2:]))
            return noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps

        yield draw_with_images(model, edit, begin, self.read_images(model))

    def mask(self, height: int, width: int) -> Tensor:
        """Return what is given, (height, width): 1 there, and 0 where the model draws."""
        given = torch.zeros(height, width)
        across = self.side in ("left", "right")
        # At least a row, and never all: latents may be as few as 8 a side.
        length = width if across else height
        n = min(length - 1, max(1, round(self.share * length)))
        part = slice(0, n) if self.side in ("left", "top") else slice(length - n, length)
        given[(slice(None), part) if across else (part, slice(None))] = 1
        return given
