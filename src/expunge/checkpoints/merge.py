"""Merge several edits of a model into one: side by side, or fused where they change the same weights."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import Change, Dense, HookedChange, LowRank, Right, WeightChange, require_finite
from expunge.checkpoints.weight_changes import (
    Place,
    compose_linear,
    group_by_place,
    require_weights,
)
from expunge.edit import Edit, Record, read_versions
from expunge.erasing.caption_gram import compute_prior, read_captions
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.fingerprint import hash_base, list_places, make_base_reader
from expunge.model import Model
from expunge.ops.least_squares import gram, pad_right_factor, solve_fusion
from expunge.ops.low_rank import balance
from expunge.problem import Problem, normalize_name
from expunge.runtime.context import RunContext

POOLED_CAPTIONS = 500
"""The number of captions whose pooled vectors are retained."""


@dataclass(frozen=True, eq=False)
class EditMoments:
    """Second moments of the input e of layers that all receive the same text."""

    erased: tuple[Tensor, ...]
    """Gᵢ = Σ e eᵀ over the prompts of edit i, averaged over each concept's prompts: (d, d)."""
    retained: Tensor
    """P, (d, d), the same averaged over captions, plus that averaged over retained prompts."""


def merge(
    model: Model,
    edits: Sequence[Edit],
    *,
    ridge: float = 1.0,
    prior_scale: float = 0.1,
    progress: Progress = ignore_progress,
) -> Edit:
    """Merge edits into one that erases what all of them erase.

    Where no two edits change the same weight, their changes are put side by side. A text layer that
    several edits change gets the one weight that does on each edit's prompts what that edit does:

        min_W*  Σᵢ Σ_{e of edit i} ‖W* e − Wᵢ e‖² + ρ E_retained ‖(W* − W) e‖² + λ ‖W* − W‖²
        W* = W + Σᵢ (Wᵢ − W) Gᵢ K,     K = (Σᵢ Gᵢ + ρ P + λ I)⁻¹

    Gates are kept as they are, one after the other.

    Args:
        model: the model that all edits are for.
        edits: two edits or more.
        ridge: λ, above 0, in units of a squared embedding.
        prior_scale: ρ, at least 0, the weight of a mean caption and of a mean retained prompt.
        progress: called with a label, the number of steps done, and their total.

    Raises:
        ExpungeError: there are fewer than two edits, or two equal ones; two give one concept different
            anchors; an edit does not fit the model; two change the same weight where no text enters; λ
            or ρ is out of range.

    Source: the fusion of MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 7.
    """
    if len(edits) < 2:
        raise ExpungeError("merging takes two edits or more")
    if len({edit.hash for edit in edits}) < len(edits):
        raise ExpungeError("two of the edits to merge are the same one")
    if not 0 < ridge < float("inf") or not 0 <= prior_scale < float("inf"):
        raise ExpungeError(
            f"ridge must be above 0 and prior_scale at least 0, and both finite,"
            f" not {ridge}, {prior_scale}"
        )
    _check_anchors(edits)
    start = time.monotonic()
    for number, edit in enumerate(edits, 1):
        require_finite(edit.changes, f"edit {number} of those to merge")
        if not edit.fits(model):
            warnings.warn(
                f"an edit was made from other weights ({edit.record.model or 'unnamed'})",
                ExpungeWarning,
                stacklevel=2,
            )
    # Gates look at the layer's input and add nothing to its weight, so that they need no fusing.
    static = [
        require_weights(tuple(c for c in edit.changes if not isinstance(c, HookedChange)))
        for edit in edits
    ]
    by_place = [group_by_place(some) for some in static]
    shared = {
        place for some in by_place for place in some if sum(place in other for other in by_place) > 1
    }
    problem = join_problems([edit.record.problem for edit in edits])
    changes: list[Change] = [change for some in static for change in _drop_places(some, shared)]
    for entries, pooled in ((model.text_entries(), False), (model.pooled_entries(), True)):
        layers = [entry.layer for entry in entries if (entry.layer, "weight") in shared]
        shared -= {(layer, "weight") for layer in layers}
        if layers:
            problems = [edit.record.problem for edit in edits]
            moments = _read_moments(model, problems, pooled, progress)
            changes += _fuse(model, layers, by_place, moments, ridge, prior_scale)
    # Elsewhere it is not known what a layer receives, and a fit needs to know it.
    if shared:
        layer, parameter = min(shared)
        raise ExpungeError(
            f"{len(shared)} of the weights that several edits change are none through which text enters"
            f" ({layer}.{parameter}), and only those can be fused: erase the concepts together instead"
        )
    changes += [c for edit in edits for c in edit.changes if isinstance(c, HookedChange)]
    record = Record(
        method="merge",
        fields={"ridge": ridge, "prior_scale": prior_scale, "of": [edit.hash for edit in edits]},
        problem=problem,
        model=edits[0].record.model,
        base=hash_base(make_base_reader(model), list_places(changes)),
        seed=0,
        seconds=round(time.monotonic() - start, 3),
        versions=read_versions(),
        family=type(model).__name__,
    )
    return Edit(tuple(changes), record)


