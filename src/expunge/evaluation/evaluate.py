"""Evaluating edits: one walk from a suite's prompts to a report.

A *case* is laid out for every set of concepts erased, with the original as its first row and an edit
in each further one. Its samples (`expunge.evaluation.sample`) are drawn, measured and scored,
unattacked and then under each attack.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.attack import Attack
from expunge.base import registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.quiet import Progress, ignore_progress
from expunge.edit import Edit
from expunge.evaluation import statistics
from expunge.evaluation.attack_budgets import Ladder, choose_ladders
from expunge.evaluation.candidates import Candidate, SuiteResult
from expunge.evaluation.cells import ROLES, Cell
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Source, describe_sampler
from expunge.evaluation.measure import make_metric, measure, name_metrics, read_options, warn_of_cuts
from expunge.evaluation.report import Report
from expunge.evaluation.robustness import Controls, Defence, judge_attack
from expunge.evaluation.sample import Sample, lay_out
from expunge.evaluation.scoring import score_suite
from expunge.evaluation.statistics import LEVEL
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.metric import Classifier, Distance, Metric
from expunge.model import Model


@dataclass(frozen=True, eq=False)
class _Plan:
    """A case that is still to be drawn."""

    suite: Suite
    """Without what its judge does not know."""
    metrics: Mapping[str, Metric]
    ladders: Sequence[Ladder]
    not_run: Mapping[str, str]
    """Of the ladders that are not run, why; "" where they were only not asked for."""
    group: Sequence[Candidate]
    cells: tuple[Cell, ...]


def evaluate(
    model: Model,
    edits: Sequence[Edit | Candidate],
    suites: Sequence[str | Path | Suite],
    *,
    full: bool = False,
    metrics: Sequence[str | Metric] = (),
    judge: Classifier | None = None,
    attacks: Sequence[str | Attack] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Collection[str] = ROLES,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress = ignore_progress,
) -> Report:
    """Judge edits by suites. Each image is drawn once and each metric looks at it once.

    >>> report = evaluate(model, [edit], ["object"], attacks=["embedding"])  # doctest: +SKIP
    >>> report.save("report")                                                # doctest: +SKIP

    Args:
        model: the original: the positive control, and the first row of every case.
        edits: what to judge.
        suites: suites, by name, file or as they are.
        full: the paper's number of images instead of the quick one.
        metrics: what to measure besides what the suites say, by name or as they are; one that has the
            name of a suite's takes its place.
        judge: what answers the suites' questions in the place of their own judge.
        attacks: what to attack every edit with, by name ("NAME", "NAME:LADDER"), at the suites' budgets,
            or as they are, at that one; "all" for every attack that the model's family can be put under.
        options: fields of metrics, by name, over those of the suites.
        roles: which prompts are drawn; by default all of a suite's.
        seed: the number that attacks' random choices follow from.
        cache: where images and numbers are kept; by default the user's cache folder.
        progress: told what is done.

    Raises:
        ExpungeError: an edit names nothing in a suite or does not fit the model, a metric or an attack
            cannot be had, or an attack is to be made on a model of its own.
        TypeError: something is of none of these types.
    """
    if not isinstance(model, Model):
        raise TypeError(f"the original must be a Model, as expunge.load gives, not {model!r}")
    cache = Cache() if cache is None else cache
    candidates, read = _check_candidates(edits), _check_suites(suites)
    for role in roles:
        if role not in ROLES:
            raise UnknownNameError("role", role, ROLES)
    if judge is not None:
        if not isinstance(judge, Classifier):
            raise TypeError(f"a judge must be a Classifier, not {judge!r}")
        read = [
            dataclasses.replace(suite, judge=registry.name_of("metrics", type(judge))) for suite in read
        ]
    given = name_metrics((*(one for one in (judge,) if one), *metrics))
    drawing = _sources(model, candidates, [suite.scheduler for suite in read])
    for candidate in candidates:
        if candidate.edit is not None:
            candidate.edit.fits(model)  # raises where it cannot be applied at all
        elif attacks:
            raise ExpungeError(f"{candidate.name} is a model of its own; an attack needs an edit")
    plans = [
        plan
        for suite in read
        for plan in _plan(model, suite, candidates, given, attacks, options or {}, roles, full)
    ]
    cases, controls = [], Controls()
    for plan in plans:
        original, sources = drawing[plan.suite.scheduler]
        case = _draw_case(cache, plan, original, sources, full, progress)
        cases.append(_attack_case(cache, plan, case, original, seed, progress, controls))
    return Report(tuple(cases), full, _provenance(model, plans, seed), cache)


def _check_candidates(edits: Sequence[Edit | Candidate]) -> list[Candidate]:
    """The candidates under names that differ."""
    if not edits:
        raise ExpungeError("there is no edit to judge")
    count: dict[str, int] = {"original": 1}
    named = []
    for one in edits:
        if not isinstance(one, (Edit, Candidate)):
            raise TypeError(f"what is judged must be an Edit or a Candidate, not {one!r}")
        candidate = one if isinstance(one, Candidate) else Candidate.of(one)
        count[candidate.name] = n = count.get(candidate.name, 0) + 1
        name = candidate.name if n == 1 else f"{candidate.name} ({n})"
        named.append(dataclasses.replace(candidate, name=name))
    return named


def _check_suites(suites: Sequence[str | Path | Suite]) -> list[Suite]:
    if not suites:
        raise ExpungeError("there is no suite to judge by")
    read = [suite if isinstance(suite, Suite) else Suite.read(suite) for suite in suites]
    if len({suite.name for suite in read}) < len(read):
        raise ExpungeError("a suite is named twice")
    return read


def _sources(
    model: Model, candidates: Sequence[Candidate], schedulers: Sequence[str]
) -> dict[str, tuple[Source, dict[str, Source]]]:
    """For each scheduler what draws the original, and what each candidate, by name.

    Raises:
        ExpungeError: a model cannot use one of them.
    """
    found = {}
    hash_for_images(model)  # once for all: copies of the model know it
    for scheduler in dict.fromkeys(schedulers):
        sampled = model.with_scheduler(scheduler)
        found[scheduler] = (
            Source(sampled),
            {
                c.name: Source(c.model.with_scheduler(scheduler))
                if c.model
                else Source(sampled, (c.edit,) if c.edit else ())
                for c in candidates
            },
        )
    return found


def _plan(
    model: Model,
    suite: Suite,
    candidates: Sequence[Candidate],
    given: Mapping[str, Metric | None],
    attacks: Sequence[str | Attack],
    options: Mapping[str, Mapping[str, Any]],
    roles: Collection[str],
    full: bool,
) -> list[_Plan]:
    """A suite's cases, with everything checked that can be before anything is drawn."""
    metrics = {
        name: given.get(name)
        or make_metric(name, {**read_options(suite, name), **options.get(name, {})})
        for name in dict.fromkeys((suite.judge, *suite.metrics, *given))
    }
    known = restrict_to_judge(suite, metrics[suite.judge])
    ladders, not_run = choose_ladders(suite, attacks, model)
    if ladders and not isinstance(metrics[suite.judge], Classifier):
        raise ExpungeError(
            f"suite {suite.name}: {suite.judge} does not say what an image shows, so no attack can be"
            " judged by it"
        )
    groups: dict[tuple[str, ...], list[Candidate]] = {}
    for candidate in candidates:
        erased = tuple(concept.name for concept in known.find_erased(candidate.erases))
        # Edits compare only on the same prompts, and these follow from what is erased, in any order.
        groups.setdefault(tuple(sorted(erased)), []).append(candidate)
    plans = []
    for group in groups.values():
        cells = tuple(c for c in known.cells(group[0].erases, full=full) if c.role in roles)
        # Before any drawing: a cut prompt may have lost the very concept that is judged.
        warn_of_cuts(model, cells)
        plans.append(_Plan(known, metrics, ladders, not_run, group, cells))
    return plans


