"""Models that draw from an image in place of noise, or with a part of an image given."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, ignore_progress
from expunge.edit import Edit
from expunge.erasing.reference_images import read_examples
from expunge.model import Model
from expunge.probe import Probe
from expunge.text import Text

Begin = Callable[[Tensor, Tensor, Any, Text], tuple[Tensor, Tensor]]
"""Gives the latents that denoising starts from, and the timesteps that it then takes, from clean latents
(n, c, h, w), noise like them, the scheduler with its timesteps set, and the prompts as encoded."""


def require_image_input(model: Model) -> None:
    """Check that a model's family can start from an image.

    Raises:
        ExpungeError: it cannot.
    """
    if not hasattr(model, "_start"):
        raise ExpungeError(
            f"it needs a family that can start from an image, and {type(model).__name__} cannot"
        )


def read_latents(model: Model, folder: str) -> Tensor:
    """Return the images of a folder as clean latents, (n, c, h, w).

    Raises:
        ExpungeError: there are none, or one is of another size than the model draws.
    """
    return read_examples(model, "the concept", "", folder).latents


def draw_with_images(model: Model, edit: Edit, begin: Begin, images: Tensor | None = None) -> Model:
    """Return a copy of the model, sharing its weights, that draws with the edit and from images.

    Args:
        model: the original.
        edit: applied while drawing, and not while the images are made.
        begin: where denoising starts.
        images: clean latents, (m, c, h, w), taken in turn by the rows of a batch; by default what the
            original draws for each prompt and seed.
    """
    require_image_input(model)
    other = copy.copy(model)
    plain_start = model._start  # type: ignore[attr-defined]
    now: dict[str, Any] = {}

    def start(noise: Tensor, seeds: Sequence[int], scheduler: Any) -> tuple[Tensor, Tensor]:
        if not now:  # a trajectory that nobody draws
            found: tuple[Tensor, Tensor] = plain_start(noise, seeds, scheduler)
            return found
        return begin(now["clean"].to(noise), noise, scheduler, now["text"])

    def draw(probe: Probe, *, batch_size: int = 16, progress: Progress = ignore_progress) -> Tensor:
        steps = probe.num_inference_steps or model.num_inference_steps
        how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": probe.guidance_scale}
        drawn = []
        for first in range(0, len(probe), batch_size):
            rows = list(range(first, min(first + batch_size, len(probe))))
            seeds = tuple(probe.seeds[i] for i in rows)
            with torch.inference_mode():
                text = probe.text or model.encode(probe.prompts)
                part = Probe(tuple(probe.prompts[i] for i in rows), seeds, **how, text=text[rows])
                if images is None:
                    _, clean = model.denoise(text[rows], seeds, until=steps, **how)
                else:
                    clean = images[[i % len(images) for i in rows]]
            with torch.inference_mode(), model.using(edit):
                now.update(clean=clean, text=text[rows])
                try:
                    drawn.append(Model.draw(other, part, batch_size=len(rows)))
                finally:
                    now.clear()
            progress("drawing from images", rows[-1] + 1, len(probe))
        return torch.cat(drawn)

    # On the copy alone: the caller's model keeps its own methods, whatever fails in between.
    other.__dict__.update(_start=start, draw=draw)
    return other


def add_scheduler_noise(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return clean latents noised to one of a scheduler's own timesteps, in its own scale.

    Args:
        scheduler: with its timesteps set.
        clean: (n, c, h, w).
        noise: like them.
        t: one of its timesteps, ().
    """
    # Flows scale the noise in; the others add it at the scheduler's own scale.
    add = getattr(scheduler, "scale_noise", None)
    times = t[None].repeat(len(clean))
    found: Tensor = add(clean, times, noise) if add else scheduler.add_noise(clean, noise, times)
    return found


def skip_steps(scheduler: Any, strength: float) -> Tensor:
    """Let a scheduler begin late, and return the timesteps left: the last share `strength` of them."""
    # At least one step: with none the image itself would be judged.
    skipped = len(scheduler.timesteps) - max(1, round(strength * len(scheduler.timesteps)))
    # Else the sampler looks its place up by timestep, and second-order ones repeat timesteps.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    left: Tensor = scheduler.timesteps[skipped:]
    return left


def keep_part(scheduler: Any, clean: Tensor, noise: Tensor, given: Tensor) -> None:
    """Let every step of a scheduler put back the given part of an image, noised as it is then.

        z_t' = given · (noised image at t') + (1 − given) · z_t'

    Args:
        scheduler: with its timesteps set; its `step` is replaced.
        clean: (n, c, h, w), the latents of the images.
        noise: like them; the same at every step.
        given: (h, w) or (1, w), 1 where the image is given, 0 where it is to be drawn.

    Source: RePaint (Lugmayr et al., CVPR 2022, arXiv 2201.09865), eq. 8, without its resampling; so do
    diffusers' inpainting pipelines with models that were not trained for it.
    """
    plain, done = scheduler.step, iter(range(1, len(scheduler.timesteps) + 1))
    mask = given.to(clean)

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        latents, *rest = plain(*args, **kwargs)
        i = next(done)
        known = clean
        if i < len(scheduler.timesteps):
            known = add_scheduler_noise(scheduler, clean, noise, scheduler.timesteps[i])
        return (mask * known + (1 - mask) * latents, *rest)

    scheduler.step = step
