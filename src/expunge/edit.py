"""An edit: the changes that erase something, and where they come from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from expunge import cluster, fingerprint, registry
from expunge.changes import (
    KINDS,
    Applied,
    Change,
    Changes,
    base_parameter,
    check_fit,
    check_numbers,
    content,
    from_spec,
)
from expunge.errors import ExpungeError, ExpungeWarning, listed
from expunge.fields import build
from expunge.files import read_header, replacing
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.run import Progress, Run, quiet
from expunge.work import opened

FORMAT = 1
"""The version of the file's record."""


@dataclass(frozen=True)
class Record:
    """Where an edit comes from."""

    method: str
    fields: Mapping[str, Any]
    problem: Problem
    model: str
    """The name of the base model."""
    base: str
    """The hash of the base model's parameters that change."""
    seed: int
    seconds: float
    versions: Mapping[str, str]
    family: str = ""
    """The base model's family; none in older edits."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**data, "problem": Problem.from_dict(data["problem"])})

    @property
    def reads_anchor(self) -> bool:
        """Whether it mattered to the method what a concept becomes; True for one not known here."""
        try:
            return bool(build(registry.get("methods", self.method), self.fields).reads_anchor)
        except ExpungeError:
            return True


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes to a model, with their record. One `.safetensors` file.

    >>> edit = Edit.load("no-airplane.safetensors")  # doctest: +SKIP
    >>> edit.record.problem.erase[0].name            # doctest: +SKIP
    'airplane'
    """

    changes: Changes
    record: Record

    @property
    def hash(self) -> str:
        """The hash of what the edit does; its record plays no part in it."""
        digest = hashlib.sha256()
        for change in self.changes:
            digest.update(json.dumps(change.spec, sort_keys=True).encode())
            for name, tensor in sorted(change.tensors.items()):
                digest.update(name.encode() + content(tensor))
        return digest.hexdigest()

    def require_family(self, family: type[Model]) -> None:
        """Check that the edit is for models of this family.

        Raises:
            ExpungeError: it is for those of another.
        """
        if self.record.family not in ("", family.__name__):
            raise ExpungeError(
                f"the edit does not fit: it is for {self.record.family}, and this model is"
                f" {family.__name__}"
            )

    def fits(self, model: Model | Any) -> bool:
        """Whether the edit was made from just these weights; half-precision copies count as them.

        Raises:
            ExpungeError: the model is of another family, or a layer is missing or has another shape:
                the edit cannot be applied.
        """
        root = model.pipe if isinstance(model, Model) else model
        if isinstance(model, Model):
            self.require_family(type(model))
        check_fit(root, self.changes)
        return same_base(base(model), places(self.changes), self.record.base)

    def apply(self, pipe: Model | Any) -> Applied:
        """Lay the edit on a diffusers pipeline (or a model) until `remove()` takes it off.

        Edits stack; take them off in reverse. Changes that are weights are then saved with
        the pipeline by `save_pretrained`.

        >>> applied = edit.apply(pipe)  # doctest: +SKIP
        >>> applied.remove()            # doctest: +SKIP

        Raises:
            ExpungeError: a layer is missing or has another shape.
        """
        root = pipe.pipe if isinstance(pipe, Model) else pipe
        if not self.fits(pipe):
            warnings.warn(
                f"the edit was made from other weights ({self.record.model or 'unnamed'});"
                " it fits, but it may erase less or harm more",
                ExpungeWarning,
                stacklevel=2,
            )
        return Applied(root, self.changes)

    def save(self, path: str | Path) -> None:
        """Write the edit to one `.safetensors` file; an older file stays until it is complete.

        Raises:
            ExpungeError: the file cannot be written, or the edit holds nan or infinity.
        """
        check_numbers(self.changes, "the edit")
        record = dataclasses.asdict(self.record)
        changes = [change.spec for change in self.changes]
        metadata = json.dumps({"format": FORMAT, "record": record, "changes": changes})
        # Cloned: a file cannot hold two tensors that share their memory, and changes may.
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
            ExpungeError: the file is missing, cut short, is not an edit, or holds nan or infinity.
        """
        header = read_header(path)
        text = header.get("__metadata__", {}).get("expunge")
        if text is None:
            raise ExpungeError(f"{path} is a safetensors file, but not an edit")
        try:
            data = json.loads(text)
            if data["format"] > FORMAT or not all(c["kind"] in KINDS for c in data["changes"]):
                raise ExpungeError(f"{path} was written by a newer expunge; this one cannot read it")
            tensors = safetensors.torch.load_file(path)
            changes = tuple(
                from_spec(
                    spec, {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
                )
                for i, spec in enumerate(data["changes"])
            )
            record = Record.from_dict(data["record"])
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            if isinstance(error, ExpungeError):
                raise
            raise ExpungeError(f"{path} is not a whole edit: {error}") from error
        check_numbers(changes, str(path))
        return cls(changes, record)


def erase(
    model: Model,
    problem: Problem,
    method: Method | str = "uce",
    *,
    seed: int = 0,
    progress: Progress = quiet,
    work: str | Path | None = None,
    ray: str = "",
) -> Edit:
    """Find the edit that erases a problem's concepts from a model. The model stays as it is.

    >>> edit = erase(model, Problem(erase=(Concept("airplane"),)), "uce")  # doctest: +SKIP

    Args:
        model: the model to erase from.
        problem: what to erase and what to retain; anchors left open are the model's choice.
        method: a method with its fields set, or the name of one.
        seed: the number all random choices follow from.
        progress: told what is done.
        work: a folder in which finished concepts are kept. The same call goes on from there if it
            was cut short, killed or not, and ends with the same edit. `work.discard` takes it away
            once the edit is saved.
        ray: the address of a Ray cluster to spread concepts over: HOST:PORT, ray://HOST:PORT,
            "auto", or "local" for one started on this machine; "" works here.

    Raises:
        ExpungeError: no such method, a name that the model cannot read, a work folder of another
            command, or a cluster that does not answer.
    """
    cluster.check(ray)
    if isinstance(method, str):
        method = registry.get("methods", method)()
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a Method with its fields set, or the name of one, not {method!r}"
        )
    problem = problem.with_anchors(model.anchors)
    anchors = (concept.anchor for concept in problem.erase if concept.anchor)
    prompts = [*(n for concept in problem.erase for n in concept.names), *anchors, *problem.retain]
    model.require_window(prompts)
    model.require_words(prompts)
    method.check_family(type(model))
    _warn_of_overlaps(problem)
    read = base(model)
    command: dict[str, Any] = {
        "method": type(method).__module__.rpartition(".")[2],
        "fields": dataclasses.asdict(method),
        "problem": dataclasses.asdict(problem),
        # What was finished with one model is not gone on with in another: all of it counts.
        "model": fingerprint.of_model(model) if work is not None else "",
        "seed": seed,
    }
    if named := _files(command["fields"]):
        command["files"] = named
    start = time.monotonic()
    with opened(work, command) as folder:
        run = Run(seed, progress, folder, ray)
        changes: tuple[Change, ...] = tuple(method.fit(model, problem, run))
    record = Record(
        method=command["method"],
        fields=command["fields"],
        problem=problem,
        model=model.name,
        base=base_hash(read, places(changes)),
        seed=seed,
        seconds=round(time.monotonic() - start, 3),
        versions=versions(),
        family=type(model).__name__,
    )
    return Edit(changes, record)


def _files(fields: Mapping[str, Any]) -> dict[str, str]:
    """The hash of every file that a field names: with other words in it, the command is another one.

    Folders are left out: who mends a picture in one goes on with what was finished.
    """
    found = {}
    for name, value in fields.items():
        with contextlib.suppress(OSError):  # who reads it says what is wrong with it
            if isinstance(value, str) and (file := Path(value)).is_file():
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _warn_of_overlaps(problem: Problem) -> None:
    """Say, in one sentence, which names may change with an erased one because they have its words."""
    pairs = problem.overlaps()
    if pairs:
        of = dict.fromkeys(problem.retain, "retained")
        shown = [f"{name!r} in {other!r} ({of.get(other, 'erased too')})" for name, other in pairs]
        warnings.warn(
            f"names that share words with an erased one may change with it: {listed(shown, 3)}",
            ExpungeWarning,
            stacklevel=3,
        )


Read = Callable[[str, str], torch.Tensor]
"""Gives a layer's parameter, by the names of both."""


