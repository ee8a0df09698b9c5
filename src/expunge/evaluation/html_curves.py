"""Curves for the page: the share that shows the concept again, against an attack's budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.base.fields import format_value
from expunge.evaluation.candidates import SuiteResult
from expunge.evaluation.statistics import Estimate

LEFT, RIGHT, TOP, BOTTOM = 40, 330, 14, 174
"""The sides of the plot, in units of the drawing."""


def lay_out_curves(cases: Sequence[SuiteResult], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Lay out one drawing for each attack whose budgets are numbers, at two or more of them.

    Budgets stand evenly apart, whatever their numbers: they usually grow by factors. 0 is unattacked.
    The original is dashed: where it falls, the attack spoils images.

    Args:
        cases: of one suite; an edit of each has a line of its own.
        colours: of each row's name.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        for row in case.rows:
            for one in row.attacks:
                if len(one.amounts) < 2:
                    continue
                rises = list(one.amounts.values()) == sorted(one.amounts.values())
                xs = [0.0] * rises + list(one.amounts.values())
                shares = [one.pre] * rises + [one.seen[budget] for budget in one.amounts]
                controls = [one.control[budget] for budget in one.amounts]
                budgets = [format_value(x) if x else "0" for x in xs]
                # The name of the field is what all budgets in words begin with.
                field = next(iter(one.amounts)).rpartition(" ")[0].replace("_", " ")
                plot = found.setdefault(
                    one.attack,
                    {"title": one.attack, "field": field, "ticks": _ticks(budgets), "lines": []},
                )
                name = row.name if len(cases) == 1 else f"{row.name} ({', '.join(case.erased[:3])})"
                # Lines of equal shares would hide one another: each edit's stands a little aside.
                aside = 2.5 * len(plot["lines"])
                for who, colour, values, first in (
                    (name, colours[row.name], shares, 0),
                    (f"original, for {name}", "var(--quiet)", controls, int(rises)),
                ):
                    points = _points(values, first, len(budgets), aside)
                    if points:
                        line = {"name": who, "colour": colour, "points": points}
                        plot["lines"].append({**line, "dashed": who != name})
    return list(found.values())


def _ticks(budgets: Sequence[str]) -> list[tuple[str, float]]:
    return [(budget, _x(i, len(budgets))) for i, budget in enumerate(budgets)]


def _points(values: Sequence[Estimate], first: int, n: int, aside: float) -> list[dict[str, Any]]:
    """The points of a line; those without a value are left out.

    Args:
        values: one each.
        first: the number of the tick that the first stands at.
        n: how many ticks there are.
        aside: how far from the tick.
    """
    found = []
    for i, estimate in enumerate(values):
        score = estimate.score
        if math.isnan(score.value):
            continue
        low, high = (s if not math.isnan(s) else score.value for s in (score.low, score.high))
        found.append(
            {"x": _x(first + i, n) + aside, "y": _y(score.value), "low": _y(low), "high": _y(high),
             "text": f"{100 * score.value:.0f} %"}
        )  # fmt: skip
    return found


def _x(i: int, n: int) -> float:
    return round(LEFT + 16 + (RIGHT - LEFT - 32) * i / max(1, n - 1), 1)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * min(max(share, 0.0), 1.0), 1)
