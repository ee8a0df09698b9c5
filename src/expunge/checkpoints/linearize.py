"""Plain weights: the nearest weights to changes that are switched by the token they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Change, Changes, HookedChange, InputChange, Right
from expunge.erasing.caption_gram import compute_prior, read_captions
from expunge.erasing.pooled_gates import apply_to_vectors
from expunge.erasing.prompt_templates import KEPT, assemble_prompts, assemble_retained_prompts
from expunge.model import Model
from expunge.ops.least_squares import gram, outer, pad_right_factor, solve_right_factor
from expunge.problem import Problem
from expunge.text import Text

VECTORS = 500
"""How many captions the vector of a whole prompt is held on."""


@dataclass(frozen=True, eq=False)
class LinearFit:
    """Changes that are weights, and what was lost on the way."""

    changes: Changes
    lost: float
    """Σ ‖W* e − W̃ e‖² over what the switched changes do, Σ ‖W̃ e − W e‖², on the erased prompts: 0 where
    the weights do all of it, 1 where they do nothing."""
    moved: float
    """Σ ‖W* e − W e‖² over Σ ‖W e‖² on the retained prompts, which the switched changes leave alone."""

    def __str__(self) -> str:
        return f"{self.lost:.1%} of the erasure is lost; what is retained moves by {self.moved:.2%}"


def fit_static_weights(
    model: Model,
    changes: Changes,
    problem: Problem,
    *,
    ridge: float = 50.0,
    prior_scale: float = 1.0,
    retain_scale: float = 1.0,
    captions_from: str = "general",
) -> LinearFit:
    """Fit weights to changes of which some are `Gated`; those that are weights stay as they are.

        min_W*  Σ_erased ‖W* e − W̃ e‖² + λ₂ (E_captions + E_retained) ‖W* e − W e‖² + λ ‖W* − W‖²

    where W̃ e = W (e + what the gates add): so W* = W M, with one matrix M for all layers that the same
    gates stand before. The sums run over all tokens of the concepts' prompts, a concept's as a mean
    over its prompts. A gate is no linear map: `lost` and `moved` say what this costs.

    Before layers that read the vector of a whole prompt, e runs over those vectors, and λ is in
    proportion to them.

    Args:
        model: the model that the changes are for, without them.
        changes: an edit's.
        problem: what it erases and retains.
        ridge: λ, above 0, in units of a squared embedding.
        prior_scale: λ₂ for the mean over general captions, at least 0.
        retain_scale: λ₂ for the mean over the retained prompts, at least 0.
        captions_from: the captions, as `prior.captions` takes them; "" for none.

    Raises:
        ExpungeError: a change turns channels down, which no input could do; or the fit is singular.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 7, on what gates answer.
    """
    for change in changes:
        if isinstance(change, HookedChange) and not isinstance(change, InputChange):
            raise ExpungeError(
                f"a {change.kind} change turns channels down, which no input could do, so no weights are"
                " fitted to it: make the edit with reduction 'shared'"
            )
    kept: list[Change] = [change for change in changes if not isinstance(change, HookedChange)]
    gates = [change for change in changes if isinstance(change, InputChange)]
    if not gates:
        return LinearFit(tuple(kept), 0.0, 0.0)
    ways = ["{}", *(KEPT[concept.kind] for concept in problem.erase)]
    retained = assemble_retained_prompts(problem.retain, list(dict.fromkeys(ways)))
    stays = model.encode(["", *retained])
    groups = _alike(gates)
    whole_prompts = {entry.layer for entry in model.pooled_entries()}
    sums = {layers: _Sums() for layers in groups}
    for concept in problem.erase:  # the texts of all of them do not fit in memory
        text = model.encode(_prompts(problem, concept.name))
        for layers, stack in groups.items():
            e = _rows(text, whole_prompts.issuperset(layers)).double()
            inputs = model.weight(layers[0]).shape[1]
            sums[layers].add(e, _through(stack, e, inputs))
    tokens = [found.whole.trace() for layers, found in sums.items() if not whole_prompts & set(layers)]
    lost, moved = [], []
    for layers, found in sums.items():
        vectors = whole_prompts.issuperset(layers)
        kept_whole = gram(_rows(stays, vectors).flatten(0, 1)).cpu()
        held = retain_scale * kept_whole / len(stays)
        if captions_from and prior_scale:
            told = read_captions(captions_from)
            if vectors:
                some = _rows(model.encode(told[:VECTORS]), vectors)
                held = held + prior_scale * gram(some.flatten(0, 1)).cpu() / len(some)
            else:
                held = held + prior_scale * compute_prior(model, told).mean
        # A vector of the whole prompt is one row where its tokens are many.
        share = float(found.whole.trace() / torch.stack(tokens).mean()) if vectors and tokens else 1.0
        matrix = solve_right_factor(found.cross, found.whole, held, share * ridge)
        eye = torch.eye(len(matrix), dtype=matrix.dtype)
        missed, wanted = found.missed_by(matrix), found.missed_by(eye)
        drift = (matrix - eye) @ kept_whole @ (matrix - eye).T
        kept.append(Right(layers, pad_right_factor(matrix.float(), model.weight(layers[0]).shape[1])))
        for layer in layers:
            w = model.weight(layer).cpu().double()[:, : len(matrix)]
            lost.append(_squares(w, missed) / _squares(w, wanted))
            moved.append(_squares(w, drift) / _squares(w, kept_whole))
    return LinearFit(tuple(kept), *(float(torch.stack(x).mean()) for x in (lost, moved)))


@dataclass(eq=False)
class _Sums:
    """Over all tokens of the concepts' prompts, each concept's as a mean over its prompts."""

    whole: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ e eᵀ"""
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ t eᵀ, where t is what the gates make of e."""
    target: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ t tᵀ"""

    def add(self, e: Tensor, t: Tensor) -> None:
        """One concept's e and t, (prompts, tokens, width)."""
        n, e, t = len(e), e.flatten(0, 1), t.flatten(0, 1)
        self.whole = self.whole + gram(e).cpu() / n
        self.cross = self.cross + outer(t, e).cpu() / n
        self.target = self.target + gram(t).cpu() / n

    def missed_by(self, matrix: Tensor) -> Tensor:
        """Σ (M e − t) (M e − t)ᵀ"""
        mixed = matrix @ self.cross.T
        return matrix @ self.whole @ matrix.T - mixed - mixed.T + self.target


