"""Find the edit that erases a problem's concepts from a model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge import fingerprint
from expunge.base import registry
from expunge.base.errors import ExpungeWarning, listed
from expunge.base.fields import flatten
from expunge.base.quiet import Progress, quiet
from expunge.changes import Change
from expunge.edit import Edit, Record
from expunge.fingerprint import base, base_hash, places
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime import ray_backend
from expunge.runtime.context import RunContext
from expunge.runtime.work_dir import opened


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
    ray_backend.check(ray)
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
        "fields": flatten(method),
        "problem": dataclasses.asdict(problem),
        # What was finished with one model is not gone on with in another: all of it counts.
        "model": fingerprint.of_model(model) if work is not None else "",
        "seed": seed,
    }
    if named := _files(command["fields"]):
        command["files"] = named
    start = time.monotonic()
    with opened(work, command) as folder:
        run = RunContext(seed, progress, folder, ray)
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

    Folders are left out: who mends an image in one goes on with what was finished.
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


def versions() -> dict[str, str]:
    """The versions of what an edit hangs on."""
    return {
        name: importlib.metadata.version(name)
        for name in ("expunge", "torch", "diffusers", "transformers")
    }
