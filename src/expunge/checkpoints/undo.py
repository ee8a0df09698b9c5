"""An erased model as it was before: what a model on the disk has lost is put back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import HookedChange, LowRank, Right, Sparse, WeightChange
from expunge.checkpoints.checkpoint import Checkpoint, Erased
from expunge.checkpoints.export import by_place, weights
from expunge.checkpoints.lora import Place
from expunge.checkpoints.safetensors_io import Change, Stored
from expunge.edit import Edit
from expunge.fingerprint import is_same_base

LARGEST_CONDITION = 1e6
"""Beyond this, a matrix that was multiplied onto float32 weights cannot be divided out again."""


def undo(
    model: str | Path | Checkpoint,
    output: str | Path,
    *,
    original: str | Path | Checkpoint | None = None,
    edit: Edit | None = None,
) -> Erased:
    """Write an erased model to `output` as it was before its last erasure.

    From the original, the changed tensors are copied back bit for bit. Without it, the edit is taken
    off by arithmetic: W = (W' − B D) M⁻¹, right but for rounding; an edit that put dense weights in
    place cannot be taken off so.

    Args:
        model: what we wrote, a folder or a single file; it is never written to.
        output: a new folder, or a file.
        original: the model that it was made from.
        edit: the edit that was laid on it.

    Returns:
        what was undone.

    Raises:
        ExpungeError: the model says of no erasure, the original or the edit is not the one it was made
            from, the edit cannot be taken off, or `output` cannot be written.
    """
    erased_model = model if isinstance(model, Checkpoint) else Checkpoint.find(model)
    history = erased_model.erased()
    if not history:
        raise ExpungeError(f"{erased_model.path} says of no erasure; there is nothing to undo")
    last = history[-1]
    of_variants: dict[str, dict[Place, Change]] = {}
    back: Mapping[Place, Change]
    if original is not None:
        source = original if isinstance(original, Checkpoint) else Checkpoint.find(original)
        back = _from_original(source, last)
        of_variants = _of_variants(erased_model, source, last)
    elif edit is not None:
        back = _by_arithmetic(edit, last)
    else:
        raise ExpungeError(
            "undoing takes the original model, or the edit: name one of them (--original or --edit)"
        )
    names = ", ".join(concept.name for concept in last.record.problem.erase)
    text = f"# {erased_model.name}, with {names} again\n\nWritten by `expunge undo`.\n"
    erased_model.copy(output, back, history[:-1], {"README.md": text}, of_variants)
    return last


def _from_original(source: Checkpoint, last: Erased) -> dict[Place, Change]:
    """The original's tensors in place of what is there."""
    if last.record.family not in ("", source.family.__name__):
        raise ExpungeError(
            f"{source.name} is {source.family.__name__}, and what was erased was {last.record.family}"
        )
    if not is_same_base(source.read, last.places, last.record.base):
        raise ExpungeError(
            f"{source.name} has other weights than the model that was erased; it cannot be put back"
        )

    return {place: partial(_copied, source=source, place=place, variant=None) for place in last.places}


def _of_variants(
    erased_model: Checkpoint, source: Checkpoint, last: Erased
) -> dict[str, dict[Place, Change]]:
    """For each variant of the erased weights what the original's same variant has.

    Raises:
        ExpungeError: the original has not all of the variants that are to be put back.
    """
    found: dict[str, dict[Place, Change]] = {}
    for place in last.places:
        there, ours = erased_model.by_variant(*place), source.by_variant(*place)
        for variant in there:
            if variant in ours:
                back = partial(_copied, source=source, place=place, variant=variant)
                found.setdefault(variant, {})[place] = back
            elif len(there) > 1:
                raise ExpungeError(
                    f"{source.name} has no {variant or 'plain'} weights of {place[0]}, which"
                    f" {erased_model.name} has: give the original that has them, or the edit"
                )
    return found


def _copied(there: Tensor, source: Checkpoint, place: Place, variant: str | None) -> Tensor | Stored:
    """The original's tensor in place of another: bit for bit where both are stored alike."""
    stored = source.stored(*place, variant)
    if stored.scale is not None or stored.value.dtype == there.dtype:
        return stored
    return stored.value.to(there.dtype)


def _by_arithmetic(edit: Edit, last: Erased) -> dict[Place, Change]:
    """The inverse of every change, the last first."""
    if edit.hash != last.edit:
        raise ExpungeError("this is not the edit that was laid on the model last")
    if any(isinstance(change, HookedChange) for change in edit.changes):
        raise ExpungeError(
            "the edit has gates; the model holds weights fitted to them, which the edit does not know;"
            " give the original"
        )
    placed = by_place(weights(edit.changes))
    inverses: dict[int, Tensor] = {}
    for change in (change for some in placed.values() for change in some):
        if isinstance(change, Right) and id(change) not in inverses:
            matrix = change.matrix.double()
            condition = float(torch.linalg.cond(matrix))
            if not condition < LARGEST_CONDITION:
                raise ExpungeError(
                    f"the edit cannot be taken off again (condition {condition:.0e}); give the original"
                )
            inverses[id(change)] = torch.linalg.inv(matrix)
        elif not isinstance(change, (Right, LowRank, Sparse)):
            raise ExpungeError(f"a {change.kind} change keeps nothing of what was; give the original")

    def taken_off(there: Tensor, some: list[WeightChange]) -> Tensor:
        value = there.double()
        for change in reversed(some):
            if isinstance(change, Right):
                value = value @ inverses[id(change)]
            else:
                # What it adds to anything, it adds to zero.
                value = value - change.weight(torch.zeros_like(value))
        return value.to(there.dtype)

    return {place: partial(taken_off, some=some) for place, some in placed.items()}
