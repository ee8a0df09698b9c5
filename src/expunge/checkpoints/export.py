"""Write an edit in the forms that other programs load: a diffusers folder, a single file, a LoRA."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError
from expunge.base.files import read_header
from expunge.changes import describe_text_encoders, require_finite
from expunge.checkpoints import hub
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.erasure_notes import NOTE, ErasureNote, serialise_notes
from expunge.checkpoints.lora import Lora
from expunge.checkpoints.lora.base_models import describe_base, read_base_title
from expunge.checkpoints.lora.factors import Naming
from expunge.checkpoints.lora.keys import require_text_keys
from expunge.checkpoints.lora.programs import choose_form, describe_support
from expunge.checkpoints.model_card import (
    LORA_FORMS,
    choose_card_path,
    make_title,
    render_card,
    write_card,
)
from expunge.checkpoints.static_weights import TextEncoders, make_static
from expunge.checkpoints.weight_changes import group_by_place, make_updates
from expunge.edit import Edit, Record
from expunge.ops.rounding import RoundingCost

Target = Literal["diffusers", "safetensors", "lora", "kohya", "comfyui", "a1111", "forge", "sd-scripts"]
"""What `export` writes to: a form, or a program whose form is chosen."""

FORMS = ("diffusers", "safetensors", "lora", "kohya")
"""The forms of an export."""

TARGETS: tuple[Target, ...] = (
    "diffusers", "safetensors", "lora", "kohya", "comfyui", "a1111", "forge", "sd-scripts",
)  # fmt: skip
"""The values of `Target`."""


ERASED, FAR = 0.8, 1.5
"""Shares of the way to its anchor: from the first on a concept is gone, on the shipped model; beyond the
second its images begin to be unrecognisable (`experiments/results/strength.json`)."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    path: Path
    """The folder or file."""
    notes: tuple[str, ...]
    """Sentences about what was lost, and the like."""
    error: float = 0.0
    """‖Δ − Δ'‖ / ‖Δ‖ over all changed weights; above 0 only for truncated LoRAs."""
    form: str = ""
    """One of `FORMS`."""
    card: Path | None = None
    """The model card."""
    erasure_lost: float | None = None
    """Of a truncated LoRA, Σ ‖(Δ − Δ') e‖² / Σ ‖Δ e‖² over the erased prompts; None where no text was
    read."""
    drift_lost: float | None = None
    """The same over captions and retained prompts: the part of the edit's side effects that is lost."""


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
) -> ExportResult:
    """Write an edit in another program's form, with a model card beside it.

    * "diffusers": a copy of the model's diffusers folder with the edit applied.
    * "safetensors": a copy of the model's single file with the edit applied: same names, same dtypes.
    * "lora", "kohya": a LoRA in diffusers' naming or in kohya's. At strength s it erases s times.
    * "comfyui", "a1111", "forge", "sd-scripts": the LoRA that this program reads whole.

    The model is read one tensor at a time and never written to. Files that expunge did not write are
    not overwritten, neither at `output` nor where the card would lie.

    Args:
        edit: the edit.
        to: one of `TARGETS`.
        model: the model that the edit is for; "diffusers" takes a folder, "safetensors" a single file.
        output: a folder for "diffusers", else a `.safetensors` file.
        rank: a LoRA's rank, at least 1; None for the smallest that keeps the energy.
        energy: the share of each weight's squared change to keep, above 0 and at most 1, where a LoRA
            has to be truncated: of what the change does to text where that can be measured, else of its
            norm.
        dtype: a LoRA's dtype.
        config: for a single file and an edit with gates, or a LoRA of small rank: a diffusers folder of
            a model built like it, whose text encoders are run.
        beneath: LoRA files that were fused into the model when the edit was made, and their strengths.
            Copies of the model have them fused; a LoRA holds the erasure alone.
        licence: the licence's identifier for the card.
        report: a folder of `expunge evaluate`, for the card.

    Raises:
        ExpungeError: the edit does not fit the model, or cannot take that form; a value is out of range;
            the disk is too full, or the output cannot be written.
    """
    output = Path(output)
    _check_values(to, output, rank, energy)
    require_finite(edit.changes, "the edit")
    _check_output(output)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.find(model)
    _check_kind(to, checkpoint)
    edit.require_family(checkpoint.family)
    texts = TextEncoders(checkpoint, config)
    static, lost = make_static(edit, checkpoint, texts)
    if text := describe_text_encoders(edit.changes):
        lost = (*lost, f"Of this edit, {text}.")
    changes = group_by_place(static)
    loras = [change for file, scale in beneath for change in checkpoint.read_lora(file, scale)]
    # The edit was made on top of these LoRAs, so that it is compared and factorised on top of them.
    fused = make_updates(group_by_place(loras))

    def read(layer: str, parameter: str) -> Tensor:
        """A parameter as the edit found it: with the LoRAs beneath."""
        original = checkpoint.read(layer, parameter)
        return fused[layer, parameter](original) if (layer, parameter) in fused else original

    if not checkpoint.fits(edit, read):
        warnings.warn(
            f"the edit was made from other weights ({edit.record.model or 'unnamed'}) than"
            f" {checkpoint.name}; it fits, but it may erase less or harm more",
            ExpungeWarning,
            stacklevel=2,
        )
    weights = [layer for layer, parameter in changes if parameter == "weight"]
    if to not in ("diffusers", "safetensors"):
        require_text_keys(weights, checkpoint.family, to)
    # Only now: whether kohya has a name for every layer depends on what the edit changes.
    if to not in FORMS:
        to = choose_form(to, checkpoint.family, all(map(checkpoint.name_by_kohya, weights)))
    make_card = partial(render_card, edit, to, licence=licence, report=report)
    card, moved = choose_card_path(output)
    if to in LORA_FORMS:
        lora = Lora.from_changes(
            read,
            changes,
            rank=rank,
            energy=energy,
            read_moments=lambda: texts.read_moments(edit.record.problem),
        )
        base = describe_base(checkpoint.family, checkpoint.infer_variant())
        support = _describe_readers(to, checkpoint, read_base_title(base))
        strengths = describe_strengths(edit.record)
        notes = (*lost, *_describe_lora(lora, dtype), *strengths, support, *moved)
        text = make_card(notes=notes)  # before the LoRA is written, since a broken report stops here
        metadata = {
            **base,
            "modelspec.title": make_title(edit),
            NOTE: serialise_notes([ErasureNote.of(edit)]),
        }
        naming = cast(Naming, "kohya" if to == "kohya" else "diffusers")
        lora.save(output, naming, checkpoint.name_by_kohya, dtype, metadata)
        write_card(card, text)
        return ExportResult(output, notes, lora.error, to, card, lora.loss.erasure, lora.loss.drift)
    cost = RoundingCost()

    def list_notes() -> tuple[str, ...]:
        """The notes; complete once everything is written, since rounding is measured on the way."""
        return (*lost, *filter(None, [cost.describe()]), *moved)

    checkpoint.copy(
        output,
        # LoRAs first: the edit was made on top of them, and a right factor acts on all before it.
        make_updates(group_by_place([*loras, *static]), edit.hash, cost),
        (*checkpoint.read_erasures(), ErasureNote.of(edit)),
        {"README.md": lambda: make_card(notes=list_notes())},
        cost=cost,
    )
    if to == "safetensors":
        write_card(card, make_card(notes=list_notes()))
    return ExportResult(output, list_notes(), 0.0, to, card)


