"""`expunge export`, `merge` and `undo`: edits into models, several into one, and out again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.checkpoints import loading
from expunge.cli.loading_options import LoadingOptions, parse_loras, read_dtype


@dataclass(frozen=True)
class ExportOptions:
    """Write an edit in the form that another program loads."""

    edit: Annotated[Positional[str], arg(metavar="EDIT")]
    """The edit."""
    to: Annotated[str, arg(metavar="FORM")]
    """diffusers (a folder), safetensors (a single file in place of the one that came in), lora (a LoRA
    in diffusers' naming) or kohya (in kohya's), or the form that a program reads whole: comfyui, a1111,
    forge, sd-scripts."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER")]
    """A new folder for diffusers, else a .safetensors file; a model card is written beside it."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model to export for: a diffusers folder, a single file, or a hub id; by default the one that
    the edit was made from. It is never written to."""
    rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """The rank of the LoRA; by default the least that keeps --energy."""
    energy: float = 0.999
    """The share of each change's squared effect on text that a LoRA keeps where its rank is too small to
    keep all of it."""
    dtype: str = "float16"
    """The dtype of the LoRA: float32, float16 or bfloat16."""
    config: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """A diffusers folder of a model of the same architecture, whose text encoders are used; needed for a
    single file with an edit with gates, or for a LoRA of small rank."""
    lora: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FILE[=STRENGTH]", help_behavior_hint="")
    ] = ()
    """A LoRA that was fused into the model when the edit was made."""
    licence: Annotated[str, arg(metavar="ID", help_behavior_hint="")] = ""
    """The identifier of the licence, for the model card."""
    variant: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The variant of the folder's weights that the edit was made from: fp16, non_ema; all are erased."""
    report: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """A report of `expunge evaluate`, whose figures the model card shows."""
    push_to_hub: Annotated[str | None, arg(metavar="OWNER/NAME", help_behavior_hint="")] = None
    """A repository of the Hugging Face hub to upload the result to."""
    private: bool = False
    """Make that repository private if it is new."""


def run_export(options: ExportOptions) -> None:
    """Run `expunge export`."""
    dtype = read_dtype(options.dtype)
    from expunge.checkpoints import hub
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.checkpoints.export import TARGETS, export, push
    from expunge.edit import Edit

    if options.to not in TARGETS:
        raise UnknownNameError("form to export to", options.to, TARGETS)
    if options.push_to_hub:
        hub.check_upload(options.push_to_hub)
    if options.to != "diffusers":
        files.check_writable(options.output)
    edit = Edit.load(options.edit)
    done = export(
        edit,
        options.to,
        Checkpoint.find(_choose_model(edit.record.model, options.model), variant=options.variant),
        options.output,
        rank=options.rank,
        energy=options.energy,
        dtype=dtype,
        config=options.config,
        beneath=parse_loras(options.lora),
        licence=options.licence,
        report=options.report,
    )
    print(f"{done.path}: {done.form}, {_measure_size(done.path)}")
    for note in done.notes:
        print(note)
    if options.push_to_hub:
        print(push(done, options.push_to_hub, private=options.private))


def _choose_model(recorded: str, named: str | None) -> str:
    """Return the model that was named, or else the one that an edit was made from.

    Raises:
        ExpungeError: none was named, and the edit's record does not say where to find it.
    """
    name = named or recorded
    if named or name in registry.list_names("models") or loading.is_hub_id(name):
        return name
    raise ExpungeError(
        f"the edit was made from {name or 'a model without a name'}: say where with --model"
    )


def _measure_size(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, in words."""
    found = path.rglob("*") if path.is_dir() else [path]
    return files.format_bytes(sum(file.stat().st_size for file in found if file.is_file()))


@dataclass(frozen=True)
class MergeOptions:
    """Make one edit of several: side by side, or fused where they change the same weights."""

    edits: Positional[tuple[str, ...]]
    """Two edits or more, of one model."""
    output: Annotated[str, arg(aliases=["-o"], metavar="EDIT")]
    """The file to write, ending in .safetensors."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model; by default the one that the first edit was made from."""
    ridge: float = 1.0
    """λ: how strongly fused weights are held to the original ones, in units of a squared embedding."""
    prior_scale: float = 0.1
    """ρ: the weight of a mean caption, and of each retained prompt, where weights are fused."""
    loading: LoadingOptions = dataclasses.field(default_factory=LoadingOptions)


def run_merge(options: MergeOptions) -> None:
    """Run `expunge merge`."""
    if not options.output.lower().endswith(".safetensors"):
        raise ExpungeError(f"an edit is a .safetensors file; {options.output} should end so")
    files.check_writable(options.output)
    from expunge.changes import summarize
    from expunge.checkpoints.merge import merge
    from expunge.edit import Edit

    edits = [Edit.load(path) for path in options.edits]
    if len(edits) < 2:
        raise ExpungeError("merging takes two edits or more")
    from expunge.runtime.cost import Cost

    # A cost of nothing loads the text encoders alone: merging reads prompts and predicts nothing.
    model = options.loading.load(_choose_model(edits[0].record.model, options.model), Cost())
    edit = merge(model, edits, ridge=options.ridge, prior_scale=options.prior_scale)
    edit.save(options.output)
    erased = len(edit.record.problem.erase)
    concepts = f"{erased} concept{'s' * (erased > 1)}"
    print(f"{options.output}: {concepts} of {len(edits)} edits, {summarize(edit.changes)}")


@dataclass(frozen=True)
class UndoOptions:
    """Take the last erasure out of a model that export wrote, or one concept out of an edit."""

    model: Annotated[Positional[str], arg(metavar="MODEL|EDIT")]
    """A diffusers folder or a single file, or with --concept an edit; it is never written to."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER")]
    """What to write: a new folder for a folder, a file for a file."""
    concept: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A concept of an edit in closed form: the edit is solved again without it, the rest as it was."""
    original: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model it was made from; the changed tensors are copied from it, bit for bit. With --concept,
    by default the one that the edit names."""
    edit: Annotated[str | None, arg(metavar="EDIT", help_behavior_hint="")] = None
    """Without the original: the edit, whose changes are then subtracted."""


def run_undo(options: UndoOptions) -> None:
    """Run `expunge undo`."""
    if options.concept is not None:
        _undo_concept(options, options.concept)
        return
    from expunge.checkpoints.undo import undo
    from expunge.edit import Edit

    edit = Edit.load(options.edit) if options.edit else None
    done = undo(options.model, options.output, original=options.original, edit=edit)
    names = ", ".join(concept.name for concept in done.record.problem.erase[:10])
    print(f"{options.output}: {names} back, {len(done.places)} tensors")


def _undo_concept(options: UndoOptions, name: str) -> None:
    """Solve an edit again without one of its concepts.

    Raises:
        ExpungeError: the file is no edit, it erases no such concept, or it cannot be solved again.
    """
    if options.edit:
        raise ExpungeError("with --concept, the edit itself comes first: leave --edit out")
    if not options.output.lower().endswith(".safetensors"):
        raise ExpungeError(f"an edit is a .safetensors file; {options.output} should end so")
    files.check_writable(options.output)
    from expunge.checkpoints.load import load
    from expunge.edit import Edit
    from expunge.erasure import restore_concept

    edit = Edit.load(options.model)
    model = load(_choose_model(edit.record.model, options.original))
    done = restore_concept(model, edit, name)
    done.save(options.output)
    left = ", ".join(concept.name for concept in done.record.problem.erase[:10])
    print(f"{options.output}: {name} back; still erased: {left}")
