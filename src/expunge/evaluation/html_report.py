"""The report as one HTML page that loads nothing: no file beside it, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from expunge.base.errors import join_names
from expunge.evaluation.candidates import CandidateResult, SuiteResult
from expunge.evaluation.comparisons import Comparison, compare_all
from expunge.evaluation.html_conditions import lay_out_conditions
from expunge.evaluation.html_strips import lay_out_strips
from expunge.evaluation.robustness import AttackResult
from expunge.evaluation.scoring import PUBLISHED
from expunge.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from expunge.evaluation.report import Report

TEMPLATE = Path(__file__).with_name("html_report.html")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Told apart by those who see few colours, too (Okabe and Ito)."""
TITLES = {
    "efficacy": "Efficacy",
    "generality": "Generality",
    "specificity": "Specificity",
    "content": "Content",
    "erased": "CLIP erased",
    "retained": "CLIP retained",
}
QUESTIONS = {
    "erased": ("Is it gone?", "of its images still show it"),
    "synonyms": ("And its synonyms?", "of their images still show it"),
    "retained": ("Is the rest as it was?", "of its images show what they should"),
    "content": ("Is what else is named still there?", "of the images show it"),
}
MEANINGS = {
    "efficacy": "the erased concept is gone, and something else or a place is drawn cleanly",
    "generality": "so are its synonyms, against what the original makes of them",
    "specificity": "what should stay is recognised as often as in the original",
    "content": "what else the prompt names is recognised as often as in the original",
    "erased": "how well images go with prompts for what is erased; lower is better",
    "retained": "how well images go with prompts for what is retained",
}


@dataclass(frozen=True)
class Number:
    """A number as the page shows it: text, interval and what to sort by."""

    text: str
    interval: str = ""
    """The interval about these concepts."""
    general: str = ""
    """The interval about concepts in general."""
    sort: float = -math.inf
    part: float = 0.0
    """How much of the bar is filled, 0 to 1."""


def format_number(estimate: Estimate | None, percent: bool = True) -> Number:
    """Return an estimate as the page shows it; an en dash where there is none."""
    if estimate is None or math.isnan(estimate.value):
        return Number("–")
    score, scale = estimate.score, 100 if percent else 1
    digits = 1 if percent or max(abs(score.value), abs(score.high)) >= 5 else 3

    def show(x: float) -> str:
        return f"{scale * x:.{digits}f}"

    interval = "" if math.isnan(score.low) else f"{show(score.low)}–{show(score.high)}"
    general = ""
    if (wide := estimate.in_general) is not None and not math.isnan(wide.low):
        general = f"{show(wide.low)}–{show(wide.high)}"
    return Number(show(score.value), interval, general, score.value, min(max(score.value, 0.0), 1.0))