def base(model: Model | Any) -> Read:
    """Reads the parameters of a model or a pipeline, beneath whatever lies on them."""
    root = model.pipe if isinstance(model, Model) else model
    if isinstance(model, Model) and model.stored:
        return model.stored
    return lambda layer, parameter: base_parameter(root, layer, parameter)


def base_hash(read: Read, places: Iterable[tuple[str, str]]) -> str:
    """The hash of some parameters, named by layer and parameter, as rounded to float16.

    The rounding lets the half-precision variant of a model count as the model itself.
    """
    digest = hashlib.sha256()
    for layer, parameter in sorted(places):
        tensor = read(layer, parameter)
        digest.update(f"{layer}.{parameter}".encode() + content(tensor.to(torch.float16)))
    return digest.hexdigest()


def same_base(read: Read, places: Iterable[tuple[str, str]], base: str) -> bool:
    """Whether a hash is that of some parameters, or of these in bfloat16, where edits are made, too."""
    places = tuple(places)
    if base_hash(read, places) == base:
        return True
    return base_hash(lambda *place: read(*place).to(torch.bfloat16), places) == base


def places(changes: Changes) -> set[tuple[str, str]]:
    """The parameters that changes take the place of."""
    return {(layer, change.parameter) for change in changes for layer in change.layers}


def versions() -> dict[str, str]:
    """The versions of what an edit hangs on."""
    return {
        name: importlib.metadata.version(name)
        for name in ("expunge", "torch", "diffusers", "transformers")
    }
