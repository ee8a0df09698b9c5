"""Judging edits: draw once, measure everything, say what is certain.

`evaluate` lays out a *case* for every set of concepts erased, with the original as its first row and
an edit in each further one. What the numbers mean stands in docs/explanation/judging.md.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError
from expunge.base.files import check_results, replacing
from expunge.base.quiet import Progress, quiet
from expunge.edit import Edit
from expunge.evaluation import statistics
from expunge.evaluation.image_cache import Cache, Request, Source, model_hash, sampler
from expunge.evaluation.measure import Measurements, make, measure, requests, require_known, warn_of_cuts
from expunge.evaluation.scoring import Candidate, Comparison, SuiteResult, compared, family, score_suite
from expunge.evaluation.statistics import LEVEL, Estimate
from expunge.evaluation.suite import Cell, Suite
from expunge.metric import Classifier, Distance, Metric
from expunge.model import Model

FORMAT = 1
"""The version of the layout of `results.json`."""


@dataclass(frozen=True, eq=False)
class Report:
    """The cases of all suites, and where every number comes from."""

    cases: tuple[SuiteResult, ...]
    full: bool
    provenance: Mapping[str, Any]
    cache: Cache = field(repr=False)

    def methods(self) -> dict[str, dict[str, Estimate]]:
        """For each suite, for each recipe, its H averaged over concepts and seeds of the edit."""
        found: dict[str, dict[str, list[tuple[str, Estimate]]]] = {}
        shares = {case.suite.name: case.suite.score != "H_a" for case in self.cases}
        for case in self.cases:
            for row in case.rows:
                recipe = row.candidate.recipe if row.candidate else "original"
                one = ("; ".join(sorted(case.erased)), row.h)
                found.setdefault(case.suite.name, {}).setdefault(recipe, []).append(one)
        return {
            suite: {
                recipe: statistics.average(
                    [h for _, h in hs], [erased for erased, _ in hs], share=shares[suite]
                )
                for recipe, hs in recipes.items()
            }
            for suite, recipes in found.items()
        }

    def differences(self) -> list[tuple[str, str, str, Estimate]]:
        """The paired differences of these means: (suite, one recipe, other, difference).

        Only between recipes that have been judged in the same cases: means over other concepts do not
        compare.
        """
        found = []
        for suite, means in self.methods().items():
            cases = {
                recipe: sorted(
                    case.erased
                    for case in self.cases
                    for row in case.rows
                    if case.suite.name == suite and row.candidate and row.candidate.recipe == recipe
                )
                for recipe in means
            }
            for one, other in itertools.combinations((r for r in means if cases[r]), 2):
                if cases[one] == cases[other]:
                    found.append((suite, one, other, means[one].minus(means[other])))
        return found

    def compared(self) -> dict[str, list[Comparison]]:
        """For each suite these differences, corrected for how many of them there are."""
        found: dict[str, list[tuple[str, str, str, Estimate]]] = {}
        scores = {case.suite.name: case.suite.score for case in self.cases}
        for suite, one, other, difference in self.differences():
            found.setdefault(suite, []).append((scores[suite], one, other, difference))
        return {suite: family(rows) for suite, rows in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON."""
        return {
            "format": FORMAT,
            "size": "full" if self.full else "quick",
            "provenance": self.provenance,
            "cases": [
                _case_dict(case, differences)
                for case, differences in zip(self.cases, compared(self.cases), strict=True)
            ],
            "methods": {
                suite: {recipe: _number(h) for recipe, h in recipes.items()}
                for suite, recipes in self.methods().items()
            },
            "differences between methods": [
                {"suite": suite, **_comparison(one)}
                for suite, rows in self.compared().items()
                for one in rows
            ],
        }

    def to_csv(self) -> str:
        """A line a row: the H, its terms, and every metric of every role, each with its interval."""
        lines: list[dict[str, Any]] = []
        for case in self.cases:
            for row in case.rows:
                line: dict[str, Any] = {
                    "suite": case.suite.name,
                    "size": "full" if self.full else "quick",
                    "erased": "; ".join(case.erased),
                    "edit": row.name,
                }
                numbers = {case.suite.score: row.h, **row.terms, **row.published}
                for group in (row.roles, row.metrics):
                    for one, parts in group.items():
                        numbers |= {f"{one} {other}": estimate for other, estimate in parts.items()}
                for name, estimate in numbers.items():
                    score = estimate.score
                    line |= {name: score.value, f"{name} low": score.low, f"{name} high": score.high}
                line |= {f"{part} found": count for part, count in row.totals.items()}
                lines.append(line)
        columns = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: "" if v != v else v for k, v in line.items()})
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write `results.json`, `results.csv` and `index.html`.

        Raises:
            ExpungeError: the folder holds results of other suites, or cannot be written.
        """
        from expunge.evaluation.html_report import render_page

        folder = Path(folder)
        check_results(folder, [case.suite.name for case in self.cases])
        html = render_page(self)
        for name, text in (
            ("results.json", json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"),
            ("results.csv", self.to_csv()),
            ("index.html", html),
        ):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf8")


def evaluate(
    model: Model,
    edits: Sequence[Edit | Candidate],
    suites: Sequence[str | Path | Suite],
    *,
    full: bool = False,
    metrics: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    cache: Cache | None = None,
    progress: Progress = quiet,
) -> Report:
    """Classifier edits by suites. Each image is drawn once and each metric looks at it once.

    >>> report = evaluate(model, [edit], ["object"])  # doctest: +SKIP
    >>> report.save("report")                         # doctest: +SKIP

    Args:
        model: the original: the positive control, and the first row of every case.
        edits: what to judge.
        suites: suites, by name, file or as they are.
        full: the paper's number of images instead of the quick one.
        metrics: what to measure besides what the suites say.
        options: fields of metrics, by name, over those of the suites.
        cache: where images and numbers are kept; by default the user's cache folder.
        progress: told what is done.

    Raises:
        ExpungeError: an edit names nothing in a suite or does not fit the model, or a metric cannot
            be had.
    """
    if not edits:
        raise ExpungeError("there is no edit to judge")
    if not suites:
        raise ExpungeError("there is no suite to judge by")
    require_known(metrics)
    cache = Cache() if cache is None else cache
    candidates = _named([e if isinstance(e, Candidate) else Candidate.of(e) for e in edits])
    read = [suite if isinstance(suite, Suite) else Suite.read(suite) for suite in suites]
    if len({suite.name for suite in read}) < len(read):
        raise ExpungeError("a suite is named twice")
    drawing = _drawing(model, candidates, [suite.scheduler for suite in read])
    for candidate in candidates:
        if candidate.edit is not None:
            candidate.edit.fits(model)  # raises where it cannot be laid on at all
    plans = []
    for suite in read:
        used = _metrics(suite, metrics, options or {})
        known = known_to(suite, used[suite.judge])
        groups: dict[tuple[str, ...], list[Candidate]] = {}
        for candidate in candidates:
            erased = tuple(concept.name for concept in known.erased(candidate.erases))
            groups.setdefault(tuple(sorted(erased)), []).append(candidate)
        for group in groups.values():
            cells = known.cells(group[0].erases, full=full)
            warn_of_cuts(model, cells)
            plans.append((known, used, group, cells))
    cases = []
    for known, used, group, cells in plans:
        original, sources = drawing[known.scheduler]
        asked = requests(model, cells, known.num_inference_steps, known.guidance_scale)
        looks = {"original": measure(cache, original, None, cells, asked, used, progress, known.name)}
        for candidate in group:
            looks[candidate.name] = measure(
                cache,
                sources[candidate.name],
                original,
                cells,
                asked,
                used,
                progress,
                f"{known.name}, {candidate.name}",
            )
        anchored = _anchored(cache, original, known, used, group, full, progress)
        here = {"original": original, **{c.name: sources[c.name] for c in group}}
        cases.append(score_suite(known, used, group, looks, here, anchored))
    return Report(tuple(cases), full, _provenance(model, plans), cache)


def _drawing(
    model: Model, candidates: Sequence[Candidate], schedulers: Sequence[str]
) -> dict[str, tuple[Source, dict[str, Source]]]:
    """For each scheduler what draws the original, and what each candidate, by name.

    Raises:
        ExpungeError: a model cannot use one of them.
    """
    found = {}
    model_hash(model)  # once for all: copies of the model know it
    for scheduler in dict.fromkeys(schedulers):
        sampled = model.sampled_by(scheduler)
        found[scheduler] = (
            Source(sampled),
            {
                c.name: Source(c.model.sampled_by(scheduler))
                if c.model
                else Source(sampled, (c.edit,) if c.edit else ())
                for c in candidates
            },
        )
    return found


def _anchored(
    cache: Cache,
    original: Source,
    suite: Suite,
    metrics: Mapping[str, Metric],
    group: Sequence[Candidate],
    full: bool,
    progress: Progress,
) -> dict[str, Measurements]:
    """What the original draws of each candidate's anchors, where a metric asks for it."""
    used = {n: m for n, m in metrics.items() if isinstance(m, Distance) and m.from_anchor}
    found = {}
    for candidate in group if used else ():
        cells = suite.anchor_cells(candidate.erases, candidate.anchors, full=full)
        asked = requests(original.model, cells, suite.num_inference_steps, suite.guidance_scale)
        if cells:
            label = f"{suite.name}, anchors"
            found[candidate.name] = measure(cache, original, None, cells, asked, used, progress, label)
    return found