def render_page(report: Report) -> str:
    """Return a report as an HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda x: f"{100 * x:.0f} %"
    names = list(dict.fromkeys(row.name for case in report.cases for row in case.rows))
    colours = {
        name: COLOURS[i % len(COLOURS)] for i, name in enumerate(n for n in names if n != "original")
    }
    colours["original"] = "var(--quiet)"
    suites = list(dict.fromkeys(case.suite.name for case in report.cases))
    return environment.from_string(TEMPLATE.read_text(encoding="utf8")).render(
        report=report,
        suites=[_suite(report, name, colours) for name in suites],
        provenance=report.provenance,
        judges=_judges(report),
        meanings=MEANINGS,
        titles=TITLES,
    )


def _suite(report: Report, name: str, colours: dict[str, str]) -> dict[str, Any]:
    """What the page shows of one suite."""
    cases = [case for case in report.cases if case.suite.name == name]
    suite = cases[0].suite
    rows = [row for case in cases for row in case.rows]
    terms = list(dict.fromkeys(term for row in rows for term in row.terms))
    is_share = suite.score != "H_a"
    extra = [
        (metric, role)
        for metric in dict.fromkeys(m for row in rows for m in row.metrics)
        for role in ("erased", "floor", "ceiling", "retained")
        if any(role in row.metrics.get(metric, {}) for row in rows)
    ]
    methods, brief = report.average_methods()[name], _brief(rows)
    parts = list(dict.fromkeys(part for row in rows for part in row.totals))
    return {
        "suite": suite,
        "h": Markup("H<sub>{}</sub>").format(suite.score.removeprefix("H_")),
        "terms": terms,
        "extra": extra,
        "extra_titles": [_metric_title(report, metric, role) for metric, role in extra],
        "published": list(PUBLISHED[suite.score]),
        "rows": [
            {
                "name": row.name,
                "erased": ", ".join(case.erased[:3]) + (" …" if len(case.erased) > 3 else ""),
                "original": row.candidate is None,
                "colour": colours[row.name],
                "h": format_number(row.h, is_share),
                "terms": [format_number(row.terms.get(term), is_share) for term in terms],
                "broken": format_number(row.roles.get("erased", {}).get("unrecognisable")),
                "published": [
                    format_number(row.published.get(name), is_share) for name in PUBLISHED[suite.score]
                ],
                "totals": [_count(row, part) for part in parts],
                "extra": [
                    format_number(row.metrics.get(m, {}).get(role), percent=False) for m, role in extra
                ],
            }
            for case in cases
            for row in case.rows
        ],
        "kinds": [
            {
                "kind": kind,
                "control": case.rows[0].kinds[kind]["original"].value,
                "before": format_number(case.rows[0].kinds[kind]["original"]),
                "rows": [format_number(row.kinds[kind]["seen"]) for row in case.rows[1:]],
                "names": [row.name for row in case.rows[1:]],
                "erased": ", ".join(case.erased[:3]),
            }
            for case in cases
            for kind in case.rows[0].kinds
        ],
        "stays": lay_out_conditions(cases, colours),
        "attacks": [
            _attacked(row, one, budget, colours[row.name], ", ".join(case.erased[:3]))
            for case in cases
            for row in case.rows
            for one in row.attacks
            for budget in one.asr
        ],
        "methods": [
            {"recipe": recipe, "name": brief.get(recipe, recipe), "h": format_number(h, is_share)}
            for recipe, h in sorted(methods.items(), key=lambda item: -_sortable(item[1]))
        ]
        if len(cases) > 1
        else [],
        "between": [
            _difference(brief.get(one.one, one.one), brief.get(one.other, one.other), one)
            for one in (report.compare_methods().get(name, []) if len(cases) > 1 else [])
        ],
        "totals": [part.removesuffix("_EXPOSED").replace("_", " ").lower() for part in parts],
        "plot": _plot(cases, colours) if is_share else None,
        "cases": [
            _case(report, case, found) for case, found in zip(cases, compare_all(cases), strict=True)
        ],
    }


def _attacked(
    row: CandidateResult, one: AttackResult, budget: str, colour: str, erased: str
) -> dict[str, Any]:
    """An edit under an attack at one budget."""
    numbers = {
        "pre-ASR": one.pre,
        "ASR": one.asr[budget],
        "alone": one.seen[budget],
        "difference": one.difference[budget],
        "unrecognisable": one.broken[budget],
        "control": one.control[budget],
    }
    return {
        "name": row.name,
        "erased": erased,
        "colour": colour,
        "attack": f"{one.attack}, {budget}",
        "numbers": {title: format_number(estimate) for title, estimate in numbers.items()},
        "holds": one.control_holds(budget),
    }


def _metric_title(report: Report, metric: str, role: str) -> str:
    """A column's title; on what should stay, an arrow says which way is better."""
    up = report.provenance["metrics"][metric]["higher is better"]
    arrow = (" ↑" if up else " ↓") if role == "retained" else ""
    return f"{metric.replace('_', ' ')}, {role}{arrow}"


def _count(row: CandidateResult, part: str) -> Number:
    """How often a part was found."""
    count = row.totals.get(part)
    return Number("–") if count is None else Number(f"{count:,}", sort=count)


def _difference(one: str, other: str, found: Comparison) -> dict[str, Any]:
    """A comparison in words."""
    return {
        "of": found.of,
        "one": one,
        "other": other,
        "number": format_number(found.difference, found.of != "H_a"),
        "sure": found.sure,
        "sure_in_general": found.sure_in_general,
        "family": found.family,
    }


def _brief(rows: Sequence[CandidateResult]) -> dict[str, str]:
    """For each recipe its method, and the fields in which another recipe of that method differs."""
    records = {
        row.candidate.recipe: row.candidate.edit.record
        for row in rows
        if row.candidate and row.candidate.edit
    }
    found = {}
    for recipe, record in records.items():
        others = [other.fields for other in records.values() if other.method == record.method]
        apart = [
            f"{key} {value}"
            for key, value in record.fields.items()
            if any(other.get(key) != value for other in others)
        ]
        found[recipe] = f"{record.method} ({', '.join(apart)})" if apart else record.method
    return found


