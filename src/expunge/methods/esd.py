"""ESD: train a part of the denoiser to turn away from the concept, wherever its own images lead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_weights
from expunge.erasing.moved_share import count_predictions
from expunge.erasing.parameters import Part, select_parameters
from expunge.erasing.prompt_templates import assemble_prompts, require_place
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.noise_error import Loss
from expunge.ops.noise_level import shift_log_snr
from expunge.ops.trajectory import Objective
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost

PARTS: Mapping[str, Part] = {"x": "cross-attention", "x-strict": "text", "u": "rest"}


@dataclass(frozen=True)
class ESD(Method):
    """Erased stable diffusion: the denoiser learns to be guided away from the concept.

        min ‖ε(z, c) − [ε₀(z, ∅) − η (ε₀(z, c) − ε₀(z, ∅))]‖²

    on points z of trajectories that the denoiser in training draws with the concept's prompt c. x
    trains the cross-attentions, for what a prompt must name (styles); u all the rest, for what should
    go whoever asks for it (objects, explicit content). With `objective` "ant", guidance is reversed
    late alone and kept early, as in ANT.

    The paper's "concept to erase" is our erase; it knows neither anchor nor retain.

    Cost: a denoising run and a gradient a step. One denoiser in memory.

    Source: Gandikota et al., ICCV 2023, arXiv 2303.07345, eq. 7.
    """

    citation: ClassVar[str] = (
        "Gandikota, Materzyńska, Fiotto-Kaufman, Bau: Erasing Concepts from Diffusion Models."
        " ICCV 2023, arXiv 2303.07345."
    )

    stronger: ClassVar[str] = "more max_train_steps, or a larger learning_rate or negative_guidance"

    presets: ClassVar[Presets] = read_presets(__file__)

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_train_steps",
        "rate": "learning_rate",
    }

    part: Literal["x", "x-strict", "u"] = "x"
    """x, the cross-attentions; x-strict, of these the keys and values alone; u, all the rest."""
    train_on: Literal["part", "text-refiner"] = "part"
    """Where: in `part`, or in the layers that see text alone and no time, of a family that has some
    (Z-Image). What makes images of the text then stays as it is."""
    objective: Literal["esd", "ant"] = "esd"
    """Guidance reversed at all times, or late alone, as in ANT with the paper's weights for styles."""
    unconditional: float = bounded(0.0, at_least=0)
    """How much the empty prompt's predictions are kept; 0 is as in the papers: ESD has no such term,
    ANT has 0.5 late and 0.2 early."""
    turn: float = -3.75
    """t' of ANT's objective, as a log-SNR."""
    turn_side: int = bounded(0, at_least=0)
    """The side of the latents that `turn` is meant for, 64 for Stable Diffusion 1.x: on larger ones it
    comes earlier, see `ops.noise_level`. 0 takes it as it stands on every size."""
    negative_guidance: float = bounded(1.0, above=0)
    """η, how far past the empty prediction guidance is turned."""
    trajectory_guidance: float = bounded(3.0, at_least=1)
    """Guidance of the trajectories."""
    trajectory_steps: int = bounded(50, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    samples: int = bounded(1, at_least=1)
    """Trajectories in a training step."""
    max_train_steps: int = bounded(1000, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(1e-5, above=0)
    """Adam's learning rate; larger erases more, and more of what is near."""
    loss: Loss = "squared"
    """How an error of a prediction counts: squared, as in the paper; or by the Hellinger distance, which
    is bounded."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts to erase a concept in, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def trajectory_config(self) -> TrajectoryConfig:
        """How trajectories are drawn, and the objective on them."""
        eta, own = self.negative_guidance, self.objective == "esd"
        keep = self.unconditional
        # λ₁, λ₂, λ₃. Where guidance is always reversed there are no early points for λ₁ and λ₃.
        terms = (0.0, keep, 0.0) if own else (0.4, keep or 0.5, keep or 0.2)
        objective = Objective(eta, *terms, error=self.loss)
        return TrajectoryConfig(
            objective,
            self.turn,
            "always" if own else "late",
            self.trajectory_steps,
            self.trajectory_guidance,
        )

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "predictions"

    @property
    def reads_anchor(self) -> bool:
        return False

    @property
    def reads_retain(self) -> bool:
        return False

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        # Every step follows a trajectory to some place, half the way on average.
        drawn = (
            (self.trajectory_steps or num_inference_steps) * (1 + (self.trajectory_guidance > 1)) // 2
        )
        prompts = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        points, asked = self.max_train_steps * self.samples, self.trajectory_config.objective
        # Measuring how far the edit went takes predictions, too.
        predictions = points * (drawn + len(asked.of_original)) + count_predictions(len(problem.erase))
        return Cost(prompts, predictions, points * len(asked.of_student))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        prompts = [p for concept in problem.erase for p in assemble_prompts(concept, self.templates)]
        model.require_window(prompts)
        # The config's t' is meant for latents of `turn_side`.
        turn = shift_log_snr(self.turn, self.turn_side, model.latents_side)
        part = PARTS[self.part] if self.train_on == "part" else self.train_on
        return train_weights(
            Steering(model, dataclasses.replace(self.trajectory_config, turn=turn)),
            # Several concepts train as one, with the prompts of all: there is one network for them.
            TrainingConcept(problem.erase[0].name, model.encode(prompts), run.generator("training")),
            InPlace(select_parameters(model, part)),
            run,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            samples=self.samples,
        )
