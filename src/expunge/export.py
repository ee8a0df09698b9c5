"""An edit in the forms that other programs load: a diffusers folder, a single file, a LoRA."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from expunge import hub
from expunge.card import LORAS, card
from expunge.changes import Changes, WeightChange
from expunge.checkpoint import NOTE, Checkpoint, Erased
from expunge.edit import Edit, Read, places, same_base
from expunge.errors import ExpungeError, ExpungeWarning, unknown
from expunge.files import replacing
from expunge.lora import Lora, Naming, Place
from expunge.model import load
from expunge.plain import plain

Target = Literal["diffusers", "safetensors", "lora", "kohya"]
TARGETS: tuple[Target, ...] = ("diffusers", "safetensors", "lora", "kohya")


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    notes: tuple[str, ...]
    """What was lost, and the like: one sentence each."""
    error: float = 0.0
    """‖Δ − Δ'‖ / ‖Δ‖, over all changed weights; 0 but for truncated LoRAs."""


def export(
    edit: Edit,
    to: str,
    model: str | Path | Checkpoint,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float = 0.999,
    dtype: torch.dtype = torch.float16,
    config: str | Path | None = None,
    beneath: Sequence[tuple[str | Path, float]] = (),
    licence: str = "",
    report: str | Path | None = None,
) -> Export:
    """Write an edit in another program's form, with a model card beside it.

    * "diffusers": a copy of the model's diffusers folder, erased.
    * "safetensors": a copy of the model's single file, erased: same names, same dtypes.
    * "lora", "kohya": a LoRA in diffusers' naming or in kohya's. At strength s it erases s times.

    The model itself is read one tensor at a time and never written to.

    Args:
        edit: what to export.
        to: one of `TARGETS`.
        model: the model that the edit is for; "diffusers" needs a folder, "safetensors" a single file.
        output: a folder for "diffusers", else a `.safetensors` file.
        rank: a LoRA's rank; None for the smallest that keeps the energy.
        energy: the share of each weight's squared change to keep, where that takes a rank.
        dtype: a LoRA's number format.
        config: for an edit with gates and a single file: a diffusers folder of a model built like it.
        beneath: LoRA files that lay on the model when the edit was made, and their strengths. Copies of
            the model have them fused; a LoRA holds the erasure alone.
        licence: for the card.
        report: a folder of `expunge evaluate`, for the card.

    Raises:
        ExpungeError: the edit does not fit the model, or cannot take that form; a value is out of range;
            the disk is too full, or the output cannot be written.
    """
    if to not in TARGETS:
        raise unknown("form to export to", to, TARGETS)
    if rank is not None and rank < 1:
        raise ExpungeError(f"the rank of a LoRA must be at least 1, not {rank}")
    if not 0 < energy <= 1:
        raise ExpungeError(f"the energy to keep must be above 0 and at most 1, not {energy:g}")
    output = Path(output)
    if to != "diffusers" and output.suffix.lower() != ".safetensors":
        raise ExpungeError(f"{to} is a .safetensors file; {output} should end so")
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.find(model)
    if to == "diffusers" and checkpoint.is_file:
        raise ExpungeError(
            f"{checkpoint.path} is a single file: export to safetensors, or give a diffusers folder"
        )
    if to == "safetensors" and not checkpoint.is_file:
        raise ExpungeError(
            f"{checkpoint.path} is a diffusers folder: export to diffusers, or give the single file"
        )
    edit.require_family(checkpoint.family)
    fitted, lost = plain_weights(edit, checkpoint, config)
    changes = by_place(fitted)
    below = by_place([change for file, scale in beneath for change in checkpoint.lora(file, scale)])
    fused = after(below)

    def read(layer: str, parameter: str) -> Tensor:
        original = checkpoint.read(layer, parameter)
        return fused[layer, parameter](original) if (layer, parameter) in fused else original

    if not fits(edit, checkpoint, read):
        warnings.warn(
            f"the edit was made from other weights ({edit.record.model or 'unnamed'}) than"
            f" {checkpoint.name}; it fits, but it may erase less or harm more",
            ExpungeWarning,
            stacklevel=2,
        )
    card_of = partial(card, edit, to, licence=licence, report=report)
    if to in LORAS:
        lora = Lora.of(read, changes, rank=rank, energy=energy)
        done = Export(output, (*lost, *_notes(lora, dtype)), lora.error)
        text = card_of(notes=done.notes)
        naming = cast(Naming, "kohya" if to == "kohya" else "diffusers")
        lora.save(output, naming, checkpoint.kohya, dtype, {NOTE: _note([erased(edit)])})
        _write(output.with_suffix(".md"), text)
        return done
    text = card_of(notes=lost)
    history = (*checkpoint.erased(), erased(edit))
    together = by_place([*_all(below), *fitted])
    checkpoint.copy(output, after(together), history, {"README.md": text})
    if to == "safetensors":
        _write(output.with_suffix(".md"), text)
    return Export(output, lost)


