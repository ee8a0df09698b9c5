"""The command line: draw, erase, evaluate, run, info, list.

Nothing here imports torch before there is work for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from expunge import __version__
from expunge.base import files, registry
from expunge.base.errors import ExpungeError, ExpungeWarning, listed, nearest, unknown
from expunge.base.fields import leaves, spelled_out
from expunge.checkpoints import loading
from expunge.cli import concept_files, export_commands, studio_command
from expunge.cli.export_commands import Loading
from expunge.probe import Probe
from expunge.problem import KINDS, Concept, Problem

if TYPE_CHECKING:
    import torch

    from expunge.base.quiet import Progress
    from expunge.checkpoints.cost_estimate import CostEstimate
    from expunge.checkpoints.pace import Pace
    from expunge.edit import Edit
    from expunge.evaluation.image_cache import Cache
    from expunge.evaluation.report import Report
    from expunge.evaluation.scoring import Candidate
    from expunge.evaluation.statistics import Estimate
    from expunge.evaluation.suite import Suite
    from expunge.method import Method
    from expunge.model import Model
    from expunge.runtime.cost import Cost
    from expunge.runtime.threads import Threads

T = TypeVar("T")

USAGE = """\
Erase concepts from text-to-image diffusion models.

usage: expunge COMMAND …

  draw PROMPT       draw images, with or without edits
  erase METHOD      erase concepts; writes an edit
  evaluate EDIT…    judge edits by suites; writes a report
  run EXPERIMENT    erase, judge and report a whole table of methods and concepts
  export EDIT       an edit as a diffusers folder, a single file, or a LoRA
  merge EDIT…       one edit of several
  undo MODEL        a model that export wrote as it was before
  info EDIT|MODEL   what an edit erases, how it was made, whether it fits; what a model has lost
  list KIND         methods, models, families, attacks, metrics, suites
  studio            all of it in the browser, on this machine

  expunge COMMAND --help    shows its options
  expunge --version         shows the version
"""


@dataclass(frozen=True)
class Draw:
    """Draw images."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What to draw."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FILE|FOLDER/")]
    """One grid as FILE.png, or one PNG an image in FOLDER/."""
    number: Annotated[int, arg(aliases=["-n"])] = 1
    """How many images; image i has the seed SEED + i."""
    seed: int = 0
    """The first image's seed."""
    edit: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="EDIT", help_behavior_hint="")] = ()
    """An edit to draw with."""
    model: str = "emoji"
    """A shipped model, a diffusers folder, a single .safetensors file, or a hub id."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Denoising steps; by default the model's own."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="")] = None
    """Guidance scale; by default the model's own."""
    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclass(frozen=True)
class Erase:
    """Erase concepts from a model."""

    output: Annotated[str, arg(aliases=["-o"], metavar="EDIT")]
    """The file to write, ending in .safetensors."""
    concept: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="NAME[=ANCHOR]", help_behavior_hint="")
    ] = ()
    """What to erase and what it becomes; NAME= is the empty prompt. Synonyms: NAME|SYNONYM=ANCHOR."""
    concepts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A .txt, .csv or .toml file with more: in .txt one a line, as in --concept or NAME=ANCHOR, KIND."""
    kind: str = "object"
    """What concepts are that do not say it: object, identity, style or explicit."""
    retain: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")
    ] = ()
    """What must stay as it is."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Values for the method's fields; those given beside count. `--preset list` shows them all."""
    model: str = "emoji"
    """A shipped model, a diffusers folder, a single .safetensors file, or a hub id."""
    seed: int = 0
    """The number all random choices follow from."""
    ray: Annotated[str, arg(metavar="ADDRESS", help_behavior_hint="")] = ""
    """A Ray cluster to spread the work over: HOST:PORT, ray://HOST:PORT, auto, or local to start one."""
    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclass(frozen=True)
