"""An image of the concept as the start, in place of noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.attack import Attack
from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.quiet import Progress, ignore_progress
from expunge.edit import Edit
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext


@dataclass(frozen=True)
class ImageToImage(Attack):
    """Draw from a noised image of the concept, with the same prompt.

    The image is what the original model draws for the same prompt and seed. At strength s the last
    share s of the steps is taken: 0.3 keeps the image's layout and most of its details, 0.9 little more
    than its colours. What the edited model leaves of the concept at a small strength is in the image
    already; the difference to the original at the same strength is what counts.

    Cost: two drawings an image.

    Source: SDEdit (Meng et al., ICLR 2022, arXiv 2108.01073); diffusers' image-to-image pipelines.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"strength": [0.9, 0.7, 0.5, 0.3]}}

    smaller_is_stronger: ClassVar[bool] = True

    strength: float = bounded(0.7, above=0, at_most=1)
    """The share of the steps that is taken, from the noised image on; 1 is nearly all noise."""

    @classmethod
    def require(cls, model: Model) -> None:
        super().require(model)
        if not hasattr(model, "_start"):
            raise ExpungeError(
                f"it needs a family that can start from an image, and {type(model).__name__} cannot"
            )

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        yield _starting_from_images(model, edit, self.strength)


def _starting_from_images(model: Model, edit: Edit, strength: float) -> Model:
    """A copy of the model, sharing its weights, that draws from noised images of the original's own."""
    other = copy.copy(model)
    clean: dict[int, Tensor] = {}
    plain_start = model._start  # type: ignore[attr-defined]

    def start(noise: Tensor, seeds: Sequence[int], scheduler: Any) -> tuple[Tensor, Tensor]:
        # While the original draws the images to start from, sampling starts from noise as always.
        if not clean:
            return plain_start(noise, seeds, scheduler)
        # At least one step: with none the original's image itself would be judged.
        skipped = len(scheduler.timesteps) - max(1, round(strength * len(scheduler.timesteps)))
        timesteps = scheduler.timesteps[skipped:]
        # Else the sampler looks its place up by timestep, and second-order ones repeat timesteps.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        x = torch.stack([clean[i] for i in range(len(seeds))]).to(noise)
        # Flows scale the noise in; the others add it at the scheduler's own scale.
        add = getattr(scheduler, "scale_noise", None)
        t = timesteps[:1].repeat(len(x))
        return (add(x, t, noise) if add else scheduler.add_noise(x, noise, t)), timesteps

    def draw(probe: Probe, *, batch_size: int = 16, progress: Progress = ignore_progress) -> Tensor:
        steps = probe.num_inference_steps or model.num_inference_steps
        images = []
        for first in range(0, len(probe), batch_size):
            rows = list(range(first, min(first + batch_size, len(probe))))
            part = Probe(
                tuple(probe.prompts[i] for i in rows),
                tuple(probe.seeds[i] for i in rows),
                probe.num_inference_steps,
                probe.guidance_scale,
                None if probe.text is None else probe.text[rows],
            )
            # The original draws first, its batch at a time; `start` then finds its images by their row.
            clean.clear()
            with torch.inference_mode():
                _, latents = model.denoise(
                    model.encode(part.prompts) if part.text is None else part.text,
                    part.seeds,
                    until=steps,
                    num_inference_steps=steps,
                    guidance_scale=probe.guidance_scale,
                )
            clean.update(enumerate(latents))
            with model.using(edit):
                images.append(Model.draw(other, part, batch_size=len(rows)))
            progress("drawing from images", rows[-1] + 1, len(probe))
        return torch.cat(images)

    # On the copy alone: the caller's model keeps its own methods, whatever fails in between.
    other.__dict__.update(_start=start, draw=draw)
    return other