def _draw_case(
    cache: Cache,
    plan: _Plan,
    original: Source,
    sources: Mapping[str, Source],
    full: bool,
    progress: Progress,
) -> SuiteResult:
    """Draw, measure and score the images of a case, unattacked."""
    suite, metrics = plan.suite, plan.metrics
    laid_out = lay_out(original.model, plan.cells, suite.num_inference_steps, suite.guidance_scale)
    samples = {"original": measure(cache, original, None, laid_out, metrics, progress, suite.name)}
    for candidate in plan.group:
        label = f"{suite.name}, {candidate.name}"
        source = sources[candidate.name]
        samples[candidate.name] = measure(cache, source, original, laid_out, metrics, progress, label)
    anchored = _draw_anchors(cache, plan, original, full, progress)
    here = {"original": original, **{c.name: sources[c.name] for c in plan.group}}
    return score_suite(suite, metrics, plan.group, samples, here, anchored)


def _draw_anchors(
    cache: Cache, plan: _Plan, original: Source, full: bool, progress: Progress
) -> dict[str, Sequence[Sample]]:
    """What the original draws of each candidate's anchors, where a metric asks for it."""
    suite = plan.suite
    used = {n: m for n, m in plan.metrics.items() if isinstance(m, Distance) and m.from_anchor}
    found: dict[str, Sequence[Sample]] = {}
    for candidate in plan.group if used else ():
        cells = suite.anchor_cells(candidate.erases, candidate.anchors, full=full)
        if cells:
            samples = lay_out(original.model, cells, suite.num_inference_steps, suite.guidance_scale)
            label = f"{suite.name}, anchors"
            found[candidate.name] = measure(cache, original, None, samples, used, progress, label)
    return found


