"""Fit static weights to changes that depend on the token they meet."""

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

POOLED_CAPTIONS = 500
"""The number of captions whose pooled vectors are retained."""


@dataclass(frozen=True, eq=False)
class LinearFit:
    """Changes that are static weights, and what was lost by fitting them."""

    changes: Changes
    """The fitted changes, and those that were weights before."""
    lost: float
    """Σ ‖W* e − W̃ e‖² / Σ ‖W̃ e − W e‖² over the erased prompts: 0 where the weights do all that the
    gates did, 1 where they do nothing."""
    moved: float
    """Σ ‖W* e − W e‖² / Σ ‖W e‖² over the retained prompts, which the gates leave alone."""

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
    """Fit static weights to changes of which some are gated; those that are weights stay as they are.

        min_W*  Σ_erased ‖W* e − W̃ e‖² + λ₂ (E_captions + E_retained) ‖W* e − W e‖² + λ ‖W* − W‖²

    where W̃ e = W (e + what the gates add). The solution is W* = W M, with one matrix M for all layers
    that the same gates stand before. The sums run over all tokens e of the concepts' prompts, averaged
    over each concept's prompts. A gate is not linear; `lost` and `moved` measure the difference.

    For layers that read the pooled vector of a prompt, e runs over pooled vectors, and λ is scaled to
    their size.

    Args:
        model: the model that the changes are for, without them.
        changes: the changes of an edit.
        problem: what the edit erases and retains.
        ridge: λ, above 0, in units of a squared embedding.
        prior_scale: λ₂ of the mean over general captions, at least 0.
        retain_scale: λ₂ of the mean over the retained prompts, at least 0.
        captions_from: the captions, as `caption_gram.read_captions` takes them; "" for none.

    Raises:
        ExpungeError: a change scales the layer's output, which no weight on the input can do; or the
            fit is singular.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 7, applied to the gates' outputs.
    """
    for change in changes:
        if isinstance(change, HookedChange) and change.unfittable:
            raise ExpungeError(f"a {change.kind} change {change.unfittable}")
    fitted: list[Change] = [change for change in changes if not isinstance(change, HookedChange)]
    gates = [change for change in changes if isinstance(change, InputChange)]
    if not gates:
        return LinearFit(tuple(fitted), 0.0, 0.0)
    # The name alone and in a sentence: a token's embedding depends on those before it.
    templates = ["{}", *(KEPT[concept.kind] for concept in problem.erase)]
    retained_prompts = assemble_retained_prompts(problem.retain, list(dict.fromkeys(templates)))
    retained = model.encode(["", *retained_prompts])
    groups = _group_layers(gates)
    pooled_layers = {entry.layer for entry in model.pooled_entries()}
    sums = {layers: _Sums() for layers in groups}
    for concept in problem.erase:  # one after the other: the text of all does not fit in memory
        text = model.encode(_list_prompts(problem, concept.name))
        for layers, stack in groups.items():
            e = _select_rows(text, pooled_layers.issuperset(layers)).double()
            inputs = model.weight(layers[0]).shape[1]
            sums[layers].add(e, _apply_stack(stack, e, inputs))
    tokens = [one.input.trace() for layers, one in sums.items() if not pooled_layers & set(layers)]
    lost, moved = [], []
    for layers, one in sums.items():
        pooled = pooled_layers.issuperset(layers)
        retained_sum = gram(_select_rows(retained, pooled).flatten(0, 1)).cpu()
        penalty = retain_scale * retained_sum / len(retained)
        if captions_from and prior_scale:
            texts = read_captions(captions_from)
            if pooled:
                some = _select_rows(model.encode(texts[:POOLED_CAPTIONS]), pooled)
                penalty = penalty + prior_scale * gram(some.flatten(0, 1)).cpu() / len(some)
            else:
                penalty = penalty + prior_scale * compute_prior(model, texts).mean
        # A prompt has one pooled vector and many tokens: the same λ would weigh more on it.
        share = float(one.input.trace() / torch.stack(tokens).mean()) if pooled and tokens else 1.0
        matrix = solve_right_factor(one.cross, one.input, penalty, share * ridge)
        eye = torch.eye(len(matrix), dtype=matrix.dtype)
        missed, wanted = one.measure_miss(matrix), one.measure_miss(eye)
        # Moments suffice for both figures, so that no prompt is encoded twice.
        drift = (matrix - eye) @ retained_sum @ (matrix - eye).T
        # Inputs behind the text, such as SDXL's image size, pass unchanged.
        fitted.append(Right(layers, pad_right_factor(matrix.float(), model.weight(layers[0]).shape[1])))
        for layer in layers:
            w = model.weight(layer).cpu().double()[:, : len(matrix)]
            lost.append(_sum_squares(w, missed) / _sum_squares(w, wanted))
            moved.append(_sum_squares(w, drift) / _sum_squares(w, retained_sum))
    return LinearFit(tuple(fitted), *(float(torch.stack(x).mean()) for x in (lost, moved)))


@dataclass(eq=False)
class _Sums:
    """Sums over all tokens of the concepts' prompts, averaged over each concept's prompts: (d, d)."""

    input: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ e eᵀ"""
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ t eᵀ, where t is the gates' output for e."""
    target: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Σ t tᵀ"""

    def add(self, e: Tensor, t: Tensor) -> None:
        """Add one concept's e and t, (prompts, tokens, d)."""
        n, e, t = len(e), e.flatten(0, 1), t.flatten(0, 1)
        self.input = self.input + gram(e).cpu() / n
        self.cross = self.cross + outer(t, e).cpu() / n
        self.target = self.target + gram(t).cpu() / n

    def measure_miss(self, matrix: Tensor) -> Tensor:
        """Σ (M e − t) (M e − t)ᵀ, expanded so that no token is needed again."""
        mixed = matrix @ self.cross.T
        return matrix @ self.input @ matrix.T - mixed - mixed.T + self.target


def _list_prompts(problem: Problem, name: str) -> list[str]:
    concept = next(c for c in problem.erase if c.name == name)
    return assemble_prompts(concept)


def _group_layers(gates: Sequence[InputChange]) -> dict[tuple[str, ...], list[InputChange]]:
    """Layers with the same changes before them, and those changes in order."""
    before: dict[str, list[InputChange]] = {}
    for change in gates:
        for layer in change.layers:
            before.setdefault(layer, []).append(change)
    groups: dict[tuple[int, ...], list[str]] = {}
    for layer, stack in before.items():
        # By identity: equal tensors of two edits are still two changes.
        groups.setdefault(tuple(map(id, stack)), []).append(layer)
    return {tuple(layers): before[layers[0]] for layers in groups.values()}


def _select_rows(text: Text, pooled: bool) -> Tensor:
    """The tokens of a text, (n, tokens, d), or the pooled vectors of its prompts, (n, 1, d)."""
    if not pooled:
        return text.embeddings
    if text.pooled is None:
        raise TypeError("text with a pooled vector is expected, not without")
    return text.pooled[:, None]


def _apply_stack(stack: Sequence[InputChange], e: Tensor, inputs: int) -> Tensor:
    """The output of a stack of changes for rows that are the first of a layer's inputs."""
    for change in stack:
        e = apply_to_vectors(change, e, inputs)
    return e


def _sum_squares(weight: Tensor, moments: Tensor) -> Tensor:
    """Σ ‖W x‖², from Σ x xᵀ."""
    return ((weight @ moments) * weight).sum()
