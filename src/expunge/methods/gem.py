"""GEM: train queries and keys until a concept's prediction is nearer its anchor's; minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, LowRank, iterate_layers
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_factors
from expunge.erasing.moved_share import count_predictions
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts, require_place
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.method import Method
from expunge.model import Model
from expunge.ops.noise_error import Loss, measure_error
from expunge.ops.trajectory import Asked, Objective, Predictions, Side
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost

JOINT = {"to_q": "add_q_proj", "to_k": "add_k_proj"}
"""The queries and keys of an attention's image stream, and those of its text stream."""

TINY = 1e-12
"""Added to an error before its root is taken: the gradient of a root at 0 is infinite."""


@dataclass(frozen=True)
class ContrastiveObjective(Objective):
    """relu(‖ε(z, c) − ε₀(z, c_anchor)‖ − η ‖ε(z, c) − ε₀(z, c)‖), of each sample.

    Norms are roots of a mean over a sample's numbers, in ε; under the Hellinger loss, that distance.
    """

    @property
    def of_student(self) -> tuple[Asked, ...]:
        """The prediction that is trained."""
        return ("late",)

    @property
    def of_original(self) -> tuple[Asked, ...]:
        """The two predictions that it is drawn to and pushed from."""
        return ("late", "late anchor")

    def loss(
        self,
        student: Predictions,
        original: Predictions,
        late: Tensor,
        early: Tensor,
        sides: Sequence[Side] = ("late",),
    ) -> Tensor:
        """Compute the loss of each sample: (n,).

        Args:
            student: the prediction for the concept, as `of_student`.
            original: the original's, as `of_original`.
            late: (n,), what an error of a prediction is worth in ε.
            early: not read: all points are of one kind.
            sides: not read.
        """
        near, far = (
            (measure_error(student["late"], original[goal], late, self.error) + TINY).sqrt()
            for goal in ("late anchor", "late")
        )
        # At 0 a sample has no gradient any more; the repelling term alone would never end.
        return (near - self.negative_guidance * far).relu()


