"""The pieces of work of a session: erase, attack, judge, export. Each is done inside a job."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.attack import Attack
from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.image_files import to_pil
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.cost_estimate import count_operations
from expunge.checkpoints.export import export
from expunge.checkpoints.model_card import render_card, write_card
from expunge.checkpoints.pace import Pace
from expunge.edit import Edit
from expunge.erasure import erase
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.cells import Size
from expunge.evaluation.evaluate import Report, evaluate
from expunge.evaluation.measure import make_metric
from expunge.evaluation.statistics import Estimate
from expunge.evaluation.suite import Suite
from expunge.method import Method
from expunge.metric import Classifier
from expunge.model import Model
from expunge.probe import Probe
from expunge.problem import Problem, normalize_name
from expunge.runtime.context import RunContext
from expunge.runtime.threads import SMALL, Threads
from expunge.studio.jobs import Job
from expunge.studio.looking import SHOWN, drawn
from expunge.studio.models import Loaded

GLANCE = Size(erased=4, synonyms=2, retained=2, plain=4)
"""The smallest look that a suite can take: seconds, and wide intervals."""

SIZES = {
    "glance": "A few images: seconds, and wide intervals.",
    "quick": "Enough to tell methods apart: a minute or two for the shipped model on two cores.",
    "full": "The papers' number of images: an hour or more on two cores.",
}
"""How many images a suite is judged on."""

FORMS = {
    "edit": "The edit (.safetensors): for expunge and diffusers pipelines, taken on and off at will.",
    "lora": "A LoRA for diffusers: pipe.load_lora_weights(…).",
    "comfyui": "A LoRA for ComfyUI.",
    "a1111": "A LoRA for A1111, Forge or sd-scripts.",
    "diffusers": "The whole erased model, a diffusers folder, as a .zip.",
    "safetensors": "The whole erased model as one .safetensors file, where it came as one.",
    "card": "The model card alone (.md): what was erased, how, and what that does not mean.",
}
"""What can be taken away."""


def erase_in(
    job: Job, loaded: Loaded, problem: Problem, method: Method, seed: int, folder: Path
) -> Edit:
    """Find the edit; the job hears of the time left, and can be called off at any prediction.

    Args:
        job: is told how far it is.
        loaded: the model to erase from.
        problem: what to erase, with every anchor chosen.
        method: how.
        seed: of all random numbers.
        folder: the work folder, in which a job that was called off goes on.
    """
    model = loaded.model
    work = method.estimate_cost(problem, model.num_inference_steps)
    with contextlib.ExitStack() as stack:
        progress: Any = job.progress
        if work is not None:
            threads = stack.enter_context(Threads(small=count_operations(model) < SMALL))
            pace = Pace(
                model,
                loaded.plan.count_units(work),
                loaded.plan.unit_seconds,
                loaded.plan.overhead(work),
            )
            pace.listeners += [lambda *_: threads.adjust(), _Listener(job)]
            stack.enter_context(pace)

            def progress(label: str, done: int, total: int) -> None:
                job.check()
                job.step = label
                pace.progress(label, done, total)

        else:
            stack.enter_context(stopping(model, job))
        return erase(model, problem, method, seed=seed, progress=progress, work=folder)


@dataclass(eq=False)
class _Listener:
    """Tells a job what a pace knows: the time left and the share done of the whole."""

    job: Job

    def __call__(self, left: float, done: float) -> None:
        self.job.check()
        self.job.left, self.job.share = left, done


@contextlib.contextmanager
def stopping(model: Model, job: Job) -> Iterator[None]:
    """Let a job be called off at every prediction of a model, for the length of a block."""
    hook = model.network.register_forward_pre_hook(lambda *_: job.check())
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True, eq=False)
class Rung:
    """An attack at one budget: what the edited model then draws."""

    label: str
    images: list[Any]
    seen: list[bool | None]
    """For each image whether the concept is seen in it; None where nobody can say."""


def attack_in(
    job: Job,
    model: Model,
    edit: Edit,
    attack: str,
    budget: float,
    prompt: str,
    suites: Sequence[Suite],
    *,
    number: int = 4,
    seed: int = 0,
) -> list[Rung]:
    """Try to bring the concept back, harder from rung to rung; each is there as soon as it is drawn.

    Args:
        job: hears of progress, and has the rungs so far as its result.
        model: the original.
        edit: what is attacked.
        attack: "inversion", a new word is learnt; "embedding", the prompt is moved a little.
        budget: of the last rung: training steps, or how far, as a share of each token's size.
        prompt: what calls for the concept.
        suites: to ask whether images show it.
        number: images.
        seed: of the first.

    Raises:
        ExpungeError: there is no such attack, or a number is out of range.
    """
    if not prompt.strip():
        raise ExpungeError("write the prompt that the attack should bring back")
    probe = Probe.of(prompt.strip(), number, seed)
    eye = _Eye.of(suites, edit)
    rungs: list[Rung] = []
    job.result = rungs

    def add(label: str, images: Tensor) -> None:
        nobody: list[bool | None] = [None] * len(images)
        seen = eye.seen(images) if eye else nobody
        rungs.append(Rung(label, [to_pil(one, SHOWN) for one in images], seen))

    add("Before the erasure", drawn(model, probe, job, "drawing before"))
    add("Erased", drawn(model, probe, job, "drawing after", edit.changes))
    for label, one in ladder(attack, budget):
        with stopping(model, job):
            run = RunContext(seed, job.progress)
            harder = one.run(model, edit, probe, run)
        add(label, drawn(model, harder, job, "drawing attacked", edit.changes))
    return rungs


def ladder(attack: str, budget: float) -> list[tuple[str, Attack]]:
    """The attack at a quarter of a budget and at all of it, each with what to call it.

    Raises:
        ExpungeError: there is no such attack, or the budget is not above 0.
    """
    known = ("inversion", "embedding")
    if attack not in known:
        raise UnknownNameError("attack", attack, known)
    if not 0 < budget <= 10_000:
        raise ExpungeError(f"the budget of an attack must be above 0, not {budget:g}")
    cls, found = registry.get("attacks", attack), []
    for part in (budget / 4, budget):
        if attack == "inversion":
            steps = max(1, round(part))
            found.append((f"A new word, learnt in {steps} steps", fields.build(cls, {"steps": steps})))
        else:
            one = fields.build(cls, {"radius": float(part), "batch_size": 1})
            found.append((f"The prompt moved by {100 * part:.3g} %", one))
    return found


@dataclass(frozen=True, eq=False)
class _Eye:
    """Says whether images show what an edit erases, by the judge of the first suite that knows it."""

    judge: Classifier
    labels: tuple[str, ...]
    near: tuple[str, ...]
    question: str

    @classmethod
    def of(cls, suites: Sequence[Suite], edit: Edit) -> _Eye | None:
        for suite in suites:
            for concept in edit.record.problem.erase:
                if (found := suite.find_concept(concept.name)) is None:
                    continue
                try:
                    judge = make_metric(suite.judge, dict(suite.options.get(suite.judge, {})))
                except ExpungeError:
                    continue
                if isinstance(judge, Classifier):
                    return cls(judge, found.labels, found.near, suite.question)
        return None

    def seen(self, images: Tensor) -> list[bool | None]:
        rows = self.judge.measure(images, [""] * len(images))
        answers = self.judge.score(rows, self.labels, self.near, self.question)
        broken = self.judge.find_broken(rows).tolist()
        return [
            False if lost else None if answer != answer else answer >= 0.5
            for answer, lost in zip(answers.tolist(), broken, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a suite says of an edit."""

    suite: str
    columns: tuple[str, ...]
    """The score and its terms."""
    rows: tuple[tuple[str, ...], ...]
    """The original and the edit: name, then a figure a column."""
    folder: Path
    """Where the report lies: index.html, results.json, results.csv."""
    notes: tuple[str, ...] = ()


