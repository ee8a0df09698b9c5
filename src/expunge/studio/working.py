"""The pieces of work of a session: erase, attack, judge, export. Each is done inside a job."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from expunge.evaluation.cells import Cell, Size, SuiteConcept
from expunge.evaluation.evaluate import Report, evaluate
from expunge.evaluation.forecast import Forecast, forecast
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Source
from expunge.evaluation.measure import make_metric, measure, read_options
from expunge.evaluation.robustness import attack_sample
from expunge.evaluation.sample import Sample, classify, lay_out
from expunge.evaluation.statistics import Estimate
from expunge.evaluation.suite import Suite
from expunge.method import Method
from expunge.metric import Classifier
from expunge.model import Model
from expunge.problem import Problem, normalize_name
from expunge.runtime.context import RunContext
from expunge.runtime.threads import SMALL, Threads
from expunge.studio.choice import Choice
from expunge.studio.jobs import Job
from expunge.studio.looking import SHOWN
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
    "comfyui": "A LoRA for ComfyUI: it goes into models/loras.",
    "a1111": "A LoRA for A1111 and Forge (it goes into models/Lora) or sd-scripts.",
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


ASKED = 100
"""Words of the tokenizer that a forecast asks about a model of which no names are known."""


def forecast_in(
    job: Job, loaded: Loaded, chosen: Choice, method: Method, known: Sequence[str]
) -> Forecast:
    """Forecast how far other names will move with a choice.

    Args:
        job: hears of progress, and can be called off.
        loaded: the model.
        chosen: what is to be erased and retained.
        method: what will erase.
        known: the names that the model is known to draw.
    """
    return forecast(
        loaded.model,
        chosen.problem,
        method,
        neighbours=known,
        words=0 if known else ASKED,
        seed=chosen.seed,
        progress=job.progress,
    )


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

    The images are drawn, kept and judged as `evaluate` does it.

    Args:
        job: hears of progress, and has the rungs so far as its result.
        model: the original.
        edit: what is attacked.
        attack: "inversion", a new word is learnt; "embedding", the prompt is moved a little.
        budget: of the last rung: training steps, or how far, as a share of each token's size.
        prompt: what calls for the concept.
        suites: to ask whether images show it: the first whose judge knows it.
        number: images.
        seed: of the first.

    Raises:
        ExpungeError: there is no such attack, or a number is out of range.
    """
    known = _find_judge(suites, edit)
    targets = (known[2].target("erased", known[2].words),) if known else ()
    name = known[2].name if known else edit.record.problem.erase[0].name
    cell = Cell("erased", name, prompt.strip(), tuple(range(seed, seed + number)), targets)
    (sample,) = lay_out(model, [cell])
    cache = Cache(required=False)  # a full disk need not stop an attack
    original, edited = Source(model), Source(model, (edit,))
    rungs: list[Rung] = []
    job.result = rungs

    def add(label: str, source: Source, asked: Sample, step: str) -> None:
        def tell(_: str, done: int, total: int) -> None:
            job.progress(step, done, total)

        images = cache.draw(source, list(asked.requests), tell)
        seen: list[bool | None] = [None] * len(images)
        if known:
            suite, judge, _ = known
            measured = measure(cache, source, None, [asked], {suite.judge: judge})
            (told,) = classify(suite, judge, measured)
            # A nan is an answer that the judge cannot give.
            seen = [None if x != x else x >= 0.5 for x in told.seen[0].tolist()]
        rungs.append(Rung(label, [to_pil(one, SHOWN) for one in images], seen))

    with stopping(model, job):
        add("Before the erasure", original, sample, "drawing before")
        add("Erased", edited, sample, "drawing after")
        for label, one in ladder(attack, budget):
            harder = attack_sample(model, edit, one, sample, RunContext(seed, job.progress))
            add(label, edited, harder, "drawing attacked")
    return rungs


def _find_judge(suites: Sequence[Suite], edit: Edit) -> tuple[Suite, Classifier, SuiteConcept] | None:
    """Find the first suite that knows what an edit erases, with its judge; None where there is none."""
    for suite in suites:
        for erased in edit.record.problem.erase:
            if (concept := suite.find_concept(erased.name)) is None:
                continue
            try:
                judge = make_metric(suite.judge, read_options(suite, suite.judge))
            except ExpungeError:
                continue  # its judge cannot be had here
            if isinstance(judge, Classifier):
                return suite, judge, concept
    return None


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
    job: Job,
    edit: Edit,
    model: str,
    form: str,
    stem: str,
    folder: Path,
    report: Path | None,
    config: str | None = None,
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
        config: for a single file, a folder or hub id of a model built like it.

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
        done = export(edit, form, checkpoint, place / stem, config=config, report=report)
        job.step = "packing"
        job.check()
        packed = Path(shutil.make_archive(str(place / stem), "zip", place, stem))
        shutil.rmtree(done.path, ignore_errors=True)
        return Taken((packed,), done.notes)
    output = place / f"{stem}{'' if form == 'safetensors' else f'-{form}'}.safetensors"
    done = export(edit, form, checkpoint, output, config=config, report=report)
    return Taken((done.path, *([done.card] if done.card else [])), done.notes)
