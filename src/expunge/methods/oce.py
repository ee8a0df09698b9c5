"""OCE: rotate the values away from a concept's directions, in closed form; seconds, no images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeWarning
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Dense
from expunge.erasing.caption_gram import compute_prior, read_captions
from expunge.erasing.concept_tokens import last_tokens
from expunge.erasing.prompt_templates import (
    assemble_anchor_prompts,
    assemble_prompts,
    require_place,
)
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class OCE(Method):
    """Orthogonal concept erasure: replace each value projection W by Q W, with an orthogonal Q.

        M = −s_e G (I − G*) + s_g W C_g Wᵀ + s_p Σ (W c_p)(W c_p)ᵀ + λ W Wᵀ = U Σ Vᵀ,    Q = U Vᵀ

    G and G* project on the span of the concepts' and of the anchors' values, C_g is the mean second
    moment of a token of everyday captions, c_p the last content tokens of what is retained. Q maximises
    tr(Qᵀ M). A rotation keeps all lengths and angles, so it can turn values, but send none to zero.

    Cost: encodes the captions once (their prior is cached), and one singular value decomposition a
    layer, as wide as the layer's output. It needs more output dimensions than concepts.

    Source: OCE, ICML 2026, arXiv 2605.28902. Prompts are the bare names.
    """

    citation: ClassVar[str] = "OCE: Orthogonal Concept Erasure. ICML 2026, arXiv 2605.28902."
    stronger: ClassVar[str] = "a larger erase_scale"
    presets: ClassVar[Presets] = read_presets(__file__)
    renamed: ClassVar[Mapping[str, str]] = {"general_scale": "captions_scale"}

    erase_scale: float = bounded(2000.0, at_least=0)
    """s_e, weight of leaving the concepts' directions for the anchors'. 0 changes nothing."""
    captions_scale: float = bounded(10.0, at_least=0)
    """s_g, weight of everyday captions."""
    retain_scale: float = bounded(0.0, at_least=0)
    """s_p, weight of each retained name."""
    ridge: float = bounded(10.0, at_least=0)
    """λ, weight of keeping W as it is in every direction."""
    captions: str = "general"
    """Everyday captions: "general", which ship, a text file, or a data set of the hub; "" leaves them
    out."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that name a concept, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    @property
    def reads_retain(self) -> bool:
        return self.retain_scale > 0

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        erased = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        general = len(read_captions(self.captions)) if self.captions and self.captions_scale else 0
        return Cost(prompts=2 * erased + len(problem.retain) + general)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        erased, anchored = [], []
        for concept in problem.erase:
            erased += assemble_prompts(concept, self.templates)
            anchored += assemble_anchor_prompts(concept, self.templates) * len(concept.names)
        model.require_window(erased + anchored)
        target, anchor = (last_tokens(model.encode(prompts)) for prompts in (erased, anchored))
        width = target.shape[1]
        kept = (
            last_tokens(model.encode(problem.retain))
            if problem.retain
            else torch.zeros(0, width).double()
        )
        general = torch.zeros(width, width, dtype=torch.float64)
        if self.captions and self.captions_scale:
            tokens = model.encode([""]).embeddings.shape[1]
            # The prior sums over a caption's positions; C_g is the mean of one token.
            general = compute_prior(model, read_captions(self.captions), run).mean / tokens

        changes, full = [], []
        # As published, values alone: keys, which say where attention falls, stay.
        values = [entry for entry in model.text_entries() if entry.role != "key"]
        for done, entry in enumerate(values):
            run.progress("solving layers", done, len(values))
            weight = model.weight(entry.layer)
            w = weight.double().cpu()
            # Fewer tokens than outputs cannot fill them, and need no decomposition more.
            if len(target) >= len(w) and projector(w @ target.T).trace() > len(w) - 0.5:
                full.append(entry.layer)
            objective = self.objective(w, target, anchor, kept, general)
            # Q stands left of W and is each layer's own, so that no factor of the input can hold it.
            changes.append(Dense((entry.layer,), (nearest_rotation(objective) @ w).to(weight.dtype)))
        run.progress("solving layers", len(values), len(values))
        if full:
            warnings.warn(
                f"OCE: the concepts' values fill all outputs of {len(full)} of {len(values)} layers,"
                f" such as {full[-1]}: no direction is left to keep there; erase fewer concepts at once",
                ExpungeWarning,
                stacklevel=2,
            )
        return tuple(changes)

    def objective(
        self, weight: Tensor, target: Tensor, anchor: Tensor, kept: Tensor, general: Tensor
    ) -> Tensor:
        """Compute M of a layer, (out, out), float64.

        Args:
            weight: W, (out, d).
            target: tokens of the concepts, (n, d).
            anchor: tokens of the anchors, (n, d).
            kept: tokens of what is retained, (m, d); m may be 0.
            general: C_g, (d, d).
        """
        eye = torch.eye(weight.shape[0], dtype=torch.float64)
        away, toward = projector(weight @ target.T), projector(weight @ anchor.T)
        held = weight @ kept.T
        # (I − G*) spares the part of a concept's direction that its anchor has, too.
        return (
            -self.erase_scale * away @ (eye - toward)
            + self.captions_scale * weight @ general @ weight.T
            + self.retain_scale * held @ held.T
            + self.ridge * weight @ weight.T
        )


def projector(columns: Tensor) -> Tensor:
    """Compute the orthogonal projector on the span of some columns, normalised first: (out, out).

    Args:
        columns: (out, n).
    """
    # Normalised, so that the cut of small singular values is one of angles and not of lengths.
    unit = columns / columns.norm(dim=0).clamp_min(1e-12)
    u, s, _ = torch.linalg.svd(unit, full_matrices=False)
    basis = u[:, s > 1e-8 * s[0]]  # concepts that share their last token are one direction
    return basis @ basis.T


def nearest_rotation(matrix: Tensor) -> Tensor:
    """Compute U Vᵀ of M = U Σ Vᵀ: the orthogonal matrix Q with the largest tr(Qᵀ M)."""
    u, _, vh = torch.linalg.svd(matrix)
    # The sign of the determinant is left free: a reflection is orthogonal, too.
    return u @ vh