class Evaluate:
    """Classifier edits: is it gone, are its synonyms gone, is the rest unharmed?"""

    edits: Annotated[Positional[tuple[str, ...]], arg(metavar="EDIT …")]
    """Edits, or diffusers folders of erased models."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FOLDER")]
    """The folder for index.html, results.json and results.csv."""
    suite: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SUITE", help_behavior_hint="")] = ()
    """What to judge by, one or more: a suite's name (`expunge list suites`), or a TOML file."""
    full: bool = False
    """The papers' number of images instead of the quick one."""
    metric: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="METRIC", help_behavior_hint="")
    ] = ()
    """What to measure besides what the suites say."""
    attack: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="ATTACK", help_behavior_hint="")
    ] = ()
    """An attack that tries to bring the erased back, at the suites' budgets; writes robustness.json."""
    erases: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME", help_behavior_hint="")] = ()
    """What the diffusers folders have erased; edits say so themselves."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The original; by default the suite's own."""
    autocast: Annotated[str | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """Draw in bfloat16 or float16: faster where the hardware has it, and the report says so."""
    cache_limit: Annotated[str, arg(metavar="SIZE")] = "10GB"
    """How large the image cache may be, as 500MB or 10GB; what was used longest ago goes first."""


@dataclass(frozen=True)
class RunOptions:
    """Erase, judge and report: methods × concepts × seeds, as a TOML file says. Goes on where it was."""

    experiment: Annotated[Positional[str], arg(metavar="EXPERIMENT")]
    """The TOML file."""
    output: Annotated[str | None, arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder for the edits and the report; by default the file's name without .toml."""
    full: bool = False
    """The papers' number of images, whatever the file says."""
    autocast: Annotated[str | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """Draw in bfloat16 or float16: faster where the hardware has it, and the report says so."""
    cache_limit: Annotated[str, arg(metavar="SIZE")] = "10GB"
    """How large the image cache may be, as 500MB or 10GB; what was used longest ago goes first."""


@dataclass(frozen=True)
class Info:
    """Say what an edit erases, how it was made, from what, and whether it fits a model."""

    edit: Annotated[Positional[str], arg(metavar="EDIT|MODEL")]
    """The edit, or a model that export wrote."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model at hand; by default the shipped one it was made from."""


@dataclass(frozen=True)
class List:
    """List what there is."""

    kind: Annotated[Positional[str], arg(metavar="KIND")] = "methods"
    """methods, models, families, attacks, metrics or suites."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 for an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = _console(stderr=True)
    with _interrupts() as heard, _notes(errors):
        try:
            _check_directory()
            _run(arguments)
        except (Exception, KeyboardInterrupt) as error:
            # An interrupt in the middle of an import comes out as some other error.
            if heard or isinstance(error, KeyboardInterrupt):
                errors.print("expunge: interrupted; no incomplete file was written")
                return 130
            if isinstance(error, ExpungeError):
                errors.print(f"expunge: {error}")
                return 2
            if isinstance(error, OSError) and (what := _of_the_system(error)):
                errors.print(f"expunge: {what}", markup=False)
                return 2
            raise
        except SystemExit as done:  # from --help
            return int(done.code or 0)
    return 0


def _check_directory() -> None:
    """Check that there is a working directory: without one, torch ends the process when it is imported.

    Raises:
        ExpungeError: it has been deleted.
    """
    try:
        os.getcwd()
    except OSError:
        raise ExpungeError("the working directory is not there any more: go to another one") from None


def _of_the_system(error: OSError) -> str:
    """What the file system has against a command, in a sentence; "" where it is something else."""
    return f"cannot use {error.filename}: {error.strerror}" if error.filename is not None else ""


LARGEST_GRID = 4096
"""How many images `draw` puts into one file."""


def draw_command(options: Draw) -> None:
    """`expunge draw`."""
    from expunge.base import image_files

    probe = Probe.of(options.prompt, options.number, options.seed, options.steps, options.guidance)
    output = Path(options.output)
    to_folder = options.output.endswith("/") or output.is_dir()
    if not to_folder:
        image_files.check_ending(output)
        if options.number > LARGEST_GRID:
            raise ExpungeError(
                f"one grid holds up to {LARGEST_GRID} images, not {options.number};"
                " -o FOLDER/ takes more"
            )
    files.check_writable(output / "0.png" if to_folder else output)
    loading.find_source(options.model, options.loading.variant)
    for path in options.edit:
        files.read_header(path)
    from expunge.edit import Edit
    from expunge.evaluation.image_cache import Cache, Request, Source

    if options.loading.dry_run:
        from expunge.runtime.cost import Cost

        n, steps = options.number, options.steps
        options.loading.show_plan(options.model, lambda own: Cost(2, 2 * n * (steps or own)))
        return
    edits = tuple(Edit.load(path) for path in options.edit)
    model = options.loading.load(options.model)
    steps = probe.num_inference_steps or model.num_inference_steps
    guidance = model.guidance_scale if probe.guidance_scale is None else probe.guidance_scale
    asked = [
        Request(prompt, seed, steps, guidance)
        for prompt, seed in zip(probe.prompts, probe.seeds, strict=True)
    ]
    made = Source(model, edits)
    with _progress() as progress:
        # The images are wanted, not the cache: without one they are drawn all the same.
        drawn = Cache(required=False).draw(made, asked, progress)
    if to_folder:
        for image, request in zip(drawn, asked, strict=True):
            name = f"{_legible(request.prompt)}-{request.seed}-{made.address(request)[:8]}"
            image_files.keep(image_files.to_pil(image), output, name)
    else:
        image_files.save(image_files.grid(drawn), output)
    print(f"{options.output}: {len(probe)} image{'s' * (len(probe) > 1)} of {options.prompt!r}")


def _legible(prompt: str, longest: int = 60) -> str:
    """What is legible of a prompt in a file name, in its own script where the system can write that."""
    name = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).casefold()).strip("-")
    try:
        # What file systems count is bytes.
        name = name.encode("utf8")[:longest].decode("utf8", "ignore").strip("-")
        os.fsencode(name)
    except UnicodeEncodeError:
        name = files.slug(prompt, longest)
    return name or "image"


def _check_erase(options: Erase) -> Problem:
    """The problem, and whether its edit can be written. Needs no torch."""
    if options.kind not in KINDS:
        raise unknown("kind of concept", options.kind, KINDS)
    named = tuple(Concept.parse(text, options.kind) for text in options.concept)
    listed, retain = concept_files.read(options.concepts, options.kind) if options.concepts else ((), ())
    problem = Problem(named + listed, options.retain + retain)
    if not options.output.lower().endswith(".safetensors"):
        raise ExpungeError(f"an edit is a .safetensors file; {options.output} should end so")
    files.check_writable(options.output)
    loading.find_source(options.model, options.loading.variant)
    return problem


def _say_anchors(model: Model, problem: Problem) -> None:
    """Those that were chosen, and those that the model may not know."""
    for concept, chosen in zip(problem.erase, problem.with_anchors(model.anchors).erase, strict=True):
        if concept.anchor is None:
            print(f"{chosen.name!r} becomes {chosen.anchor!r}: the anchor of its kind, {chosen.kind}")
        if concept.anchor and (strange := _spelled(model, [concept.anchor])):
            warnings.warn(
                f"this model's tokenizer has no token for {strange} in the anchor {concept.anchor!r}:"
                f" is it what {concept.name!r} should become?",
                ExpungeWarning,
                stacklevel=1,
            )


def _spelled(model: Model, names: Sequence[str]) -> str:
    """The words that the tokenizer can only spell, each with what it may be meant to be.

    What a suite of the model asks for is spelled as it is meant.
    """
    if not any(map(model.unfamiliar, names)):
        return ""
    judged = _judged_names(model.name)
    told: dict[str, str] = {}
    for name in names:
        near = _nearest(name, judged)
        if near.casefold() == name.casefold():
            continue
        for word in model.unfamiliar(name):
            told.setdefault(word, near or model.near(word))
    return listed([repr(word) + f" (near: {near!r})" * bool(near) for word, near in told.items()], 3)


def _nearest(name: str, names: Sequence[str]) -> str:
    """The name that is spelled most like one, but for an article; "" where none is."""
    bare = re.sub(r"^(an?|the) ", "", name.casefold())
    known = {one.casefold(): one for one in names}
    return known.get(nearest(bare, known, 0.8), "")


def _judged_names(model: str) -> list[str]:
    """The names of all that the suites of a model ask for."""
    from expunge.evaluation.suite import Suite

    suites = [Suite.read(name) for name in registry.names("suites")]
    concepts = [one for suite in suites if suite.model == model for one in suite.concepts]
    return [name for one in concepts for name in (*one.names, *one.synonyms)]


def _say_unfamiliar(model: Model, problem: Problem) -> None:
    """The words that may be misspelt.

    What is retained may be anybody's names: of those only words near to one of the model's are said.
    """
    names = [name for concept in problem.erase for name in concept.names]
    names += [text for text in problem.retain if any(map(model.near, model.unfamiliar(text)))]
    if strange := _spelled(model, names):
        warnings.warn(
            f"this model's tokenizer has no token for {strange}:"
            " look whether it is spelled as you meant",
            ExpungeWarning,
            stacklevel=1,
        )


def erase_command(options: Erase, method: Any) -> None:
    """`expunge erase METHOD`."""
    problem = _check_erase(options)
    from expunge.runtime import ray_backend, work_dir

    ray_backend.check(options.ray)
    from expunge.checkpoints.checkpoint import Checkpoint
    from expunge.erasure import erase

    method.check_family(
        Checkpoint.find(options.model, weights=False, variant=options.loading.variant).family
    )
    if options.loading.dry_run:
        options.loading.show_plan(options.model, lambda steps: method.estimate_cost(problem, steps))
        return
    model = options.loading.load(options.model, method.estimate_cost(problem, 1))
    _say_unfamiliar(model, problem)
    if method.reads_anchor:
        _say_anchors(model, problem)
    elif told := [concept for concept in problem.erase if concept.anchor]:
        warnings.warn(
            f"{type(method).__name__}, as it is set, reads no anchor: what {told[0].name!r} becomes is"
            f" left to the model, not {told[0].anchor!r}",
            ExpungeWarning,
            stacklevel=1,
        )
    asked = method.estimate_cost(problem, model.num_inference_steps)
    folder = work_dir.beside(options.output)
    how: Any = {"seed": options.seed, "work": folder, "ray": options.ray}
    try:
        with contextlib.ExitStack() as stack:
            threads = stack.enter_context(_threads(model))
            plan = options.loading.say_plan(model, asked, problem.erase)
            pace = _pace(model, plan, asked) if asked and not options.ray else None
            tell = stack.enter_context(_progress(pace))
            if pace:
                pace.tell = tell
                pace.listeners.append(lambda *_: threads.look())
                stack.enter_context(pace)
            progress = pace.progress if pace else tell
            edit = erase(model, problem, method, progress=progress, **how)
    except KeyboardInterrupt:
        if Path(folder).is_dir():
            print(f"{folder} keeps what was finished; the same command goes on there", file=sys.stderr)
        raise
    edit.save(options.output)
    work_dir.remove(folder)
    names = listed([concept.name for concept in problem.erase], 10)
    size = files.size(Path(options.output).stat().st_size)
    print(f"{options.output}: {names} erased in {edit.record.seconds:.1f} s, {size}")


def evaluate_command(options: Evaluate) -> None:
    """`expunge evaluate`."""
    if not options.suite:
        raise ExpungeError(f"name a suite with --suite, one of: {', '.join(registry.names('suites'))}")
    limit, autocast = _bytes(options.cache_limit), _autocast(options.autocast)
    from expunge.evaluation.suite import Suite

    suites = [Suite.read(name) for name in options.suite]
    for attack in options.attack:
        if attack.partition(":")[0] not in registry.names("attacks"):
            raise unknown("attack", attack.partition(":")[0], registry.names("attacks"))
    models = {options.model or suite.model for suite in suites}
    if len(models) > 1:
        raise ExpungeError(f"these suites are for different models: {', '.join(sorted(models))}")
    for name in models:
        loading.find_source(name)
    for name in options.edits:
        if not Path(name).is_dir():
            files.read_header(name)
        elif not options.erases:
            raise ExpungeError(f"{name} is a folder; say with --erases NAME what it has erased")
    for name in options.metric:
        if name not in registry.names("metrics"):
            raise unknown("metric", name, registry.names("metrics"))
    files.check_results(options.output, [suite.name for suite in suites])
    files.check_writable(Path(options.output) / "results.json")
    from expunge.checkpoints.load import load
    from expunge.edit import Edit
    from expunge.evaluation.image_cache import Cache
    from expunge.evaluation.report import evaluate
    from expunge.evaluation.scoring import Candidate

    candidates = []
    for name in options.edits:
        path = Path(name)
        if not path.is_dir():
            candidates.append(Candidate.of(Edit.load(path), path.stem))
        else:
            candidates.append(Candidate(path.resolve().name, options.erases, model=load(path)))
    cache, original = Cache(limit=limit), load(models.pop())
    drawing = [original, *(one.model for one in candidates if one.model)]
    with contextlib.ExitStack() as stack:
        for model in drawing:
            stack.enter_context(model.autocasting(autocast))
        progress = stack.enter_context(_progress())
        report = evaluate(
            original,
            candidates,
            suites,
            full=options.full,
            metrics=options.metric,
            cache=cache,
            progress=progress,
        )
    report.save(options.output)
    _show(report)
    if options.attack:
        with original.autocasting(autocast):
            _attack(options, original, candidates, suites, cache)
    cache.prune(limit)
    print(f"{cache.drawn} images drawn; look at {Path(options.output) / 'index.html'}")


def _attack(
    options: Evaluate,
    model: Model,
    candidates: Sequence[Candidate],
    suites: Sequence[Suite],
    cache: Cache,
) -> None:
    """Attack every edit on every suite: `robustness.json`, images, and a table."""
    from expunge.base.image_files import save
    from expunge.evaluation.contact_sheet import contact_sheet
    from expunge.evaluation.robustness import robustness

    found = []
    with _progress() as progress:
        for suite in suites:
            for one in candidates:
                if one.edit is None:
                    raise ExpungeError(f"{one.name} is a folder; an attack needs an edit")
                for attack in options.attack:
                    how: Any = {"name": one.name, "full": options.full, "cache": cache}
                    found.append(robustness(model, one.edit, suite, attack, progress=progress, **how))
    text = json.dumps([one.to_dict() for one in found], indent=1, ensure_ascii=False)
    with files.replacing(Path(options.output) / "robustness.json") as temporary:
        temporary.write_text(text + "\n", "utf8")
    images = Path(options.output) / "robustness.png"
    save(contact_sheet([one.strip for one in found], 96), images)
    columns = ("suite", "edit", "attack", "pre-ASR", "ASR", "unrecognisable")
    table = Table(*columns, box=None, pad_edge=False)
    for row in found:
        shares = ", ".join(f"{budget}: {_score(asr)}" for budget, asr in row.asr.items())
        broken = ", ".join(f"{budget}: {_score(one)}" for budget, one in row.broken.items())
        table.add_row(row.suite, row.edit, row.attack, _score(row.pre), shares, broken)
    _print(table)
    print(f"attacked images: {images}")


def run_command(options: RunOptions) -> None:
    """`expunge run`."""
    limit, autocast = _bytes(options.cache_limit), _autocast(options.autocast)
    from expunge.checkpoints.load import load
    from expunge.evaluation.experiment import Experiment
    from expunge.evaluation.image_cache import Cache

    experiment = Experiment.read(options.experiment)
    if options.full:
        experiment = dataclasses.replace(experiment, full=True)
    folder = Path(options.output or Path(options.experiment).with_suffix(""))
    files.check_results(folder, [suite.name for suite in experiment.suites])
    files.check_writable(folder / "results.json")
    cache = Cache(limit=limit)
    with _progress() as progress:
        how: Any = {"autocast": autocast, "cache": cache, "progress": progress}
        report = experiment.run(load(experiment.model), folder, **how)
    cache.prune(limit)
    _show(report)
    print(f"{cache.drawn} images drawn; look at {folder / 'index.html'}")


def _show(report: Report) -> None:
    """The H of every row and its terms, as a table."""
    for name in dict.fromkeys(case.suite.name for case in report.cases):
        cases = [case for case in report.cases if case.suite.name == name]
        terms = list(dict.fromkeys(term for case in cases for row in case.rows for term in row.terms))
        erased = [", ".join(case.erased[:3]) + (" …" if len(case.erased) > 3 else "") for case in cases]
        several = len(set(erased)) > 1
        heads = [name, "erased"] if several else [f"{name}: {erased[0]} erased"]
        table = Table(*heads, box=None, pad_edge=False)
        for term in (cases[0].suite.score, *terms):
            table.add_column(term, overflow="fold")
        for case, words in zip(cases, erased, strict=True):
            for row in case.rows:
                numbers = (row.h, *(row.terms.get(term) for term in terms))
                table.add_row(row.name, *[words] * several, *map(_score, numbers))
        _print(table)
        left_out = list(dict.fromkeys(words for case in cases for _, words, _ in case.left_out))
        if left_out:
            print(f"left out, for the original seldom draws them: {listed(left_out, 5)}")


def _score(estimate: Estimate | None) -> str:
    """A number with its interval: in per cent where it is a share."""
    if estimate is None or estimate.value != estimate.value:
        return "–"
    score, scale = estimate.score, 100 if abs(estimate.value) <= 1 else 1
    return f"{scale * score.value:.1f} ({scale * score.low:.0f}–{scale * score.high:.0f})"


def _autocast(name: str | None) -> torch.dtype | None:
    """The number format to draw in."""
    if name is None:
        return None
    if name not in (half := export_commands.DTYPES[1:]):
        raise unknown("number format to draw in", name, half)
    import torch

    return getattr(torch, name)


def _bytes(text: str) -> int:
    """A size such as 500MB in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ExpungeError(f"a size is a number with kB, MB, GB or TB, not {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def info_command(options: Info) -> None:
    """`expunge info`."""
    if export_commands.is_model(options.edit):
        export_commands.info_of_model(options.edit)
        return
    from expunge.changes import summary
    from expunge.edit import Edit

    edit = Edit.load(options.edit)
    record = edit.record
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for concept in record.problem.erase:
        also = f" and {', '.join(concept.synonyms)}" if concept.synonyms else ""
        becomes = repr(concept.anchor) if concept.anchor else "what the empty prompt draws"
        becomes = f"becomes {becomes}" if record.reads_anchor else "its method read no anchor"
        table.add_row("erases", f"{concept.name}{also} ({concept.kind}); {becomes}")
    table.add_row("retains", ", ".join(record.problem.retain) or "nothing by name")
    table.add_row("method", f"{record.method}: {spelled_out(record.fields)}")
    table.add_row("made from", f"{record.model or 'an unnamed model'}, seed {record.seed}")
    table.add_row("took", f"{record.seconds:.1f} s")
    table.add_row("changes", summary(edit.changes))
    table.add_row(
        "versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())
    )
    table.add_row("hash", edit.hash[:16])
    table.add_row("fits", _fit(edit, options.model))
    _print(table)


def list_command(options: List) -> None:
    """`expunge list`."""
    names = registry.names(options.kind)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name in names:
        families = (registry.suits(name),) if options.kind == "methods" else ()
        table.add_row(name, registry.describe(options.kind, name), *families)
    _print(table if names else f"no {options.kind} yet")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "draw": (Draw, draw_command),
    "evaluate": (Evaluate, evaluate_command),
    "run": (RunOptions, run_command),
    "export": (export_commands.Export, export_commands.export_command),
    "merge": (export_commands.Merge, export_commands.merge_command),
    "undo": (export_commands.Undo, export_commands.undo_command),
    "info": (Info, info_command),
    "list": (List, list_command),
    "studio": (studio_command.Studio, studio_command.studio_command),
}
"""The commands but for `erase`, whose options depend on the method."""


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"expunge {__version__}")
    elif command == "erase":
        _run_erase(arguments[1:])
    elif command in COMMANDS:
        options, function = COMMANDS[command]
        function(_parse(options, command, arguments[1:]))
    else:
        raise unknown("command", command, [*COMMANDS, "erase"])


def _run_erase(arguments: list[str]) -> None:
    """Read the method's name first, so that only its fields and no others become options."""
    name = arguments[0] if arguments else "--help"
    known = registry.names("methods")
    if name in ("-h", "--help"):
        print("usage: expunge erase METHOD --concept NAME[=ANCHOR] -o EDIT …\n")
        print("\n".join(f"  {n:<8} {registry.describe('methods', n)}" for n in known))
        print("\n  expunge erase METHOD --help    shows its options")
        return
    if name.startswith("-"):
        raise ExpungeError(f"name a method after erase, one of: {', '.join(known)}")
    if name not in known:
        raise unknown("method", name, known)
    preset = _value(arguments, "--preset")
    if preset != "list" and not {"-h", "--help"} & set(arguments):
        # Importing a method takes seconds: first what can be said without.
        try:
            _check_erase(_parse(Erase, f"erase {name}", arguments[1:], alone=False))
        except ExpungeError:  # a misspelt option may be why something is missing
            if _unknown_options(Erase, arguments[1:]):
                with_method = _erase_with(registry.get("methods", name)())
                _check_options(with_method, f"erase {name}", arguments[1:])
            raise
    method = registry.get("methods", name)
    if preset == "list":
        _show_presets(name, method.presets)
        return
    options = _erase_with(method.preset(preset) if preset is not None else method())
    parsed: Any = _parse(options, f"erase {name}", arguments[1:])
    erase_command(parsed, parsed.method)


def _erase_with(default: Method) -> type[Erase]:
    """The options of `expunge erase` with the method's fields among them."""
    field: Any = ("method", type(default), dataclasses.field(default=default))
    options = dataclasses.make_dataclass("EraseWith", [field], bases=(Erase,), frozen=True)
    options.__doc__ = Erase.__doc__
    return options


def _value(arguments: Sequence[str], option: str) -> str | None:
    """The value of one option, read before the others can be; given twice, the last counts."""
    for place, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name == option:
            following = next(iter(arguments[place + 1 :]), "-")
            return value if equals else None if following.startswith("-") else following
    return None


def _show_presets(method: str, presets: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, preset in presets.items():
        values = {field: value for field, value in preset.items() if field != "about"}
        table.add_row(name, preset.get("about", ""), spelled_out(values))
    _print(table if presets else f"{method} has no presets")


def _parse(options: type[T], command: str, arguments: Sequence[str], *, alone: bool = True) -> T:
    """Read options with tyro; what it has against them becomes one sentence.

    Unless they are `alone`, there may be others among the arguments.
    """
    said = io.StringIO()
    arguments = _shielded(options, arguments)
    try:
        with contextlib.redirect_stderr(said):
            parsed, rest = tyro.cli(
                options,
                prog=f"expunge {command}",
                args=arguments,
                return_unknown_args=True,
                config=(OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        if alone:
            _check_options(options, command, arguments)
        raise ExpungeError(_bare(_sentence(said.getvalue(), command))) from None
    if rest and alone:
        _check_options(options, command, rest)
        raise ExpungeError(f"{command} does not know what to do with {_bare(rest[0])!r}")
    return _unshielded(parsed)


SHIELD = "\uf8ff"
"""Stands before a value that begins with a hyphen while options are read: a character of no meaning."""


def _bare(text: str) -> str:
    return text.replace(SHIELD, "")


def _shielded(options: Any, arguments: Sequence[str]) -> list[str]:
    """The arguments with a shield before every value that begins with a hyphen: "-5 cats".

    A value is what has a space before any equals sign, what follows `--`, a word with one hyphen that
    is no option, and a number where no option asks for one.
    """
    fields = list(_all_fields(options))
    switches = {
        f"--{f.name.replace('_', '-')}" for f in fields if f.default is False or f.default is True
    }
    known = {f"--{f.name.replace('_', '-')}" for f in fields} | {"--help", "-h", "-o", "-n"}
    known |= {f"--no-{switch[2:]}" for switch in switches}
    found: list[str] = []
    before = ""
    for place, argument in enumerate(arguments):
        takes = before in known - switches  # the option before this argument waits for its value
        option, equals, value = argument.partition("=")
        if argument == "--" and not takes:
            return [*found, *(SHIELD + rest for rest in arguments[place + 1 :])]
        if equals and option in known:
            argument = f"{option}={SHIELD * value.startswith('-') * (not _is_number(value))}{value}"
        elif argument.startswith("-") and argument not in known:
            one_hyphen = not argument.startswith("--")
            mistyped = one_hyphen and f"-{argument}" in known
            short = one_hyphen and not takes and argument[:2] in known and argument[2:].isdigit()  # -n3
            if _is_number(argument):
                shield = not takes
            else:
                shield = " " in option or (one_hyphen and not mistyped and not short)
            argument = SHIELD * shield + argument
        found.append(argument)
        before = argument if argument in known else ""
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unshielded(value: T) -> T:
    """Parsed options without shields."""
    plain: Any = value
    if isinstance(value, str):
        plain = value.removeprefix(SHIELD)
    elif isinstance(value, (tuple, list)):
        plain = type(value)(map(_unshielded, value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: _unshielded(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
        same = all(changed[name] == getattr(value, name) for name in changed)
        plain = value if same else dataclasses.replace(value, **changed)
    return plain


def _check_options(options: Any, command: str, arguments: Sequence[str]) -> None:
    """Check that there are none that nobody knows."""
    method = {f.name: f.default for f in dataclasses.fields(options)}.get("method")
    renamed = {f"--{old.replace('_', '-')}": new for old, new in getattr(method, "renamed", {}).items()}
    for name in _unknown_options(options, arguments):
        if name in renamed:
            now = f"--{renamed[name].replace('_', '-')}"
            raise ExpungeError(f"the option {name} of {command} is named {now} now")
        known = {f"--{f.name.replace('_', '-')}" for f in _all_fields(options)}
        raise unknown(f"option of {command}", name, known)


def _unknown_options(options: Any, arguments: Sequence[str]) -> list[str]:
    known = {f.name.replace("_", "-") for f in _all_fields(options)}
    names = [argument.partition("=")[0] for argument in arguments]
    given = [name for name in names if name.startswith("--")]
    single = [
        n for n in names if n.startswith("-") and len(n) > 2 and n[1:] in known
    ]  # -seed for --seed
    return [name for name in given if not {name[2:], name[2:].removeprefix("no-")} & known] + single


def _all_fields(options: Any) -> Iterator[dataclasses.Field[Any]]:
    for field in dataclasses.fields(options):
        if field.name == "method":
            yield from leaves(type(field.default))
        elif field.name == "loading":
            yield from dataclasses.fields(Loading)
        else:
            yield field


NUMBERS = {
    r": invalid literal for int\(\) with base 10: ('.*')": r" must be a whole number, not \1",
    r": could not convert string to float: ('.*')": r" must be a number, not \1",
    r": no type matching .*<class '\w+'>( must be .*)": r"\1",
}
"""What Python has against a number, and what we say."""


def _sentence(said: str, command: str) -> str:
    """The gist of tyro's boxed message."""
    lines = [line.strip("│| ") for line in said.splitlines()[1:]]  # the first is a title
    rule = re.compile(r"[─-]{3}|╰")
    while lines and rule.match(lines[0]):
        del lines[0]
    gist = list(itertools.takewhile(lambda line: not rule.match(line), filter(None, lines)))
    if gist and gist[0].startswith("Missing from"):
        return f"{command} needs {gist[1]}"
    text = re.sub(r"^Error parsing (method: )?", "", " ".join(gist)).rstrip(".")
    for said_by_python, ours in NUMBERS.items():
        text = re.sub(said_by_python, ours, text)
    return f"{command}: {text[:1].lower()}{text[1:]}" if text else f"{command}: bad options"


def _fit(edit: Edit, model: str | None) -> str:
    """Whether an edit fits a model, in words."""
    from expunge.checkpoints.checkpoint import Checkpoint

    name = model or edit.record.model
    if model is None and name not in registry.names("models"):
        return "name the model at hand with --model to see"
    try:
        same = Checkpoint.find(name).fits(edit)
    except ExpungeError as error:
        if model is None or "does not fit" not in str(error):
            raise
        return f"no: {str(error).partition(': ')[2]}"
    return f"{name}, made from it" if same else f"{name}, though made from other weights"


def _threads(model: Model) -> Threads:
    """The CPU's threads for some work with a model."""
    from expunge.checkpoints.cost_estimate import count_operations
    from expunge.runtime.threads import SMALL, Threads

    return Threads(small=count_operations(model) < SMALL)


def _pace(model: Model, plan: CostEstimate, work: Cost) -> Pace:
    """What counts the work of a model, and says how long the rest of it takes."""
    from expunge.checkpoints.pace import Pace

    return Pace(model, plan.count_units(work), plan.unit_seconds, plan.overhead(work))


@contextlib.contextmanager
def _progress(pace: Pace | None = None) -> Iterator[Progress]:
    """A progress bar on the terminal, gone when the work is done; elsewhere a line now and then.

    Work that starts with some of it done goes on from an earlier command, and this is said. With the
    pace of a whole piece of work, its end is told, too, as far as the work so far tells of it.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        if pace is None:
            yield _lines(say)
            return
        from expunge.checkpoints.pace import make_printer

        pace.listeners.append(make_printer(pace, say))
        yield _only_what_was_there()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}
        if pace is not None:
            from expunge.checkpoints.pace import format_duration

            whole = bars.add_task("in all", total=1.0)
            pace.listeners.append(
                lambda left, done: bars.update(
                    whole, completed=done, description=f"about {format_duration(left)} left in all"
                )
            )

        def tell(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
                _say_what_was_there(label, done, total)
            bars.update(tasks[label], completed=done, total=total)

        yield tell


def _lines(
    say: Callable[[str], None], every: float = 30.0, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Progress as lines, at most one in `every` seconds: what is done, and how long the rest takes."""
    starts: dict[str, tuple[float, int]] = {}
    said = clock()

    def tell(label: str, done: int, total: int) -> None:
        nonlocal said
        now = clock()
        if label not in starts:
            starts[label] = now, done
            _say_what_was_there(label, done, total)
        start, before = starts[label]
        if now - said < every or done <= before or done >= total:
            return
        said, rest = now, (now - start) * (total - done) / (done - before)
        left = f"{rest / 60:.0f} min" if rest >= 90 else f"{rest:.0f} s"
        say(f"{label}: {100 * done // total} % done, about {left} left")

    return tell


def _only_what_was_there() -> Progress:
    """Progress that says nothing but what was finished before."""
    met: set[str] = set()

    def tell(label: str, done: int, total: int) -> None:
        if label not in met:
            met.add(label)
            _say_what_was_there(label, done, total)

    return tell


def _say_what_was_there(label: str, done: int, total: int) -> None:
    if done:
        print(f"{label}: {done} of {total} were finished before")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts heard so far; each is raised as a KeyboardInterrupt, as ever."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        while frame:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                # Raised in there, it could end in a library's own code and abort the process.
                os.write(2, b"expunge: interrupted\n")
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Show our warnings as one line each, and nobody else's."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, ExpungeWarning):
            console.print(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ExpungeWarning)
        warnings.showwarning = show
        yield


def _print(shown: Table | str) -> None:
    """Print to a terminal as it is; elsewhere without the blanks that fill a table's last column."""
    console = _console()
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as caught:
        console.print(shown)
    print("\n".join(line.rstrip() for line in caught.get().splitlines()))


WIDE = 100_000
"""The columns of what is no terminal: no line is cut or broken there."""


def _console(stderr: bool = False) -> Console:
    """A console that prints names as they are: no brackets are styles and no `:words:` are emoji."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    return console