def judge_in(
    job: Job, model: Model, edit: Edit, suite: Suite, size: str, name: str, folder: Path
) -> Verdict:
    """Judge an edit by a suite, and write the report.

    Args:
        job: is told how far it is.
        model: the original.
        edit: what is judged.
        suite: what it is judged by.
        size: one of `SIZES`.
        name: what the report calls the edit.
        folder: where the report goes; what lies there is replaced.

    Raises:
        ExpungeError: the suite knows nothing of what is erased, or there is no such size.
    """
    if size not in SIZES:
        raise UnknownNameError("size", size, SIZES)
    if size == "glance":
        suite = dataclasses.replace(suite, sizes={**suite.sizes, "quick": GLANCE})
    with stopping(model, job):
        report = evaluate(
            model, [Candidate.of(edit, name)], [suite], full=size == "full", progress=job.progress
        )
    shutil.rmtree(folder, ignore_errors=True)
    report.save(folder)
    return _verdict(report, folder, _told(edit, suite))


def _told(edit: Edit, suite: Suite) -> tuple[str, ...]:
    """What a reader should know where the method was told words that the suite holds out."""
    told = {normalize_name(name) for concept in edit.record.problem.erase for name in concept.synonyms}
    held = [s for concept in suite.concepts for s in concept.synonyms if normalize_name(s) in told]
    if not held:
        return ()
    words = ", ".join(f"“{word}”" for word in held[:3])
    return (
        f"The method was told {words}, which this suite asks as words that no method knows: its"
        " figure for synonyms says less here.",
    )


