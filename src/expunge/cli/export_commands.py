"""The commands that move edits in and out of models: export, merge, undo.

Nothing here imports torch before there is work for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, unknown
from expunge.checkpoints import loading

if TYPE_CHECKING:
    from expunge.checkpoints.cost_estimate import CostEstimate
    from expunge.edit import Edit
    from expunge.model import Model
    from expunge.problem import Concept
    from expunge.runtime.cost import Cost

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Export:
    """Write an edit in the form that another program loads."""

    edit: Annotated[Positional[str], arg(metavar="EDIT")]
    """The edit."""
    to: Annotated[str, arg(metavar="FORM")]
    """diffusers (a folder), safetensors (a single file in place of the one that came in), a LoRA in
    diffusers' naming (lora) or in kohya's (kohya), or the one that a program reads whole: comfyui,
    a1111, forge, sd-scripts."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER")]
    """What to write: a new folder for diffusers, else a .safetensors file; a model card beside it."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model it is for: a diffusers folder, a single file, or a hub id; by default the one it was
    made from. It is never written to."""
    rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """A LoRA's rank; by default what --energy takes."""
    energy: float = 0.999
    """The share of each squared change that a LoRA keeps, in what it does to text, where it cannot keep
    all."""
    dtype: str = "float16"
    """A LoRA's number format: float32, float16 or bfloat16."""
    config: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """For a single file, and an edit with gates or a LoRA of small rank: a diffusers folder of a model
    built like it, whose text encoders read."""
    lora: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FILE[=STRENGTH]", help_behavior_hint="")
    ] = ()
    """A LoRA that lay on the model when the edit was made."""
    licence: Annotated[str, arg(metavar="ID", help_behavior_hint="")] = ""
    """The licence's identifier for the model card."""
    variant: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The variant of a folder's weights that the edit was made from: fp16, non_ema; all are erased."""
    report: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """A report of expunge evaluate, whose figures the card shows."""
    push_to_hub: Annotated[str | None, arg(metavar="OWNER/NAME", help_behavior_hint="")] = None
    """A repository of the Hugging Face hub to upload to, when all is written."""
    private: bool = False
    """Make that repository private if it is new."""


def export_command(options: Export) -> None:
    """`expunge export`."""
    dtype = _dtype(options.dtype)
    from expunge.checkpoints import hub
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.checkpoints.export import TARGETS, export, push
    from expunge.edit import Edit

    if options.to not in TARGETS:
        raise unknown("form to export to", options.to, TARGETS)
    if options.push_to_hub:
        hub.check_upload(options.push_to_hub)
    if options.to != "diffusers":
        files.check_writable(options.output)
    edit = Edit.load(options.edit)
    done = export(
        edit,
        options.to,
        Checkpoint.find(_base(edit, options.model), variant=options.variant),
        options.output,
        rank=options.rank,
        energy=options.energy,
        dtype=dtype,
        config=options.config,
        beneath=strengths(options.lora),
        licence=options.licence,
        report=options.report,
    )
    print(f"{done.path}: {done.form}, {_size(done.path)}")
    for note in done.notes:
        print(note)
    if options.push_to_hub:
        print(push(done, options.push_to_hub, private=options.private))


def _base(edit: Edit, model: str | None) -> str:
    """The model that was named, or else the one that an edit was made from.

    Raises:
        ExpungeError: none was named, and the edit does not say where to find it.
    """
    name = model or edit.record.model
    if model or name in registry.names("models") or loading.is_hub_id(name):
        return name
    raise ExpungeError(
        f"the edit was made from {name or 'a model without a name'}: say where with --model"
    )


def _dtype(name: str) -> Any:
    """The torch dtype of a name."""
    if name not in DTYPES:
        raise unknown("number format", name, DTYPES)
    import torch

    return getattr(torch, name)


