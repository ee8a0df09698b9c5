"""A sample: the images of one prompt by one model, from the request to the score.

It is made of a suite's cell (`lay_out`), given its numbers by `expunge.evaluation.measure`, and its
answers by `classify`. Scoring and the page read it, and nothing else holds what is known of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expunge.evaluation.cells import Cell, Target
from expunge.evaluation.image_source import Request
from expunge.evaluation.suite import Suite
from expunge.metric import Classifier
from expunge.model import Model

GONE = ("erased", "synonyms")
"""The roles in which a concept should no longer be seen."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The images of one cell, drawn by one model."""

    cell: Cell
    requests: tuple[Request, ...] = field(repr=False)
    """One an image: what to draw."""
    features: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """For each metric, by name, what it measured: (images, width)."""
    seen: tuple[Tensor, ...] = field(default=(), repr=False)
    """For each of the cell's targets whether the judge sees it, (images,) in [0, 1]; nan where that
    cannot be said, 0 for broken images. Empty without a judge that answers."""
    present: tuple[Tensor, ...] = field(default=(), repr=False)
    """The same for whether the target is in the image at all, beside whatever else."""
    broken: Tensor | None = field(default=None, repr=False)
    """(images,) 1 for an unrecognisable image, else 0; None without a judge that answers."""

    def __len__(self) -> int:
        return len(self.requests)

    def failure(self, left_out: Collection[tuple[str, str]] = ()) -> Tensor:
        """Return how badly each image fails, (images,) from 0 to 1.

        It fails where something is seen though erased, unseen though retained, or broken: a half where
        that cannot be said, nan where all targets are left out.

        Args:
            left_out: (role, words) of what the original itself does not draw.
        """
        worst = torch.zeros(len(self)) if self.broken is None else self.broken.clone()
        targets = self.judged(left_out)
        for target, seen in targets:
            if target.role != "plain":
                answer = seen.nan_to_num(0.5)
                # The worst and not the mean: a page lists failures by it, and one is enough to fail.
                worst = torch.maximum(worst, answer if target.role in GONE else 1 - answer)
        return worst if targets or not self.cell.targets else worst.fill_(torch.nan)

    def judged(self, left_out: Collection[tuple[str, str]] = ()) -> list[tuple[Target, Tensor]]:
        """Return the targets that count, each with what was seen of it, (images,)."""
        pairs = zip(self.cell.targets, self.seen, strict=False)  # without a judge nothing was seen
        return [(target, seen) for target, seen in pairs if (target.role, target.words) not in left_out]


def lay_out(
    model: Model,
    cells: Sequence[Cell],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> tuple[Sample, ...]:
    """Make the samples of cells: one request for each seed, with the sampler's settings filled in.

    Args:
        model: its own settings count where nothing else is said.
        cells: what to draw.
        num_inference_steps: the suite's denoising steps.
        guidance_scale: the suite's guidance; a cell's own counts before.
    """
    steps = num_inference_steps or model.num_inference_steps
    scale = model.guidance_scale if guidance_scale is None else guidance_scale
    return tuple(
        Sample(
            cell,
            tuple(
                Request(
                    cell.prompt,
                    seed,
                    steps,
                    scale if cell.guidance is None else cell.guidance,
                    cell.stand_in,
                )
                for seed in cell.seeds
            ),
        )
        for cell in cells
    )


def classify(suite: Suite, judge: Classifier, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return the samples with the judge's answers, from what it measured of them.

    Args:
        suite: says what its judge is asked.
        judge: the suite's judge.
        samples: with the judge's features.
    """
    found = []
    for sample in samples:
        rows = sample.features[suite.judge]
        broken = judge.find_broken(rows)

        def ask(question: str, of: Sample = sample, broken: Tensor = broken) -> tuple[Tensor, ...]:
            return tuple(
                # A judge must answer something even of noise; of a broken image it does not count.
                judge.score(of.features[suite.judge], one.labels, one.near, question).masked_fill(
                    broken, 0.0
                )
                for one in of.cell.targets
            )

        seen = ask(suite.question)
        present = seen if suite.question == "present" else ask("present")
        found.append(dataclasses.replace(sample, seen=seen, present=present, broken=broken.float()))
    return tuple(found)
