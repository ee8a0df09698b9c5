"""An edit: the changes that erase concepts, with a record of how they were made. One file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from expunge import __version__
from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning, join_names
from expunge.base.fields import build_from_record
from expunge.base.files import parse_json, read_header, replacing
from expunge.base.html import render_table
from expunge.base.shipped import list_shipped
from expunge.changes import (
    KINDS,
    Applied,
    Changes,
    build_change,
    check_fit,
    check_strength,
    describe_text_encoders,
    encode_tensor,
    require_finite,
    summarize,
)
from expunge.fingerprint import is_same_base, list_places, make_base_reader
from expunge.model import Model
from expunge.problem import Problem

FORMAT = 1
"""The version of the file format."""

SHOWN = 10
"""How many concepts, and retained prompts, a notebook shows of an edit."""


@dataclass(frozen=True)
class Record:
    """How an edit was made."""

    method: str
    """The name of the method."""
    fields: Mapping[str, Any]
    """The values of the method's fields."""
    problem: Problem
    """What was to be erased and retained."""
    model: str
    """The name of the base model."""
    base: str
    """The hash of the base model's parameters that change."""
    seed: int
    """The seed of all random numbers."""
    seconds: float
    """How long it took."""
    versions: Mapping[str, str]
    """The versions of expunge and the libraries it was made with."""
    family: str = ""
    """The base model's family; "" in older edits."""
    moved: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How far each concept moved toward its anchor in prompts that the edit was not made with, 1 for all
    of the way; concepts of which this means nothing, and those of older edits, are not there."""
    onto: Record | None = None
    """The record of the edit that this one was solved on, whose concepts are among the problem's."""
    onto_changes: int = 0
    """How many of the changes, the first ones, are that edit's."""
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `autotune` tried, and chose; empty where it was not asked."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`.

        Raises:
            ExpungeError: a value is none that a record holds.
        """
        onto = cls.from_dict(data["onto"]) if data.get("onto") else None
        record = cls(**{**data, "problem": Problem.from_dict(data["problem"]), "onto": onto})
        if type(record.seed) is not int or not math.isfinite(record.seconds):
            raise ExpungeError(
                f"its seed is {record.seed!r} and it took {record.seconds!r} s: both should be numbers"
            )
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data; of an edit that stands alone, as older versions read it."""
        data = dataclasses.asdict(self)
        if not self.tuned:
            del data["tuned"]
        level = data
        while level["onto"] is not None:
            level = level["onto"]
        del level["onto"], level["onto_changes"]
        return data

    @property
    def measured_in(self) -> str:
        """Where `moved` was measured: "text" or "predictions"; "" for a method that is not here."""
        return str(self._read_method("measured_in", ""))

    @property
    def reads_anchor(self) -> bool:
        """Whether the method used the anchors; True for a method that is not installed here."""
        return bool(self._read_method("reads_anchor", True))

    def _read_method(self, what: str, unknown: Any) -> Any:
        """Return what the method says of itself with these fields; `unknown` if it is not installed."""
        try:
            return getattr(build_from_record(registry.get("methods", self.method), self.fields), what)
        except ExpungeError:
            return unknown


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes to a model, with their record. One `.safetensors` file.

    >>> edit = Edit.load("no-airplane.safetensors")  # doctest: +SKIP
    >>> edit.record.problem.erase[0].name            # doctest: +SKIP
    'airplane'
    """

    changes: Changes
    """The changes, applied in order."""
    record: Record
    """How they were made."""

    @property
    def hash(self) -> str:
        """The hash of the changes; the record has no part in it."""
        digest = hashlib.sha256()
        # In order: changes of one layer do not commute.
        for change in self.changes:
            digest.update(json.dumps(change.spec, sort_keys=True).encode())
            for name, tensor in sorted(change.tensors.items()):
                digest.update(name.encode() + encode_tensor(tensor))
        return digest.hexdigest()

    def require_family(self, family: type[Model]) -> None:
        """Check that the edit is for models of this family.

        Raises:
            ExpungeError: it is for models of another.
        """
        if self.record.family not in ("", family.__name__):
            raise ExpungeError(
                f"the edit does not fit: it is for {self.record.family}, and this model is"
                f" {family.__name__}"
            )

    def require_shipped(self, name: str) -> None:
        """Check that an edit of one shipped model is not applied to another.

        Their layers may have the same shapes, and what they have learnt has nothing in common.

        Args:
            name: the model's name.

        Raises:
            ExpungeError: it was made for the other one.
        """
        made_for = self.record.model
        if made_for != name and {made_for, name} <= set(list_shipped()):
            raise ExpungeError(
                f"the edit does not fit: it was made for the model {made_for}, and this is {name}; give"
                f" --model {made_for}, or erase again from {name}"
            )

    def fits(self, model: Model | Any) -> bool:
        """Whether the edit was made from these very weights; half-precision copies of them count.

        Raises:
            ExpungeError: the model is of another family or another shipped one, or a layer is missing or
                has another shape: the edit cannot be applied.
        """
        root = model.pipe if isinstance(model, Model) else model
        if isinstance(model, Model):
            self.require_family(type(model))
            self.require_shipped(model.name)
        check_fit(root, self.changes)
        return is_same_base(make_base_reader(model), list_places(self.changes), self.record.base)

    def apply(self, pipe: Model | Any, strength: float = 1.0) -> Applied:
        """Apply the edit to a diffusers pipeline (or a model), until `remove()` is called on the result.

        Edits stack; remove them in reverse order. `save_pretrained` then saves changes that are static
        weights with the pipeline.

        >>> applied = edit.apply(pipe)  # doctest: +SKIP
        >>> applied.remove()            # doctest: +SKIP

        Args:
            pipe: the pipeline, or the model.
            strength: how much of the changes counts: 1 is the edit as it was made, 0 changes nothing,
                0.8 moves every weight 0.8 of the way. Gated changes are scaled in what they do to their
                layer's input or output.

        Raises:
            ExpungeError: a layer is missing or has another shape, or the strength is no number of 0 or
                more.
        """
        check_strength(strength)
        root = pipe.pipe if isinstance(pipe, Model) else pipe
        # A fine-tuned model has the same shapes, and erasing may well work on it: warn, do not refuse.
        if not self.fits(pipe):
            warnings.warn(
                f"the edit was made from other weights ({self.record.model or 'unnamed'});"
                " it fits, but it may erase less or harm more",
                ExpungeWarning,
                stacklevel=2,
            )
        return Applied(root, self.changes, strength)

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it: what it erases, how it was made, what it changes."""
        record, problem = self.record, self.record.problem
        rows = []
        for concept in problem.erase:
            becomes = repr(concept.anchor) if concept.anchor else "what the empty prompt draws"
            how = f"becomes {becomes}" if record.reads_anchor else "its method read no anchor"
            rows.append((f"erases {', '.join(concept.names)}", f"{concept.kind}; {how}"))
        # An edit of a thousand concepts must not fill the notebook.
        if len(rows) > SHOWN:
            rows[SHOWN:] = [(f"and {len(rows) - SHOWN} more", "")]
        rows += [
            ("retains", join_names(problem.retain, SHOWN) or "nothing by name"),
            ("method", f"{record.method}, seed {record.seed}, {record.seconds:.1f} s"),
            ("made from", f"{record.model or 'an unnamed model'} ({record.family or 'unknown family'})"),
            ("changes", summarize(self.changes)),
        ]
        if text := describe_text_encoders(self.changes):
            rows.append(("note", text))
        return render_table("expunge edit", rows)

    def save(self, path: str | Path) -> None:
        """Write the edit to one `.safetensors` file; an older file stays until it is complete.

        Raises:
            ExpungeError: the file cannot be written, or the edit contains NaN or infinity.
        """
        require_finite(self.changes, "the edit")
        record = self.record.to_dict()
        changes = [change.spec for change in self.changes]
        metadata = json.dumps({"format": FORMAT, "record": record, "changes": changes})
        # Changes may share memory, which safetensors refuses to save: clone.
        tensors = {
            f"{i}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for i, change in enumerate(self.changes)
            for name, tensor in change.tensors.items()
        }
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, {"expunge": metadata}))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit.

        Raises:
            ExpungeError: the file is missing, cut short, not an edit, or contains NaN or infinity.
        """
        header = read_header(path)
        text = header.get("__metadata__", {}).get("expunge")
        if text is None:
            raise ExpungeError(f"{path} is a safetensors file, but not an edit")
        try:
            data = parse_json(text)
            # A kind of change that is not known here came with a later version, too.
            if data["format"] > FORMAT or not all(c["kind"] in KINDS for c in data["changes"]):
                raise ExpungeError(f"{path} was written by a newer expunge; this one cannot read it")
            # Copied: in the file they lie at odd places, where products round otherwise than in memory
            # that was asked for, and a loaded edit must draw what the one that was saved drew.
            tensors = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
            changes = tuple(
                build_change(
                    spec, {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
                )
                for i, spec in enumerate(data["changes"])
            )
            record = Record.from_dict(data["record"])
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            # ExpungeError is a ValueError: one that says more must not be wrapped.
            if isinstance(error, ExpungeError) and str(path) in str(error):
                raise
            raise ExpungeError(f"{path} is not a whole edit: {error}") from error
        require_finite(changes, str(path))
        return cls(changes, record)


def read_versions() -> dict[str, str]:
    """Return the versions of expunge and the libraries that an edit depends on."""
    others = ("torch", "diffusers", "transformers")
    return {"expunge": __version__, **{name: importlib.metadata.version(name) for name in others}}
