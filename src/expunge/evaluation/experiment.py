"""An experiment: methods × concepts × seeds, erased, judged and reported. One TOML file.

    model = "emoji"
    suites = ["object"]
    concepts = ["airplane", "bird=sky", ["cat", "dog"]]    # erased one after the other; a list together
    retain = "others"                                      # the other concepts, or a list of prompts
    seeds = [0, 1]                                         # of the edits
    full_seeds = [0, 1, 2]                                 # and at full size, where not the same
    attacks = ["embedding", "inversion"]                   # tried on each edit, at the suites' budgets

    [[methods]]
    name = "uce"
    ridge = 50.0

    [[methods]]
    name = "mace"
    preset = "emoji"                                   # values for the fields; those beside it count
    stages = ["refine"]
    title = "refinement only"                          # what the report calls it

An edit that was made is found by its file name, which contains the hash of all it depends on, and an
image in the cache. So a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.base import fields, registry
from expunge.base.errors import ExpungeError
from expunge.base.files import make_slug, read_toml
from expunge.base.quiet import Progress, ignore_progress
from expunge.base.shipped import DEFAULT_MODEL
from expunge.edit import Edit
from expunge.erasure import erase
from expunge.evaluation.attack_budgets import choose_ladders
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.report import Report
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.method import Method
from expunge.model import Model
from expunge.problem import KINDS, Concept, Kind, Problem, normalize_name
from expunge.runtime.work_dir import find_work_dir, remove


@dataclass(frozen=True)
class Job:
    """One edit to make."""

    method: Method
    method_name: str
    problem: Problem
    seed: int
    preset: str = ""
    title: str = ""

    @property
    def name(self) -> str:
        """What the report calls it: its title, or the method, its preset, and what is not as there."""
        default = type(self.method).preset(self.preset) if self.preset else type(self.method)()
        usual = fields.flatten(default)
        changed = [
            f"{name} {value}"
            for name, value in fields.flatten(self.method).items()
            if value != usual[name]
        ]
        concepts = ", ".join(concept.name for concept in self.problem.erase[:3])
        more = " …" if len(self.problem.erase) > 3 else ""
        seed = [f"seed {self.seed}"] if self.seed else []
        called = [self.title] if self.title else [f"{self.method_name} {self.preset}".rstrip(), *changed]
        return ", ".join([*called, *seed]) + f": {concepts}{more}"

    def file(self, model: Model) -> str:
        """Return the edit's file name: it changes with everything that the edit depends on."""
        record = [
            self.method_name,
            fields.flatten(self.method),
            dataclasses.asdict(self.problem),
            self.seed,
            hash_for_images(model),
        ]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        return f"{make_slug(self.name)}-{digest}.safetensors"

    def run(self, model: Model, folder: Path, progress: Progress = ignore_progress) -> Candidate:
        """Return the edit, made if it is not in the folder yet, going on where an earlier try stopped.

        Args:
            model: what to erase from.
            folder: where edits are kept.
            progress: told what is done.
        """
        file = folder / self.file(model)
        if not file.is_file():
            place = find_work_dir(file)
            edit = erase(model, self.problem, self.method, seed=self.seed, progress=progress, work=place)
            edit.save(file)
            remove(place)
        # Read back even where it was just made: both ways then judge what the file holds.
        return Candidate.of(Edit.load(file), self.name)


