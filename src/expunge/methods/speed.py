"""SPEED: a closed-form edit of the values in the null space of what is retained; seconds, no images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, LowRank
from expunge.erasing.concept_tokens import last_tokens, sample_words
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
from expunge.text import Text


@dataclass(frozen=True)
class SPEED(Method):
    """Send a concept's values where its anchor's go, by a change that no retained embedding can feel.

        min_Δ ‖(W + ΔP) C₁ − W C*‖² + s ‖ΔP‖²   with   ΔP C₂ = 0

    The columns of C₁ and C* are the last content tokens of the concepts' and the anchors' prompts, or
    all of their tokens, place by place (`positions`). P projects on the directions in which the
    retained embeddings C₀ have almost no energy: the eigenvectors of C₀ C₀ᵀ whose eigenvalue is below
    `threshold`. C₂ is the start token and three centres of the empty prompt's tokens. With
    N = P (C₁C₁ᵀ P + s I)⁻¹, which is symmetric,

        ΔP = W (C* − C₁) C₁ᵀ [N − N C₂ (C₂ᵀ N C₂ + λ I)⁻¹ C₂ᵀ N].

    Which embeddings are retained is chosen for each layer: those that an unconstrained edit would move
    more than the mean (influence), and random copies of them along the direction that the layer sees
    least (augmentation).

    Cost: encodes a few hundred short prompts; two eigenvalue problems of the text's width a layer. The
    change of a layer has rank n, the number of tokens that are erased.

    Source: SPEED, ICLR 2026, arXiv 2503.07392. The tokenizer's words that stand in for the paper's
    retained names, and that anchors are retained, are ours.
    """

    citation: ClassVar[str] = (
        "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models."
        " ICLR 2026, arXiv 2503.07392."
    )
    stronger: ClassVar[str] = "a smaller strength_penalty, or a larger threshold"
    strength_field: ClassVar[str] = "strength_penalty"
    presets: ClassVar[Presets] = read_presets(__file__)
    renamed: ClassVar[Mapping[str, str]] = {"general": "num_retain_words"}

    threshold: float = bounded(0.1, above=0)
    """Largest eigenvalue of C₀C₀ᵀ that counts as none, in units of a squared embedding. Larger leaves
    the edit more directions: it erases more and moves the retained more."""
    strength_penalty: float = bounded(1.0, above=0)
    """s, the pull of ΔP to zero. Larger erases less."""
    invariant_slack: float = bounded(0.0, at_least=0)
    """λ, how far the start token and the empty prompt may move: 0 not at all."""
    positions: Literal["last", "all"] = "last"
    """Tokens of a prompt that are sent to the anchor's: its last own one, or each that differs from the
    anchor's in the same place, end and padding too, as published for nudity."""
    influence_filter: bool = True
    """Retain only the embeddings that an unconstrained edit moves more than the mean."""
    augmentations: int = bounded(10, at_least=0)
    """Random copies of every retained embedding, along the direction that a layer sees least."""
    num_retain_words: int = bounded(500, at_least=0)
    """How many of the tokenizer's own words are retained beside the problem's."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that name a concept, with {} in its place. The paper's own are not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        erased = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        return Cost(prompts=2 * erased + len(problem.retain) + self.num_retain_words + 1)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        erased, anchored = [], []
        for concept in problem.erase:
            erased += assemble_prompts(concept, self.templates)
            anchored += assemble_anchor_prompts(concept, self.templates) * len(concept.names)
        model.require_window(erased + anchored)
        text = model.encode(erased + anchored)
        n = len(erased)
        target, anchor = self._pairs(text[range(n)], text[range(n, 2 * n)])
        anchors = {concept.anchor for concept in problem.erase if concept.anchor}
        words = sample_words(model, problem.erase, self.num_retain_words, run.generator("words"))
        # Sorted: a set has no order of its own, and random copies are drawn row by row.
        retained = list(dict.fromkeys([*problem.retain, *sorted(anchors), *words]))
        if not retained:
            raise ExpungeError(
                "SPEED needs something to retain: name it, or set num_retain_words above 0"
            )
        kept = last_tokens(model.encode(retained))
        fixed = invariants(model.encode([""]).embeddings[0].double().cpu(), run.generator("centres"))

        changes = []
        # As published, values alone: keys, which say where attention falls, stay.
        values = [entry for entry in model.text_entries() if entry.role != "key"]
        for done, entry in enumerate(values):
            run.progress("solving layers", done, len(values))
            weight = model.weight(entry.layer).double().cpu()
            chosen = self._retained(weight, target, anchor, kept, run.generator("augment", entry.layer))
            change = null_space_change(
                target, chosen, fixed, self.threshold, self.strength_penalty, self.invariant_slack
            )
            # Two thin factors, W (C* − C₁) and C₁ᵀ [·]: no (out, d) matrix is formed or stored.
            up, down = weight @ (anchor - target).T, target @ change
            if len(target) > len(change):  # more tokens than directions
                up, down = up @ target, change
            changes.append(LowRank((entry.layer,), up.float(), down.float()))
        run.progress("solving layers", len(values), len(values))
        return tuple(changes)

    def _pairs(self, erased: Text, anchored: Text) -> tuple[Tensor, Tensor]:
        """Take the tokens of the concepts' prompts and of the anchors', row by row: (n, d) each."""
        if self.positions == "last":
            return last_tokens(erased), last_tokens(anchored)
        target, anchor = (text.embeddings.double().cpu().flatten(0, 1) for text in (erased, anchored))
        differs = (target != anchor).any(1)  # the start token does not, nor do beginnings in common
        return target[differs], anchor[differs]

    def _retained(
        self, weight: Tensor, target: Tensor, anchor: Tensor, kept: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Select the retained embeddings that matter to a layer, and random copies of them: (m, d)."""

        def select(rows: Tensor) -> Tensor:
            return rows[influential(weight, target, anchor, rows)] if self.influence_filter else rows

        chosen = select(kept)
        if not self.augmentations:
            return chosen
        # Along the direction that the layer sees least, a copy has nearly the same value.
        least = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, 0]
        size = (len(chosen), self.augmentations, 1)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        return torch.cat([chosen, select((chosen[:, None] + noise * least).flatten(0, 1))])


