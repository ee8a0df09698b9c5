"""ANT: keep a trajectory's early steps, turn its late ones away from a concept, or from many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.changes import Changes
from expunge.erasing import fusion, saliency
from expunge.erasing.caption_gram import captions_for
from expunge.erasing.guidance_training import (
    Layers,
    Part,
    Reverse,
    Steering,
    TrainingConcept,
    TrajectoryConfig,
    layers_of,
    part_of,
    train_factors,
    train_weights,
)
from expunge.erasing.prompt_templates import TEMPLATES, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.least_squares import fused, gram
from expunge.ops.trajectory import Objective
from expunge.problem import Concept, Problem, normalize_name
from expunge.runtime.context import RunContext, Tensors
from expunge.runtime.cost import Cost
from expunge.runtime.schedulers import parse_scheduler
from expunge.text import Text

COCO = 616_767
"""The captions of COCO, which the paper's prior is the sum over."""


def published(scale: float, domain: float) -> dict[str, float]:
    """The released scales of a prior that is a sum, for one that is a mean, over 100 names."""
    return {"fuse_prior": scale * COCO, "domain_weight": domain * 100 / COCO, "ridge": 0.0}


FLOOR = 1e-9
"""The least ridge of the fusion, as a share of the sum of its equations' squares (their trace): what no
prompt speaks of stays as it was, and float64 keeps seven digits of the rest."""

MANY = {"trained": "low-rank", "drawn_by": "original", "trajectories": 0, "trajectory_guidance": 7.5,
        "prediction_guidance": 7.5, "samples": 2, "strength": 4.3, "max_train_steps": 400, "preserve": 0.4,
        "unconditional_late": 0.5, "unconditional_early": 0.2, "training_templates": ("{}",),
        "layers": "blocks", "scheduler": "DDIM"}  # fmt: skip
"""The paper's values for many concepts, as released."""

EMOJI = {"drawn_by": "original", "trajectory_steps": 0, "scheduler": "", "preserve": 0.4,
         "unconditional_late": 0.5, "unconditional_early": 0.2, "batch_size": 16,
         "micro_batch": 0}  # fmt: skip
"""What the emoji model's presets share: its own sampler draws, once."""

EMOJI_MANY = {**EMOJI, "trained": "low-rank", "layers": "text", "rank": 4, "alpha": 4.0, "learning_rate": 3e-3,
              "max_train_steps": 60, "turn": -3.0, "negative_guidance": 3.0, "trajectories": 4, "strength": 2.0,
              "fuse_prior": 1000.0, "domain_weight": 10.0}  # fmt: skip

EMOJI_ALONE = {"turn": -5.0, "negative_guidance": 1.0, "through_fusion": True, "strength": 1.0,
               "rank": 16}  # fmt: skip
"""One concept by a low-rank change: of a higher rank, and as the fusion will leave it."""

EMOJI_ANCHORED = {"turn_to": "anchor", "negative_guidance": 0.25}
"""Turned to the anchor, and little past it."""

MIXED = (
    "an image of the {}", "a snapshot of {}", "a painting of the {}", "a watercolor of {}",
    "a photo with {}", "one {} and nothing else", "the {} in a picture", "the {} in the middle",
    "the butterfly beside the {}", "the {} beside the pig", "the snail next to the {}",
    "the {} next to the soccer ball",
)  # fmt: skip
"""Prompts with a concept alone and beside another thing, of which no suite with unsafe things knows."""

EMOJI_MASKED = {**EMOJI, "trained": "weights", "part": "cross-attention", "turn": -5.0, "samples": 2,
                "learning_rate": 1e-3, "max_train_steps": 100, "trajectories": 20, "maps": 40}  # fmt: skip