@dataclass(frozen=True)
class Experiment:
    """What to erase with what, and what to judge it by.

    >>> experiment = Experiment.read("experiment.toml")  # doctest: +SKIP
    """

    methods: tuple[Mapping[str, Any], ...]
    """For each method a table: its `name` and its fields; perhaps a `preset` of them, and a `title`."""
    problems: tuple[Problem, ...]
    suites: tuple[Suite, ...]
    model: str = DEFAULT_MODEL
    seeds: tuple[int, ...] = (0,)
    full: bool = False
    full_seeds: tuple[int, ...] = ()
    """The seeds of the edits at full size; by default `seeds`."""
    attacks: tuple[str, ...] = ()
    """What every edit is attacked with, "NAME", "NAME:LADDER" or "all"."""

    @classmethod
    def read(cls, path: str | Path) -> Experiment:
        """Read an experiment.

        Raises:
            ExpungeError: there is none, or something in it is wrong.
        """
        path = Path(path)
        table = read_toml(path)
        values = {k: v for k, v in table.items() if k in _Head.known()} | _rest(table)
        head = fields.build(_Head, values, "an experiment")
        suites = tuple(
            Suite.read(path.parent / name if name.lower().endswith(".toml") else name, head.model)
            for name in head.suites
        )
        methods = table.get("methods", [])
        if not methods or not all(isinstance(one, Mapping) and "name" in one for one in methods):
            raise ExpungeError(f'{path} names no method: write [[methods]] and name = "uce"')
        problems = _problems(table.get("concepts", []), table.get("retain", "others"), head.kind)
        experiment = cls(
            tuple(methods),
            problems,
            suites,
            head.model,
            head.seeds,
            head.full,
            head.full_seeds,
            head.attacks,
        )
        experiment.jobs()  # says now what is wrong with a method
        for suite in suites:
            # Wrong names are found before hours of erasing.
            choose_ladders(suite, head.attacks)
            for problem in problems:
                suite.find_erased([concept.name for concept in problem.erase])
        return experiment

    def jobs(self) -> list[Job]:
        """Return the edits to make: every method on every problem with every seed."""
        found, seeds = [], (self.full_seeds if self.full else ()) or self.seeds
        for table in self.methods:
            cls = registry.get("methods", table["name"])
            values = {k: v for k, v in table.items() if k not in ("name", "preset", "title")}
            preset, title = table.get("preset", ""), str(table.get("title", ""))
            method = cls.preset(preset, **values) if preset else fields.build(cls, values, table["name"])
            found += [
                Job(method, table["name"], problem, seed, preset, title)
                for problem in self.problems
                for seed in seeds
            ]
        return found

    def run(
        self,
        model: Model,
        folder: str | Path,
        *,
        autocast: torch.dtype | None = None,
        cache: Cache | None = None,
        progress: Progress = ignore_progress,
    ) -> Report:
        """Make the edits that are not there yet, judge them all, and write the report to `folder`.

        Args:
            model: what to erase from, in its own number format.
            folder: where edits and the report go.
            autocast: the number format to draw in when judging, as in `Model.autocasting`.
            cache: where images and numbers are kept; by default the user's cache folder.
            progress: told what is done.

        Raises:
            ExpungeError: the folder cannot be written.
        """
        folder, jobs = Path(folder), self.jobs()
        candidates = []
        for done, job in enumerate(jobs):
            progress("erasing", done, len(jobs))
            candidates.append(job.run(model, folder / "edits", progress))
        progress("erasing", len(jobs), len(jobs))
        how: Any = {"full": self.full, "attacks": self.attacks, "cache": cache, "progress": progress}
        # Only judging: edits are made in the weights' own precision, whatever draws their images.
        with model.autocasting(autocast):
            report = evaluate(model, candidates, self.suites, **how)
        report.save(folder)
        return report


@dataclass(frozen=True)
class _Head:
    """The single values of the file."""

    model: str = DEFAULT_MODEL
    suites: tuple[str, ...] = ()
    kind: Kind = "object"
    seeds: tuple[int, ...] = (0,)
    full: bool = False
    full_seeds: tuple[int, ...] = ()
    attacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields.check_fields(self)
        if not self.suites:
            raise ExpungeError('the experiment names no suite: write suites = ["object"]')
        if not self.seeds:
            raise ExpungeError("the experiment has no seeds")

    @classmethod
    def known(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)


def _rest(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that nobody knows: `fields.build` says so."""
    known = (*_Head.known(), "concepts", "retain", "methods")
    return {key: value for key, value in table.items() if key not in known}


def _problems(concepts: Any, retain: Any, kind: Kind) -> tuple[Problem, ...]:
    if not isinstance(concepts, list) or not concepts:
        raise ExpungeError('the experiment has no concepts: write concepts = ["airplane"]')
    if kind not in KINDS:
        raise ExpungeError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    groups = []
    for one in concepts:
        texts = one if isinstance(one, list) else [one]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ExpungeError(f"a concept is NAME or NAME=ANCHOR, or a list of them, not {one!r}")
        groups.append(tuple(Concept.parse(text, kind) for text in texts))
    names = list(
        {normalize_name(concept.name): concept.name for group in groups for concept in group}.values()
    )
    problems = []
    for group in groups:
        gone = {normalize_name(name) for concept in group for name in concept.names}
        if retain == "others":
            kept = [name for name in names if normalize_name(name) not in gone]
        elif isinstance(retain, list) and all(isinstance(text, str) for text in retain):
            kept = [text for text in retain if normalize_name(text) not in gone]
        else:
            raise ExpungeError(f'retain is "others" or a list of prompts, not {retain!r}')
        problems.append(Problem(group, tuple(kept)))
    return tuple(problems)