def join_problems(problems: Sequence[Problem]) -> Problem:
    """Join problems into one that erases all they erase, and retains the rest of what they retain."""
    concepts, seen = [], set[str]()
    for concept in (concept for problem in problems for concept in problem.erase):
        # A name that an earlier edit erases keeps that edit's kind and anchor.
        names = tuple(name for name in concept.names if normalize_name(name) not in seen)
        seen |= set(map(normalize_name, names))
        if names:
            concepts.append(dataclasses.replace(concept, name=names[0], synonyms=names[1:]))
    retained = dict.fromkeys(text for problem in problems for text in problem.retain)
    lost = [text for text in retained if normalize_name(text) in seen]
    if lost:
        warnings.warn(
            f"one edit retains what another erases, and it will be erased: {', '.join(lost)}",
            ExpungeWarning,
            stacklevel=3,
        )
    return Problem(tuple(concepts), tuple(text for text in retained if text not in lost))


def _check_anchors(edits: Sequence[Edit]) -> None:
    """Check that no concept has two anchors: its fused weights would lie between the two.

    Raises:
        ExpungeError: one has.
    """
    anchors: dict[str, str | None] = {}
    for edit in edits:
        if not edit.record.reads_anchor:
            continue
        for concept in edit.record.problem.erase:
            for name in concept.names:
                first, second = anchors.setdefault(normalize_name(name), concept.anchor), concept.anchor
                if normalize_name(first or "") != normalize_name(second or ""):
                    one, other = (
                        repr(x) if x else "what the empty prompt draws" for x in (first, second)
                    )
                    raise ExpungeError(
                        f"{name!r} becomes {one} in one of the edits to merge and {other} in another:"
                        " merged, it would become neither: erase it in one of them alone"
                    )


def _drop_places(changes: Sequence[WeightChange], shared: set[Place]) -> list[WeightChange]:
    """The changes without the layers whose parameters several edits change."""
    found = []
    for change in changes:
        layers = tuple(layer for layer in change.layers if (layer, change.parameter) not in shared)
        if layers:
            found.append(dataclasses.replace(change, layers=layers))
    return found