def _prompts(problem: Problem, name: str) -> list[str]:
    concept = next(c for c in problem.erase if c.name == name)
    return assemble_prompts(concept)


def _alike(gates: Sequence[InputChange]) -> dict[tuple[str, ...], list[InputChange]]:
    """Layers that the same changes stand before, with those changes in order."""
    before: dict[str, list[InputChange]] = {}
    for change in gates:
        for layer in change.layers:
            before.setdefault(layer, []).append(change)
    groups: dict[tuple[int, ...], list[str]] = {}
    for layer, stack in before.items():
        groups.setdefault(tuple(map(id, stack)), []).append(layer)
    return {tuple(layers): before[layers[0]] for layers in groups.values()}


def _rows(text: Text, vectors: bool) -> Tensor:
    """The tokens of a text, (n, tokens, width), or the vectors of its prompts, (n, 1, width)."""
    if not vectors:
        return text.embeddings
    if text.pooled is None:
        raise TypeError("text with a vector of the whole prompt is expected, not without")
    return text.pooled[:, None]


def _through(stack: Sequence[InputChange], e: Tensor, inputs: int) -> Tensor:
    """What a stack of changes makes of rows that are the first of a layer's inputs."""
    for change in stack:
        e = apply_to_vectors(change, e, inputs)
    return e


def _squares(weight: Tensor, sums: Tensor) -> Tensor:
    """Σ ‖W x‖², from Σ x xᵀ."""
    return ((weight @ sums) * weight).sum()
