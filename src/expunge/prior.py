"""What general captions look like to a model, as one small matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import ExpungeError
from expunge.model import Model
from expunge.ops.least_squares import outer
from expunge.run import Run


@dataclass(frozen=True, eq=False)
class Prior:
    """The mean over captions of Σ_positions e eᵀ."""

    mean: Tensor
    """(d, d), float64"""
    count: int
    """How many captions it is the mean of."""


def captions(source: str) -> tuple[str, ...]:
    """The captions of a source: "general", or a text file with one a line."""
    if source == "general":
        things = ("cat", "house", "river", "table", "man", "bicycle", "tree", "street", "cup", "bird")
        return tuple(f"{a} {b}" for a in ("a photo of a", "two of the") for b in things)
    lines = tuple(filter(None, map(str.strip, Path(source).read_text("utf8").splitlines())))
    if not lines:
        raise ExpungeError(f"{source} has no captions")
    return lines


def prior(model: Model, captions: Sequence[str], run: Run) -> Prior:
    """The prior of a model over captions."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(captions), 64):
        run.progress("reading captions", start, len(captions))
        e = model.encode(captions[start : start + 64]).embeddings.flatten(0, 1).cpu()
        total = total + outer(e, e)
    return Prior(total / len(captions), len(captions))
