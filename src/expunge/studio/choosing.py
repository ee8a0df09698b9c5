"""What a session chooses, and what can be said of it before any work."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import format_bytes
from expunge.base.shipped import DEFAULT_MODEL
from expunge.checkpoints.pace import format_duration
from expunge.cli import concept_files
from expunge.evaluation.forecast import Forecast
from expunge.problem import Concept, normalize_name
from expunge.studio import choice, recipes, uploads
from expunge.studio.choice import Choice, View
from expunge.studio.knowledge import Knowledge, notes_on
from expunge.studio.models import Models


@dataclass(frozen=True)
class Foresight:
    """What can be said before the work."""

    memory: str = ""
    time: str = ""
    notes: tuple[str, ...] = ()
    """What may move with it, and names to look at again."""
    problem: str = ""
    """Why it cannot be done as it is; "" where it can."""
    forecast: Forecast | None = None
    """How far other names will move, once that is known."""


class Choosing:
    """A choice that is changed step by step; a change that does not fit leaves it as it was.

    Args:
        models: what may be chosen.
        folder: the session's own.
        first: the model to begin with.
    """

    models: Models
    folder: Path

    def __init__(self, models: Models, folder: Path, first: str = DEFAULT_MODEL) -> None:
        self.models, self.folder = models, folder
        self.marks: Counter[str] = Counter()
        """How often each part of the session has changed: what a page shows it by."""
        self.forecast: tuple[Choice, Forecast] | None = None
        """The last forecast, and what it is of."""
        self.choice: Choice = Choice(first, preset=recipes.presets(recipes.FIRST, first)[0].name)

    @property
    def knowledge(self) -> Knowledge:
        """What is known of the chosen model."""
        return self.models.knowledge(self.choice.model)

    @property
    def sketch(self) -> tuple[str, View]:
        """The model, and what of the choice it draws before there is an edit."""
        prompts = self.knowledge.prompts(self.choice.concepts, self.choice.retain)
        return self.choice.model, View(tuple(prompts), 0, 1)

    def take_model(self, name: str, config: str = "") -> None:
        """Take another model, which has been checked: concepts are chosen anew."""
        if name != self.choice.model:
            preset = recipes.presets(self.choice.method, name)[0].name
            self._choose(model=name, config=config, concepts=(), retain=(), preset=preset, view=View())
        elif config != self.choice.config:
            self._choose(config=config)

    def choose(self, names: Sequence[str]) -> None:
        """Choose what to erase by name; what is known of a name is proposed with it.

        Raises:
            ExpungeError: a name is empty, there twice, or to be retained.
        """
        if list(names) == [concept.name for concept in self.choice.concepts]:
            return  # a page tells of what it was told, too
        there = {normalize_name(concept.name): concept for concept in self.choice.concepts}
        found = [there.get(normalize_name(name)) or self.knowledge.propose(name) for name in names]
        self._set_concepts(found, proposing=True)

    def change(self, name: str, **values: Any) -> None:
        """Change a chosen concept's anchor, kind or synonyms.

        Raises:
            ExpungeError: it is not chosen, or a value does not fit.
        """
        if normalize_name(name) not in [
            normalize_name(concept.name) for concept in self.choice.concepts
        ]:
            raise UnknownNameError(
                "chosen concept", name, [concept.name for concept in self.choice.concepts]
            )
        changed = [
            dataclasses.replace(concept, **values)
            if normalize_name(concept.name) == normalize_name(name)
            else concept
            for concept in self.choice.concepts
        ]
        if tuple(changed) != self.choice.concepts:
            self._set_concepts(changed)

    def choose_list(self, path: str | Path) -> None:
        """Choose the concepts, and what stays, of a file: .txt, .csv or .toml.

        Raises:
            ExpungeError: it is no such file, too large, or a line does not fit.
        """
        checked = uploads.check(path, uploads.LISTS)
        try:
            concepts, retain = concept_files.read_concepts(checked)
        except ExpungeError as error:
            raise ExpungeError(str(error).replace(str(checked), checked.name)) from None
        if retain:
            self._choose(retain=retain)
        self._set_concepts(concepts, proposing=not retain)

    def choose_text(self, text: str) -> None:
        """Choose the concepts of a pasted list, one a line: NAME|SYNONYM=ANCHOR, KIND.

        Raises:
            ExpungeError: a line does not fit.
        """
        if not text.strip():
            raise ExpungeError("the list is empty: write one concept a line")
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / "pasted.txt"
        place.write_text(text, encoding="utf-8")
        try:
            self.choose_list(place)
        except ExpungeError as error:
            raise ExpungeError(
                str(error).replace("pasted.txt, ", "").replace("pasted.txt", "the list")
            ) from None
        finally:
            place.unlink(missing_ok=True)

    def retain(self, names: Sequence[str]) -> None:
        """Say what must stay.

        Raises:
            ExpungeError: one of them is to be erased, or empty.
        """
        if tuple(names) == self.choice.retain:
            return
        trial = dataclasses.replace(self.choice, retain=tuple(dict.fromkeys(names)))
        if trial.concepts:
            trial = dataclasses.replace(trial, retain=trial.problem.retain)
        self._choose(retain=trial.retain)

    def choose_method(self, method: str, preset: str | None = None) -> None:
        """Choose how to erase; without a preset, the first that fits the model and the kind.

        Raises:
            ExpungeError: there is no such method or preset.
        """
        recipes.check_preset(method, preset or "")
        if preset is None:
            kind = recipes.kind_of(self.choice.concepts)
            preset = recipes.presets(method, self.choice.model, kind)[0].name
        self._choose(method=method, preset=preset)

    def choose_seed(self, seed: int) -> None:
        """Choose the number that all random choices follow from.

        Raises:
            ExpungeError: it is no whole number of the right size.
        """
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ExpungeError(f"a seed is a whole number from 0 to below 2**63, not {seed!r}")
        self._choose(seed=seed)

    def _set_concepts(self, concepts: Sequence[Concept], proposing: bool = False) -> None:
        trial = dataclasses.replace(self.choice, concepts=tuple(concepts))
        if proposing:
            before = self.knowledge.stay([concept.name for concept in self.choice.concepts])
            own = [name for name in self.choice.retain if name not in before]
            names = [concept.name for concept in concepts]
            erased = {normalize_name(name) for concept in concepts for name in concept.names}
            stay = [n for n in (*own, *self.knowledge.stay(names)) if normalize_name(n) not in erased]
            trial = dataclasses.replace(trial, retain=tuple(dict.fromkeys(stay)))
        if trial.concepts:
            _ = trial.problem  # says what is wrong with it
        self._choose(concepts=trial.concepts, retain=trial.retain, view=View())
        if proposing:
            self.choose_method(self.choice.method, None)

    def _choose(self, **values: Any) -> None:
        self.choice = dataclasses.replace(self.choice, **values)
        self.marks["choice"] += 1
        with contextlib.suppress(ExpungeError):  # a full disk is told where something is asked of it
            self.save()

    def foresee(self) -> Foresight:
        """What the chosen erasure will take, and what may move with it."""
        try:
            problem = self.choice.problem
            method = recipes.build(self.choice.method, self.choice.preset)
            loaded = self.models.ready(self.choice.model)
            pairs = problem.overlaps()
            notes = [
                f"“{other}” shares words with “{name}” and may change with it."
                for name, other in pairs[:4]
            ]
            if len(pairs) > 4:
                notes.append(f"{len(pairs) - 4} more names share words with an erased one.")
            if not method.reads_anchor and any(concept.anchor for concept in problem.erase):
                notes.append("This method, as it is set, reads no “becomes”: the model chooses.")
            if loaded is None:
                return Foresight(notes=tuple(notes))
            method.check_family(type(loaded.model))
            problem = problem.with_anchors(loaded.model.anchors)
            with loaded.lock:
                notes = [*notes_on(loaded.asked, self.knowledge, problem.erase), *notes]
                loaded.asked.require_window([*problem.retain, *(c.anchor or "" for c in problem.erase)])
                memory, seconds = loaded.foresee(method, problem)
        except ExpungeError as error:
            return Foresight(problem=str(error))
        told = (
            "this method does not say how long it takes"
            if seconds is None
            else f"about {format_duration(seconds)}"
        )
        known = self.forecast[1] if self.forecast and self.forecast[0] == self.forecast_key else None
        memory_told = f"{format_bytes(memory)} of weights in memory"
        return Foresight(memory_told, told, tuple(notes), forecast=known)

    @property
    def forecast_key(self) -> Choice:
        """What a forecast follows from: the choice, however it is looked at."""
        return dataclasses.replace(self.choice, view=View())

    @property
    def edit_path(self) -> Path:
        """Where the session's edit lies, if it has one."""
        return self.folder / "edit.safetensors"

    def save(self, *, carry: bool = False) -> Path:
        """Write `studio.json`: everything that opens this session again.

        Args:
            carry: whether to put the edit in it, for another machine.

        Raises:
            ExpungeError: it cannot be written.
        """
        name, edit = ("studio.json", None) if not carry else ("share/studio.json", self.edit_path)
        return choice.write(self.choice, self.folder / name, edit)
