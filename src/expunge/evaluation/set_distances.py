"""Distances between sets of images, with their intervals.

They are measured from the original, from real images, and from what an anchor draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.evaluation import statistics
from expunge.evaluation.sample import Sample
from expunge.evaluation.statistics import NONE, Estimate
from expunge.metric import Distance, SetDistance

FURTHER = "\0further seeds"
"""Marks the images of an anchor that no other set shares its seeds with."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of a set of images, and for each run of them the prompt."""

    rows: Tensor
    prompts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], metric: str, role: str) -> FeatureSet:
        """Return the images of one role.

        Args:
            samples: a model's.
            metric: the name of what measured them.
            role: whose images.
        """
        parts = [
            (sample.cell.prompt, sample.features[metric])
            for sample in samples
            if sample.cell.role == role
        ]
        return cls._joined(parts)

    @classmethod
    def halves(cls, samples: Sequence[Sample], metric: str) -> tuple[FeatureSet, FeatureSet]:
        """Return an anchor's images: with the seeds of the erased prompts, and with further ones."""
        shared, further = [], []
        for sample in samples:
            prompt, rows = sample.cell.prompt, sample.features[metric]
            half = len(rows) // 2
            # The floor needs two sets of the anchor's images without a common seed, for an image is at
            # distance 0 from itself.
            shared.append((prompt, rows[:half]))
            further.append((prompt + FURTHER, rows[half:]))
        return cls._joined(shared), cls._joined(further)

    @classmethod
    def _joined(cls, parts: list[tuple[str, Tensor]]) -> FeatureSet:
        return cls(torch.cat([rows for _, rows in parts]), tuple((p, len(rows)) for p, rows in parts))

    def by_prompt(self, values: Tensor) -> dict[str, Tensor]:
        """Return one number an image, for each prompt."""
        found: dict[str, list[Tensor]] = {}
        lengths = [n for _, n in self.prompts]
        for (prompt, _), part in zip(self.prompts, values.split(lengths), strict=True):
            found.setdefault(prompt, []).append(part)
        return {prompt: torch.cat(parts) for prompt, parts in found.items()}


def measure_from_original(
    name: str, metric: Distance, samples: Sequence[Sample], before: Sequence[Sample], role: str
) -> Estimate:
    """Measure how far a role's images are from real ones, or else from the original's.

    There is no distance of the original from itself, nor of a single image.

    Args:
        name: the metric's.
        metric: what compares the sets.
        samples: a model's.
        before: the original's, of the same cells.
        role: whose images.
    """
    images, real = FeatureSet.of(samples, name, role), metric.load_real()
    # A variance needs two images.
    if len(images.rows) < 2 or (samples is before and real is None):
        return NONE
    if real is not None:
        # Real images are no pairs of those drawn: each set is resampled by itself.
        return _between(metric, images, FeatureSet(real, (("real images", len(real)),)))
    apart = metric.distance(images.rows, FeatureSet.of(before, name, role).rows)
    # The same prompts and seeds: each pair of images is resampled together.
    return statistics.shift_by_influence(
        apart.value, images.by_prompt(apart.influence + apart.reference_influence)
    )


def measure_from_anchor(
    name: str,
    metric: Distance,
    samples: Sequence[Sample],
    before: Sequence[Sample],
    anchor: Sequence[Sample],
) -> dict[str, Estimate]:
    """Measure how far the erased images are from the anchor's, between the floor and the ceiling.

    Args:
        name: the metric's.
        metric: what compares the sets.
        samples: a model's.
        before: the original's, of the same cells.
        anchor: what the original draws of the anchors, twice as many images.
    """
    shared, further = FeatureSet.halves(anchor, name)
    erased, original = (FeatureSet.of(one, name, "erased") for one in (samples, before))
    if min(map(len, (erased.rows, shared.rows))) < 2:
        return {}
    sets = {"erased": erased, "floor": shared, "ceiling": original}
    return {what: _between(metric, images, further) for what, images in sets.items()}


def _between(metric: Distance, one: FeatureSet, other: FeatureSet) -> Estimate:
    """The distance of two sets that share no image's weight."""
    apart: SetDistance = metric.distance(one.rows, other.rows)
    return statistics.shift_by_influence(
        apart.value, one.by_prompt(apart.influence), other.by_prompt(apart.reference_influence)
    )