def _size(path: Path) -> str:
    found = path.rglob("*") if path.is_dir() else [path]
    return files.size(sum(file.stat().st_size for file in found if file.is_file()))


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: str = "float32"
    """The number format of its weights: float32, float16 or bfloat16."""
    device: str = "auto"
    """Where it works: auto, cpu, cuda, cuda:1, mps."""
    offload: bool = False
    """Keep on the accelerator only the part of it that is at work; else the denoiser stays there."""
    config: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """For a single file: a diffusers folder of a model built like it."""
    variant: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The variant of a folder's weights to read: fp16, non_ema; by default the plain ones."""
    lora: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FILE[=STRENGTH]", help_behavior_hint="")
    ] = ()
    """A LoRA to fuse into the weights first."""
    gradient_checkpointing: bool = False
    """Compute twice what gradients need, instead of keeping it: less memory, more time."""
    attention_slicing: bool = False
    """Attend in slices: less memory, more time."""
    dry_run: bool = False
    """Print what it would take, in memory and time, and do nothing."""

    def show_plan(self, name: str, work: Callable[[int], Cost | None]) -> None:
        """Print the plan for a model and an amount of work, which may hang on the model's steps."""
        from expunge.checkpoints.checkpoint import Checkpoint
        from expunge.checkpoints.cost_estimate import estimate

        checkpoint = Checkpoint.find(name, weights=False, variant=self.variant)
        found = loading.read_settings(loading.Source(name, checkpoint.path))
        asked = work(int(found.get("num_inference_steps", 50)))
        alone = self._reads_alone(asked, checkpoint.is_file)
        made = estimate(
            checkpoint, _dtype(self.dtype), self.device, offload=self.offload, text_alone=alone
        )
        print(f"{checkpoint.name}, {checkpoint.family.__name__}")
        for line in made.describe(asked):
            print(line)

    def say_plan(self, model: Model, work: Cost | None, erased: Sequence[Concept] = ()) -> CostEstimate:
        """Print in a line what some work with a model will take."""
        from expunge.checkpoints.cost_estimate import estimate_model

        made = estimate_model(model, offload=self.offload, work=work, erased=erased)
        _, memory, _, time = made.describe(work)
        print(f"{memory}; {time}", flush=True)
        return made

    def load(self, name: str, work: Cost | None = None) -> Model:
        """The model of this name; of one whose text encoders are enough for the work, these alone."""
        found = loading.find_source(name, self.variant)
        if self._reads_alone(work, found.is_file):
            from expunge.checkpoints.checkpoint import Checkpoint

            checkpoint = Checkpoint.find(name, variant=self.variant)
            return checkpoint.load_text_model(_dtype(self.dtype), self.device)
        from expunge.checkpoints.load import load

        return load(
            name,
            dtype=_dtype(self.dtype),
            device=self.device,
            config=self.config,
            lora=strengths(self.lora),
            offload=self.offload,
            gradient_checkpointing=self.gradient_checkpointing,
            attention_slicing=self.attention_slicing,
            variant=self.variant,
        )

    def _reads_alone(self, work: Cost | None, is_file: bool) -> bool:
        """Whether text encoders are enough; a single file is read whole, a LoRA is laid on a whole."""
        return bool(work and work.reads_alone) and not (is_file or self.lora or self.offload)


def strengths(loras: tuple[str, ...]) -> list[tuple[str, float]]:
    """FILE or FILE=STRENGTH, one after the other; a file may have = in its name.

    Raises:
        ExpungeError: a strength is no finite number.
    """
    found = []
    for text in loras:
        file, equals, strength = text.rpartition("=")
        if not equals or Path(text).is_file() or text.lower().endswith(".safetensors"):
            found.append((text, 1.0))
            continue
        try:
            number = float(strength)
        except ValueError:
            raise ExpungeError(f"a LoRA is given as FILE or FILE=STRENGTH, not {text!r}") from None
        if not math.isfinite(number):
            raise ExpungeError(
                f"the strength of a LoRA must be a finite number, not {strength} (in {text!r})"
            )
        found.append((file, number))
    return found


