"""MACE: refit what a concept leaves around it, lower the attention to it, fuse it all in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing import fusion, object_masks
from expunge.erasing.prompt_templates import RETAINED, TEMPLATES
from expunge.methods.mace.prompt_sums import AnchorGroup, PromptSums, group_by_anchor, read_rows
from expunge.methods.mace.settings import MACESettings
from expunge.methods.mace.suppression import (
    SuppressionData,
    prepare,
    train_on_attention,
    train_on_trajectories,
)
from expunge.model import Model
from expunge.ops.least_squares import SOLVABLE
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext, Tensors
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class MACE(MACESettings):
    """Mass concept erasure: a hundred concepts at once, each with a low-rank change of its own.

    *refine*: what stands around a concept's phrase carries it too: the words behind it, the end and the
    padding. (A causal text encoder, as CLIP's is, says nothing of it in the words before; these are
    the same with the anchor and hold still.) So keys and values W are refitted to send all that is
    around it (eᶠ) where it goes (eᵍ) when the anchor stands in the phrase's place:

        min_W'  Σ ‖W' eᶠ − W eᵍ‖² + λ₁ (E_captions ‖(W' − W) e‖² + ω E_retained ‖…‖²) + λ ‖W' − W‖²

    W' = W M, one matrix M for every layer, since no embedding depends on the layer.

    *suppress*: for each concept a change B D of W' is trained to lower the attention A that its
    tokens S get inside the object's mask in images of it:

        min_{B,D}  Σ_layers (Σ_{i∈S} ‖Aⁱ ⊙ mask‖²)^½

    at times drawn where a concept's detail takes shape (`focal`). Many concepts train in one batch,
    each with its own factors, random numbers and clipping: the result is that of one by one.

    *fuse*: one W* that does to each concept's words what its own change does:

        min_W*  Σᵢ Σ ‖W* eᶠ − (W' + BᵢDᵢ) eᶠ‖² + λ₂ (as above) + λ ‖W* − W'‖²

    with W* = W M₂ + Σᵢ Bᵢ (DᵢGᵢK): one matrix and one low-rank change a layer, however many concepts.
    Without *fuse*, the changes are averaged, as in the second row of the paper's ablation (`combine`).

    The paper's "target", "destination" and "preservation" are our erase, anchor and retain. λ and the
    sums are as published: a sum over templates and names, each of 77 tokens.

    Cost: closed forms take seconds on a CPU; drawing 8 images and 50 short training steps a concept.

    Source: Lu et al., CVPR 2024, arXiv 2403.06135, eq. 1–7.
    """

    citation: ClassVar[str] = (
        "Lu, Wang, Li, Liu, Kong: MACE: Mass Concept Erasure in Diffusion Models."
        " CVPR 2024, arXiv 2403.06135."
    )

    absent: ClassVar[Mapping[str, str]] = {
        "train_on": "MACE trains attention to a phrase, and a family with layers that see text alone has"
        " no cross-attention; refine and fuse solve for the layer through which text enters, which is"
        " one of these, so set stages to refine and fuse"
    }

    stronger: ClassVar[str] = "a smaller ridge, ridge_floor or refine_prior"

    presets: ClassVar[Presets] = read_presets(__file__)

    needs: ClassVar[Mapping[str, str]] = {"suppress": "cross-attention"}

    renamed: ClassVar[Mapping[str, str]] = {
        "lesson": "objective",
        "steps": "max_train_steps",
        "rate": "learning_rate",
        "clip": "max_grad_norm",
        "batch": "batch_size",
        "pictures": "num_images",
        "picture_steps": "num_inference_steps",
        "pictures_from": "images_from",
    }

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        # A concept's own words are not sent anywhere: attention to them is lowered.
        return "text" if "refine" in self.stages else ""

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        concepts = len(problem.erase)
        prompts = sum(len(self.prompts(concept)) for concept in problem.erase)
        # An anchor is read once, however many concepts of a kind share it.
        told = {(c.kind, c.anchor): len(self.templates or TEMPLATES[c.kind]) for c in problem.erase}
        weighs = self.refine_prior > 0 or self.fuse_prior > 0
        staying = len(RETAINED) * len(problem.retain) if weighs and self.domain_weight else 0
        products = 8 * (1 + ("fuse" in self.stages)) + concepts
        captions = self.captions if weighs else ""
        prompts += sum(told.values()) + staying
        if "suppress" not in self.stages:
            return Cost(prompts, captions=captions, products=products)
        # Those of what is trained are read for it, and again to fuse.
        prompts += sum(len(self.prompts(c)) for c in problem.erase) * (1 + ("fuse" in self.stages))
        drawn = 2 * (self.num_inference_steps or num_inference_steps)
        of_one = 1 if self.images_from else drawn  # what is read is encoded
        of_one += len(object_masks.LOG_SNRS) if self.masks == "attention" else 0
        predictions = concepts * self.num_images * of_one
        return Cost(prompts, predictions, concepts * self.max_train_steps, captions, products)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        groups = group_by_anchor(model, problem, self.templates)
        sums = PromptSums.of(groups)
        retained = self.sum_retained(model, problem, run)
        factors: Mapping[str, Tensors] = {}
        if "refine" in self.stages:
            matrix = self.refine(sums, retained)
        else:
            matrix = torch.eye(len(retained), dtype=torch.float64)
        if "suppress" in self.stages:
            factors = self.suppress(model, problem, matrix, run)
        if "fuse" in self.stages:
            matrix, factors = self.fuse(groups, sums, retained, matrix, factors)
        layers = [entry.layer for entry in model.text_entries()]
        # Fused, each change acts on its own words alone; unfused, all act on every word.
        averaged = factors and "fuse" not in self.stages and self.combine == "average"
        scale = 1 / len(factors) if averaged else 1.0
        # Without *refine* and *fuse* M is the identity: the edit's file need not hold its d² numbers.
        return fusion.assemble_changes(
            layers, None if self.stages == ("suppress",) else matrix, factors, scale
        )

    def refine(self, sums: PromptSums, retained: Tensor) -> Tensor:
        """Solve for M, (d, d), float64: it sends what is around a concept where its anchor's goes.

        Args:
            sums: over the concepts' prompts.
            retained: the prior's sum, (d, d).
        """
        prior = self.refine_weight * retained if self.refine_weight else None
        # Of the sum that is inverted here: over the tokens around phrases, without the phrases.
        mean = sums.around.energy / len(retained)
        return sums.around.right_factor(max(self.ridge, self.ridge_floor * mean), prior)

    def suppress(
        self, model: Model, problem: Problem, matrix: Tensor, run: RunContext
    ) -> dict[str, Tensors]:
        """Train a low-rank change of each concept.

        Args:
            model: the original.
            problem: the concepts.
            matrix: M, upon which the changes are trained.
            run: its seed, and the folder in which finished concepts are stored.

        Returns:
            By concept: `LAYER.up` (out, rank), `LAYER.down` (rank, d).
        """
        # Bound to plain data, so that it can be pickled and run on another machine.
        train = partial(self._train, model, problem, matrix, run.seed)
        return run.map_cached(
            train, [c.name for c in problem.erase], batch_size=self.batch_size, label="training"
        )

    def fuse(
        self,
        groups: Sequence[AnchorGroup],
        sums: PromptSums,
        retained: Tensor,
        matrix: Tensor,
        factors: Mapping[str, Tensors],
    ) -> tuple[Tensor, dict[str, Tensors]]:
        """Solve for M₂, and replace D by D G K in the factors: together they act on each concept alone.

        Args:
            groups: the concepts' prompts; those with factors are encoded again.
            sums: as in `refine`.
            retained: as in `refine`.
            matrix: M.
            factors: what `suppress` returned.
        """
        if not factors and not self.fuse_prior:
            return matrix, {}  # M₂ = M (Σᵢ Gᵢ + λI) (Σᵢ Gᵢ + λI)⁻¹
        return fusion.fuse(
            factors,
            read_rows(groups),
            matrix=matrix,
            whole=sums.whole,
            prior=self.fuse_prior * retained,
            ridge=self.ridge,
            floor=SOLVABLE if self.ridge_floor else 0.0,
        )

    def sum_retained(self, model: Model, problem: Problem, run: RunContext) -> Tensor:
        """Sum the prior: P + ω P_retained, (d, d), means of Σ_positions e eᵀ over captions and names.

        Args:
            model: whose text encoder reads.
            problem: the names to retain.
            run: told how far it is.
        """
        return fusion.retained_gram(
            model,
            problem,
            run,
            captions_from=self.captions,
            weighs=self.refine_prior > 0 or self.fuse_prior > 0,
            domain_weight=self.domain_weight,
        )

    def _train(
        self, model: Model, problem: Problem, matrix: Tensor, seed: int, names: Sequence[str]
    ) -> dict[str, Tensors]:
        """Train the changes of the concepts of these names in one batch."""
        run = RunContext(seed)
        concepts = [concept for concept in problem.erase if concept.name in names]
        if self.objective == "trajectory":
            return train_on_trajectories(self, model, concepts, matrix, run)
        data = [self.prepare(model, concept, run) for concept in concepts]
        return train_on_attention(self, model, data, matrix, run)

    def prepare(self, model: Model, concept: Concept, run: RunContext) -> SuppressionData:
        """Find a concept's prompts, images and masks; a subclass may remember them.

        Args:
            model: the original.
            concept: the concept.
            run: its seed.
        """
        return prepare(self, model, concept, run)