def _attack_case(
    cache: Cache,
    plan: _Plan,
    case: SuiteResult,
    original: Source,
    seed: int,
    progress: Progress,
    controls: Controls,
) -> SuiteResult:
    """Attack every edit of a case; its rows are given what the attacks came to."""
    # The original's row stays as it is: under attack it is the control within each edit's result.
    judge, rows = plan.metrics[plan.suite.judge], [case.rows[0]]
    if not plan.ladders or not isinstance(judge, Classifier):
        return case
    for row in case.rows[1:]:
        if row.candidate is None or row.candidate.edit is None:
            raise TypeError("a row that is attacked must have an edit")
        defence = Defence.of(
            plan.suite,
            judge,
            cache,
            original,
            row.candidate.edit,
            row.name,
            case.rows[0].samples,
            row.samples,
        )
        how: Any = {"seed": seed, "progress": progress, "controls": controls}
        attacks = tuple(judge_attack(defence, ladder, **how) for ladder in plan.ladders)
        rows.append(dataclasses.replace(row, attacks=attacks))
    return dataclasses.replace(case, rows=tuple(rows), not_run=plan.not_run)


def restrict_to_judge(suite: Suite, judge: Metric) -> Suite:
    """Return the suite without what its judge cannot tell: a small world has fewer concepts.

    Raises:
        ExpungeError: the judge answers no questions, or knows none of the labels.
    """
    if not isinstance(judge, Classifier):
        # H_a is made of CLIP scores alone; all other H's are shares of images that show a concept.
        if suite.score != "H_a":
            raise ExpungeError(
                f"suite {suite.name}: {suite.judge} does not say what an image shows; only H_a can do"
                " without a judge that does"
            )
        return suite
    concepts = tuple(c for c in suite.concepts if any(judge.knows(label) for label in c.labels))
    others = tuple(c for c in suite.others if any(judge.knows(label) for label in c.labels))
    if not concepts:
        raise ExpungeError(f"suite {suite.name}: its judge, {suite.judge}, knows none of its labels")
    return dataclasses.replace(suite, concepts=concepts, others=others)


def _provenance(model: Model, plans: Sequence[_Plan], seed: int) -> dict[str, Any]:
    """What numbers hang on: the model, how it was sampled, every metric, how intervals are made."""
    suite = plans[0].suite
    (first, *_), *_ = (
        sample.requests
        for sample in lay_out(model, plans[0].cells, suite.num_inference_steps, suite.guidance_scale)
    )
    metrics = {
        name: {
            **dataclasses.asdict(metric),
            "higher is better": metric.higher_is_better,
            **metric.provenance,
        }
        for plan in plans
        for name, metric in plan.metrics.items()
    }
    attacked = {"attack seed": seed} if any(plan.ladders for plan in plans) else {}
    return {
        "model": model.name,
        "model sha256": hash_for_images(model),
        "sampler": describe_sampler(model.with_scheduler(suite.scheduler)),
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        # Through JSON at once: tuples and paths read back from results.json as they are written here.
        "metrics": json.loads(json.dumps(metrics, default=str)),
        **attacked,
        "intervals": f"95 %, {statistics.DRAWS} draws: low and high are about these concepts (prompts,"
        " images and seeds of the edit resampled), general low and high about concepts in general"
        " (these resampled, too)",
        "comparisons": f"Holm: those of one number in one suite are a family, level {LEVEL:g}",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("expunge", "torch", "diffusers", "transformers")
        },
    }