def push(done: ExportResult, repository: str, *, private: bool = False) -> str:
    """Upload an export to the hub, with its card, and return its address.

    Args:
        done: the export.
        repository: OWNER/NAME.
        private: whether a new repository is private.

    Raises:
        ExpungeError: the hub cannot be reached, or it refuses.
    """
    hub.check_upload(repository)
    if done.path.is_dir():
        return hub.upload(done.path, repository, private=private)
    with tempfile.TemporaryDirectory(dir=done.path.parent) as place:
        folder = Path(place)
        (folder / done.path.name).hardlink_to(done.path)  # no second copy of a large file
        card = done.card or done.path.with_suffix(".md")
        (folder / "README.md").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
        return hub.upload(folder, repository, private=private)


def _check_values(to: str, output: Path, rank: int | None, energy: float) -> None:
    """Check the values of an export that need no file to be read.

    Raises:
        ExpungeError: one is out of range.
    """
    if to not in TARGETS:
        raise UnknownNameError("form to export to", to, TARGETS)
    if rank is not None and rank < 1:
        raise ExpungeError(f"the rank of a LoRA must be at least 1, not {rank}")
    if not 0 < energy <= 1:
        raise ExpungeError(f"the energy to keep must be above 0 and at most 1, not {energy:g}")
    if to != "diffusers" and output.suffix.lower() != ".safetensors":
        raise ExpungeError(f"{to} is a .safetensors file; {output} should end so")
    if to == "diffusers" and str(output).lower().endswith(".safetensors"):
        raise ExpungeError(f"diffusers is a folder; {output} should not end in .safetensors")


