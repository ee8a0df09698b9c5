"""Trajectories of a denoiser: how they are drawn, what is trained on them, and points on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.ops.trajectory import Asked, Objective
from expunge.text import Text

Reverse = Literal["late", "early", "always"]
"""Where guidance is reversed: from t' on, as in ANT's paper; until t'; or at all times."""


@dataclass(frozen=True)
class TrajectoryConfig:
    """How trajectories are drawn, and where guidance turns on them."""

    objective: Objective
    turn: float
    """t', as a log-SNR: steps with at least this are late."""
    reverse: Reverse = "late"
    num_inference_steps: int = 50
    """Denoising steps; 0 for the model's own."""
    guidance_scale: float = 3.0
    scheduler: str = ""
    """The scheduler that draws, by diffusers' class: "" for the model's own, "auto" for DDIM where the
    model predicts noise and for its own where it learns a flow."""


@dataclass(frozen=True, eq=False)
class TrainingConcept:
    """A concept in words, and the random numbers of its training."""

    name: str
    text: Text
    """The concept's prompts."""
    generator: torch.Generator
    anchor: Text | None = None
    """The same prompts with the anchor in the concept's place, row for row; None for empty ones."""


@dataclass(frozen=True, eq=False)
class LatentPoints:
    """Points that n trajectories pass through."""

    latents: Tensor
    """(n, c, h, w), as `predict` takes them."""
    t: Tensor
    """(n,), int64"""


@dataclass(frozen=True, eq=False)
class TrajectorySample:
    """The points that one training step compares predictions at."""

    text: Text
    """(n,) prompts."""
    late: LatentPoints
    early: LatentPoints | None
    """None where the objective has no early terms."""
    anchor: Text | None = None
    """(n,) prompts of the anchor, or None for empty ones."""

    def points(self, asked: Asked) -> LatentPoints:
        """Return the points at which a prediction is asked for.

        Raises:
            TypeError: the sample has no early points.
        """
        points = self.late if asked.startswith("late") else self.early
        if points is None:
            raise TypeError(f"early must be LatentPoints where {asked!r} is asked for, not None")
        return points

    def split(self, n: int) -> list[TrajectorySample]:
        """Split the sample's rows, in their order, into samples of at most n."""
        parts = []
        for start in range(0, len(self.text), n):
            rows = list(range(len(self.text)))[start : start + n]
            points = [p and LatentPoints(p.latents[rows], p.t[rows]) for p in (self.late, self.early)]
            if points[0] is None:
                raise TypeError("late must be LatentPoints, not None")
            anchor = self.anchor and self.anchor[rows]
            parts.append(TrajectorySample(self.text[rows], points[0], points[1], anchor))
        return parts


@dataclass(frozen=True, eq=False)
class StoredTrajectories:
    """Trajectories of one concept, with the original's predictions at every step."""

    text: Text
    """(trajectories,) prompts."""
    anchor: Text
    """(trajectories,) prompts of the anchor."""
    latents: Tensor
    """(steps, trajectories, c, h, w)"""
    prompted: Tensor
    """ε₀ for the prompts, as `latents`."""
    empty: Tensor
    """ε₀ for the empty prompt, as `latents`."""
    anchored: Tensor | None = None
    """ε₀ for the anchor's prompts, as `latents`, where the objective asks for it."""
