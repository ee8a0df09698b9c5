"""An edit in the forms that other programs load: a diffusers folder, a single file, a LoRA."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning, unknown
from expunge.base.files import cache_folder, read_header, read_json, replacing
from expunge.changes import Changes, WeightChange, check_numbers
from expunge.checkpoints import hub, lora_names
from expunge.checkpoints.checkpoint import NOTE, Checkpoint, Erased
from expunge.checkpoints.linearize import LinearFit, fit_static_weights
from expunge.checkpoints.load import load
from expunge.checkpoints.lora import Lora, Naming, Place
from expunge.checkpoints.model_card import LORAS, is_ours, title, write_card
from expunge.checkpoints.text_moments import Seen, seen
from expunge.edit import Edit
from expunge.erasing.caption_gram import text_hash
from expunge.fingerprint import Read, places, same_base
from expunge.model import Model
from expunge.ops.rounding import RoundingCost, round_to
from expunge.problem import Problem

Target = Literal["diffusers", "safetensors", "lora", "kohya", "comfyui", "a1111", "forge", "sd-scripts"]
FORMS = ("diffusers", "safetensors", "lora", "kohya")
"""What is written."""
TARGETS: tuple[Target, ...] = (
    "diffusers", "safetensors", "lora", "kohya", "comfyui", "a1111", "forge", "sd-scripts",
)  # fmt: skip
"""The forms, and the programs for which one is chosen."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    notes: tuple[str, ...]
    """What was lost, and the like: one sentence each."""
    error: float = 0.0
    """‖Δ − Δ'‖ / ‖Δ‖, over all changed weights; 0 but for truncated LoRAs."""
    form: str = ""
    """Which of the forms it is."""
    card: Path | None = None
    """Where its model card lies."""
    erasure_lost: float | None = None
    """Of a truncated LoRA, Σ ‖(Δ − Δ') e‖² / Σ ‖Δ e‖² over the erased prompts; None where unknown."""
    drift_lost: float | None = None
    """The same over captions and retained prompts: what else the edit did that is lost with it."""


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
    * "comfyui", "a1111", "forge", "sd-scripts": the LoRA that this program reads whole.

    The model itself is read one tensor at a time and never written to, and nothing that somebody else
    wrote is overwritten: neither a file at `output` nor one where the card would lie.

    Args:
        edit: what to export.
        to: one of `TARGETS`.
        model: the model that the edit is for; "diffusers" needs a folder, "safetensors" a single file.
        output: a folder for "diffusers", else a `.safetensors` file.
        rank: a LoRA's rank; None for the smallest that keeps the energy.
        energy: the share of each weight's squared change to keep, where that takes a rank; of what the
            change does to text, where that is known.
        dtype: a LoRA's number format.
        config: for a single file and an edit with gates, or a LoRA of small rank: a diffusers folder of
            a model built like it, whose text encoders read.
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
    if to == "diffusers" and str(output).lower().endswith(".safetensors"):
        raise ExpungeError(f"diffusers is a folder; {output} should not end in .safetensors")
    check_numbers(edit.changes, "the edit")
    _check_output(output)
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
    texts = _Texts(checkpoint, config)
    fitted, lost = plain_weights(edit, checkpoint, config, texts)
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
    if to not in FORMS:
        named = all(checkpoint.kohya(layer) for layer, name in changes if name == "weight")
        to = lora_names.form_for(to, checkpoint.family.__name__, named)
    card_of = partial(write_card, edit, to, licence=licence, report=report)
    place, moved = _card_place(output)
    if to in LORAS:
        lora = Lora.of(
            read, changes, rank=rank, energy=energy, seen=lambda: texts.seen(edit.record.problem)
        )
        base = lora_names.base_of(checkpoint.family.__name__, variant(checkpoint, lora.shapes))
        about = {**base, "modelspec.title": title(edit), NOTE: _note([erased(edit)])}
        where = lora_names.loads_in(to, checkpoint.family.__name__)
        built = lora_names.base_named(base)
        shipped = checkpoint.name in registry.names("models")  # other widths than any model they know
        whom = (
            f"For {checkpoint.name} alone, which is built like {built} but smaller: diffusers loads it."
        )
        told = whom if shipped else f"For {built}. {where}"
        notes = (*lost, *_notes(lora, dtype), told, *moved)
        naming = cast(Naming, "kohya" if to == "kohya" else "diffusers")
        text = card_of(notes=notes)
        lora.save(output, naming, checkpoint.kohya, dtype, about)
        _write(place, text)
        return Export(output, notes, lora.error, to, place, lora.lost.erasure, lora.lost.drift)
    history = (*checkpoint.erased(), erased(edit))
    together = by_place([*_all(below), *fitted])
    cost = RoundingCost()

    def said() -> tuple[str, ...]:
        """The notes, once everything is written."""
        return (*lost, *filter(None, [cost.note()]), *moved)

    checkpoint.copy(
        output, after(together, edit.hash, cost), history, {"README.md": lambda: card_of(notes=said())}
    )
    if to == "safetensors":
        _write(place, card_of(notes=said()))
    return Export(output, said(), 0.0, to, place)