@dataclass(frozen=True)
class GEM(Method):
    """Geometric erasure: the anchor's prediction attracts, the concept's own repels, until one wins.

        min E relu(‖v(z, c) − v₀(z, c_anchor)‖ − η ‖v(z, c) − v₀(z, c)‖)

    v is the denoiser in training, v₀ the original, z points of trajectories that the original draws with
    the concept's prompt. A sample stops pulling once its prediction is 1/η times as far from what it
    was as from the anchor's. Trained are low-rank changes of queries and keys: of attentions with a
    stream of text and one of the image (FLUX, SD3), both streams; where text enters a cross-attention,
    that one's (ours: the paper is on FLUX); else those of every attention.

    All concepts share one low-rank change. Errors are compared in ε, so that early and late steps count
    alike. It knows no retain.

    Cost: `trajectories` images with three predictions a step, once; then a gradient a sample.

    Source: Grebe, Braun, Rohrbach, Rohrbach, arXiv 2606.00140. Of its values only the layers are known
    here; the rest is ours.
    """

    citation: ClassVar[str] = (
        "Grebe, Braun, Rohrbach, Rohrbach: GEM: Geometric Erasure by Contrastive Velocity Matching in"
        " Rectified Flows. 2026, arXiv 2606.00140."
    )

    stronger: ClassVar[str] = "more max_train_steps, or a larger learning_rate"
    presets: ClassVar[Presets] = read_presets(__file__)

    repulsion: float = bounded(0.25, at_least=0, at_most=1)
    """η: 0 only attracts, and larger lets go of a sample sooner."""
    layers: Literal["queries-keys", "queries", "keys"] = "queries-keys"
    """What is trained."""
    rank: int = bounded(8, at_least=1)
    """Of the low-rank changes."""
    alpha: float = bounded(8.0, above=0)
    """Scale of the low-rank changes: B D counts alpha/rank times."""
    trajectories: int = bounded(16, at_least=1)
    """Trajectories that the original draws, over all prompts."""
    trajectory_steps: int = bounded(28, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    trajectory_guidance: float = bounded(3.5, at_least=1)
    """Guidance of the trajectories."""
    samples: int = bounded(4, at_least=1)
    """Points in a training step."""
    max_train_steps: int = bounded(300, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(1e-3, above=0)
    """AdamW's learning rate; larger erases more, and more of what is near."""
    micro_batch: int = bounded(4, at_least=0)
    """Rows of the denoiser that have gradients at once; 0 for all. It changes memory and speed alone."""
    loss: Loss = "squared"
    """What the two distances are: roots of the squared error, as in the paper; or Hellinger distances,
    which are bounded."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def reads_retain(self) -> bool:
        return False

    @property
    def trajectory_config(self) -> TrajectoryConfig:
        """How trajectories are drawn, and the objective on all their points."""
        objective = ContrastiveObjective(self.repulsion, anchored=True, error=self.loss)
        steps, guidance = self.trajectory_steps, self.trajectory_guidance
        # Without a step to turn at: "always" does not read t', here 0.
        return TrajectoryConfig(objective, 0.0, "always", steps, guidance, "auto")

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "predictions"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        prompts = [p for c in problem.erase for p in assemble_prompts(c, self.templates)]
        steps = self.trajectory_steps or num_inference_steps
        # Three more a step are stored: for the prompt, for none, and for the anchor.
        drawn = self.trajectories * steps * (1 + (self.trajectory_guidance > 1) + 3)
        # Measuring how far the edit went takes predictions, too.
        drawn += count_predictions(len(problem.erase))
        return Cost(2 * len(prompts), drawn, self.max_train_steps * self.samples)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        erased, anchored = [], []
        for concept in problem.erase:
            erased += assemble_prompts(concept, self.templates)
            anchored += assemble_anchor_prompts(concept, self.templates) * len(concept.names)
        model.require_window(erased + anchored)
        subject = TrainingConcept(
            "gem", model.encode(erased), run.generator("training"), model.encode(anchored)
        )
        layers = self.trained_layers(model)
        factors = train_factors(
            Steering(model, self.trajectory_config),
            [subject],
            layers,
            run,
            rank=self.rank,
            alpha=self.alpha,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            max_grad_norm=1.0,
            samples=self.samples,
            n_stored=self.trajectories,
            drawn_by_original=True,
            micro_batch=self.micro_batch,
            # All of them: these factors are the edit itself, not what a fusion of text entries reads.
            returned=layers,
        )["gem"]
        return tuple(LowRank((n,), factors[f"{n}.up"], factors[f"{n}.down"]) for n in layers)

    def trained_layers(self, model: Model) -> tuple[str, ...]:
        """List the queries and keys of the attentions that text enters, in the order of the network."""
        wanted = {"queries": ("to_q",), "keys": ("to_k",)}.get(self.layers, ("to_q", "to_k"))
        there = {f"{model.denoiser}.{name}" for name, _ in iterate_layers(model.network)}
        own = [name for name in there if name.rpartition(".")[2] in wanted]
        crossings = {entry.layer.rpartition(".")[0] for entry in model.text_entries()}
        cross = [name for name in own if name.rpartition(".")[0] in crossings]
        streams = [f"{n.rpartition('.')[0]}.{JOINT[n.rpartition('.')[2]]}" for n in own]
        joint = [name for pair in zip(own, streams, strict=True) if pair[1] in there for name in pair]
        # Where some attentions have a stream of text, those without one stay as they are: FLUX's single
        # blocks.
        chosen = set(cross or joint or own)
        # In the order of the network: a set has none, and factors draw their numbers layer by layer.
        return tuple(
            f"{model.denoiser}.{name}"
            for name, _ in iterate_layers(model.network)
            if f"{model.denoiser}.{name}" in chosen
        )
