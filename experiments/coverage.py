"""How often a 95 % interval holds the truth, for both readings of a mean, on simulated judges.

A world is drawn a thousand times: concepts whose accuracy differs (a Beta distribution), prompts of each
that differ again, images that succeed or fail, and for a mean of H's also seeds of the edit. In each
the package's own intervals are asked for, and it is counted how often they hold

    these        the mean accuracy of the concepts that were drawn,
    in general   the mean accuracy of the distribution that they were drawn from.

Writes `experiments/results/coverage.json`.

    python experiments/coverage.py [--trials 1000]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.base.files import replacing
from expunge.evaluation.statistics import (
    Estimate,
    Score,
    average,
    harmonic_mean,
    mean,
    take_harmonic_mean,
)

FILE = Path(__file__).parent / "results" / "coverage.json"


@dataclass(frozen=True)
class World:
    """What is drawn in each trial of a share."""

    concepts: int
    prompts: int
    """Of each concept."""
    images: int
    """Of each prompt."""
    accuracy: float
    concept_counts: float | None
    """The concepts' accuracies are a Beta distribution of so many counts; None where they are alike."""
    prompt_counts: float | None = None
    """The same for the prompts about their concept's accuracy."""


WORLDS = (
    *(
        World(concepts, 1, images, accuracy, counts)
        for concepts, images in ((3, 20), (5, 20), (9, 12), (10, 20), (20, 5), (100, 5))
        for accuracy, counts in ((0.5, 4.0), (0.8, 4.0), (0.9, 8.0), (0.97, 30.0), (0.9, None))
    ),
    World(10, 5, 5, 0.9, 8.0, 20.0),
    World(20, 5, 2, 0.8, 8.0, 20.0),
    World(5, 5, 4, 0.8, 8.0, 20.0),
    World(1, 3, 20, 0.8, None, 8.0),
    World(1, 9, 12, 0.8, None, 8.0),
)


@dataclass(frozen=True)
class Averaged:
    """What is drawn in each trial of a mean of H's: a case a concept, some seeds of the edit."""

    concepts: int
    seeds: int
    """Of the edit."""
    images: int
    """Of the erased concept; as many of what is retained."""
    efficacy: float
    specificity: float
    concept_counts: float
    seed_counts: float | None
    """The seeds' accuracies about their concept's."""


AVERAGED = (
    Averaged(5, 1, 20, 0.9, 0.9, 8.0, None),
    Averaged(10, 1, 20, 0.9, 0.95, 12.0, None),
    Averaged(10, 1, 20, 0.7, 0.9, 6.0, None),
    Averaged(5, 3, 20, 0.85, 0.9, 8.0, 20.0),
    Averaged(10, 3, 20, 0.85, 0.9, 8.0, 20.0),
)


def beta(mean_: Tensor, counts: float | None) -> Tensor:
    """Accuracies about a mean; the mean itself where there are no counts."""
    if counts is None:
        return mean_
    inside = mean_.clamp(1e-6, 1 - 1e-6)
    return torch.distributions.Beta(inside * counts, (1 - inside) * counts).sample()


def holds(score: Score | None, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return score is not None and score.low <= truth <= score.high


class Count:
    """How often intervals held, and how wide they were."""

    def __init__(self) -> None:
        self.held: dict[str, list[float]] = {"these": [], "in general": []}
        self.width: dict[str, list[float]] = {"these": [], "in general": []}

    def add(self, estimate: Estimate, these: float, general: float) -> None:
        """One trial's intervals, and what they should hold."""
        for reading, score, truth in (
            ("these", estimate.score, these),
            ("in general", estimate.in_general, general),
        ):
            if score is not None:
                self.held[reading].append(float(holds(score, truth)))
                self.width[reading].append(score.high - score.low)

    def to_dict(self) -> dict[str, Any]:
        """Both readings, ready for JSON."""
        return {
            reading: {
                "covered": round(sum(held) / len(held), 3),
                "width": round(sum(self.width[reading]) / len(held), 3),
            }
            for reading, held in self.held.items()
            if held
        }


def of_shares(world: World, trials: int) -> dict[str, Any]:
    """The coverage of the mean of a share."""
    count = Count()
    shape = (world.concepts, world.prompts)
    names = [(f"concept {c}", f"prompt {c} {p}") for c in range(shape[0]) for p in range(shape[1])]
    concepts = {prompt: concept for concept, prompt in names}
    for _ in range(trials):
        each = beta(
            torch.full((world.concepts,), world.accuracy, dtype=torch.float64), world.concept_counts
        )
        at = beta(each[:, None].expand(shape), world.prompt_counts)
        seen = (torch.rand(*shape, world.images, dtype=torch.float64) < at[..., None]).double()
        rows = seen.flatten(0, 1)
        answers = {prompt: row for (_, prompt), row in zip(names, rows, strict=True)}
        count.add(mean(answers, name="m", concepts=concepts), float(each.mean()), world.accuracy)
    return count.to_dict()


def of_averages(world: Averaged, trials: int) -> dict[str, Any]:
    """The coverage of a mean of H's over concepts and seeds of the edit."""
    count = Count()

    def levels(n: int) -> tuple[Tensor, Tensor]:
        ends = (world.efficacy, world.specificity)
        return tuple(  # type: ignore[return-value]
            beta(torch.full((n,), x, dtype=torch.float64), world.concept_counts) for x in ends
        )

    def h(efficacy: Tensor, specificity: Tensor, seeds: int) -> Tensor:
        """The true H of each concept: the mean over so many seeds of the edit."""
        at = [beta(x[:, None].expand(-1, seeds), world.seed_counts) for x in (efficacy, specificity)]
        return take_harmonic_mean([x.flatten() for x in at]).reshape(-1, seeds).mean(1)

    general = float(h(*levels(200_000), 1).mean())
    seeds = 400 if world.seed_counts else 1
    for _ in range(trials):
        efficacy, specificity = levels(world.concepts)
        hs, names = [], []
        for c in range(world.concepts):
            for s in range(world.seeds):
                terms = []
                for what, level in (("erased", efficacy[c]), ("retained", specificity[c])):
                    at = float(beta(level[None], world.seed_counts))
                    row = (torch.rand(world.images, dtype=torch.float64) < at).double()
                    terms.append(mean({f"{what} {c}": row}, name=f"{what} {c} {s}"))
                hs.append(harmonic_mean(terms))
                names.append(f"concept {c}")
        these = float(h(efficacy, specificity, seeds).mean())
        count.add(average(hs, names), these, general)
    return count.to_dict()


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--only", default="", help="a part of what is measured, such as H")
    parser.add_argument("--to", type=Path, default=FILE)
    trials = parser.parse_args().trials
    rows: list[dict[str, Any]] = []
    work: list[tuple[str, Any, Callable[[Any, int], dict[str, Any]]]] = [
        *(("mean of a share", world, of_shares) for world in WORLDS),
        *(("mean of H's", world, of_averages) for world in AVERAGED),
    ]
    only = parser.parse_args().only
    for what, world, measure in work:
        if only and only not in what:
            continue
        torch.manual_seed(len(rows))
        rows.append({"of": what, **asdict(world), **measure(world, trials)})
        print(json.dumps(rows[-1]), flush=True)
    record = {"trials": trials, "said": 0.95, "rows": rows}
    with replacing(parser.parse_args().to) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
