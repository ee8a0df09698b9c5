"""The report: the cases of all suites, and where every number comes from.

What the numbers mean stands in docs/explanation/judging.md.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.base.errors import join_names
from expunge.base.files import check_results, replacing
from expunge.base.html import render_table
from expunge.evaluation import statistics
from expunge.evaluation.candidates import SuiteResult
from expunge.evaluation.comparisons import Comparison, compare_all, correct_family
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.results import FORMAT, RESULTS, case_table, comparison_table
from expunge.evaluation.statistics import Estimate


@dataclass(frozen=True, eq=False)
class Report:
    """The cases of all suites, and where every number comes from."""

    cases: tuple[SuiteResult, ...]
    full: bool
    provenance: Mapping[str, Any]
    cache: Cache = field(repr=False)

    def average_methods(self) -> dict[str, dict[str, Estimate]]:
        """Return for each suite, for each recipe, its H averaged over concepts and seeds of the edit."""
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

    def pair_methods(self) -> list[tuple[str, str, str, Estimate]]:
        """Return the paired differences of these means: (suite, one recipe, other, difference).

        Only between recipes that have been judged in the same cases: means over other concepts do not
        compare.
        """
        found = []
        for suite, means in self.average_methods().items():
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

    def compare_methods(self) -> dict[str, list[Comparison]]:
        """Return these differences for each suite, corrected for their number."""
        found: dict[str, list[tuple[str, str, str, Estimate]]] = {}
        scores = {case.suite.name: case.suite.score for case in self.cases}
        for suite, one, other, difference in self.pair_methods():
            found.setdefault(suite, []).append((scores[suite], one, other, difference))
        return {suite: correct_family(rows) for suite, rows in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images, ready for JSON."""
        return {
            "format": FORMAT,
            "size": "full" if self.full else "quick",
            "provenance": self.provenance,
            "cases": [
                case_table(case, differences)
                for case, differences in zip(self.cases, compare_all(self.cases), strict=True)
            ],
            "methods": {
                suite: {recipe: h.to_dict() for recipe, h in recipes.items()}
                for suite, recipes in self.average_methods().items()
            },
            "differences between methods": [
                {"suite": suite, **comparison_table(one)}
                for suite, rows in self.compare_methods().items()
                for one in rows
            ],
        }

    def to_csv(self) -> str:
        """Return a table with a line for each row: H, terms and metrics, each with its interval."""
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
                for attacked in row.attacks:
                    numbers[f"{attacked.attack} pre-ASR"] = attacked.pre
                    for budget, asr in attacked.asr.items():
                        numbers[f"{attacked.attack} {budget} ASR"] = asr
                        numbers[f"{attacked.attack} {budget} control"] = attacked.control[budget]
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

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it: a table for each suite, with scores and intervals."""
        from expunge.evaluation.html_report import format_number

        tables = []
        for suite in dict.fromkeys(case.suite.name for case in self.cases):
            cases = [case for case in self.cases if case.suite.name == suite]
            score = cases[0].suite.score
            terms = list(
                dict.fromkeys(term for case in cases for row in case.rows for term in row.terms)
            )
            rows = []
            for case in cases:
                for row in case.rows:
                    numbers = [row.h, *(row.terms.get(term) for term in terms)]
                    shown = [format_number(number, score != "H_a") for number in numbers]
                    cells = (f"{n.text} ({n.interval})" if n.interval else n.text for n in shown)
                    rows.append((row.name, join_names(case.erased, 3), *cells))
            attacked = [one for case in cases for row in case.rows for one in row.attacks]
            notes = ["In brackets: 95 % intervals."]
            if attacked:
                notes.append("Edits were attacked, too: save the report to see how they held.")
            title = f"{suite}, {'full' if self.full else 'quick'}"
            tables.append(render_table(title, rows, ("edit", "erased", score, *terms), notes))
        return "".join(tables)

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
            (RESULTS, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"),
            ("results.csv", self.to_csv()),
            ("index.html", html),
        ):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