def influential(weight: Tensor, target: Tensor, anchor: Tensor, rows: Tensor) -> Tensor:
    """Find the rows that an unconstrained edit of a layer moves at least as far as the mean row.

    Δ = W (C*C₁ᵀ − C₁C₁ᵀ)(I + C₁C₁ᵀ)⁻¹, and a row c₀ counts where ‖Δ c₀‖ is at least the mean.

    Args:
        weight: W, (out, d).
        target: C₁, (n, d), a row a token.
        anchor: C*, (n, d).
        rows: (m, d).

    Returns:
        (m,), bool.
    """
    eye = torch.eye(target.shape[1], dtype=torch.float64)
    # With I, not s I, as published: which rows are retained does not depend on the penalty.
    change = weight @ (anchor - target).T @ torch.linalg.solve(eye + target.T @ target, target.T).T
    moved = (rows @ change.T).norm(dim=1)
    return moved >= moved.mean()


def null_space_change(
    target: Tensor, retained: Tensor, fixed: Tensor, threshold: float, penalty: float, slack: float
) -> Tensor:
    """Compute N − N C₂ (C₂ᵀ N C₂ + λ I)⁻¹ C₂ᵀ N with N = P (C₁C₁ᵀ P + s I)⁻¹: (d, d), symmetric.

    Args:
        target: C₁, (n, d), a row a token.
        retained: C₀, (m, d).
        fixed: C₂, (k, d).
        threshold: eigenvalues of C₀C₀ᵀ below it span the null space.
        penalty: s.
        slack: λ.

    Raises:
        ExpungeError: the retained embeddings leave no direction free.
    """
    values, vectors = torch.linalg.eigh(retained.T @ retained)
    free = vectors[:, values < threshold]
    if not free.shape[1]:
        raise ExpungeError(
            f"what is retained leaves SPEED no direction below its threshold of {threshold:g};"
            f" raise it above {float(values[0]):.2g}, or retain less"
        )
    inside = target @ free
    eye = torch.eye(free.shape[1], dtype=torch.float64)
    # In the basis of P the system is symmetric and has as many unknowns as free directions.
    n = free @ torch.linalg.solve(inside.T @ inside + penalty * eye, free.T)
    held = n @ fixed.T
    inner = fixed @ held + slack * torch.eye(len(fixed), dtype=torch.float64)
    # Where C₂ lies in the retained span, the inner matrix is zero; its pseudo-inverse leaves N as it is.
    return n - held @ torch.linalg.pinv(inner, atol=1e-12, rtol=1e-9, hermitian=True) @ held.T


def invariants(empty: Tensor, generator: torch.Generator, centres: int = 3) -> Tensor:
    """Find the start token and the centres of the empty prompt's other tokens: (1 + centres, d).

    Args:
        empty: the empty prompt's embeddings, (tokens, d).
        generator: chooses the first centres of k-means.
        centres: how many, at most as many as other tokens differ.
    """
    rest = empty[1:]
    # Equal tokens, such as padding that is zeroed, would give centres that are equal, too.
    distinct = torch.unique(rest, dim=0)
    k = min(centres, len(distinct))
    if not k:
        return empty[:1]
    means = distinct[torch.randperm(len(distinct), generator=generator)[:k]]
    for _ in range(20):
        # A centre without tokens stays where it is.
        nearest = torch.cdist(rest, means).argmin(1)
        means = torch.stack([
            rest[nearest == i].mean(0) if (nearest == i).any() else means[i] for i in range(k)
        ])  # fmt: skip
    return torch.cat([empty[:1], means])
