"""What became of each kind of prompt: short, long, misspelt, described, in other languages."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from expunge.evaluation import statistics
from expunge.evaluation.sample import Sample
from expunge.evaluation.statistics import Estimate


def score_kinds(
    name: str,
    samples: Sequence[Sample],
    original: Sequence[Sample],
    dropped: Collection[tuple[str, str]],
) -> dict[str, dict[str, Estimate]]:
    """Return for each kind of prompt that a suite names the share of images that show the concept.

    Args:
        name: what the report calls the edit.
        samples: its images, classified.
        original: the original's, of the same cells.
        dropped: (role, words) of the prompts that the original seldom draws.

    Returns:
        For each kind `seen`, of the prompts that the original draws, and `original`, of all of them: its
        positive control.
    """
    found: dict[str, dict[str, Estimate]] = {}
    kinds = dict.fromkeys(sample.cell.kind for sample in samples if sample.cell.kind)
    for kind in kinds:
        mine: dict[str, Tensor] = {}
        control: dict[str, Tensor] = {}
        concepts: dict[str, str] = {}
        for one, its in zip(samples, original, strict=True):
            cell = one.cell
            if cell.kind != kind or not cell.targets:
                continue
            concepts[cell.prompt] = cell.concept
            control[cell.prompt] = its.seen[0]
            if (cell.targets[0].role, cell.targets[0].words) not in dropped:
                mine[cell.prompt] = one.seen[0]
        found[kind] = {
            "seen": statistics.mean(mine, name=f"{kind} prompts of {name}", concepts=concepts),
            "original": statistics.mean(control, name=f"{kind} prompts of original", concepts=concepts),
        }
    return found
