"""`expunge evaluate` and `expunge run`: judge edits by suites, and whole experiments."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, UseAppendAction, arg

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, UnknownNameError, join_names
from expunge.base.shipped import DEFAULT_MODEL, list_shipped
from expunge.checkpoints import loading
from expunge.cli.loading_options import read_autocast
from expunge.cli.terminal import make_plain_table, print_table, show_progress

if TYPE_CHECKING:
    from expunge.evaluation.report import Report
    from expunge.evaluation.statistics import Estimate
    from expunge.evaluation.suite import Suite


@dataclass(frozen=True)
class EvaluateOptions:
    """Judge edits: is the concept gone, are its synonyms gone, is everything else unharmed?"""

    renamed: ClassVar[Mapping[str, str]] = {"attack": "attacks"}
    """Options with another name in earlier versions: {old: new}."""
    edits: Annotated[Positional[tuple[str, ...]], arg(metavar="EDIT …")]
    """Edits, or diffusers folders of erased models."""
    output: Annotated[str, arg(aliases=["-o"], metavar="FOLDER")]
    """The folder for index.html, results.json and results.csv."""
    suite: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SUITE", help_behavior_hint="")] = ()
    """A suite to judge by, once or more: its name (`expunge list suites`), or a TOML file. Of a suite
    MODEL/NAME the second part is enough with --model MODEL."""
    include: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER", help_behavior_hint="")
    ] = ()
    """A folder of your own suites, found by their file names without .toml; once or more."""
    full: bool = False
    """Draw the papers' number of images instead of the quick one."""
    metric: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="METRIC", help_behavior_hint="")
    ] = ()
    """A metric to measure besides those of the suites."""
    attacks: Annotated[
        UseAppendAction[tuple[tuple[str, ...], ...]],
        arg(aliases=["--conditions"], metavar="ATTACK …", help_behavior_hint=""),
    ] = ()
    """Attacks and other conditions that may bring the concept back, at the suites' budgets: their names
    (`expunge list attacks`), or all."""
    erases: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME", help_behavior_hint="")] = ()
    """What the diffusers folders have erased; an edit says so itself."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The original model; by default the suite's own."""
    autocast: Annotated[str | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """Draw in bfloat16 or float16, faster where the hardware has it; auto: bfloat16 there, else float32.
    The report says in which."""
    cache_limit: Annotated[str, arg(metavar="SIZE")] = "10GB"
    """The most that the image cache may hold, such as 500MB or 10GB; the oldest images go first."""


@dataclass(frozen=True)
class RunOptions:
    """Erase, judge and report methods × concepts × seeds, as a TOML file says; resumes where it was."""

    experiment: Annotated[Positional[str], arg(metavar="EXPERIMENT")]
    """The TOML file."""
    output: Annotated[str | None, arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder for the edits and the report; by default the file's name without .toml."""
    include: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER", help_behavior_hint="")
    ] = ()
    """A folder of your own suites, found by their file names without .toml; once or more."""
    full: bool = False
    """Draw the papers' number of images, whatever the file says."""
    autocast: Annotated[str | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """Draw in bfloat16 or float16, faster where the hardware has it; auto: bfloat16 there, else float32.
    The report says in which."""
    cache_limit: Annotated[str, arg(metavar="SIZE")] = "10GB"
    """The most that the image cache may hold, such as 500MB or 10GB; the oldest images go first."""


def run_evaluate(options: EvaluateOptions) -> None:
    """Run `expunge evaluate`."""
    if not options.suite:
        own = f"{options.model or DEFAULT_MODEL}/"
        known = [name.removeprefix(own) for name in registry.list_names("suites")]
        names = ", ".join(sorted(name for name in known if "/" not in name))
        raise ExpungeError(f"name a suite with --suite, one of: {names}")
    limit, autocast = _parse_bytes(options.cache_limit), read_autocast(options.autocast)
    from expunge.evaluation.suite import Suite

    base = options.model or find_base(options.edits)
    suites = [Suite.read(name, base) for name in options.suite]
    attacks = tuple(itertools.chain.from_iterable(options.attacks))
    model = _check_evaluate(options, suites, attacks)
    from expunge.checkpoints.load import load
    from expunge.edit import Edit
    from expunge.evaluation.candidates import Candidate
    from expunge.evaluation.evaluate import evaluate
    from expunge.evaluation.image_cache import Cache

    candidates = []
    for name in options.edits:
        path = Path(name)
        if not path.is_dir():
            candidates.append(Candidate.of(Edit.load(path), path.stem))
        else:
            candidates.append(Candidate(path.resolve().name, options.erases, model=load(path)))
    cache, original = Cache(limit=limit), load(model)
    drawing = [original, *(one.model for one in candidates if one.model)]
    with contextlib.ExitStack() as stack:
        for one in drawing:
            stack.enter_context(one.autocasting(autocast))
        progress = stack.enter_context(show_progress())
        report = evaluate(
            original,
            candidates,
            suites,
            full=options.full,
            metrics=options.metric,
            attacks=attacks,
            cache=cache,
            progress=progress,
        )
    report.save(options.output)
    print_report(report)
    cache.prune(limit)
    print(f"{cache.drawn} images drawn; look at {Path(options.output) / 'index.html'}")


def find_base(edits: Sequence[str]) -> str:
    """Return the shipped model that the first of some edits was made for; "" if it is none of them.

    Args:
        edits: files of edits, and folders.
    """
    for name in edits:
        with contextlib.suppress(ExpungeError, ValueError, KeyError, TypeError):
            text = files.read_header(name).get("__metadata__", {}).get("expunge", "{}")
            model: str = json.loads(text)["record"]["model"]
            return model if model in list_shipped() else ""
    return ""


def _check_evaluate(options: EvaluateOptions, suites: Sequence[Suite], attacks: Sequence[str]) -> str:
    """Check all that can be checked before torch is imported, and return the original model's name.

    Args:
        options: the command's options.
        suites: those that it names.
        attacks: those that it names.

    Raises:
        ExpungeError: an unknown name, a missing file, or suites of different models.
    """
    for attack in attacks:
        # As `attack_budgets.check_attack_name`, which cannot be had without torch.
        known = registry.list_names("attacks")
        if attack != "all" and attack.partition(":")[0] not in (*known, "all"):
            raise UnknownNameError("attack", attack.partition(":")[0], [*known, "all"])
    models = {options.model or suite.model for suite in suites}
    if len(models) > 1:
        raise ExpungeError(f"these suites are for different models: {', '.join(sorted(models))}")
    model = models.pop()
    loading.find_source(model)
    for name in options.edits:
        if not Path(name).is_dir():
            files.read_header(name)
        elif not options.erases:
            raise ExpungeError(f"{name} is a folder; say with --erases NAME what it has erased")
    for name in options.metric:
        if name not in registry.list_names("metrics"):
            raise UnknownNameError("metric", name, registry.list_names("metrics"))
    files.check_results(options.output, [suite.name for suite in suites])
    files.check_writable(Path(options.output) / "results.json")
    return model


def run_experiment(options: RunOptions) -> None:
    """Run `expunge run`."""
    limit, autocast = _parse_bytes(options.cache_limit), read_autocast(options.autocast)
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
    with show_progress() as progress:
        how: Any = {"autocast": autocast, "cache": cache, "progress": progress}
        report = experiment.run(load(experiment.model), folder, **how)
    cache.prune(limit)
    print_report(report)
    print(f"{cache.drawn} images drawn; look at {folder / 'index.html'}")


def print_report(report: Report) -> None:
    """Print a report as tables, one a suite: the score of every edit, and its terms."""
    for name in dict.fromkeys(case.suite.name for case in report.cases):
        cases = [case for case in report.cases if case.suite.name == name]
        terms = list(dict.fromkeys(term for case in cases for row in case.rows for term in row.terms))
        erased = [", ".join(case.erased[:3]) + (" …" if len(case.erased) > 3 else "") for case in cases]
        several = len(set(erased)) > 1
        heads = [name, "erased"] if several else [f"{name}: {erased[0]} erased"]
        table = make_plain_table(*heads)
        for term in (cases[0].suite.score, *terms):
            table.add_column(term, overflow="fold")
        for case, words in zip(cases, erased, strict=True):
            for row in case.rows:
                numbers = (row.h, *(row.terms.get(term) for term in terms))
                table.add_row(row.name, *[words] * several, *map(_format_score, numbers))
        print_table(table)
        left_out = list(dict.fromkeys(words for case in cases for _, words, _ in case.left_out))
        if left_out:
            print(f"left out, for the original seldom draws them: {join_names(left_out, 5)}")
    attacked = [(case, row, one) for case in report.cases for row in case.rows for one in row.attacks]
    if not attacked:
        return
    table = make_plain_table("suite", "edit", "attack", "pre-ASR", "ASR", "unrecognisable", "original")
    for case, row, one in attacked:
        for budget, asr in one.asr.items():
            numbers = (one.pre, asr, one.broken[budget], one.control[budget])
            table.add_row(
                case.suite.name, row.name, f"{one.attack} {budget}", *map(_format_score, numbers)
            )
    print_table(table)
    spoiled = [f"{a.attack} {b}" for *_, a in attacked for b in a.asr if not a.control_holds(b)]
    if spoiled:
        names = join_names(list(dict.fromkeys(spoiled)), 5)
        print(f"does not count, for under it the original seldom draws the concept either: {names}")
    for name, reason in {k: v for case in report.cases for k, v in case.not_run.items() if v}.items():
        print(f"left out: {name}, for {reason}")


def _format_score(estimate: Estimate | None) -> str:
    """Return a score with its interval, in per cent where it is a share."""
    if estimate is None or estimate.value != estimate.value:  # nan: nothing to measure on
        return "–"
    score, scale = estimate.score, 100 if abs(estimate.value) <= 1 else 1
    return f"{scale * score.value:.1f} ({scale * score.low:.0f}–{scale * score.high:.0f})"


def _parse_bytes(text: str) -> int:
    """Return the number of bytes of a size such as 500MB.

    Raises:
        ExpungeError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ExpungeError(f"a size is a number with kB, MB, GB or TB, not {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
