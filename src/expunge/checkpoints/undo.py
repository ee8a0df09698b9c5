"""Undo the last erasure of a model on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import HookedChange, LowRank, Right, Sparse, WeightChange
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.erasure_notes import ErasureNote
from expunge.checkpoints.safetensors_io import StoredTensor, TensorUpdate
from expunge.checkpoints.variants import list_variants
from expunge.checkpoints.weight_changes import Place, group_by_place, require_weights
from expunge.edit import Edit
from expunge.fingerprint import is_same_base

MAX_CONDITION = 1e6
"""The condition number of a matrix beyond which its inverse, applied to float32 weights, is mostly
rounding."""


def undo(
    model: str | Path | Checkpoint,
    output: str | Path,
    *,
    original: str | Path | Checkpoint | None = None,
    edit: Edit | None = None,
) -> ErasureNote:
    """Write an erased model to `output` as it was before its last erasure.

    With the original, the changed tensors are copied from it bit for bit. Without it, the edit is
    inverted: W = (W' − B D) M⁻¹, up to rounding. An edit with dense weights cannot be inverted.

    Args:
        model: what `export` wrote, a folder or a single file; it is never written to.
        output: a new folder, or a file.
        original: the model before the erasure.
        edit: the edit that was applied.

    Returns:
        the note of the erasure that was undone.

    Raises:
        ExpungeError: the model has no note of an erasure, the original or the edit is another than it
            was made from, the edit cannot be inverted, or `output` cannot be written.
    """
    erased_model = model if isinstance(model, Checkpoint) else Checkpoint.find(model)
    notes = erased_model.read_erasures()
    if not notes:
        raise ExpungeError(f"{erased_model.path} says of no erasure; there is nothing to undo")
    last = notes[-1]
    variant_updates: dict[str, dict[Place, TensorUpdate]] = {}
    updates: Mapping[Place, TensorUpdate]
    if original is not None:
        source = original if isinstance(original, Checkpoint) else Checkpoint.find(original)
        source = _choose_variant(source, last)
        updates = _copy_from(source, last)
        variant_updates = _copy_variants_from(source, erased_model, last)
    elif edit is not None:
        updates = _invert(edit, last)
    else:
        raise ExpungeError(
            "undoing takes the original model, or the edit: name one of them (--original or --edit)"
        )
    names = ", ".join(concept.name for concept in last.record.problem.erase)
    text = f"# {erased_model.name}, with {names} again\n\nWritten by `expunge undo`.\n"
    erased_model.copy(output, updates, notes[:-1], {"README.md": text}, variant_updates)
    return last


def iterate_variants(model: Checkpoint) -> Iterator[Checkpoint]:
    """Yield a model once for each variant of its weights, first as it is read by default."""
    yield model
    for variant in [] if model.is_file else list_variants(model.path):
        yield replace(model, variant=variant)


def _choose_variant(original: Checkpoint, last: ErasureNote) -> Checkpoint:
    """The original, read in the variant of its weights that the edit was made from.

    Raises:
        ExpungeError: `original` is not the original.
    """
    if last.record.family not in ("", original.family.__name__):
        raise ExpungeError(
            f"{original.name} is {original.family.__name__}, and what was erased was"
            f" {last.record.family}"
        )
    for source in iterate_variants(original):
        # The note's hash is of the tensors before the erasure, rounded to float16.
        if is_same_base(source.read, last.places, last.record.base):
            return source
    raise ExpungeError(
        f"{original.name} has other weights than the model that was erased; it cannot be put back"
    )


def _copy_from(source: Checkpoint, last: ErasureNote) -> dict[Place, TensorUpdate]:
    """Updates that put the original's tensors in place of the changed ones."""
    return {
        place: partial(_read_original, source=source, place=place, variant=None) for place in last.places
    }


def _copy_variants_from(
    source: Checkpoint, erased_model: Checkpoint, last: ErasureNote
) -> dict[str, dict[Place, TensorUpdate]]:
    """Updates for each variant of the erased weights, from the same variant of the original.

    Raises:
        ExpungeError: the original lacks a variant that the erased model has.
    """
    found: dict[str, dict[Place, TensorUpdate]] = {}
    for place in last.places:
        there, ours = erased_model.locate(*place), source.locate(*place)
        for variant in there:
            if variant in ours:
                update = partial(_read_original, source=source, place=place, variant=variant)
                found.setdefault(variant, {})[place] = update
            # A single variant may be copied from whatever the original has, with its dtype converted.
            elif len(there) > 1:
                raise ExpungeError(
                    f"{source.name} has no {variant or 'plain'} weights of {place[0]}, which"
                    f" {erased_model.name} has: give the original that has them, or the edit"
                )
    return found


def _read_original(
    there: Tensor, source: Checkpoint, place: Place, variant: str | None
) -> Tensor | StoredTensor:
    """The original's tensor in place of `there`: bit for bit where both are stored alike."""
    stored = source.read_stored(*place, variant)
    if stored.scale is not None or stored.value.dtype == there.dtype:
        return stored
    return stored.value.to(there.dtype)


def _invert(edit: Edit, last: ErasureNote) -> dict[Place, TensorUpdate]:
    """Updates that invert an edit's changes, the last one first.

    Raises:
        ExpungeError: the edit is not the last one, or a change cannot be inverted.
    """
    if edit.hash != last.edit:
        raise ExpungeError("this is not the edit that was laid on the model last")
    if any(isinstance(change, HookedChange) for change in edit.changes):
        raise ExpungeError(
            "the edit has gates; the model holds weights fitted to them, which the edit does not know;"
            " give the original"
        )
    by_place = group_by_place(require_weights(edit.changes))
    inverses: dict[int, Tensor] = {}
    for change in (change for some in by_place.values() for change in some):
        if isinstance(change, Right) and id(change) not in inverses:
            matrix = change.matrix.double()
            condition = float(torch.linalg.cond(matrix))
            if not condition < MAX_CONDITION:
                raise ExpungeError(
                    f"the edit cannot be taken off again (condition {condition:.0e}); give the original"
                )
            # Once for all layers that share the matrix.
            inverses[id(change)] = torch.linalg.inv(matrix)
        elif not isinstance(change, (Right, LowRank, Sparse)):
            raise ExpungeError(f"a {change.kind} change keeps nothing of what was; give the original")

    def invert(there: Tensor, some: list[WeightChange]) -> Tensor:
        # float64, so that only the stored weight's own rounding is amplified by the inverse.
        value = there.double()
        for change in reversed(some):
            if isinstance(change, Right):
                value = value @ inverses[id(change)]
            else:
                # An additive change applied to zero is what it adds.
                value = value - change.weight(torch.zeros_like(value))
        return value.to(there.dtype)

    return {place: partial(invert, some=some) for place, some in by_place.items()}
