"""Comparisons of edits and recipes, corrected for how many are made at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.evaluation.candidates import SuiteResult
from expunge.evaluation.statistics import LEVEL, Estimate, holm


@dataclass(frozen=True, eq=False)
class Comparison:
    """A difference of two edits or recipes, and whether chance explains it, among all that are made."""

    of: str
    """The number that is compared."""
    one: str
    other: str
    difference: Estimate
    p: float
    """The two-sided p-value of this difference alone, about these concepts."""
    corrected: float
    """The p-value corrected by Holm for all comparisons of its family."""
    family: int
    """The number of comparisons in its family: those of one number, in one suite, in all its cases."""
    p_in_general: float = math.nan
    corrected_in_general: float = math.nan

    @property
    def sure(self) -> bool:
        """Whether it is larger than chance among these concepts, after the correction."""
        return self.corrected < LEVEL

    @property
    def sure_in_general(self) -> bool:
        """Whether it is larger than chance for concepts in general, after the correction."""
        return self.corrected_in_general < LEVEL


def correct_family(differences: Sequence[tuple[str, str, str, Estimate]]) -> list[Comparison]:
    """Correct the comparisons that are made at once for their number."""
    p = [difference.p_value() for *_, difference in differences]
    # Corrected apart from the others: the two readings answer two questions.
    general = [
        d.p_value(in_general=True) if d.general is not None else math.nan for *_, d in differences
    ]
    rows = zip(differences, p, holm(p), general, holm(general), strict=True)
    return [
        Comparison(of, one, other, d, alone, corrected, len(p), alone_general, general_corrected)
        for (of, one, other, d), alone, corrected, alone_general, general_corrected in rows
    ]


def compare_all(cases: Sequence[SuiteResult]) -> list[list[Comparison]]:
    """Return the comparisons of each case: those of one number in one suite are a family."""
    found = [compare_pairs(case) for case in cases]
    families: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for c, rows in enumerate(found):
        for r, (of, *_) in enumerate(rows):
            # A family is what one would search for its best: all pairs, in all cases, of one number.
            families.setdefault((cases[c].suite.name, of), []).append((c, r))
    placed: dict[tuple[int, int], Comparison] = {}
    for places in families.values():
        for place, one in zip(places, correct_family([found[c][r] for c, r in places]), strict=True):
            placed[place] = one
    return [[placed[c, r] for r in range(len(rows))] for c, rows in enumerate(found)]


def compare_pairs(case: SuiteResult) -> list[tuple[str, str, str, Estimate]]:
    """Return for each pair of edits and each number the paired difference.

    Each is (what is compared, one edit, the other, the difference).
    """
    found: list[tuple[str, str, str, Estimate]] = []
    edits = [row for row in case.rows if row.candidate]
    for i, one in enumerate(edits):
        for other in edits[i + 1 :]:
            numbers: dict[str, tuple[Estimate, Estimate]] = {case.suite.score: (one.h, other.h)}
            numbers |= {t: (one.terms[t], other.terms[t]) for t in one.terms if t in other.terms}
            for name, (a, b) in numbers.items():
                if a.n and b.n:
                    found.append((name, one.name, other.name, a.minus(b)))
    return found
