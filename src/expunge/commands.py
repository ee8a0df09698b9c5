"""The commands that move edits in and out of models: export, merge, undo.

Nothing here imports torch before there is work for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from expunge import files
from expunge.errors import ExpungeError, unknown

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Export:
    """Write an edit in the form that another program loads."""

    edit: Positional[str]
    """The edit."""
    to: Annotated[str, arg(metavar="FORM")]
    """diffusers (a folder), safetensors (a single file in place of the one that came in), lora
    (diffusers' naming) or kohya (ComfyUI, A1111)."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER")]
    """What to write: a new folder for diffusers, else a .safetensors file; a model card beside it."""
    model: str | None = None
    """The model it is for: a diffusers folder, a single file, or a hub id; by default the one it was
    made from. It is never written to."""
    rank: int | None = None
    """A LoRA's rank; by default what --energy takes."""
    energy: float = 0.999
    """The share of each squared change that a LoRA keeps, where it cannot keep all."""
    dtype: str = "float16"
    """A LoRA's number format: float32, float16 or bfloat16."""
    licence: Annotated[str, arg(metavar="ID")] = ""
    """The licence's identifier for the model card."""
    report: Annotated[str | None, arg(metavar="FOLDER")] = None
    """A report of expunge evaluate, whose figures the card shows."""
    push_to_hub: Annotated[str | None, arg(metavar="OWNER/NAME")] = None
    """A repository of the Hugging Face hub to upload to, when all is written."""
    private: bool = False
    """Make that repository private if it is new."""


def export_command(options: Export) -> None:
    """`expunge export`."""
    torch_dtype = dtype(options.dtype)
    from expunge import hub
    from expunge.edit import Edit
    from expunge.export import TARGETS, export, push

    if options.to not in TARGETS:
        raise unknown("form to export to", options.to, TARGETS)
    if options.push_to_hub:
        hub.check_push(options.push_to_hub)
    if options.to != "diffusers":
        files.check_writable(options.output)
    edit = Edit.load(options.edit)
    model = options.model or edit.record.model
    if not model:
        raise ExpungeError("the edit does not say which model it is for; name it with --model")
    done = export(
        edit,
        options.to,
        model,
        options.output,
        rank=options.rank,
        energy=options.energy,
        dtype=torch_dtype,
        licence=options.licence,
        report=options.report,
    )
    print(f"{done.path}: {options.to}, {_size(done.path)}")
    for note in done.notes:
        print(note)
    if options.push_to_hub:
        print(push(done, options.push_to_hub, private=options.private))


def dtype(name: str):  # type: ignore[no-untyped-def]
    """The torch dtype of a name."""
    if name not in DTYPES:
        raise unknown("number format", name, DTYPES)
    import torch

    return getattr(torch, name)


def _size(path: Path) -> str:
    found = path.rglob("*") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in found if file.is_file()) / 1e6:.1f} MB"
