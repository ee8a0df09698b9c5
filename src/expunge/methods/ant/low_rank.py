"""ANT for many concepts: a low-rank change of each, and one weight that is fitted to them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expunge.base.fields import bounded, check_fields
from expunge.changes import Changes
from expunge.erasing import fusion
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_factors
from expunge.erasing.parameters import Layers, select_layers
from expunge.erasing.prompt_templates import require_place
from expunge.erasing.trajectories import TrainingConcept
from expunge.methods.ant.settings import SharedSettings
from expunge.model import Model
from expunge.ops.least_squares import gram, solve_fusion
from expunge.problem import Problem
from expunge.runtime.context import RunContext, Tensors

FLOOR = 1e-9
"""The least ridge of the fusion, as a share of the trace of its equations' matrix: directions that no
prompt has stay as they were, and float64 keeps seven digits of the rest."""


@dataclass(frozen=True)
class LowRankChanges:
    """A low-rank change B D of each concept, and the fusion of all on keys and values."""

    rank: int = bounded(64, at_least=1)
    """The rank of each concept's low-rank change."""
    alpha: float = bounded(1.0, above=0)
    """Its scale: alpha/rank times the product of its factors."""
    layers: Layers = "all"
    """Where low-rank changes are trained: "text", the keys and values through which text enters; "all",
    every linear layer and convolution, of which these are fused and the others dropped; "blocks", those
    within transformer, residual and sampler blocks, as released."""
    weight_decay: float = bounded(0.01, at_least=0)
    """AdamW's weight decay."""
    max_grad_norm: float = bounded(1.0, above=0)
    """The largest norm of one concept's gradient."""
    strength: float = bounded(1.0, above=0)
    """s, what each low-rank change is multiplied by before they are fused."""
    through_fusion: bool = False
    """Train each low-rank change as the fusion will leave it, B D G K for B D: what it does to words
    that others share is then no part of what it learns, and nothing is lost when it is fused. Ours."""
    ridge: float = bounded(100.0, at_least=0)
    """λ, pull of the fused weight to the original, in units of a squared embedding (about 600 for one
    token of a CLIP); the sums it stands against run over all tokens of 30 prompts."""
    fuse_prior: float = bounded(0.0, at_least=0)
    """κ, weight of the prior in the fusion, for a mean per caption."""
    domain_weight: float = bounded(0.0, at_least=0)
    """ω, how much more than the mean of the captions the mean of the retained prompts weighs."""
    training_templates: tuple[str, ...] = ()
    """Prompts that low-rank changes are trained in, while `templates` are those they are fused for; by
    default the same. {} is the bare name, as released."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_place(self.training_templates)

    def fit(self, settings: SharedSettings, model: Model, problem: Problem, run: RunContext) -> Changes:
        """Train a low-rank change of each concept, and fuse them.

        Args:
            settings: the objective, the trajectories and the training.
            model: as in `Method.fit`.
            problem: as in `Method.fit`.
            run: as in `Method.fit`.
        """
        sums = self.sum_grams(settings, model, problem, run)
        factors = self.train(settings, model, problem, run, *sums)
        return self.fuse(settings, model, problem, factors, *sums)

    def sum_grams(
        self, settings: SharedSettings, model: Model, problem: Problem, run: RunContext
    ) -> tuple[Tensor, Tensor]:
        """Sum e eᵀ over all tokens of the concepts' prompts, and over those of the weighted prior.

        Args:
            settings: the templates and the captions.
            model: as in `Method.fit`.
            problem: as in `Method.fit`.
            run: as in `Method.fit`.

        Returns:
            Both sums, (d, d), float64.
        """
        retained = fusion.retained_gram(
            model,
            problem,
            run,
            captions_from=settings.captions,
            weighs=self.fuse_prior > 0,
            domain_weight=self.domain_weight,
        )
        rows = self._rows(settings, model, problem).values()
        return sum((gram(e) for e in rows), torch.zeros_like(retained)), self.fuse_prior * retained

    def train(
        self,
        settings: SharedSettings,
        model: Model,
        problem: Problem,
        run: RunContext,
        whole: Tensor,
        prior: Tensor,
    ) -> dict[str, Tensors]:
        """Train B and D of every key and value for each concept.

        Args:
            settings: the objective, the trajectories and the training.
            model: as in `Method.fit`.
            problem: as in `Method.fit`.
            run: as in `Method.fit`.
            whole: Σ e eᵀ over all tokens of the concepts' prompts, (d, d).
            prior: the weighted prior, (d, d).

        Returns:
            By concept: `LAYER.up` (out, rank), `LAYER.down` (rank, d).
        """
        eye = torch.eye(len(whole), dtype=torch.float64)
        ridge = self._ridge(whole, prior)
        # K alone: D G K for D the identity and G the identity.
        inverse = solve_fusion(eye, whole, prior, ridge, eye)[1] if self.through_fusion else None
        # Bound to plain data, so that it can be pickled and run on another machine.
        train = partial(self._train, settings, model, problem, run.seed, inverse)
        names = [concept.name for concept in problem.erase]
        batch_size = settings.fit_together(settings.rows_per_sample)
        title = Steering(model, settings.trajectory_config).title
        return run.map_cached(train, names, batch_size=batch_size, label=title)

    def _train(
        self,
        settings: SharedSettings,
        model: Model,
        problem: Problem,
        seed: int,
        inverse: Tensor | None,
        names: Sequence[str],
    ) -> dict[str, Tensors]:
        """Train the concepts of these names in one batch; `inverse` is K, (d, d), where it is needed."""
        # The seed is all that training needs of a run; its folder and progress stay with the caller.
        run, templates = RunContext(seed), self.training_templates
        subjects = [
            TrainingConcept(
                concept.name,
                model.encode(settings.prompts(model, concept, templates)),
                run.generator("training", concept.name),
                settings.encode_anchors(model, [concept], templates),
            )
            for concept in problem.erase
            if concept.name in names
        ]
        rows = self._rows(settings, model, problem)
        return train_factors(
            Steering(model, settings.trajectory_config),
            subjects,
            select_layers(model, self.layers),
            run,
            rank=self.rank,
            alpha=self.alpha,
            max_train_steps=settings.max_train_steps,
            learning_rate=settings.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            samples=settings.samples,
            n_stored=settings.n_stored,
            drawn_by_original=settings.drawn_by == "original",
            micro_batch=settings.micro_batch,
            # GᵢK, by which `fuse` will multiply D.
            through=[gram(rows[s.name]) @ inverse for s in subjects] if inverse is not None else (),
        )

    def fuse(
        self,
        settings: SharedSettings,
        model: Model,
        problem: Problem,
        factors: Mapping[str, Tensors],
        whole: Tensor,
        prior: Tensor,
    ) -> Changes:
        """Fit one weight that does to each concept's words what its own low-rank change does.

        Args:
            settings: the templates.
            model: as in `Method.fit`.
            problem: as in `Method.fit`.
            factors: what `train` returned.
            whole: as in `train`.
            prior: as in `train`.
        """
        matrix, fitted = fusion.fuse(
            factors,
            self._rows(settings, model, problem),
            # ANT has no first stage: weights are fused as they were.
            matrix=torch.eye(len(whole), dtype=torch.float64),
            whole=whole,
            prior=prior,
            ridge=self._ridge(whole, prior),
        )
        layers = [entry.layer for entry in model.text_entries()]
        # s may enter after the solve, since D G K is linear in D.
        return fusion.assemble_changes(layers, matrix, fitted, self.strength)

    def _rows(self, settings: SharedSettings, model: Model, problem: Problem) -> fusion.LazyTensors:
        """For each concept the tokens of its prompts, (n, d): read when they are needed."""
        prompts = {concept.name: settings.prompts(model, concept) for concept in problem.erase}
        return fusion.LazyTensors(
            prompts, lambda name: model.encode(prompts[name]).embeddings.flatten(0, 1).cpu()
        )

    def _ridge(self, whole: Tensor, prior: Tensor) -> float:
        """λ, or the least that keeps the fusion's equations from being singular."""
        return max(self.ridge, FLOOR * float((whole + prior).diagonal().sum()))