def _read_moments(
    model: Model, problems: Sequence[Problem], pooled: bool, progress: Progress
) -> EditMoments:
    """The second moments of tokens, or of pooled vectors."""

    def average(prompts: Sequence[str]) -> Tensor:
        text = model.encode(prompts)
        rows = text.pooled if pooled else text.embeddings.flatten(0, 1)
        if rows is None:
            raise TypeError("a pooled vector is expected of every text, and this model has none")
        return gram(rows.cpu()) / len(prompts)

    erased = []
    for problem in problems:
        sums = [
            average(
                [template.format(name) for name in concept.names for template in TEMPLATES[concept.kind]]
            )
            for concept in problem.erase
        ]
        # Each concept counts once, however many synonyms and templates it has.
        erased.append(torch.stack(sums).sum(0))
    retained = average(["", *(text for problem in problems for text in problem.retain)])
    if pooled:
        retained = retained + average(read_captions("general")[:POOLED_CAPTIONS])
    else:
        retained = (
            retained + compute_prior(model, read_captions("general"), RunContext(progress=progress)).mean
        )
    return EditMoments(tuple(erased), retained)


def _fuse(
    model: Model,
    layers: Sequence[str],
    by_place: Sequence[Mapping[Place, Sequence[WeightChange]]],
    moments: EditMoments,
    ridge: float,
    prior_scale: float,
) -> list[Change]:
    """The fused changes of layers that receive the same text.

    Args:
        model: the model.
        layers: the layers.
        by_place: the changes of each edit, by parameter.
        moments: the second moments of the layers' input.
        ridge: λ.
        prior_scale: ρ.
    """
    # One solution for all layers: K depends on the text alone, and W enters only as (Wᵢ − W) Gᵢ K.
    whole = torch.stack(moments.erased).sum(0)
    eye = torch.eye(len(whole), dtype=torch.float64)
    # With M the identity, `solve_fusion` gives Gᵢ K for whatever is stacked: W + Σ (Wᵢ − W) Gᵢ K.
    stacked = torch.cat([*moments.erased])
    _, solved = solve_fusion(eye, whole, prior_scale * moments.retained, ridge, stacked)
    reach = solved.split(len(whole))
    changes: list[Change] = []
    groups: dict[tuple[int, ...], list[str]] = {}
    matrices: dict[tuple[int, ...], Tensor] = {}
    for layer in layers:
        some = [each.get((layer, "weight"), ()) for each in by_place]
        if not all(isinstance(change, (Right, LowRank)) for each in some for change in each):
            changes.append(_fuse_dense(model, layer, some, reach))
            continue
        inputs = model.weight(layer).shape[1]
        # Layers with the same `Right` changes share one matrix, as the edits' own layers do.
        rights = tuple(id(change) for each in some for change in each if isinstance(change, Right))
        total, ups, downs = torch.eye(inputs, dtype=torch.float64), [], []
        for each, k in zip(some, reach, strict=True):
            k = pad_right_factor(k, inputs)
            right, up, down = compose_linear(each, inputs)
            total = total + (right - torch.eye(inputs, dtype=torch.float64)) @ k
            if len(down):
                ups.append(up)
                downs.append(down @ k)
        if rights:
            groups.setdefault(rights, []).append(layer)
            matrices[rights] = total
        if ups:
            # Side by side the edits' factors are one product; balanced, float32 keeps most of it.
            factors = balance(torch.cat(ups, 1), torch.cat(downs))
            changes.append(LowRank((layer,), *(factor.float() for factor in factors)))
    shared = [Right(tuple(some), matrices[rights].float()) for rights, some in groups.items()]
    return [*shared, *changes]


def _fuse_dense(
    model: Model, layer: str, changes: Sequence[Sequence[WeightChange]], reach: Sequence[Tensor]
) -> Dense:
    """The fused weight of a layer of which some change is no linear map of W.

    Args:
        model: the model.
        layer: the layer.
        changes: the changes of each edit.
        reach: Gᵢ K of each edit, (d, d).
    """
    # float64 throughout: differences of nearly equal weights are summed.
    original = model.weight(layer).cpu().double()
    total = original.clone()
    for some, k in zip(changes, reach, strict=True):
        after: Any = original
        for change in some:
            after = change.weight(after)
        # Other inputs behind the text stay as each edit has them.
        total += (after - original) @ pad_right_factor(k, original.shape[1])
    return Dense((layer,), total.to(model.weight(layer).dtype))
