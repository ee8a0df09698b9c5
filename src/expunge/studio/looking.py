"""Images before and after, of the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.image_files import to_pil
from expunge.changes import Changes
from expunge.edit import Edit
from expunge.model import Model
from expunge.probe import Probe
from expunge.studio.choice import View
from expunge.studio.jobs import Job
from expunge.studio.strength import check_strength

MOST = 64
"""Images of one look."""

SHOWN = 384
"""Pixels that a small image is enlarged to."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One prompt and seed, before and after."""

    prompt: str
    seed: int
    before: Image.Image
    after: Image.Image


def draw_pairs(model: Model, edit: Edit, view: View, job: Job) -> list[Pair]:
    """Draw every prompt with and without the edit, at a strength.

    Args:
        model: the original.
        edit: what is applied after.
        view: prompts, seed, number and strength.
        job: is told how far it is.

    Raises:
        ExpungeError: there is no prompt, there are too many images, or a number is out of range.
    """
    probe = probe_of(view)
    check_strength(view.strength)
    edit.fits(model)  # raises where it cannot be laid on at all
    before = drawn(model, probe, job, "drawing before")
    after = drawn(model, probe, job, "drawing after", edit.changes, view.strength)
    return [
        Pair(prompt, seed, to_pil(one, SHOWN), to_pil(other, SHOWN))
        for prompt, seed, one, other in zip(probe.prompts, probe.seeds, before, after, strict=True)
    ]


def draw_now(model: Model, view: View, job: Job) -> list[tuple[str, Image.Image]]:
    """Draw every prompt once, as the model is: (prompt, image).

    Args:
        model: draws them.
        view: prompts, seed and number.
        job: is told how far it is.
    """
    probe = probe_of(view)
    images = drawn(model, probe, job, "drawing")
    return [(prompt, to_pil(one, SHOWN)) for prompt, one in zip(probe.prompts, images, strict=True)]


def probe_of(view: View) -> Probe:
    """What to draw.

    Raises:
        ExpungeError: there is no prompt, there are too many images, or a number is out of range.
    """
    prompts = [prompt.strip() for prompt in view.prompts if prompt.strip()]
    if not prompts:
        raise ExpungeError("write at least one prompt to look at")
    if len(prompts) * view.number > MOST:
        raise ExpungeError(
            f"{len(prompts)} prompts with {view.number} images each are more than the {MOST} that are"
            " drawn at once"
        )
    return Probe.of(list(dict.fromkeys(prompts)), view.number, view.seed)


def drawn(
    model: Model, probe: Probe, job: Job, label: str, changes: Changes = (), strength: float = 1.0
) -> Tensor:
    """Draw a probe with some changes applied: (n, 3, height, width).

    Args:
        model: draws them.
        probe: prompts and seeds.
        job: is told how far it is.
        label: what is drawn, for the progress.
        changes: to apply; none for the original.
        strength: of the changes, 1 as they were made.
    """

    def tell(_: str, done: int, total: int) -> None:
        job.progress(label, done, total)

    with model.using(changes, strength=strength), torch.inference_mode():
        return model.draw(probe, progress=tell)