@dataclass(frozen=True)
class Merge:
    """Make one edit of several: side by side, or fused where they touch the same weights."""

    edits: Positional[tuple[str, ...]]
    """Two edits or more, of one model."""
    output: Annotated[str, arg(aliases=["-o"], metavar="EDIT")]
    """The file to write, ending in .safetensors."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model; by default the one that the first was made from."""
    ridge: float = 1.0
    """λ, pull of fused weights to the original ones, in units of a squared embedding."""
    prior_scale: float = 0.1
    """ρ, the weight of a mean caption, and of each retained prompt, where weights are fused."""
    loading: Loading = field(default_factory=Loading)


def merge_command(options: Merge) -> None:
    """`expunge merge`."""
    if not options.output.lower().endswith(".safetensors"):
        raise ExpungeError(f"an edit is a .safetensors file; {options.output} should end so")
    files.check_writable(options.output)
    from expunge.changes import summary
    from expunge.checkpoints.merge import merge
    from expunge.edit import Edit

    edits = [Edit.load(path) for path in options.edits]
    if len(edits) < 2:
        raise ExpungeError("merging takes two edits or more")
    from expunge.runtime.cost import Cost

    model = options.loading.load(_base(edits[0], options.model), Cost())
    edit = merge(model, edits, ridge=options.ridge, prior_scale=options.prior_scale)
    edit.save(options.output)
    erased = len(edit.record.problem.erase)
    concepts = f"{erased} concept{'s' * (erased > 1)}"
    print(f"{options.output}: {concepts} of {len(edits)} edits, {summary(edit.changes)}")


@dataclass(frozen=True)
class Undo:
    """Take the last erasure off a model that export wrote."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A diffusers folder or a single file; it is never written to."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER")]
    """What to write: a new folder for a folder, a file for a file."""
    original: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model it was made from: the changed tensors are copied from it, bit for bit."""
    edit: Annotated[str | None, arg(metavar="EDIT", help_behavior_hint="")] = None
    """Without the original: the edit, taken off by arithmetic."""


def undo_command(options: Undo) -> None:
    """`expunge undo`."""
    from expunge.checkpoints.undo import undo
    from expunge.edit import Edit

    edit = Edit.load(options.edit) if options.edit else None
    done = undo(options.model, options.output, original=options.original, edit=edit)
    names = ", ".join(concept.name for concept in done.record.problem.erase[:10])
    print(f"{options.output}: {names} back, {len(done.places)} tensors")


def is_model(path: str) -> bool:
    """Whether a path is a model's, not an edit's: a shipped one, a folder, or a file that is no edit."""
    if files.is_dir(path) or path in registry.names("models"):
        return True
    return files.is_file(path) and "expunge" not in files.read_header(path).get("__metadata__", {})


def info_of_model(path: str) -> None:
    """What a model or a LoRA on the disk says of itself."""
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.checkpoints.erasure_notes import read_notes

    header = files.read_header(path) if Path(path).is_file() else {}
    if any("lora" in name for name in header):
        from expunge.checkpoints.lora import read_lora_info

        said = read_lora_info(path)
        rows = [("lora", f"{path}, rank {said.rank} on {said.layers} layers")]
        rows.append(("for", said.base or "it does not say which base"))
        history = read_notes(header)
    else:
        checkpoint = Checkpoint.find(path)
        kind = "single file" if checkpoint.is_file else "diffusers folder"
        rows = [("model", f"{checkpoint.name}, {checkpoint.family.__name__}, a {kind}")]
        history = checkpoint.read_erasures()
    for erased in history:
        record = erased.record
        concepts = ", ".join(
            f"{c.name} (becomes {c.anchor!r})" if record.reads_anchor else c.name
            for c in record.problem.erase
        )
        rows.append(("erased", f"{concepts} by {record.method}, seed {record.seed}"))
        rows.append(("", f"{len(erased.places)} tensors, edit {erased.edit[:16]}"))
    if not history:
        rows.append(("erased", "nothing that it says of"))
    for name, text in rows:
        print(f"{name:<8}{text}")