def plain_weights(
    edit: Edit, checkpoint: Checkpoint, config: str | Path | None = None
) -> tuple[Sequence[WeightChange], tuple[str, ...]]:
    """An edit's changes as weights, which other programs know alone, and what was lost on the way.

    Weights are fitted to changes that look at what a layer is given (`expunge.plain`).

    Raises:
        ExpungeError: no weights can be fitted.
    """
    if all(isinstance(change, WeightChange) for change in edit.changes):
        return weights(edit.changes), ()
    whole = checkpoint.is_file  # which diffusers cannot read in part
    model = load(checkpoint.path, config=config) if whole else checkpoint.text_model()
    fit = plain(model, edit.changes, edit.record.problem)
    return weights(fit.changes), (f"gates became weights: {fit}",)


def weights(changes: Changes) -> Sequence[WeightChange]:
    """Changes that are weights.

    Raises:
        ExpungeError: one of them is none.
    """
    found = [change for change in changes if isinstance(change, WeightChange)]
    if len(found) < len(changes):
        kinds = {change.kind for change in changes if not isinstance(change, WeightChange)}
        raise ExpungeError(
            f"{' and '.join(sorted(kinds))} changes are no weights: export the edit, which fits weights"
            " to them"
        )
    return found


def by_place(changes: Sequence[WeightChange]) -> dict[Place, list[WeightChange]]:
    """The changes of every parameter, in order."""
    found: dict[Place, list[WeightChange]] = {}
    for change in changes:
        for layer in change.layers:
            found.setdefault((layer, change.parameter), []).append(change)
    return found


def after(changes: Mapping[Place, Sequence[WeightChange]]) -> dict[Place, Callable[[Tensor], Tensor]]:
    """What each parameter becomes, in its own dtype."""

    def changed(original: Tensor, some: Sequence[WeightChange]) -> Tensor:
        value = original.to(torch.promote_types(_wide(original.dtype), torch.float32))
        for change in some:
            value = change.weight(value)
        return value.to(original.dtype)

    return {place: partial(changed, some=some) for place, some in changes.items()}


def erased(edit: Edit) -> Erased:
    """The note that an erased model carries."""
    return Erased(edit.record, edit.hash, tuple(sorted(places(edit.changes))))


def fits(edit: Edit, checkpoint: Checkpoint, read: Read | None = None) -> bool:
    """Whether an edit was made from just these weights, as `Edit.fits`, of a model on the disk.

    Args:
        edit: the edit.
        checkpoint: the model.
        read: gives the model's parameters, with what lies on them; by default as they are stored.

    Raises:
        ExpungeError: the model is of another family, or a layer is missing or has another shape.
    """
    edit.require_family(checkpoint.family)
    for change in edit.changes:
        for layer in change.layers:
            shape = checkpoint.shape(layer, change.parameter)
            if not change.fits(torch.Size(shape)):
                found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in change.tensors.items())
                raise ExpungeError(
                    f"the edit does not fit: {layer} is {shape} in {checkpoint.name},"
                    f" and its {change.kind} change has {found}"
                )
    return same_base(read or checkpoint.read, places(edit.changes), edit.record.base)


def push(done: Export, repository: str, *, private: bool = False) -> str:
    """Upload an export to the hub, with its card; its address there.

    Raises:
        ExpungeError: the hub cannot be reached, or it refuses.
    """
    hub.check_push(repository)
    if done.path.is_dir():
        return hub.push(done.path, repository, private=private)
    with tempfile.TemporaryDirectory(dir=done.path.parent) as place:
        folder = Path(place)
        (folder / done.path.name).hardlink_to(done.path)
        (folder / "README.md").write_text(done.path.with_suffix(".md").read_text("utf8"), "utf8")
        return hub.push(folder, repository, private=private)


def _all(changes: Mapping[Place, Sequence[WeightChange]]) -> list[WeightChange]:
    return [change for some in changes.values() for change in some]


def _notes(lora: Lora, dtype: torch.dtype) -> tuple[str, ...]:
    format = str(dtype).removeprefix("torch.")
    notes = [f"A LoRA of rank {lora.rank} on {len(lora.factors)} layers, in {format}."]
    if lora.error > 1e-6:
        notes.append(f"The changes were of higher rank; {lora.error:.2%} of their norm is lost.")
    if lora.left_out:
        notes.append(f"Left out, since a LoRA cannot hold them: {len(lora.left_out)} biases and norms.")
    return tuple(notes)


def _note(history: Sequence[Erased]) -> str:
    return json.dumps([dataclasses.asdict(one) for one in history])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that can be computed in: eight-bit floats cannot."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, "utf8")
