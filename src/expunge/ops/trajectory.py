"""The objective that steers a trajectory away from a concept.

Early steps, near noise, bring an image onto the manifold of images; a concept's detail comes later.
So guidance keeps its direction early and is reversed late. With δ₀ = ε₀(z, c) − ε₀(z, ∅),

    L = ‖ε(z_l, c) − [ε₀(z_l, ∅) − η δ₀]‖²            late: away from the concept
      + λ₁ ‖ε(z_e, c) − [ε₀(z_e, ∅) + η δ₀]‖²         early: as ever
      + λ₂ ‖ε(z_l, ∅) − ε₀(z_l, ∅)‖²                  late, without the concept
      + λ₃ ‖ε(z_e, ∅) − ε₀(z_e, ∅)‖²                  early, without the concept

ε is the denoiser in training, ε₀ the original; z_l and z_e are a late and an early point of one
trajectory of c. Where the concept has an anchor a, late guidance can be reversed from its prediction
instead, so that the first target is ε₀(z_l, a) − η δ₀; that is ours.

Source: ANT (Li et al., ACM MM 2025, arXiv 2504.12782). Its first term alone, at all times, is the
objective of ESD (Gandikota et al., ICCV 2023, arXiv 2303.07345), eq. 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.ops.noise_error import Loss, measure_error

Side = Literal["late", "early"]
"""One of the two points."""
Asked = Literal["late", "late empty", "late anchor", "early", "early empty"]
"""A prediction: at which point, and whether for the concept's prompt, the empty one, or the anchor's."""

Predictions = Mapping[Asked, Tensor]
"""Predictions (n, c, h, w), raw as the network gives them."""


@dataclass(frozen=True)
class Objective:
    """The weights of L.

    Errors are means over a sample's numbers, and compared in ε whatever the network predicts. All
    targets are combinations of predictions whose coefficients sum to one, so that they are the same
    in ε, v and flow.
    """

    negative_guidance: float = 1.0
    """η, how far past the empty prediction late guidance is turned."""
    preserve: float = 0.0
    """λ₁"""
    unconditional_late: float = 0.0
    """λ₂"""
    unconditional_early: float = 0.0
    """λ₃"""
    prediction_guidance: float = 1.0
    """g, the guidance of the predictions: ε(z, c) becomes ε(z, ∅) + g (ε(z, c) − ε(z, ∅)), and η is
    multiplied by g."""
    anchored: bool = False
    """Whether late guidance is reversed from the anchor's prediction, not the empty one's; ours."""
    unconditional_gradient: bool = True
    """Whether the terms λ₂ and λ₃ are learnt from; without, they are only counted, as released."""
    error: Loss = "squared"
    """How an error counts in every term."""

    @property
    def meets_early(self) -> bool:
        """Whether any term needs an early point."""
        return self.preserve > 0 or self.unconditional_early > 0

    @property
    def sides(self) -> tuple[Side, ...]:
        """The points that L has terms at."""
        return ("late", "early") if self.meets_early else ("late",)

    @property
    def of_student(self) -> tuple[Asked, ...]:
        """The predictions that are needed of the denoiser in training."""
        guided = self.prediction_guidance != 1
        needed: dict[Asked, bool] = {
            "late": True,
            "late empty": guided or self.unconditional_late > 0,
            "early": self.preserve > 0,
            "early empty": self.unconditional_early > 0 or (guided and self.preserve > 0),
        }
        return tuple(asked for asked, is_needed in needed.items() if is_needed)

    @property
    def of_original(self) -> tuple[Asked, ...]:
        """The predictions that are needed of the original."""
        needed: dict[Asked, bool] = {
            "late": True,
            "late empty": True,
            "late anchor": self.anchored,
            "early": self.preserve > 0,
            "early empty": self.meets_early,
        }
        return tuple(asked for asked, is_needed in needed.items() if is_needed)

    def loss(
        self,
        student: Predictions,
        original: Predictions,
        late: Tensor,
        early: Tensor,
        sides: Sequence[Side] = ("late", "early"),
    ) -> Tensor:
        """Compute L of each sample: (n,).

        Args:
            student: ε, at least `of_student`; gradients pass through it.
            original: ε₀, at least `of_original`.
            late: (n,), what an error of a prediction is worth in ε at the late points.
            early: the same at the early points.
            sides: the points whose terms are wanted; L is the sum over both.
        """
        # The released code guides the student too, so that its targets move g times as far.
        push = self.negative_guidance * self.prediction_guidance
        total = torch.zeros_like(late)
        if "late" in sides:
            empty = original["late empty"]
            # The anchor is guided where the student is, or the student would overshoot it.
            base = self._guided(original, "late anchor", "late empty") if self.anchored else empty
            target = base - push * (original["late"] - empty)
            total = total + measure_error(
                self._guided(student, "late", "late empty"), target, late, self.error
            )
            if self.unconditional_late:
                error = self._unconditional(student["late empty"], empty, late)
                total = total + self.unconditional_late * error
        if "early" in sides and self.preserve:
            empty = original["early empty"]
            # For η = 1 the original's own guided prediction.
            target = empty + push * (original["early"] - empty)
            guided = self._guided(student, "early", "early empty")
            total = total + self.preserve * measure_error(guided, target, early, self.error)
        if "early" in sides and self.unconditional_early:
            error = self._unconditional(student["early empty"], original["early empty"], early)
            total = total + self.unconditional_early * error
        return total

    def _unconditional(self, found: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
        found = found if self.unconditional_gradient else found.detach()
        return measure_error(found, wanted, scale, self.error)

    def _guided(self, predictions: Predictions, prompt: Asked, empty: Asked) -> Tensor:
        if self.prediction_guidance == 1:
            return predictions[prompt]
        base = predictions[empty]
        return base + self.prediction_guidance * (predictions[prompt] - base)
