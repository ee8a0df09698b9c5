"""The fields that ANT's two algorithms share: the objective, the trajectories, and the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.base.fields import bounded
from expunge.erasing.prompt_templates import (
    assemble_anchor_prompts,
    assemble_prompts,
    require_place,
)
from expunge.erasing.trajectories import Reverse, TrajectoryConfig
from expunge.method import Method
from expunge.model import Model
from expunge.ops.noise_error import Loss
from expunge.ops.trajectory import Objective
from expunge.problem import Concept
from expunge.runtime.schedulers import parse_scheduler
from expunge.text import Text


@dataclass(frozen=True)
class SharedSettings(Method):
    """What ANT trains on, whichever of its algorithms trains."""

    trained: Literal["auto", "weights", "low-rank"] = "auto"
    """What is trained: the denoiser's own weights, or a low-rank change a concept, fused at the end;
    "auto" takes weights for one concept and low-rank changes for several."""
    turn: float = -3.75
    """t', as a log-SNR: where reversing begins. -3.75 is step 43 of Stable Diffusion's 50, counted
    down; lower reverses earlier steps too, and keeps less of the layout."""
    reverse: Reverse = "late"
    """Where guidance is reversed: "late", from t' on; "early", until t'; "always"."""
    negative_guidance: float = bounded(1.0, above=0)
    """η, how far past the empty prediction late guidance is turned."""
    turn_to: Literal["empty", "anchor"] = "empty"
    """What late predictions are turned to: the empty prompt's, as in the paper; or the anchor's, where
    a concept has one, so that something is drawn in its place. Ours."""
    preserve: float = bounded(1.0, at_least=0)
    """λ₁, weight of the early predictions for the concept."""
    unconditional_late: float = bounded(0.5, at_least=0)
    """λ₂, weight of the late predictions for the empty prompt."""
    unconditional_early: float = bounded(0.5, at_least=0)
    """λ₃, weight of the early predictions for the empty prompt."""
    unconditional_gradient: bool = True
    """Learn from the two terms of the empty prompt, as the paper says; in the released code they carry
    no gradient."""
    loss: Loss = "squared"
    """How an error of a prediction counts: squared, as in the paper; or by the Hellinger distance, which
    is bounded."""
    prediction_guidance: float = bounded(1.0, at_least=1)
    """g, guidance within the predictions that are compared."""
    trajectory_guidance: float = bounded(3.0, at_least=1)
    """Guidance scale of the trajectories."""
    trajectory_steps: int = bounded(50, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    scheduler: str = "auto"
    """The scheduler of the trajectories, by diffusers' class: "auto" is DDIM, as in the paper, where the
    model predicts noise, and its own scheduler where it learns a flow; "" is the model's own."""
    drawn_by: Literal["current", "original"] = "current"
    """What draws the trajectories: the denoiser in training, anew at each step; or the original, once,
    which is faster."""
    trajectories: int = bounded(8, at_least=0)
    """Trajectories of each concept that the original draws and stores; 0 for new ones at each step, as
    released."""
    samples: int = bounded(1, at_least=1)
    """Trajectories of each concept in a training step."""
    max_train_steps: int = bounded(250, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(5e-4, above=0)
    """Adam's learning rate; larger erases more, and more of what is near."""
    captions: str = "general"
    """Captions that stay, in the fusion's prior or by `retain_weight`: "general"; "vocabulary", the
    tokenizer's own words; a text file with one a line; "" for none, the retained alone."""
    batch_size: int = bounded(4, at_least=1)
    """Concepts trained together, or points of a map at once; more is faster and takes more memory."""
    micro_batch: int = bounded(4, at_least=0)
    """Rows of the denoiser that have gradients at once; 0 for all. It changes memory and speed alone: at
    Stable Diffusion's size a row takes 2 to 3 GB."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)
        if self.scheduler != "auto":
            object.__setattr__(self, "scheduler", parse_scheduler(self.scheduler))

    @property
    def trajectory_config(self) -> TrajectoryConfig:
        """How trajectories are drawn, and the objective on them."""
        objective = Objective(
            self.negative_guidance,
            self.preserve,
            self.unconditional_late,
            self.unconditional_early,
            self.prediction_guidance,
            self.turn_to == "anchor",
            self.unconditional_gradient,
            self.loss,
        )
        return TrajectoryConfig(
            objective,
            self.turn,
            self.reverse,
            self.trajectory_steps,
            self.trajectory_guidance,
            self.scheduler,
        )

    @property
    def n_stored(self) -> int:
        """How many trajectories of a concept the original draws once; 0 where each step draws anew."""
        return self.trajectories if self.drawn_by == "original" else 0

    @property
    def rows_per_sample(self) -> int:
        """Rows with gradients that points of one trajectory take at once; one point's are not split."""
        asked = self.trajectory_config.objective.of_student
        # The two points of a sample may have their gradients one after the other (`split_losses`).
        return max(sum(one.startswith(side) for one in asked) for side in ("late", "early"))

    def fit_together(self, rows: int) -> int:
        """Tell how many concepts, or points of a map, go through the network in one batch.

        Args:
            rows: the rows with gradients that each of them takes.
        """
        if not self.micro_batch:
            return self.batch_size
        return min(self.batch_size, max(1, self.micro_batch // rows))

    def prompts(self, model: Model, concept: Concept, templates: Sequence[str] = ()) -> list[str]:
        """Put a concept's names into templates.

        Args:
            model: whose window the prompts must fit.
            concept: the concept.
            templates: by default the method's own, or those of the concept's kind.
        """
        prompts = assemble_prompts(concept, templates or self.templates)
        model.require_window(prompts)
        return prompts

    def encode_anchors(
        self, model: Model, concepts: Sequence[Concept], templates: Sequence[str] = ()
    ) -> Text | None:
        """Encode for each of the concepts' prompts the one with the anchor in the concept's place.

        Args:
            model: whose text encoders read.
            concepts: the concepts.
            templates: as in `prompts`.

        Returns:
            The prompts, row for row; None where late predictions turn to the empty prompt's.
        """
        if self.turn_to == "empty":
            return None
        prompts = [
            prompt
            for concept in concepts
            for prompt in assemble_anchor_prompts(concept, templates or self.templates)
            * len(concept.names)
        ]
        model.require_window(prompts)
        return model.encode(prompts)
