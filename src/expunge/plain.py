"""Plain weights: the nearest weights to changes that are switched by the token they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.changes import Change, Changes, HookedChange, InputChange, Right
from expunge.errors import ExpungeError
from expunge.model import Model
from expunge.ops.least_squares import gram, outer, right_factor
from expunge.prior import captions, prior
from expunge.problem import Problem
from expunge.templates import TEMPLATES

RETAINED = ("{}", "a photo of the {}")


@dataclass(frozen=True, eq=False)
class Plain:
    """Changes that are weights, and what was lost on the way."""

    changes: Changes
    lost: float
    """Σ ‖W* e − W̃ e‖² over what the switched changes do, Σ ‖W̃ e − W e‖², on the erased prompts: 0 where
    the weights do all of it, 1 where they do nothing."""
    moved: float
    """Σ ‖W* e − W e‖² over Σ ‖W e‖² on the retained prompts, which the switched changes leave alone."""

    def __str__(self) -> str:
        return f"{self.lost:.1%} of the erasure is lost; what is retained moves by {self.moved:.2%}"


def plain(
    model: Model,
    changes: Changes,
    problem: Problem,
    *,
    ridge: float = 50.0,
    prior_scale: float = 1.0,
    retain_scale: float = 1.0,
    captions_from: str = "general",
) -> Plain:
    """Fit weights to changes of which some are `Gated`; those that are weights stay as they are.

        min_W*  Σ_erased ‖W* e − W̃ e‖² + λ₂ (E_captions + E_retained) ‖W* e − W e‖² + λ ‖W* − W‖²

    where W̃ e = W (e + what the gates add): so W* = W M, with one matrix M for all layers that the same
    gates stand before. The sums run over all tokens of the concepts' prompts, a concept's as a mean
    over its prompts. A gate is no linear map: `lost` and `moved` say what this costs.

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
        return Plain(tuple(kept), 0.0, 0.0)
    erased = [_prompts(problem, c.name) for c in problem.erase]
    rows = [model.encode(prompts).embeddings.double() for prompts in erased]
    retained = [way.format(name) for name in problem.retain for way in RETAINED]
    stays = model.encode(["", *retained]).embeddings.double()
    held = retain_scale * gram(stays.flatten(0, 1)) / len(stays)
    if captions_from and prior_scale:
        held = held + prior_scale * prior(model, captions(captions_from)).mean.to(held)
    lost, moved = [], []
    for layers, stack in _alike(gates).items():
        target = [_through(stack, e) for e in rows]
        cross = sum((_mean_outer(t, e) for t, e in zip(target, rows, strict=True)), 0 * held)
        whole = sum((_mean_outer(e, e) for e in rows), 0 * held)
        matrix = right_factor(cross, whole, held, ridge)
        kept.append(Right(layers, matrix.float().cpu()))
        for layer in layers:
            w = model.weight(layer).double()
            lost.append(_squares(w, rows, [e @ matrix.T - t for e, t in zip(rows, target, strict=True)]))
            lost[-1] /= _squares(w, rows, [t - e for e, t in zip(rows, target, strict=True)])
            moved.append(
                _squares(w, [stays], [stays @ matrix.T - stays]) / _squares(w, [stays], [stays])
            )
    return Plain(tuple(kept), *(float(torch.stack(x).mean()) for x in (lost, moved)))


def _prompts(problem: Problem, name: str) -> list[str]:
    concept = next(c for c in problem.erase if c.name == name)
    return [template.format(one) for one in concept.names for template in TEMPLATES[concept.kind]]


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


def _through(stack: Sequence[InputChange], e: Tensor) -> Tensor:
    for change in stack:
        e = change.given(e)
    return e


def _mean_outer(left: Tensor, right: Tensor) -> Tensor:
    return outer(left.flatten(0, 1), right.flatten(0, 1)) / len(left)


def _squares(weight: Tensor, like: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Σ ‖W x‖² over all rows, those of each concept as a mean over its prompts."""
    return torch.stack(
        [(x @ weight.T).square().sum() / len(e) for x, e in zip(rows, like, strict=True)]
    ).sum()
