"""ANT: keep a trajectory's early steps, turn its late ones away from a concept, or from many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from expunge.base.errors import ExpungeError
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.moved_share import count_predictions
from expunge.erasing.prompt_templates import RETAINED, TEMPLATES
from expunge.methods.ant.low_rank import LowRankChanges
from expunge.methods.ant.masked_weights import MaskedWeights
from expunge.methods.ant.settings import SharedSettings
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class ANT(SharedSettings):
    """Auto-steering denoising trajectories: no anchor; guidance reversed from a step t' on.

    Early steps, near noise, bring an image onto the manifold of images; a concept's detail comes
    later. So early predictions are kept, late ones turned away, and those for the empty prompt kept.
    With δ₀ = ε₀(z, c) − ε₀(z, ∅),

        L = ‖ε(z_l, c) − [ε₀(z_l, ∅) − η δ₀]‖² + λ₁ ‖ε(z_e, c) − [ε₀(z_e, ∅) + η δ₀]‖²
          + λ₂ ‖ε(z_l, ∅) − ε₀(z_l, ∅)‖² + λ₃ ‖ε(z_e, ∅) − ε₀(z_e, ∅)‖²

    z_l, with t ≤ t', and z_e, with t > t', lie on one trajectory drawn with the prompt c.

    *One concept* (`weights`) trains the weights of the denoiser that its saliency mask leaves: those
    whose gradient is in the upper half of their tensor in every one of many maps, over augmented prompts
    and noises. The edit holds these weights alone. *Many concepts* (`low_rank`) each train a low-rank
    change, and one weight is fitted to them all on keys and values, as in MACE:

        min_W*  Σᵢ Σ ‖W* e − (W + s BᵢDᵢ) e‖² + λ ‖W* − W‖²
                + κ (E_captions ‖(W* − W) e‖² + ω E_retained ‖…‖²)

    The paper's "forget" or "target" is our erase. Weights that are trained directly know of what is
    retained only through the terms of the empty prompt.

    Cost: a denoising run and a few gradients a step. One denoiser in memory.

    Source: Li et al., ACM MM 2025, arXiv 2504.12782.
    """

    citation: ClassVar[str] = (
        "Li et al.: Set You Straight: Auto-Steering Denoising Trajectories to Sidestep Unwanted"
        " Concepts. ACM MM 2025, arXiv 2504.12782."
    )

    stronger: ClassVar[str] = "more max_train_steps, or a larger learning_rate"

    presets: ClassVar[Presets] = read_presets(__file__)

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_train_steps",
        "rate": "learning_rate",
        "clip": "max_grad_norm",
        "batch": "batch_size",
    }

    weights: MaskedWeights = field(default_factory=MaskedWeights)
    """How one concept's weights are chosen and trained."""
    low_rank: LowRankChanges = field(default_factory=LowRankChanges)
    """How many concepts' low-rank changes are trained and fused."""

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "predictions"

    @property
    def reads_anchor(self) -> bool:
        return self.turn_to == "anchor"

    @property
    def reads_retain(self) -> bool:
        return self.trained != "weights" or self.weights.retain_weight > 0

    def trains_low_rank(self, problem: Problem) -> bool:
        """Tell whether each concept of a problem gets a low-rank change, and these are fused."""
        return len(problem.erase) > 1 if self.trained == "auto" else self.trained == "low-rank"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        many, objective = self.trains_low_rank(problem), self.trajectory_config.objective
        rows = 1 + (self.trajectory_guidance > 1)
        whole = rows * (self.trajectory_steps or num_inference_steps)
        names = sum(len(c.names) * len(self.templates or TEMPLATES[c.kind]) for c in problem.erase)
        # Those of many concepts are read for the sums, to train and to fuse.
        prompts = 3 * names + len(RETAINED) * len(problem.retain) if many else names
        points = (len(problem.erase) if many else 1) * self.max_train_steps * self.samples
        # Stored trajectories are predicted twice at every step; others end half the way on average.
        drawn = (
            self.n_stored * 2 * whole
            if self.n_stored
            else points * (whole // 2 + len(objective.of_original))
        )
        maps = 0 if many else self.weights.maps
        # What stays by a term of its own is met as often as the concept.
        staying = bool(self.weights.retain_weight)
        return Cost(
            prompts,
            drawn * (len(problem.erase) if many and self.n_stored else 1 + staying)
            + maps * whole
            + count_predictions(len(problem.erase)),
            points * (len(objective.of_student) + staying) + maps * self.weights.map_samples,
            self.captions if many else "",
            16 * many,
        )

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        many = self.trains_low_rank(problem)
        for what in ("mask", "augmentations", "retain_weight"):
            if many and getattr(self.weights, what):
                raise ExpungeError(f"low-rank changes know no {what}: leave it out, or train weights")
        if many and self.weights.train_on != "part":
            raise ExpungeError(
                "low-rank changes are fused where text enters, so train_on"
                f" {self.weights.train_on!r} has no say: set trained to 'weights'"
            )
        if not many and self.low_rank.training_templates:
            raise ExpungeError("weights know no training_templates: leave them out, or give templates")
        # What the model's schedule does not allow is said before captions are read.
        Steering(model, self.trajectory_config)
        if many:
            return self.low_rank.fit(self, model, problem, run)
        return self.weights.train(self, model, problem, run)