def variant(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> str:
    """Which model of its family a checkpoint is, as `lora_names.base_of` takes it.

    Args:
        checkpoint: the model.
        shapes: of some of its weights, by their layers' names.
    """
    config, family = checkpoint.config, checkpoint.family.__name__
    names = [name for header in checkpoint.headers.values() for name in header]
    if family == "StableDiffusion":
        widths = [
            shape[1] for layer, shape in shapes.items() if layer.endswith(("attn2.to_k", "attn2.to_v"))
        ]
        width = widths[0] if widths else config.get("cross_attention_dim")
        file = checkpoint.path / "scheduler" / "scheduler_config.json"
        velocity = file.is_file() and read_json(file).get("prediction_type") == "v_prediction"
        return "" if width != 1024 else "2-v" if velocity else "2"
    if family == "SD3":
        normed = bool(config.get("qk_norm")) or any(".ln_q." in name for name in names)
        blocks = {
            found[2]
            for name in names
            if (found := re.search(r"(joint|transformer)_blocks\.(\d+)\.", name))
        }
        return "m" if not normed else "5-large" if len(blocks) > 30 else "5-medium"
    if family == "Flux":
        told = any(
            name.startswith(("guidance_in.", "time_text_embed.guidance")) or ".guidance_in." in name
            for name in names
        )
        return "dev" if told or config.get("guidance_embeds") else "schnell"
    return ""


@dataclass(eq=False)
class _Texts:
    """A checkpoint's text encoders, read when they are first asked for."""

    checkpoint: Checkpoint
    config: str | Path | None

    @cached_property
    def model(self) -> Model:
        """The model with its text encoders, at least.

        Raises:
            ExpungeError: it is a single file, and no folder says how it is built.
        """
        if self.checkpoint.is_file:  # which diffusers cannot read in part
            return load(self.checkpoint.path, config=self.config)
        return self.checkpoint.text_model(check=False)  # every tensor is checked where it is read

    def seen(self, problem: Problem) -> Mapping[str, Seen]:
        """What layers are given of text; nothing where no text encoders are at hand."""
        if self.checkpoint.is_file and self.config is None:
            return {}
        try:
            return seen(self.model, problem)
        except ExpungeError:  # a folder without text encoders: the LoRA is cut in norm, and says so
            return {}


def plain_weights(
    edit: Edit,
    checkpoint: Checkpoint,
    config: str | Path | None = None,
    texts: _Texts | None = None,
) -> tuple[Sequence[WeightChange], tuple[str, ...]]:
    """An edit's changes as weights, which other programs know alone, and what was lost on the way.

    Weights are fitted to changes that look at what a layer is given
    (`expunge.checkpoints.linearize`). The fit is kept in the cache folder: another export of the edit
    finds it there.

    Raises:
        ExpungeError: no weights can be fitted.
    """
    if all(isinstance(change, WeightChange) for change in edit.changes):
        return weights(edit.changes), ()
    fit = _fitted((texts or _Texts(checkpoint, config)).model, edit)
    return weights(fit.changes), (f"gates became weights: {fit}",)


def _fitted(model: Model, edit: Edit) -> LinearFit:
    """The weights fitted to an edit's gates, found in the cache folder or kept there."""
    problem = json.dumps(dataclasses.asdict(edit.record.problem), sort_keys=True)
    command = "\n".join([text_hash(model, ()), edit.hash, edit.record.base, problem])
    file = cache_folder() / "plain" / f"{hashlib.sha256(command.encode()).hexdigest()}.safetensors"
    if file.is_file():
        try:
            kept = Edit.load(file)
            return LinearFit(
                kept.changes, *(float(kept.record.fields[name]) for name in ("lost", "moved"))
            )
        except (ExpungeError, KeyError, TypeError, ValueError):
            pass  # broken: made again
    fit = fit_static_weights(model, edit.changes, edit.record.problem)
    fields = {"lost": fit.lost, "moved": fit.moved}
    try:
        Edit(tuple(fit.changes), dataclasses.replace(edit.record, fields=fields)).save(file)
    except ExpungeError as error:
        warnings.warn(f"the fit is not kept for another time: {error}", ExpungeWarning, stacklevel=2)
    return fit


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


def after(
    changes: Mapping[Place, Sequence[WeightChange]], seed: str = "", cost: RoundingCost | None = None
) -> dict[Place, Callable[[Tensor], Tensor]]:
    """What each parameter becomes, in its own dtype.

    Args:
        changes: of every parameter, in order.
        seed: what the random rounding to eight bits follows from, beside the parameter's name.
        cost: told what rounding does to every change.
    """

    def changed(original: Tensor, place: Place, some: Sequence[WeightChange]) -> Tensor:
        value = original.to(torch.promote_types(_wide(original.dtype), torch.float32))
        for change in some:
            value = change.weight(value)
        digest = hashlib.sha256(f"{seed}.{place[0]}.{place[1]}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        written = round_to(value, original.dtype, draw)
        if cost is not None and original.dtype.itemsize < 4:
            cost.add(original, value, written)
        return written

    return {place: partial(changed, place=place, some=some) for place, some in changes.items()}


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
        own = done.card or done.path.with_suffix(".md")
        (folder / "README.md").write_text(own.read_text("utf8"), "utf8")
        return hub.push(folder, repository, private=private)


def _all(changes: Mapping[Place, Sequence[WeightChange]]) -> list[WeightChange]:
    return [change for some in changes.values() for change in some]


def _notes(lora: Lora, dtype: torch.dtype) -> tuple[str, ...]:
    format = str(dtype).removeprefix("torch.")
    notes = [f"A LoRA of rank {lora.rank} on {len(lora.factors)} layers, in {format}."]
    if lora.error > 1e-6:
        lost = lora.lost
        if lost.erasure is None or lost.drift is None:
            notes.append(
                f"The changes were of higher rank; {lora.error:.2%} of their norm is lost (no text"
                " was read to choose what to keep)."
            )
        else:
            notes.append(
                f"The changes were of higher rank; {lora.error:.2%} of their norm is lost, but"
                f" {lost.erasure:.2%} of the erasure and {lost.drift:.2%} of what the edit does to"
                " other text."
            )
    if lora.left_out:
        notes.append(f"Left out, since a LoRA cannot hold them: {len(lora.left_out)} biases and norms.")
    return tuple(notes)


def _note(history: Sequence[Erased]) -> str:
    return json.dumps([dataclasses.asdict(one) for one in history])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that can be computed in: eight-bit floats cannot."""
    return torch.float32 if dtype.itemsize == 1 else dtype


def _check_output(output: Path) -> None:
    """Check that nothing at the output was written by somebody else.

    Raises:
        ExpungeError: a file is there that is no export.
    """
    if not output.is_file():
        return
    try:
        ours = NOTE in read_header(output).get("__metadata__", {})
    except ExpungeError:
        ours = False
    if not ours:
        raise ExpungeError(
            f"{output} is there already and is no export of ours; choose another name, or move it away"
        )


def _card_place(output: Path) -> tuple[Path, tuple[str, ...]]:
    """Where the card of an export goes, and what to say of it: nobody else's file is overwritten."""
    wanted = output.with_suffix(".md")
    if output.is_dir() or output.suffix.lower() != ".safetensors":
        return output / "README.md", ()
    place, number = wanted, 1
    while (place.exists() or place.is_symlink()) and not is_ours(place):
        place = output.with_name(f"{output.stem}.card{'' if number == 1 else f'-{number}'}.md")
        number += 1
    if place == wanted:
        return place, ()
    return place, (f"{wanted.name} is not a card of ours and stays as it is; the card is {place.name}.",)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, "utf8")