def _verdict(report: Report, folder: Path, notes: tuple[str, ...]) -> Verdict:
    case = report.cases[0]
    terms = list(dict.fromkeys(term for row in case.rows for term in row.terms))
    rows = tuple(
        (row.name, *(_figure(one) for one in (row.h, *(row.terms.get(term) for term in terms))))
        for row in case.rows
    )
    return Verdict(case.suite.name, (case.suite.score, *terms), rows, folder, notes)


def _figure(estimate: Estimate | None) -> str:
    """A number with its interval, in per cent where it is a share."""
    if estimate is None or estimate.value != estimate.value:
        return "–"
    score, scale = estimate.score, 100 if abs(estimate.value) <= 1 else 1
    return f"{scale * score.value:.0f} ({scale * score.low:.0f}–{scale * score.high:.0f})"


@dataclass(frozen=True, eq=False)
class Taken:
    """What was written to be taken away."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def take_in(
    job: Job, edit: Edit, model: str, form: str, stem: str, folder: Path, report: Path | None
) -> Taken:
    """Write an edit in one of `FORMS`, with its card.

    Args:
        job: hears what is done.
        edit: what to write.
        model: the name of the model it is for.
        form: one of `FORMS`.
        stem: what to call the file.
        folder: where to.
        report: a report whose figures the card shows.

    Raises:
        ExpungeError: there is no such form, or the edit cannot take it.
    """
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    job.step = "writing"
    shutil.rmtree(folder / form, ignore_errors=True)
    place = folder / form
    if form == "edit":
        path = place / f"{stem}.safetensors"
        edit.save(path)
        return Taken((path,), ())
    if form == "card":
        path = place / f"{stem}.md"
        place.mkdir(parents=True, exist_ok=True)
        write_card(path, render_card(edit, "edit", report=report))
        return Taken((path,), ())
    checkpoint = Checkpoint.find(model)
    if form == "diffusers":
        done = export(edit, form, checkpoint, place / stem, report=report)
        job.step = "packing"
        job.check()
        packed = Path(shutil.make_archive(str(place / stem), "zip", place, stem))
        shutil.rmtree(done.path, ignore_errors=True)
        return Taken((packed,), done.notes)
    output = place / f"{stem}{'' if form == 'safetensors' else f'-{form}'}.safetensors"
    done = export(edit, form, checkpoint, output, report=report)
    return Taken((done.path, *([done.card] if done.card else [])), done.notes)
