"""The report as one page that needs nothing else: no file beside it, no request to the net."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from expunge.base.errors import join_names
from expunge.base.image_files import to_pil
from expunge.evaluation.measure import make
from expunge.evaluation.scoring import PUBLISHED, CandidateResult, Comparison, SuiteResult, compared
from expunge.evaluation.statistics import Estimate
from expunge.metric import Classifier

if TYPE_CHECKING:
    from expunge.evaluation.report import Report

TEMPLATE = Path(__file__).with_name("html_report.html")
SHOWN = {"erased": 8, "synonyms": 8, "retained": 12}  # images of a strip
WIDEST = 128  # pixels of an image on the page
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Told apart by those who see few colours, too (Okabe and Ito)."""
ROLES = {
    "erased": "Erased",
    "synonyms": "Synonyms, which the method was not told of",
    "retained": "Retained",
}
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
    """About these concepts."""
    general: str = ""
    """About concepts in general."""
    sort: float = -math.inf
    part: float = 0.0
    """Of a full bar, 0 to 1."""


def number(estimate: Estimate | None, percent: bool = True) -> Number:
    """An estimate in words."""
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
    """The page."""
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
    methods, brief = report.methods()[name], _brief(rows)
    parts = list(dict.fromkeys(part for row in rows for part in row.totals))
    return {
        "suite": suite,
        "h": Markup("H<sub>{}</sub>").format(suite.score.removeprefix("H_")),
        "terms": terms,
        "extra": extra,
        "extra_titles": [f"{metric.replace('_', ' ')}, {role}" for metric, role in extra],
        "published": list(PUBLISHED[suite.score]),
        "rows": [
            {
                "name": row.name,
                "erased": ", ".join(case.erased[:3]) + (" …" if len(case.erased) > 3 else ""),
                "original": row.candidate is None,
                "colour": colours[row.name],
                "h": number(row.h, is_share),
                "terms": [number(row.terms.get(term), is_share) for term in terms],
                "broken": number(row.roles.get("erased", {}).get("unrecognisable")),
                "published": [
                    number(row.published.get(name), is_share) for name in PUBLISHED[suite.score]
                ],
                "totals": [_count(row, part) for part in parts],
                "extra": [number(row.metrics.get(m, {}).get(role), percent=False) for m, role in extra],
            }
            for case in cases
            for row in case.rows
        ],
        "methods": [
            {"recipe": recipe, "name": brief.get(recipe, recipe), "h": number(h, is_share)}
            for recipe, h in sorted(methods.items(), key=lambda item: -_sortable(item[1]))
        ]
        if len(cases) > 1
        else [],
        "between": [
            _difference(brief.get(one.one, one.one), brief.get(one.other, one.other), one)
            for one in (report.compared().get(name, []) if len(cases) > 1 else [])
        ],
        "totals": [part.removesuffix("_EXPOSED").replace("_", " ").lower() for part in parts],
        "plot": _plot(cases, colours) if is_share else None,
        "cases": [
            _case(report, case, found) for case, found in zip(cases, compared(cases), strict=True)
        ],
    }


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
        "number": number(found.difference, found.of != "H_a"),
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
        "edits": [{**_asked(row), **_strips(report, case, row)} for row in edits],
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


def _asked(row: CandidateResult) -> dict[str, Any]:
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
                    "number": number(seen["seen"]),
                    "what": what.replace("pictures", f"{seen['seen'].n:,} images"),
                    "before": number(seen["original"]).text,
                    "gone": role in ("erased", "synonyms"),
                    "broken": number(seen["unrecognisable"]).text,
                }
            )
    return {"asked": asked, "made": made, "answers": answers}


def _strips(report: Report, case: SuiteResult, row: CandidateResult) -> dict[str, Any]:
    """Before and after on the same seeds, worst first, for each role."""
    judge = _judge_of(report, case)
    strips = []
    for role, title in ROLES.items():
        places = _worst_first(case, row, role)
        if not places:
            continue
        score_suite = [place for place in places if row.looks.cells[place[1]].asks]
        chosen = places[: SHOWN[role]]
        asked = [row.looks.requests[c][i] for _, c, i in chosen]
        before = report.cache.draw(case.sources["original"], asked)
        after = report.cache.draw(case.sources[row.name], asked)
        strips.append(
            {
                "title": title,
                "failing": sum(bad > 0.5 for bad, _, _ in score_suite),
                "judged": len(score_suite),
                "of": len(places),
                "pairs": [
                    {
                        "before": data_uri(before[k]),
                        "after": data_uri(after[k]),
                        "prompt": request.prompt,
                        "seed": request.seed,
                        "seen": _seen(judge, case, row, c, i),
                        "wrong": bad > 0.5,
                    }
                    for k, ((bad, c, i), request) in enumerate(zip(chosen, asked, strict=True))
                ],
            }
        )
    return {"name": row.name, "roles": strips}


def _worst_first(case: SuiteResult, row: CandidateResult, role: str) -> list[tuple[float, int, int]]:
    """The images of a role, (how badly it fails, cell, place): the worst of every prompt first, then
    the next of every prompt, so that a strip shows many words. Of like ones, those come first that the
    original did right, or where something is erased, wrong: that drew what should go."""
    ranked = []
    for c, cell in enumerate(row.looks.cells):
        if cell.role != role:
            continue
        after, before = (case.wrong[name][c].tolist() for name in (row.name, "original"))
        turn = 1 if role == "retained" else -1
        order = sorted(
            (-bad, turn * was, i)
            for i, (bad, was) in enumerate(zip(after, before, strict=True))
            if not math.isnan(bad)
        )
        ranked += [(rank, bad, c, i) for rank, (bad, _, i) in enumerate(order)]
    return [(-bad, c, i) for _, bad, c, i in sorted(ranked)]


def _judge_of(report: Report, case: SuiteResult) -> Classifier | None:
    metric = make(case.suite.judge, case.suite.options.get(case.suite.judge, {}))
    return metric if isinstance(metric, Classifier) else None


def _seen(
    judge: Classifier | None, case: SuiteResult, row: CandidateResult, cell: int, image: int
) -> tuple[str, str]:
    """What the judge calls the image before and after."""
    if judge is None:
        return "", ""
    before, after = (
        judge.shown(one.looks.rows[case.suite.judge][cell][image : image + 1])[0]
        for one in (case.rows[0], row)
    )
    return before, after


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


def data_uri(image: Tensor) -> str:
    """An image (3, height, width) inside the page, at most 128 pixels wide."""
    one = to_pil(image.nan_to_num())
    data = io.BytesIO()
    if one.width > WIDEST:
        one = one.resize((WIDEST, one.height * WIDEST // one.width), Image.Resampling.LANCZOS)
        one.save(data, "WEBP", quality=85)
        kind = "webp"
    else:
        one.save(data, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
