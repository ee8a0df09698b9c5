"""Distances between sets of images, with their intervals: from the original, from real images, and
from what an anchor draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.evaluation import statistics
from expunge.evaluation.measure import Measurements
from expunge.evaluation.statistics import NONE, Estimate
from expunge.metric import Apart, Distance

FURTHER = "\0further seeds"
"""Marks the images of an anchor that no other set shares its seeds with."""


@dataclass(frozen=True, eq=False)
class Images:
    """The rows of some images, and for each run of them the prompt."""

    rows: Tensor
    prompts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, looks: Measurements, metric: str, role: str) -> Images:
        """Those of one role."""
        parts = [
            (cell.prompt, rows)
            for cell, rows in zip(looks.cells, looks.rows[metric], strict=True)
            if cell.role == role
        ]
        return cls._joined(parts)

    @classmethod
    def halves(cls, looks: Measurements, metric: str) -> tuple[Images, Images]:
        """An anchor's images: with the seeds of the erased prompts, and with further ones."""
        shared, further = [], []
        for cell, rows in zip(looks.cells, looks.rows[metric], strict=True):
            half = len(rows) // 2
            shared.append((cell.prompt, rows[:half]))
            further.append((cell.prompt + FURTHER, rows[half:]))
        return cls._joined(shared), cls._joined(further)

    @classmethod
    def _joined(cls, parts: list[tuple[str, Tensor]]) -> Images:
        return cls(torch.cat([rows for _, rows in parts]), tuple((p, len(rows)) for p, rows in parts))

    def by_prompt(self, values: Tensor) -> dict[str, Tensor]:
        """One number an image, for each prompt."""
        found: dict[str, list[Tensor]] = {}
        lengths = [n for _, n in self.prompts]
        for (prompt, _), part in zip(self.prompts, values.split(lengths), strict=True):
            found.setdefault(prompt, []).append(part)
        return {prompt: torch.cat(parts) for prompt, parts in found.items()}


def from_original(
    name: str, metric: Distance, looks: Measurements, before: Measurements, role: str
) -> Estimate:
    """How far a role's images are from real ones, or else from the original's.

    There is no distance of the original from itself, nor of a single image.
    """
    images, real = Images.of(looks, name, role), metric.real()
    if len(images.rows) < 2 or (looks is before and real is None):
        return NONE
    if real is not None:
        return _between(metric, images, Images(real, (("real images", len(real)),)))
    apart = metric.distance(images.rows, Images.of(before, name, role).rows)
    # The same prompts and seeds: each pair of images is resampled together.
    return statistics.moved(apart.value, images.by_prompt(apart.influence + apart.of_reference))


def from_anchor(
    name: str, metric: Distance, looks: Measurements, before: Measurements, anchor: Measurements
) -> dict[str, Estimate]:
    """How far the erased images are from the anchor's, between the floor and the ceiling."""
    shared, further = Images.halves(anchor, name)
    erased, original = (Images.of(one, name, "erased") for one in (looks, before))
    if min(map(len, (erased.rows, shared.rows))) < 2:
        return {}
    sets = {"erased": erased, "floor": shared, "ceiling": original}
    return {what: _between(metric, images, further) for what, images in sets.items()}


def _between(metric: Distance, one: Images, other: Images) -> Estimate:
    """The distance of two sets that share no image's weight."""
    apart: Apart = metric.distance(one.rows, other.rows)
    return statistics.moved(
        apart.value, one.by_prompt(apart.influence), other.by_prompt(apart.of_reference)
    )