@dataclass(frozen=True)
class ANT(Method):
    """Auto-steering denoising trajectories: no anchor; guidance reversed from a step t' on.

    Early steps, near noise, bring an image onto the manifold of images; a concept's detail comes
    later. So early predictions are kept, late ones turned away, and those for the empty prompt kept.
    With δ₀ = ε₀(z, c) − ε₀(z, ∅),

        L = ‖ε(z_l, c) − [ε₀(z_l, ∅) − η δ₀]‖² + λ₁ ‖ε(z_e, c) − [ε₀(z_e, ∅) + η δ₀]‖²
          + λ₂ ‖ε(z_l, ∅) − ε₀(z_l, ∅)‖² + λ₃ ‖ε(z_e, ∅) − ε₀(z_e, ∅)‖²

    z_l, with t ≤ t', and z_e, with t > t', lie on one trajectory drawn with the prompt c.

    *One concept* trains the weights of the denoiser that its saliency mask leaves: those that in every
    one of many maps, over augmented prompts and noises, have a gradient in the upper half of their
    tensor. The edit holds these weights alone. *Many concepts* each train a low-rank change, and one
    weight is fitted to them all on keys and values, as in MACE:

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

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "explicit": {"about": "the paper's, on SD 1.x: weights with a mask, t' = 43 of 50",
                     "trained": "weights", "turn": -3.75, "max_train_steps": 250, "scheduler": "DDIM"},
        "explicit-as-released": {
            "about": "its code on SD 1.x, not its text: time split reversed, smallest halves masked",
            "trained": "weights", "turn": -3.75, "max_train_steps": 250, "scheduler": "DDIM",
            "reverse": "early", "mask_half": "smallest", "unconditional_gradient": False},
        "identity": {"about": "the paper's, on SD 1.x: many at once, t' = 40 of 50", **MANY,
                     "turn": -3.18, **published(2e-12, 1e13)},
        "style": {"about": "the paper's, on SD 1.x: many at once, t' = 47 of 50", **MANY,
                  "turn": -4.58, **published(1e-12, 7e12)},
        "object": {"about": "ours, on SD 1.x: weights or many at once, t' = 40 of 50", "turn": -3.18,
                   "preserve": 0.4, "unconditional_late": 0.5, "unconditional_early": 0.2},
        "emoji-object": {"about": "one object of the emoji model; chosen on other words", **EMOJI_MANY,
                         **EMOJI_ALONE, "max_train_steps": 120, "fuse_prior": 100.0},
        "emoji-identity": {"about": "flags of the emoji model; chosen on other words", **EMOJI_MANY,
                           "turn": -5.0, "negative_guidance": 1.0, "through_fusion": True,
                           "strength": 1.0},
        "emoji-object-anchored": {"about": "one object, turned to the anchor: ours", **EMOJI_MANY,
                                  **EMOJI_ALONE, "max_train_steps": 120, "fuse_prior": 100.0, "samples": 4,
                                  **EMOJI_ANCHORED},
        "emoji-identity-anchored": {"about": "flags, turned to the anchor: ours", **EMOJI_MANY,
                                    "turn": -5.0, "through_fusion": True, "strength": 1.0,
                                    **EMOJI_ANCHORED},
        "emoji-style": {"about": "a style of the emoji model; chosen on noto", **EMOJI_MANY,
                        **EMOJI_ALONE, "max_train_steps": 200},
        "emoji-explicit": {"about": "weapons of the emoji model; chosen on food", **EMOJI_MANY,
                           "rank": 16, "max_train_steps": 120, "turn": -5.0, "strength": 1.5,
                           "fuse_prior": 10000.0},
        "emoji-explicit-anchored": {"about": "weapons told as one, turned to the anchor: ours",
                                    **EMOJI_MANY, **EMOJI_ALONE, **EMOJI_ANCHORED, "max_train_steps": 200,
                                    "trajectories": 60, "samples": 8, "templates": MIXED,
                                    "captions": "vocabulary"},
        "emoji-masked": {"about": "one concept of the emoji model, by its weights", **EMOJI_MASKED},
        "fast": {"about": "a rough try in a few steps", "trained": "low-rank", "rank": 1, "max_train_steps": 5,
                 "learning_rate": 0.03, "drawn_by": "original", "trajectories": 2, "trajectory_steps": 4,
                 "turn": -2.0, "ridge": 1.0, "fuse_prior": 10.0, "domain_weight": 50.0,
                 "captions": ""},
    }  # fmt: skip

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_train_steps",
        "rate": "learning_rate",
        "clip": "max_grad_norm",
        "batch": "batch_size",
    }

    trained: Literal["auto", "weights", "low-rank"] = "auto"
    """What is trained: the denoiser's own weights, or a low-rank change a concept, fused at the end;
    "auto" takes weights for one concept and low-rank changes for several."""
    part: Part = "denoiser"
    """Of the weights: "denoiser", the whole of it; "cross-attention"; "text", of that
    the keys and values alone; or "rest", all but the cross-attentions."""
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
    """Whether the two terms of the empty prompt are learnt from, as the paper says; in the released code
    they carry no gradient."""
    prediction_guidance: float = bounded(1.0, at_least=1)
    """g, guidance within the predictions that are compared."""
    trajectory_guidance: float = bounded(3.0, at_least=1)
    """Guidance of the trajectories."""
    trajectory_steps: int = bounded(50, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    scheduler: str = "auto"
    """What draws trajectories, by diffusers' class: "auto" is DDIM, as in the paper, where the model
    predicts noise, and its own scheduler where it learns a flow; "" is the model's own."""
    drawn_by: Literal["current", "original"] = "current"
    """Who draws the trajectories: the denoiser in training, anew at each step; or the original, once,
    which is faster."""
    trajectories: int = bounded(8, at_least=0)
    """Trajectories of each concept that the original draws and keeps; 0 for new ones at each step, as
    released."""
    samples: int = bounded(1, at_least=1)
    """Trajectories of each concept in a training step."""
    max_train_steps: int = bounded(250, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(5e-4, above=0)
    """Adam's learning rate; larger erases more, and more of what is near."""
    maps: int = bounded(100, at_least=0)
    """Saliency maps at the most, for weights; 0 trains all of them. With the largest halves the number
    of weights does not settle: more maps leave fewer."""
    mask_half: Literal["largest", "smallest"] = "largest"
    """Which half of each tensor's gradients a map keeps: the largest, as the paper says; or the
    smallest, as released, whose common part falls far more slowly."""
    map_samples: int = bounded(10, at_least=1)
    """Points of a trajectory that a map sums the gradient over."""
    settle: float = bounded(0.01, at_least=0, at_most=1)
    """No more maps once ten of them took away no more than this share of the weights; 0 takes all."""
    mask: str = ""
    """A .safetensors file for the saliency mask: taken from there, or made and kept there."""
    augmentations: tuple[str, ...] = ()
    """Prompts for the maps, the concept among them; by default its names in the templates."""
    retain_weight: float = bounded(0.0, at_least=0)
    """Weight of a term of ours, for weights: predictions for what is retained and for the captions stay
    as they were."""
    rank: int = bounded(64, at_least=1)
    """The rank of each concept's low-rank change."""
    alpha: float = bounded(1.0, above=0)
    """Its scale: alpha/rank times the product of its factors."""
    layers: Layers = "all"
    """Where low-rank changes are trained: "text", the keys and values through which text enters; "all",
    every linear layer and convolution, of which these are fused and the others dropped; "blocks", those
    within transformer, residual and sampler blocks, as released."""
    weight_decay: float = bounded(0.01, at_least=0)
    """AdamW's weight decay, for low-rank changes."""
    max_grad_norm: float = bounded(1.0, above=0)
    """The largest norm of one concept's gradient, for low-rank changes."""
    strength: float = bounded(1.0, above=0)
    """s, what each low-rank change is multiplied by when they are fused."""
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
    captions: str = "general"
    """The prior's captions: "general"; "vocabulary", the tokenizer's own words; a text file with one
    a line; "" for none, the retained alone."""
    batch_size: int = bounded(4, at_least=1)
    """Concepts trained together, or points of a map at once; more is faster and takes more memory."""
    micro_batch: int = bounded(4, at_least=0)
    """Rows of the denoiser that have gradients at once; 0 for all. It changes memory and speed alone: at
    Stable Diffusion's size a row takes 2 to 3 GB."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""
    training_templates: tuple[str, ...] = ()
    """Prompts that low-rank changes are trained in, while `templates` are those they are fused for; by
    default the same. {} is the bare name, as released."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)
        require_place(self.training_templates)
        if self.scheduler != "auto":
            object.__setattr__(self, "scheduler", parse_scheduler(self.scheduler))
        if self.mask and not self.mask.lower().endswith(".safetensors"):
            raise ExpungeError(f"a mask is a .safetensors file; {self.mask} should end so")

    @property
    def reads_anchor(self) -> bool:
        return self.turn_to == "anchor"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        many, asked = self._many(problem), self.course.objective
        rows = 1 + (self.trajectory_guidance > 1)
        whole = rows * (self.trajectory_steps or num_inference_steps)
        names = sum(len(c.names) * len(self.templates or TEMPLATES[c.kind]) for c in problem.erase)
        prompts = 3 * names + len(fusion.RETAINED) * len(problem.retain) if many else names
        points = (len(problem.erase) if many else 1) * self.max_train_steps * self.samples
        # Kept trajectories are foretold twice at every step; others end half the way on average.
        drawn = self._kept * 2 * whole if self._kept else points * (whole // 2 + len(asked.of_original))
        maps = 0 if many else self.maps
        # What stays by a term of its own is met as often as the concept.
        staying = bool(self.retain_weight)
        return Cost(
            prompts,
            drawn * (len(problem.erase) if many and self._kept else 1 + staying) + maps * whole,
            points * (len(asked.of_student) + staying) + maps * self.map_samples,
            self.captions if many else "",
            16 * many,
        )

    def _many(self, problem: Problem) -> bool:
        """Whether each concept gets a low-rank change, and these are fused."""
        return len(problem.erase) > 1 if self.trained == "auto" else self.trained == "low-rank"

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        many = self._many(problem)
        for what in ("mask", "augmentations", "retain_weight"):
            if many and getattr(self, what):
                raise ExpungeError(f"low-rank changes know no {what}: leave it out, or train weights")
        if not many and self.training_templates:
            raise ExpungeError("weights know no training_templates: leave them out, or give templates")
        steering = Steering(model, self.course)
        if many:
            sums = self._sums(model, problem, run)
            return self.fuse(model, problem, self.train(model, problem, run, *sums), *sums)
        return self.train_masked(steering, problem, run)

    @property
    def course(self) -> TrajectoryConfig:
        """How trajectories are drawn and what is asked of them."""
        objective = Objective(
            self.negative_guidance,
            self.preserve,
            self.unconditional_late,
            self.unconditional_early,
            self.prediction_guidance,
            self.turn_to == "anchor",
            self.unconditional_gradient,
        )
        return TrajectoryConfig(
            objective,
            self.turn,
            self.reverse,
            self.trajectory_steps,
            self.trajectory_guidance,
            self.scheduler,
        )

    # One concept: weights with a mask.

    def train_masked(self, steering: Steering, problem: Problem, run: RunContext) -> Changes:
        """The trained weights, those of the saliency mask alone; several concepts count as one."""
        model, parameters = steering.model, part_of(steering.model, self.part)
        prompts = [p for concept in problem.erase for p in self._prompts(model, concept)]
        augmented = self._augmented(problem) or prompts
        model.require_window(augmented)
        masks = None
        if self.maps:
            found = self._mask(steering, augmented, run)
            masks = {k: m.to(parameters[k].device) for k, m in found.masks.items()}
        generator = run.generator("training")
        return train_weights(
            steering,
            TrainingConcept(
                problem.erase[0].name,
                model.encode(prompts),
                generator,
                self._anchored(model, problem.erase),
            ),
            InPlace(parameters, masks),
            run,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            samples=self.samples,
            kept=self._kept,
            by_original=self.drawn_by == "original",
            micro_batch=self.micro_batch,
            retained=self._retained(model, problem, generator),
            retain_weight=self.retain_weight,
        )

    def _retained(
        self, model: Model, problem: Problem, generator: torch.Generator
    ) -> TrainingConcept | None:
        """Prompts that stay as they are: of the retained and of the captions, as often."""
        if not self.retain_weight:
            return None
        named = [template.format(text) for text in problem.retain for template in fusion.RETAINED]
        erased = [f" {normalize_name(name)} " for concept in problem.erase for name in concept.names]
        general = [
            text
            for text in (captions_for(model, self.captions, problem.erase) if self.captions else ())
            if not any(name in f" {normalize_name(text)} " for name in erased)
        ]
        if not named and not general:
            raise ExpungeError("retain_weight keeps nothing: retain something, or give captions")
        times = max(1, len(general) // max(1, len(named)))
        rows = [*(list(range(len(named))) * times), *range(len(named), len(named) + len(general))]
        return TrainingConcept("retained", model.encode([*named, *general])[rows], generator)

    def _mask(self, steering: Steering, prompts: Sequence[str], run: RunContext) -> saliency.Mask:
        """The mask of the file, or a new one, which is kept there and with the unfinished work."""
        model, parameters = steering.model, part_of(steering.model, self.part)
        file = Path(self.mask) if self.mask else run.folder and run.folder / "mask" / "mask.safetensors"
        if file and file.is_file():
            mask = saliency.Mask.load(file)
            mask.require_fit(model, parameters, "ant", file)
            return mask
        mask = saliency.find(
            steering,
            parameters,
            prompts,
            run,
            method="ant",
            maps=self.maps,
            samples=self.map_samples,
            settle=self.settle,
            batch_size=self._together(1),
            half=self.mask_half,
        )
        if file:
            mask.save(file)
        return mask

    def _augmented(self, problem: Problem) -> tuple[str, ...]:
        """The user's own prompts for the maps, each concept named in one of them."""
        texts = [f" {normalize_name(text)} " for text in self.augmentations]
        for concept in problem.erase if texts else ():
            if not any(f" {normalize_name(name)} " in text for name in concept.names for text in texts):
                raise ExpungeError(f"no prompt of the augmentations names {concept.name!r}")
        return self.augmentations

    # Many concepts: a low-rank change each, and their fusion.

    def _sums(self, model: Model, problem: Problem, run: RunContext) -> tuple[Tensor, Tensor]:
        """Σ e eᵀ over all tokens of the concepts' prompts, and the weighted prior: (d, d), float64."""
        kept = fusion.retained_gram(
            model,
            problem,
            run,
            captions_from=self.captions,
            weighs=self.fuse_prior > 0,
            domain_weight=self.domain_weight,
        )
        whole = sum((gram(e) for e in self._rows(model, problem).values()), torch.zeros_like(kept))
        return whole, self.fuse_prior * kept

    def train(
        self, model: Model, problem: Problem, run: RunContext, whole: Tensor, prior: Tensor
    ) -> dict[str, Tensors]:
        """For each concept B and D of every key and value: `LAYER.up` (out, rank), `LAYER.down`.

        Args:
            model, problem, run: as in `fit`.
            whole: Σ e eᵀ over all tokens of the concepts' prompts, (d, d).
            prior: the weighted prior, (d, d).
        """
        eye = torch.eye(len(whole), dtype=torch.float64)
        ridge = self._ridge(whole, prior)
        inverse = fused(eye, whole, prior, ridge, eye)[1] if self.through_fusion else None
        # Bound to plain data, so that it can run elsewhere, too.
        train = partial(self._train, model, problem, run.seed, inverse)
        title = Steering(model, self.course).title
        names = [concept.name for concept in problem.erase]
        return run.map_cached(train, names, batch_size=self._together(self._rows_together), label=title)

    def _train(
        self, model: Model, problem: Problem, seed: int, inverse: Tensor | None, names: Sequence[str]
    ) -> dict[str, Tensors]:
        run, templates = RunContext(seed), self.training_templates or self.templates
        subjects = [
            TrainingConcept(
                concept.name,
                model.encode(self._prompts(model, concept, templates)),
                run.generator("training", concept.name),
                self._anchored(model, [concept], templates),
            )
            for concept in problem.erase
            if concept.name in names
        ]
        rows = self._rows(model, problem)
        return train_factors(
            Steering(model, self.course),
            subjects,
            layers_of(model, self.layers),
            run,
            rank=self.rank,
            alpha=self.alpha,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            samples=self.samples,
            kept=self._kept,
            by_original=self.drawn_by == "original",
            micro_batch=self.micro_batch,
            through=[gram(rows[s.name]) @ inverse for s in subjects] if inverse is not None else (),
        )

    def fuse(
        self,
        model: Model,
        problem: Problem,
        factors: Mapping[str, Tensors],
        whole: Tensor,
        prior: Tensor,
    ) -> Changes:
        """One weight that does to each concept's words what its own low-rank change does.

        Args:
            model, problem: as in `fit`.
            factors: what `train` found.
            whole, prior: as in `train`.
        """
        matrix, fitted = fusion.fuse(
            factors,
            self._rows(model, problem),
            matrix=torch.eye(len(whole), dtype=torch.float64),
            whole=whole,
            prior=prior,
            ridge=self._ridge(whole, prior),
        )
        layers = [entry.layer for entry in model.text_entries()]
        return fusion.assemble_changes(layers, matrix, fitted, self.strength)

    def _rows(self, model: Model, problem: Problem) -> fusion.LazyTensors:
        """For each concept the tokens of its prompts, (n, d)."""
        prompts = {concept.name: self._prompts(model, concept) for concept in problem.erase}
        return fusion.LazyTensors(
            prompts, lambda name: model.encode(prompts[name]).embeddings.flatten(0, 1).cpu()
        )

    def _ridge(self, whole: Tensor, prior: Tensor) -> float:
        """λ, and at the least what keeps the fusion's equations from being singular."""
        return max(self.ridge, FLOOR * float((whole + prior).diagonal().sum()))

    @property
    def _rows_together(self) -> int:
        """How many rows of one trajectory have gradients at once, at the least."""
        asked = self.course.objective.of_student
        return max(sum(one.startswith(side) for one in asked) for side in ("late", "early"))

    def _together(self, rows: int) -> int:
        """How many concepts, or points of a map, go through the network together, of so many rows."""
        return (
            min(self.batch_size, max(1, self.micro_batch // rows))
            if self.micro_batch
            else self.batch_size
        )

    @property
    def _kept(self) -> int:
        return self.trajectories if self.drawn_by == "original" else 0

    def _anchored(
        self, model: Model, concepts: Sequence[Concept], templates: Sequence[str] = ()
    ) -> Text | None:
        """For each of the concepts' prompts the one with the anchor in it, if it is asked for."""
        if self.turn_to == "empty":
            return None
        prompts = [
            template.format(concept.anchor) if concept.anchor else ""
            for concept in concepts
            for _ in concept.names
            for template in templates or self.templates or TEMPLATES[concept.kind]
        ]
        model.require_window(prompts)
        return model.encode(prompts)

    def _prompts(self, model: Model, concept: Concept, templates: Sequence[str] = ()) -> list[str]:
        """A concept's names in some templates, by default its own, name after name."""
        templates = templates or self.templates or TEMPLATES[concept.kind]
        prompts = [template.format(name) for name in concept.names for template in templates]
        model.require_window(prompts)
        return prompts
