"""One user's way through the studio: choose, foresee, erase, look, judge, attack, take away.

Knows nothing of browsers: what is shown, and how, stands in `page`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.edit import Edit
from expunge.studio import choice, looking, recipes, uploads, working
from expunge.studio.choice import Choice, View
from expunge.studio.choosing import Choosing
from expunge.studio.jobs import Desk, Job
from expunge.studio.looking import Pair
from expunge.studio.models import Models
from expunge.studio.strength import STRONGEST

PREVIEW = "Previewing"
"""What the job of a preview is called."""


@dataclass(frozen=True, eq=False)
class Made:
    """An edit, and what it was made from."""

    edit: Edit
    model: str

    @property
    def names(self) -> list[str]:
        """The names of what it erases."""
        return [concept.name for concept in self.edit.record.problem.erase]


class Session(Choosing):
    """One user's choice and what came of it.

    Args:
        name: tells it from others.
        models: what may be chosen.
        desk: does its work.
        folder: its own.
        first: the model to begin with.
    """

    name: str
    desk: Desk
    choice: Choice

    def __init__(self, name: str, models: Models, desk: Desk, folder: Path, first: str) -> None:
        super().__init__(models, folder, first)
        self.name, self.desk = name, desk
        self.made: Made | None = None
        self.pairs: list[Pair] = []
        self.verdict: working.Verdict | None = None
        self.rungs: list[working.Rung] = []
        self.taken: working.Taken | None = None
        self._foreseen: tuple[tuple[str, View] | None, Choice] | None = None
        self._now: tuple[tuple[str, View] | None, list[Any]] = None, []
        """What the model draws of a choice as it is, and of which."""
        self.job: Job | None = None
        """The last piece of work."""
        with contextlib.suppress(ExpungeError):  # one that cannot be read any more begins anew
            self._restore()

    def choose_model(self, name: str, config: str = "") -> Job:
        """Take another model: it is checked now, and loaded by the job.

        Args:
            name: the model's.
            config: for a single file, a folder or hub id of a model built like it.

        Raises:
            ExpungeError: there is none of that name, it does not fit the memory, or work is under way.
        """
        name, config = name.strip(), config.strip()
        self.models.check(name)
        self.models.use_config(name, config)
        job = self._start("Loading", lambda job: self.models.get(name, job))
        self.take_model(name, config)
        return job

    # Erase.

    def erase(self) -> Job:
        """Erase what is chosen, and draw the first pairs. Called off, it goes on from there next time.

        Raises:
            ExpungeError: nothing is chosen, it cannot be done as it is, or other work is under way.
        """
        if problem := self.foresee().problem:
            raise ExpungeError(problem)
        chosen = self.choice
        method = recipes.build(chosen.method, chosen.preset)

        def work(job: Job) -> Made:
            loaded = self.models.get(chosen.model, job)
            problem = chosen.problem.with_anchors(loaded.model.anchors)
            self.folder.mkdir(parents=True, exist_ok=True)
            place = self._work_folder(chosen)
            edit = working.erase_in(job, loaded, problem, method, chosen.seed, place)
            edit.save(self.edit_path)
            shutil.rmtree(place, ignore_errors=True)
            self._set_made(Made(edit, chosen.model))
            self._set_pairs(looking.draw_pairs(loaded.model, edit, self._view(), job))
            return Made(edit, chosen.model)

        return self._start("Erasing", work)

    @property
    def unfinished(self) -> bool:
        """Whether the chosen erasure was begun before and goes on where it was."""
        return self._work_folder(self.choice).is_dir()

    def _work_folder(self, chosen: Choice) -> Path:
        told = dataclasses.asdict(dataclasses.replace(chosen, view=View()))
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return self.folder / "work" / digest[:16]

    def _set_made(self, made: Made) -> None:
        self._begin(made)
        with contextlib.suppress(ExpungeError):
            self.save()

    def _begin(self, made: Made | None) -> None:
        """Go on with an edit, or with none; what came of the last one is forgotten."""
        self.made, self.pairs, self.verdict, self.rungs, self.taken = made, [], None, [], None
        # Last: a page that looks in between must look again.
        self.marks.update(("made", "pairs", "verdict", "rungs", "taken"))

    def _set_pairs(self, pairs: list[Pair]) -> list[Pair]:
        self.pairs = pairs
        self.marks["pairs"] += 1
        return pairs

    def _view(self) -> View:
        """What to draw: what was asked, or what is proposed for what is erased."""
        view = self.choice.view
        return view if view.prompts else dataclasses.replace(view, prompts=tuple(self.prompts))

    @property
    def prompts(self) -> list[str]:
        """What is proposed to look at."""
        problem = self.made.edit.record.problem if self.made else None
        concepts = problem.erase if problem else self.choice.concepts
        return self.knowledge.prompts(concepts, problem.retain if problem else self.choice.retain)

    # See what it draws now.

    def preview(self) -> Job | None:
        """Forecast what the choice will move, and draw what the model makes of it as it is.

        That is done once for each choice, if nothing else is to be done; any other work of the session
        takes its place. Once there is an edit, its images stand where these would.
        """
        chosen, loaded = self.choice, self.models.ready(self.choice.model)
        idle = self.job is None or not self.job.active or self.job.label == PREVIEW
        if loaded is None or not idle or self.foresee().problem:
            return None
        of = self.sketch
        drawn, key = None if self.made else of, self.forecast_key
        foreseen = self.forecast is not None and self.forecast[0] == key
        if self._foreseen == (drawn, key) or (foreseen and drawn in (None, self._now[0])):
            return None
        self._foreseen = drawn, key
        method, known = recipes.build(chosen.method, chosen.preset), self.knowledge.names

        def work(job: Job) -> list[Any]:
            if drawn and self._now[0] != drawn:
                self._now = drawn, looking.draw_now(loaded.model, of[1], job)
            job.result = shown = self._now[1] if drawn else []
            self.forecast = key, working.forecast_in(job, loaded, chosen, method, known)
            self.marks["forecast"] += 1
            return shown

        return self._start(PREVIEW, work)

    @property
    def drawn(self) -> list[Any]:
        """What the model draws of the choice as it is, where it has been drawn."""
        return self._now[1] if self._now[0] == self.sketch else []

    # Look.

    def look(
        self, prompts: Sequence[str], *, seed: int = 0, number: int = 2, strength: float = 1.0
    ) -> Job:
        """Draw prompts before and after, at a strength.

        Args:
            prompts: what to draw.
            seed: of each prompt's first image.
            number: images of each prompt.
            strength: how much of the edit counts, 1 as it was made.

        Raises:
            ExpungeError: there is no edit yet, a number is out of range, or other work is under way.
        """
        made = self._need()
        if not 0 <= strength <= STRONGEST:
            raise ExpungeError(f"the strength must be 0 to {STRONGEST:g}, not {strength:g}")
        view = View(tuple(prompts), seed, number, strength)
        looking.probe_of(view)  # says what is wrong with it
        self._choose(view=view)

        def work(job: Job) -> list[Pair]:
            loaded = self.models.get(made.model, job)
            return self._set_pairs(looking.draw_pairs(loaded.model, made.edit, view, job))

        return self._start("Drawing", work)

    # Judge.

    @property
    def suites(self) -> list[str]:
        """The suites that can judge the edit."""
        return self.models.knowledge(self.made.model).suites_for(self.made.names) if self.made else []

    def judge(self, suite: str, amount: str = "quick") -> Job:
        """Judge the edit by a suite.

        Raises:
            ExpungeError: there is no edit yet, no such suite or size, or other work is under way.
        """
        made = self._need()
        known = self.models.knowledge(made.model).suites
        if suite not in self.suites:
            raise UnknownNameError("suite that knows what was erased", suite, self.suites)
        if amount not in working.SIZES:
            raise UnknownNameError("size", amount, working.SIZES)

        def work(job: Job) -> working.Verdict:
            model = self.models.get(made.model, job).model
            name = recipes.file_name(made.edit.record.problem)
            folder = self.folder / "report" / suite
            self.verdict = working.judge_in(job, model, made.edit, known[suite], amount, name, folder)
            self.marks["verdict"] += 1
            return self.verdict

        return self._start("Judging", work)

    # Try to get it back.

    def attack(self, attack: str, budget: float, prompt: str, *, number: int = 4, seed: int = 0) -> Job:
        """Try to bring what was erased back.

        Args:
            attack: its name.
            budget: the largest one that is tried, in the attack's own unit.
            prompt: what the attacker asks for.
            number: images at each budget.
            seed: of the images and of the attack.

        Raises:
            ExpungeError: there is no edit yet, no prompt, no such attack, or other work is under way.
        """
        made = self._need()
        if not prompt.strip():
            raise ExpungeError("write the prompt that the attack should bring back")
        working.ladder(attack, budget)  # says what is wrong with it
        suites = list(self.models.knowledge(made.model).suites.values())

        def work(job: Job) -> list[working.Rung]:
            model = self.models.get(made.model, job).model
            self.rungs = working.attack_in(
                job, model, made.edit, attack, budget, prompt, suites, number=number, seed=seed
            )
            return self.rungs

        return self._start("Attacking", work)

    # Take away.

    def take(self, form: str) -> Job:
        """Write the edit in a form to be taken away, with its card.

        Raises:
            ExpungeError: there is no edit yet, no such form, or other work is under way.
        """
        made = self._need()
        if form not in working.FORMS:
            raise UnknownNameError("form", form, working.FORMS)
        stem, report = recipes.file_name(made.edit.record.problem), None
        if self.verdict is not None and (self.verdict.folder / "results.json").is_file():
            report = self.verdict.folder

        def work(job: Job) -> working.Taken:
            folder = self.folder / "take"
            config = self.models.config(made.model)
            self.taken = working.take_in(job, made.edit, made.model, form, stem, folder, report, config)
            self.marks["taken"] += 1
            return self.taken

        return self._start("Writing", work)

    def command(self) -> str:
        """The command that does the same as this session."""
        return recipes.command(*self._recipe())

    def python(self) -> str:
        """The lines of Python that do the same as this session."""
        return recipes.python(*self._recipe())

    def _recipe(self) -> tuple[Any, ...]:
        chosen = self.choice
        return chosen.model, chosen.problem, chosen.method, chosen.preset, chosen.seed, chosen.config

    # Keep and open.

    def open(self, path: str | Path) -> None:
        """Go on from a `studio.json`, or look at an edit.

        Raises:
            ExpungeError: it is neither, too large, or broken; nothing has changed then.
        """
        checked = uploads.check(path, uploads.OPENED)
        if self.job is not None and self.job.active:
            raise ExpungeError("work is still under way here: wait for it, or cancel it")
        if checked.suffix.lower() == ".json":
            chosen, data = choice.read(checked)
            self.models.check(chosen.model)
            self.models.use_config(chosen.model, chosen.config)
            made = self._opened(data, chosen.model) if data else None
        else:
            made = self._opened(checked.read_bytes(), None)
            record = made.edit.record
            chosen = Choice(made.model, record.problem.erase, record.problem.retain, record.method)
        self.choice = chosen
        self._begin(made)
        self.marks["choice"] += 1
        if made is not None:
            made.edit.save(self.edit_path)
        self.save()

    def _opened(self, data: bytes, model: str | None) -> Made:
        """The edit in some bytes, checked as one from a stranger.

        Raises:
            ExpungeError: they are no whole edit, or its model is not here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / "opened.safetensors"
        place.write_bytes(data)
        try:
            edit = Edit.load(place)
        except ExpungeError as error:
            raise ExpungeError(str(error).replace(str(place), "the edit")) from None
        finally:
            place.unlink(missing_ok=True)
        name = model or edit.record.model
        self.models.check(name)
        return Made(edit, name)

    def _restore(self) -> None:
        path = self.folder / "studio.json"
        if not path.is_file():
            return
        self.choice, _ = choice.read(path)
        self.models.use_config(self.choice.model, self.choice.config)
        if self.edit_path.is_file():
            self.made = Made(Edit.load(self.edit_path), self.choice.model)

    # Work.

    def place(self) -> int:
        """How many pieces of others' work come before this session's; 0 where none waits."""
        return self.desk.place(self.job) if self.job and self.job.active else 0

    def cancel(self) -> None:
        """Call off what is under way; what was finished of it is kept."""
        if self.job is not None and self.job.active:
            self.desk.cancel(self.job)

    def hide_folder(self, text: str) -> str:
        """Return a sentence without the place of the session's files, which is nobody's concern."""
        return text.replace(f"{self.folder}/", "")

    def _need(self) -> Made:
        if self.made is None:
            raise ExpungeError("erase something first, or open an edit")
        return self.made

    def _start(self, label: str, work: Any) -> Job:
        if self.job is not None and self.job.active and self.job.label == PREVIEW:
            self.desk.cancel(self.job)  # it makes way
            self.job.wait(10)
        job = Job(self.name, label, work)
        self.job = self.desk.submit(job)
        self.marks["job"] += 1
        return job