def _named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates under names that differ."""
    seen: dict[str, int] = {"original": 1}
    named = []
    for candidate in candidates:
        seen[candidate.name] = count = seen.get(candidate.name, 0) + 1
        name = candidate.name if count == 1 else f"{candidate.name} ({count})"
        named.append(dataclasses.replace(candidate, name=name))
    return named


def _metrics(
    suite: Suite, more: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Metric]:
    """The suite's judge first, then its metrics, then further ones."""
    return {
        name: make(name, {**suite.options.get(name, {}), **options.get(name, {})})
        for name in dict.fromkeys((suite.judge, *suite.metrics, *more))
    }


def known_to(suite: Suite, judge: Metric) -> Suite:
    """The suite without what its judge cannot tell: a small world has fewer concepts.

    Raises:
        ExpungeError: the judge answers no questions, or knows none of the labels.
    """
    if not isinstance(judge, Classifier):
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


def _number(estimate: Estimate) -> dict[str, Any]:
    score = estimate.score
    values = {"value": score.value, "low": score.low, "high": score.high}
    if (general := estimate.in_general) is not None:
        values |= {"general low": general.low, "general high": general.high}
    return {k: None if v != v else round(v, 6) for k, v in values.items()} | {"n": score.n}


def _comparison(one: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {
        "of": one.of,
        "between": [one.one, one.other],
        **_number(one.difference),
        "comparisons": one.family,
        "p": _rounded(one.p),
        "p corrected": _rounded(one.corrected),
        "larger than chance": one.sure,
    }
    if one.difference.general is not None:
        found |= {
            "p in general": _rounded(one.p_in_general),
            "p in general corrected": _rounded(one.corrected_in_general),
            "larger than chance in general": one.sure_in_general,
        }
    return found


def _rounded(p: float) -> float | None:
    """A p-value to three figures; None where there is none."""
    return None if p != p else float(f"{p:.3g}")


def _numbers(table: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {a: {b: _number(e) for b, e in parts.items()} for a, parts in table.items()}


def _case_dict(case: SuiteResult, differences: Sequence[Comparison]) -> dict[str, Any]:
    suite = case.suite
    return {
        "suite": {
            "name": suite.name,
            "version": suite.version,
            "score": suite.score,
            "judge": suite.judge,
            "question": suite.question,
            "notes": suite.notes,
        },
        "erased": list(case.erased),
        "retained": list(case.retained),
        "sampler": _drawn_with(case),
        "pictures": sum(len(cell.seeds) for cell in case.rows[0].looks.cells),
        "seeds": [suite.first_seed, max(max(cell.seeds) for cell in case.rows[0].looks.cells)],
        "left out": [
            {"role": role, "words": words, "original": None if share != share else round(share, 4)}
            for role, words, share in case.left_out
        ],
        "rows": [
            {
                "name": row.name,
                "from": row.candidate.record if row.candidate else {"kind": "original"},
                suite.score: _number(row.h),
                "terms": {name: _number(e) for name, e in row.terms.items()},
                "published": {name: _number(e) for name, e in row.published.items()},
                **({"totals": dict(row.totals)} if row.totals else {}),
                "roles": _numbers(row.roles),
                "metrics": _numbers(row.metrics),
                "each": {
                    role: {k: None if v != v else round(v, 4) for k, v in parts.items()}
                    for role, parts in row.each.items()
                },
            }
            for row in case.rows
        ],
        "differences": [_comparison(one) for one in differences],
    }


def _drawn_with(case: SuiteResult) -> dict[str, Any]:
    """The scheduler with its settings, the steps and the guidance of a case's images."""
    requests = [request for cell in case.rows[0].looks.requests for request in cell]
    scales = sorted({request.guidance_scale for request in requests})
    return {
        **sampler(case.sources["original"].model),
        "num_inference_steps": requests[0].num_inference_steps,
        "guidance_scale": scales[0] if len(scales) == 1 else scales,
    }


def _provenance(
    model: Model, plans: Sequence[tuple[Suite, Mapping[str, Metric], Any, Sequence[Cell]]]
) -> dict[str, Any]:
    first: Request = requests(
        model, plans[0][3], plans[0][0].num_inference_steps, plans[0][0].guidance_scale
    )[0][0]
    metrics = {
        name: {**dataclasses.asdict(metric), **metric.provenance}
        for _, used, _, _ in plans
        for name, metric in used.items()
    }
    return {
        "model": model.name,
        "model sha256": model_hash(model),
        "sampler": sampler(model.sampled_by(plans[0][0].scheduler)),
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        "metrics": json.loads(json.dumps(metrics, default=str)),
        "intervals": f"95 %, {statistics.DRAWS} draws: low and high are about these concepts (prompts,"
        " images and seeds of the edit resampled), general low and high about concepts in general"
        " (these resampled, too)",
        "comparisons": f"Holm: those of one number in one suite are a family, level {LEVEL:g}",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("expunge", "torch", "diffusers", "transformers")
        },
    }