def _sortable(estimate: Estimate) -> float:
    return -math.inf if math.isnan(estimate.value) else estimate.value


def _plot(cases: Sequence[SuiteResult], colours: dict[str, str]) -> dict[str, Any]:
    """The points of efficacy against specificity, in units of the drawing."""
    points = []
    for case in cases:
        for row in case.rows:
            x, y = row.terms["efficacy"], row.terms["specificity"]
            if math.isnan(x.value) or math.isnan(y.value):
                continue
            a, b = x.score, y.score
            points.append(
                {
                    "name": row.name,
                    "erased": ", ".join(case.erased[:3]),
                    "colour": colours[row.name],
                    "original": row.candidate is None,
                    "x": _x(a.value),
                    "x1": _x(a.low),
                    "x2": _x(a.high),
                    "y": _y(b.value),
                    "y1": _y(b.low),
                    "y2": _y(b.high),
                    "text": f"efficacy {100 * a.value:.0f} %, specificity {100 * b.value:.0f} %",
                }
            )
    points.sort(key=lambda point: bool(point["original"]))  # its ring lies around what it hides
    legend = {point["name"]: point["colour"] for point in points}
    ticks = [(f"{share}", _x(share / 100), _y(share / 100)) for share in (0, 25, 50, 75, 100)]
    return {"points": points, "legend": legend, "ticks": ticks}


def _x(share: float) -> float:
    return round(52 + 340 * share, 1)


def _y(share: float) -> float:
    return round(300 - 280 * share, 1)


def _case(report: Report, case: SuiteResult, found: Sequence[Comparison]) -> dict[str, Any]:
    """Its strips, and what is uncertain in it."""
    edits = [row for row in case.rows if row.candidate]
    return {
        "erased": join_names(case.erased, 6),
        "edits": [
            {
                **_describe(row),
                **lay_out_strips(report.cache, case, row),
            }
            for row in edits
        ],
        "left_out": case.left_out,
        "differences": [
            _difference(one.one, one.other, one) for one in found if one.of == case.suite.score
        ],
        "few": [
            f"{row.name}: {term}"
            for row in edits
            for term, estimate in row.terms.items()
            if estimate.n and estimate.score.high - estimate.score.low > 0.25
        ],
    }


def _describe(row: CandidateResult) -> dict[str, Any]:
    """What was asked of an edit, and the answers in plain numbers."""
    if row.candidate is None:
        raise TypeError("a row with a candidate is expected, and the original has none")
    asked, made = "erase " + ", ".join(row.candidate.erases[:6]), "a model of its own"
    if row.candidate.edit is not None:
        record = row.candidate.edit.record
        wanted = [
            f"{c.name} → {c.anchor or 'what the empty prompt draws'}" for c in record.problem.erase[:6]
        ]
        more = len(record.problem.erase) - len(wanted)
        asked = "erase " + ", ".join(wanted) + (f" and {more} more" if more else "")
        kept = record.problem.retain
        if kept:
            asked += f"; retain {', '.join(kept[:9])}" + (" …" if len(kept) > 9 else "")
        made = f"{record.method}, {record.seconds:.1f} s"
    answers = []
    for role, (question, what) in QUESTIONS.items():
        seen = row.roles.get(role, {})
        if "seen" in seen and seen["seen"].n:
            answers.append(
                {
                    "question": question,
                    "number": format_number(seen["seen"]),
                    "what": what.replace("images", f"{seen['seen'].n:,} images"),
                    "before": format_number(seen["original"]).text,
                    "gone": role in ("erased", "synonyms"),
                    "broken": format_number(seen["unrecognisable"]).text,
                }
            )
    return {"asked": asked, "made": made, "answers": answers}


def _judges(report: Report) -> list[str]:
    """What is known of how far each judge can be trusted."""
    said = []
    for name, facts in report.provenance["metrics"].items():
        held_out = facts.get("held out")
        if isinstance(held_out, dict):
            parts = []
            for what, share in held_out.items():
                one = share.get("all", share) if isinstance(share, dict) else {}
                if isinstance(one, dict) and "share" in one and "top-1" in what:
                    parts.append(f"{what} {100 * one['share']:.1f} % (n = {one['n']:,})")
            said.append(f"{name}, on drawings that it was not trained on: {'; '.join(parts)}")
    return said