def _check_kind(to: str, checkpoint: Checkpoint) -> None:
    """Check that a model can be copied to a form.

    Raises:
        ExpungeError: it is a single file in place of a folder, or the reverse.
    """
    if to == "diffusers" and checkpoint.is_file:
        raise ExpungeError(
            f"{checkpoint.path} is a single file: export to safetensors, or give a diffusers folder"
        )
    if to == "safetensors" and not checkpoint.is_file:
        raise ExpungeError(
            f"{checkpoint.path} is a diffusers folder: export to diffusers, or give the single file"
        )


def _check_output(output: Path) -> None:
    """Check that a file at the output was written by an earlier export.

    Raises:
        ExpungeError: it was not.
    """
    if not output.is_file():
        return
    try:
        ours = NOTE in read_header(output).get("__metadata__", {})
    except ExpungeError:
        # What is no safetensors file was not written here.
        ours = False
    if not ours:
        raise ExpungeError(
            f"{output} is there already and is no export of ours; choose another name, or move it away"
        )


def _describe_readers(form: str, checkpoint: Checkpoint, base: str) -> str:
    """A note of which model a LoRA is for, and which programs read it."""
    if checkpoint.name in registry.list_names("models"):
        # Shipped models have other widths than any model that the programs know.
        alike = f", which is built like {base} but smaller" if base else ""
        return f"For {checkpoint.name} alone{alike}: diffusers loads it."
    return f"For {base or checkpoint.name}. {describe_support(form, checkpoint.family)}"


def _describe_lora(lora: Lora, dtype: torch.dtype) -> tuple[str, ...]:
    """Notes of a LoRA's rank and of what it lost."""
    format = str(dtype).removeprefix("torch.")
    notes = [f"A LoRA of rank {lora.rank} on {len(lora.factors)} layers, in {format}."]
    if lora.error > 1e-6:  # below that it is rounding
        loss = lora.loss
        if loss.erasure is None or loss.drift is None:
            notes.append(
                f"The changes were of higher rank; {lora.error:.2%} of their norm is lost (no text"
                " was read to choose what to keep)."
            )
        else:
            notes.append(
                f"The changes were of higher rank; {lora.error:.2%} of their norm is lost, but"
                f" {loss.erasure:.2%} of the erasure and {loss.drift:.2%} of what the edit does to"
                " other text."
            )
    if lora.left_out:
        notes.append(f"Left out, since a LoRA cannot hold them: {len(lora.left_out)} biases and norms.")
    return tuple(notes)


def describe_strengths(record: Record) -> tuple[str, ...]:
    """Say at which strengths a LoRA can be used, of 0.5 to 2 that programs offer.

    Where it shows in text, s times the changes moves a concept s times as far. What then is drawn:
    `experiments/strength.py`.

    Args:
        record: of the edit; it says how far its concepts moved.
    """
    if not record.moved:
        return ()
    if record.measured_in == "predictions":
        return (
            "Use it at strength 1, at which it was trained: below, a concept may still be drawn; above,"
            " what stays may suffer, and images of the concept may be unrecognisable.",
        )
    low, high = min(record.moved.values()), max(record.moved.values())
    if low < ERASED:
        way_out = f"use it at {ERASED / low:.2g}, or erase more" if 2 * low >= ERASED else "erase more"
        return (
            f"At strength 1 it moves a concept by {low:.0%} of the way alone, and one is often still"
            f" drawn below {ERASED:.0%}: {way_out}.",
        )
    least, most = max(0.5, ERASED / low), min(2.0, max(1.0, FAR / high))
    return (
        f"Use it at strengths of {least:.2g} to {most:.2g}: below, a concept may still be drawn; above,"
        " its images may be unrecognisable.",
    )
