"""Find the edit that erases a problem's concepts from a model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge import fingerprint
from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError, join_names
from expunge.base.fields import build_from_record, flatten
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import Change, Changes
from expunge.checkpoints.load import load
from expunge.edit import Edit, Record, read_versions
from expunge.erasing.moved_share import measure_moved
from expunge.erasing.onto import add_constraints, join_problem
from expunge.fingerprint import hash_base, list_places, make_base_reader
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem, normalize_name
from expunge.runtime import ray_backend
from expunge.runtime.context import RunContext
from expunge.runtime.work_dir import open_work_dir


def erase(
    model: Model | Any,
    problem: Problem,
    method: Method | str = "uce",
    *,
    seed: int = 0,
    progress: Progress = ignore_progress,
    work: str | Path | None = None,
    ray: str = "",
    onto: Edit | None = None,
) -> Edit:
    """Find the edit that erases a problem's concepts from a model. The model stays as it is.

    >>> edit = erase(model, Problem(erase=(Concept("airplane"),)), "uce")  # doctest: +SKIP

    Args:
        model: the model to erase from, or a diffusers pipeline as it is.
        problem: what to erase and what to retain; the model chooses anchors that are left open.
        method: a method with its fields set, or the name of one.
        seed: the seed of all random numbers.
        progress: called with what is done.
        work: a work folder, in which finished parts are saved. If the call is interrupted or killed,
            the same call resumes there and ends with the same edit. Delete it with `work_dir.remove`
            once the edit is saved.
        ray: the address of a Ray cluster to spread the work over: HOST:PORT, ray://HOST:PORT,
            "auto", or "local" to start one on this machine; "" runs in this process.
        onto: an earlier edit of the model that is built on: what it erases stays erased, what it
            retains stays, and the edit that is returned does both. See `erasing.onto`.

    Returns:
        The edit, with its record.

    Raises:
        ExpungeError: there is no such method, the model is a name or a path, its family is not known, it
            cannot read a name, the work folder belongs to another call, the cluster does not answer, or
            `onto` is of other weights, has gates, or rules out what is asked for.
        TypeError: `method` is neither a Method nor a name.
    """
    ray_backend.check_address(ray)
    model = as_model(model)
    if isinstance(method, str):
        method = registry.get("methods", method)()
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a Method with its fields set, or the name of one, not {method!r}"
        )
    # First of all: the record must hold the anchors that were used, and they are checked like names.
    problem = asked = problem.with_anchors(model.anchors)
    if onto is not None:
        problem = add_constraints(problem, onto)
        _require_base(model, onto)
        if not method.reads_retain:
            warnings.warn(
                f"{type(method).__name__} reads nothing to retain: what the earlier edit erases may come"
                " back",
                ExpungeWarning,
                stacklevel=2,
            )
    anchors = (concept.anchor for concept in problem.erase if concept.anchor)
    prompts = [*(n for concept in problem.erase for n in concept.names), *anchors, *problem.retain]
    model.require_window(prompts)
    model.require_words(prompts)
    method.check_family(type(model))
    _warn_of_overlaps(problem)
    # Without edits that are applied: the record tells which base weights the changes take the place of.
    read = make_base_reader(model)
    command: dict[str, Any] = {
        "method": registry.name_of("methods", type(method)),
        "fields": flatten(method),
        "problem": dataclasses.asdict(problem),
        # Parts that were computed with another model must not be resumed, so all of the model counts.
        "model": fingerprint.hash_model(model) if work is not None else "",
        "seed": seed,
    }
    if named := _hash_files(command["fields"]):
        command["files"] = named
    if onto is not None:
        command["onto"] = onto.hash
    # Once two calls have the same command, the second may resume the work of the first.
    start = time.monotonic()
    with open_work_dir(work, command) as folder:
        run = RunContext(seed, progress, folder, ray)
        with model.using(onto) if onto is not None else contextlib.nullcontext():
            changes: tuple[Change, ...] = tuple(method.fit(model, problem, run))
    seconds = round(time.monotonic() - start, 3)
    if onto is not None:
        changes = (*onto.changes, *changes)
    record = Record(
        method=command["method"],
        fields=command["fields"],
        problem=join_problem(asked, onto.record.problem) if onto is not None else problem,
        model=model.name,
        base=hash_base(read, list_places(changes)),
        seed=seed,
        seconds=seconds,
        versions=read_versions(),
        family=type(model).__name__,
        moved=_measure_moved(model, method, problem, changes),
        onto=onto.record if onto is not None else None,
        onto_changes=len(onto.changes) if onto is not None else 0,
    )
    return Edit(changes, record)


def _measure_moved(model: Model, method: Method, problem: Problem, changes: Changes) -> dict[str, float]:
    """Measure how far the concepts moved toward their anchors, where the method says that it shows."""
    where = method.measured_in
    if not where or (where == "predictions" and model.stored):
        return {}
    concepts = problem.erase
    if not method.reads_anchor:  # away from the concept, whatever the problem says
        concepts = tuple(dataclasses.replace(concept, anchor="") for concept in concepts)
    return measure_moved(model, changes, concepts, where)


def restore_concept(
    model: Model | Any, edit: Edit, name: str, *, progress: Progress = ignore_progress
) -> Edit:
    """Find the edit that erases all that an edit does but for one concept.

    The recorded problem is solved again without the concept, with the same fields and seed, and so is
    every problem that was solved onto it later: the edit is, to the last bit, the one that would have
    been made had the concept never been asked for.

    Args:
        model: the model that the edit was made from, or a diffusers pipeline as it is.
        edit: the edit.
        name: of the concept, or one of its synonyms; all its names come back.
        progress: called with what is done.

    Raises:
        ExpungeError: the edit erases no such concept, or nothing else; the model has other weights; or
            a method in question is trained or unknown here, so that it cannot be solved again.
    """
    model = as_model(model)
    wanted = normalize_name(name)
    names = {normalize_name(n): c for c in edit.record.problem.erase for n in c.names}
    if wanted not in names:
        raise UnknownNameError("concept in this edit", name, names)
    concept = names[wanted]
    if len(edit.record.problem.erase) == 1:
        raise ExpungeError(f"the edit erases nothing but {concept.name!r}: leave the edit out instead")
    _require_base(model, edit)
    # From the newest record down to the one that has the concept: these are solved again.
    again, record, changes = [], edit.record, tuple(edit.changes)
    while True:
        again.append(record)
        changes = changes[: record.onto_changes]
        if record.onto is None or concept not in record.onto.problem.erase:
            break
        record = record.onto
    built = Edit(changes, record.onto) if record.onto is not None else None
    methods = [_require_closed_form(one) for one in again]
    for one, method in zip(reversed(again), reversed(methods), strict=True):
        before = one.onto.problem.erase if one.onto is not None else ()
        own = tuple(c for c in one.problem.erase if c not in before and c != concept)
        if own:
            problem = dataclasses.replace(one.problem, erase=own)
            built = erase(model, problem, method, seed=one.seed, progress=progress, onto=built)
    if built is None:  # a concept is left, so something was solved or kept
        raise TypeError("built must be an Edit, not None")
    return built


def _require_closed_form(record: Record) -> Method:
    """Return the method of a record, which must be solved from text alone.

    Raises:
        ExpungeError: it is trained, or not known here.
    """
    if record.method == "merge":
        raise ExpungeError("the edit was merged from others: undo the concept in the one that erases it")
    method = build_from_record(registry.get("methods", record.method), record.fields)
    cost = method.estimate_cost(record.problem, 1)
    if cost is None or not cost.text_only:
        raise ExpungeError(
            f"{record.method} draws or trains, so its problem is not solved again at once: erase the"
            " other concepts anew"
        )
    return method


def _require_base(model: Model, edit: Edit) -> None:
    """Check that an edit was made from this model.

    Raises:
        ExpungeError: it was made from other weights.
    """
    if not edit.fits(model):
        raise ExpungeError(
            f"the edit was made from other weights ({edit.record.model or 'unnamed'}): give the model"
            " that it was made from"
        )


def as_model(pipe: Model | Any) -> Model:
    """Return a diffusers pipeline as a model; a model is returned as it is.

    Raises:
        ExpungeError: it is a name or a path, or a pipeline of no known family.
    """
    if isinstance(pipe, Model):
        return pipe
    if isinstance(pipe, (str, Path)):
        raise ExpungeError(
            f"a model or a diffusers pipeline is expected, not {str(pipe)!r}: load it first, with"
            f" expunge.load({str(pipe)!r})"
        )
    return load(pipe)


def _hash_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of every file that a field names: a changed file makes it another command.

    Folders are left out, so that a user may mend one image of many and resume.
    """
    hashes = {}
    for name, value in fields.items():
        with contextlib.suppress(OSError):  # the method that reads the file reports the error
            if isinstance(value, str) and (file := Path(value)).is_file():
                hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def _warn_of_overlaps(problem: Problem) -> None:
    """Warn of names that contain the words of an erased one, and so may change with it."""
    pairs = problem.overlaps()
    if pairs:
        of = dict.fromkeys(problem.retain, "retained")
        shown = [f"{name!r} in {other!r} ({of.get(other, 'erased too')})" for name, other in pairs]
        warnings.warn(
            f"names that share words with an erased one may change with it: {join_names(shown, 3)}",
            ExpungeWarning,
            stacklevel=3,
        )
