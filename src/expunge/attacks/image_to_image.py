"""An image of the concept as the start, in place of noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from expunge.attack import Access
from expunge.attacks._from_image import FromImage
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.image_inputs import (
    add_scheduler_noise,
    draw_with_images,
    skip_steps,
)
from expunge.model import Model
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class ImageToImage(FromImage):
    """Draw from a noised image of the concept, with the same prompt.

    The image is what the original model draws for the same prompt and seed, or one of a folder's, in
    turn. At strength s the last share s of the steps is taken: 0.3 keeps the image's layout and most of
    its details, 0.9 little more than its colours. What the edited model leaves of the concept at a small
    strength is in the image already; the difference to the original at the same strength is what counts.

    Cost: two drawings an image.

    Source: SDEdit (Meng et al., ICLR 2022, arXiv 2108.01073); diffusers' image-to-image pipelines.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"strength": [0.9, 0.7, 0.5, 0.3]}}

    smaller_is_stronger: ClassVar[bool] = True
    access: ClassVar[Access] = "interface"

    strength: float = bounded(0.7, above=0, at_most=1)
    """The share of the steps that is taken, from the noised image on; 1 is nearly all noise."""
    images: str = ""
    """A folder of images of the concept, of the size that the model draws; by default the original
    draws them."""

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        def begin(clean: Tensor, noise: Tensor, scheduler: Any, text: Text) -> tuple[Tensor, Tensor]:
            timesteps = skip_steps(scheduler, self.strength)
            return add_scheduler_noise(scheduler, clean, noise, timesteps[0]), timesteps

        yield draw_with_images(model, edit, begin, self.read_images(model))
