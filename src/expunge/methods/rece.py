"""RECE: UCE repeated on the embeddings that still call for the concept, found in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.prompt_templates import (
    RETAINED,
    assemble_anchor_prompts,
    assemble_prompts,
    assemble_retained_prompts,
    require_place,
)
from expunge.erasing.refit import Refit, match_from_last_token
from expunge.method import Method
from expunge.model import Model
from expunge.ops.least_squares import solve_right_factor
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class RECE(Method):
    """Reliable and efficient concept erasure: refit, look for what comes back, refit that too.

    A round finds, for each of the concept's tokens e, the embedding that the edited projections
    W' = W M send nearest to where the original ones sent e,

        e' = argmin_x Σ_layers ‖W' x − W e‖² + ν ‖x‖² = (ν I + Mᵀ S M)⁻¹ Mᵀ S e,    S = Σ_layers Wᵀ W,

    and adds "e' goes where the anchor goes" to what M is solved from. All layers share M, so a round is
    one solve of the width of the text, whatever the number of layers.

    The paper edits the edited weights again in every round; here each round is solved from the original
    weights with all that was found, so that what is retained is held once (ours). The neutral target of
    the paper is the anchor.

    Cost: UCE's prompts; a Cholesky factorisation and a solve a round. No images, no gradients.

    Source: Gong et al., ECCV 2024, arXiv 2407.12383, eq. 9–12.
    """

    citation: ClassVar[str] = (
        "Gong, Chen, Wei, Chen, Jiang: Reliable and Efficient Concept Erasure of Text-to-Image Diffusion"
        " Models. ECCV 2024, arXiv 2407.12383."
    )
    stronger: ClassVar[str] = "a smaller ridge, or more rounds"
    strength_field: ClassVar[str] = "ridge"
    presets: ClassVar[Presets] = read_presets(__file__)
    renamed: ClassVar[Mapping[str, str]] = {"general": "num_retain_words"}

    rounds: int = bounded(3, at_least=0)
    """How many times to look for what comes back; 0 is UCE."""
    norm_weight: float = bounded(0.1, above=0)
    """ν, how short the found embeddings are kept, in units of a squared projection; smaller finds
    stronger ones, and hurts more of what is retained."""
    ridge: float = bounded(50.0, above=0)
    """λ of the refit, as in UCE."""
    retain_scale: float = bounded(1.0, at_least=0)
    """ρ of the refit: the weight of each retained prompt, of each anchor, and of the empty prompt."""
    num_retain_words: int = bounded(500, at_least=0)
    """How many of the tokenizer's own words are retained."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts to erase the concept in, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        erased = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        retained = len(RETAINED) * len(self._retained(problem))
        return Cost(2 * erased + retained + self.num_retain_words, products=8 * (1 + self.rounds))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        refit = Refit()
        pairs = []
        for concept in problem.erase:
            erased = assemble_prompts(concept, self.templates)
            anchored = assemble_anchor_prompts(concept, self.templates) * len(concept.names)
            model.require_window(erased + anchored)
            texts = model.encode(erased), model.encode(anchored)
            # A mean over prompts, so that synonyms and templates do not weigh a concept up.
            weight = 1 / len(erased)
            refit.erase(*texts, weight)
            e, a = match_from_last_token(*texts)
            # Every round looks for what stands in for these, not for what earlier rounds found.
            pairs.append((e.double().cpu(), a.double().cpu(), weight))
        for text in self._retained(problem):
            prompts = assemble_retained_prompts([text], RETAINED) if text else [""]
            refit.retain(model.encode(prompts), self.retain_scale / len(prompts))
        refit.retain_words(model, problem.erase, self.num_retain_words, 1.0, run)
        sent = sum_projections(model)
        for done in range(self.rounds):
            run.progress("looking for what comes back", done, self.rounds)
            # Tokens alone: a vector of the whole prompt is refitted once, as in UCE.
            sums = refit.tokens
            # Float64 throughout: the found embeddings are differences of near-equal projections.
            matrix = solve_right_factor(sums.cross, sums.gram, sums.prior, self.ridge)
            # One solve a round, for all concepts.
            rows = torch.cat([e for e, _, _ in pairs])
            found = find_returning(rows, matrix, sent, self.norm_weight)
            for part, (_, a, weight) in zip(
                found.split([len(e) for e, _, _ in pairs]), pairs, strict=True
            ):
                sums.erase(part, a, weight)
        run.progress("looking for what comes back", self.rounds, self.rounds)
        return refit.solve(model, self.ridge)

    def _retained(self, problem: Problem) -> list[str]:
        """List what is retained, each once: the empty prompt, the problem's own, and the anchors."""
        anchors = (concept.anchor or "" for concept in problem.erase)
        return list(dict.fromkeys(["", *problem.retain, *anchors]))


def sum_projections(model: Model) -> Tensor:
    """Sum S = Σ Wᵀ W over the layers that read text, (d, d), float64."""
    total = torch.zeros((), dtype=torch.float64)
    for entry in model.text_entries():
        weight = model.weight(entry.layer).double().cpu()
        total = total + weight.T @ weight
    return total


def find_returning(rows: Tensor, matrix: Tensor, sent: Tensor, norm_weight: float) -> Tensor:
    """Find the embeddings that edited projections send nearest to where the original ones sent `rows`.

    Args:
        rows: e, (n, d), float64.
        matrix: M of the edited projections W M, (d, d).
        sent: S = Σ Wᵀ W, (d, d).
        norm_weight: ν, above 0.

    Returns:
        e', (n, d), float64.
    """
    left = matrix.T @ sent
    eye = torch.eye(len(sent), dtype=torch.float64)
    # ν also makes this solvable where M leaves little of the concept's directions.
    return torch.linalg.solve(left @ matrix + norm_weight * eye, left @ rows.T).T
