"""Several edits of one model as one: laid side by side, or fused where they touch the same weights."""

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
from expunge.base.quiet import Progress, quiet
from expunge.changes import Change, Dense, HookedChange, LowRank, Right, WeightChange, check_numbers
from expunge.checkpoints.export import by_place, weights
from expunge.checkpoints.lora import Place, composed
from expunge.edit import Edit, Record
from expunge.erasing.caption_gram import compute_prior, read_captions
from expunge.erasing.prompt_templates import assemble_prompts
from expunge.erasure import versions
from expunge.fingerprint import base, base_hash, places
from expunge.model import Model
from expunge.ops.least_squares import gram, pad_right_factor, solve_fusion
from expunge.ops.low_rank import balance
from expunge.problem import Problem, key
from expunge.runtime.context import RunContext


@dataclass(frozen=True, eq=False)
class Rows:
    """What a kind of layer is given: by each edit's erased prompts, and by what is to stay."""

    erased: tuple[Tensor, ...]
    """Gᵢ = Σ e eᵀ over the prompts of edit i, each concept's as a mean over its prompts: (d, d)."""
    kept: Tensor
    """P, (d, d), of the same over captions and retained prompts."""


def merge(
    model: Model,
    edits: Sequence[Edit],
    *,
    ridge: float = 1.0,
    prior_scale: float = 0.1,
    progress: Progress = quiet,
) -> Edit:
    """One edit that erases what several do.

    Where no two change the same weight, their changes lie side by side. A layer through which text
    enters, changed by several, becomes the one weight that answers for each on its own prompts:

        min_W*  Σᵢ Σ_{e of edit i} ‖W* e − Wᵢ e‖² + ρ E_kept ‖(W* − W) e‖² + λ ‖W* − W‖²
        W* = W + Σᵢ (Wᵢ − W) Gᵢ K,     K = (Σᵢ Gᵢ + ρ P + λ I)⁻¹

    Gates are kept as they are, one behind the other.

    Args:
        model: the model that all of them are for.
        edits: two or more.
        ridge: λ, above 0, in units of a squared embedding.
        prior_scale: ρ, at least 0, the weight of a mean caption and of each retained prompt.
        progress: told what is done.

    Raises:
        ExpungeError: fewer than two; two are the same; two turn one concept to different anchors; one
            does not fit the model; two change the same weight where no text enters; λ or ρ is out of
            range.

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
        check_numbers(edit.changes, f"edit {number} of those to merge")
        if not edit.fits(model):
            warnings.warn(
                f"an edit was made from other weights ({edit.record.model or 'unnamed'})",
                ExpungeWarning,
                stacklevel=2,
            )
    fixed = [
        weights(tuple(c for c in edit.changes if not isinstance(c, HookedChange))) for edit in edits
    ]
    placed = [by_place(some) for some in fixed]
    shared = {place for some in placed for place in some if sum(place in other for other in placed) > 1}
    problem = joined([edit.record.problem for edit in edits])
    changes: list[Change] = [change for some in fixed for change in _without(some, shared)]
    for entries, pooled in ((model.text_entries(), False), (model.pooled_entries(), True)):
        layers = [entry.layer for entry in entries if (entry.layer, "weight") in shared]
        shared -= {(layer, "weight") for layer in layers}
        if layers:
            rows = _rows(model, [edit.record.problem for edit in edits], pooled, progress)
            changes += _fused(model, layers, placed, rows, ridge, prior_scale)
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
        base=base_hash(base(model), places(changes)),
        seed=0,
        seconds=round(time.monotonic() - start, 3),
        versions=versions(),
        family=type(model).__name__,
    )
    return Edit(tuple(changes), record)


def _check_anchors(edits: Sequence[Edit]) -> None:
    """Check that no concept is turned to two anchors: fused, its weights would lie between the two.

    Raises:
        ExpungeError: one is.
    """
    anchors: dict[str, str | None] = {}
    for edit in edits:
        if not edit.record.reads_anchor:
            continue
        for concept in edit.record.problem.erase:
            for name in concept.names:
                first, second = anchors.setdefault(key(name), concept.anchor), concept.anchor
                if key(first or "") != key(second or ""):
                    one, other = (
                        repr(x) if x else "what the empty prompt draws" for x in (first, second)
                    )
                    raise ExpungeError(
                        f"{name!r} becomes {one} in one of the edits to merge and {other} in another:"
                        " merged, it would become neither: erase it in one of them alone"
                    )


def joined(problems: Sequence[Problem]) -> Problem:
    """Everything that several problems erase, and what they retain of the rest."""
    concepts, seen = [], set[str]()
    for concept in (concept for problem in problems for concept in problem.erase):
        names = tuple(name for name in concept.names if key(name) not in seen)
        seen |= set(map(key, names))
        if names:
            concepts.append(dataclasses.replace(concept, name=names[0], synonyms=names[1:]))
    retained = dict.fromkeys(text for problem in problems for text in problem.retain)
    lost = [text for text in retained if key(text) in seen]
    if lost:
        warnings.warn(
            f"one edit retains what another erases, and it will be erased: {', '.join(lost)}",
            ExpungeWarning,
            stacklevel=3,
        )
    return Problem(tuple(concepts), tuple(text for text in retained if text not in lost))


def _without(changes: Sequence[WeightChange], shared: set[Place]) -> list[WeightChange]:
    """The changes, less the layers that several edits change."""
    found = []
    for change in changes:
        layers = tuple(layer for layer in change.layers if (layer, change.parameter) not in shared)
        if layers:
            found.append(dataclasses.replace(change, layers=layers))
    return found


def _rows(model: Model, problems: Sequence[Problem], pooled: bool, progress: Progress) -> Rows:
    def total(prompts: Sequence[str]) -> Tensor:
        text = model.encode(prompts)
        rows = text.pooled if pooled else text.embeddings.flatten(0, 1)
        if rows is None:
            raise TypeError("a pooled vector is expected of every text, and this model has none")
        return gram(rows.cpu()) / len(prompts)

    erased = []
    for problem in problems:
        sums = [total(assemble_prompts(concept)) for concept in problem.erase]
        erased.append(torch.stack(sums).sum(0))
    retained = [text for problem in problems for text in problem.retain]
    kept = total(["", *retained])
    if pooled:
        some = read_captions("general")[:500]
        kept = kept + total(some)
    else:
        kept = kept + compute_prior(model, read_captions("general"), RunContext(progress=progress)).mean
    return Rows(tuple(erased), kept)


def _fused(
    model: Model,
    layers: Sequence[str],
    placed: Sequence[Mapping[Place, Sequence[WeightChange]]],
    rows: Rows,
    ridge: float,
    prior_scale: float,
) -> list[Change]:
    """The fused changes of layers that are given the same rows."""
    whole = torch.stack(rows.erased).sum(0)
    eye = torch.eye(len(whole), dtype=torch.float64)
    parts = torch.cat([*rows.erased])
    # With M the identity, `solve_fusion` gives Gᵢ K for whatever is stacked: W + Σ (Wᵢ − W) Gᵢ K.
    _, solved = solve_fusion(eye, whole, prior_scale * rows.kept, ridge, parts)
    reach = solved.split(len(whole))
    changes: list[Change] = []
    alike: dict[tuple[int, ...], list[str]] = {}
    matrices: dict[tuple[int, ...], Tensor] = {}
    for layer in layers:
        some = [each.get((layer, "weight"), ()) for each in placed]
        if not all(isinstance(change, (Right, LowRank)) for each in some for change in each):
            changes.append(_dense(model, layer, some, reach))
            continue
        inputs = model.weight(layer).shape[1]
        rights = tuple(id(change) for each in some for change in each if isinstance(change, Right))
        total, ups, downs = torch.eye(inputs, dtype=torch.float64), [], []
        for each, k in zip(some, reach, strict=True):
            k = _reaching(k, inputs)
            right, up, down = composed(each, inputs)
            total = total + (right - torch.eye(inputs, dtype=torch.float64)) @ k
            if len(down):
                ups.append(up)
                downs.append(down @ k)
        if rights:
            alike.setdefault(rights, []).append(layer)
            matrices[rights] = total
        if ups:
            factors = balance(torch.cat(ups, 1), torch.cat(downs))
            changes.append(LowRank((layer,), *(factor.float() for factor in factors)))
    shared = [Right(tuple(some), matrices[rights].float()) for rights, some in alike.items()]
    return [*shared, *changes]


def _dense(
    model: Model, layer: str, changes: Sequence[Sequence[WeightChange]], reach: Sequence[Tensor]
) -> Dense:
    original = model.weight(layer).cpu().double()
    total = original.clone()
    for some, k in zip(changes, reach, strict=True):
        after: Any = original
        for change in some:
            after = change.weight(after)
        total += (after - original) @ _reaching(k, original.shape[1])
    return Dense((layer,), total.to(model.weight(layer).dtype))


def _reaching(k: Tensor, inputs: int) -> Tensor:
    """Gᵢ K for a layer that is given something else behind the text: that stays as each edit has it."""
    return pad_right_factor(k, inputs)
