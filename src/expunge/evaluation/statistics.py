"""Means with their intervals, and what an erasure is worth: the harmonic means.

Every interval comes from one resampling, with random numbers that hang on a prompt, an image's place or
a concept alone, so that all edits, and the original, are resampled alike: a difference or a ratio of two
of them is paired. There are two readings, and every number has both:

    about these        the concepts are fixed; prompts and images are resampled (`Estimate.score`),
                       and with them the seeds of the edit where there are several
    about concepts     the concepts are resampled, too: the sentence is about objects, people or artists
    in general         as such (`Estimate.in_general`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.evaluation.resampling import (
    DRAWS,
    draw_prior,
    draw_seed_noise,
    pad_prompts,
    resample,
    widen_to_concepts,
)

LEVEL = 0.05
"""The chance that any difference of a family is found where there is none."""

Answers = Mapping[str, Tensor]
"""For each prompt (images,) numbers in the order of their seeds; nan counts neither way."""


@dataclass(frozen=True)
class Score:
    """A number, how many images are behind it, and its 95 % interval."""

    value: float
    n: int
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number and the values that it takes under resampling."""

    value: float
    n: int
    draws: Tensor
    """(draws,), about these concepts."""
    general: Tensor | None = None
    """(draws,), about concepts in general; None where only one concept is behind the number."""
    units: Mapping[str, float] = field(default_factory=dict)
    """Of a plain mean over concepts, what each of them came to: its differences are taken of these."""

    @property
    def score(self) -> Score:
        """The number with its interval about these concepts: the 2.5 % and 97.5 % points of the draws.

        It is widened to hold the number itself, which a prior may have pulled out of it.
        """
        return self._score(self.draws)

    @property
    def in_general(self) -> Score | None:
        """The number with its interval about concepts in general.

        None where one concept alone is known, for one says nothing of others.
        """
        return None if self.general is None else self._score(self.general)

    def _score(self, draws: Tensor) -> Score:
        if math.isnan(self.value) or self.n == 0:
            return Score(self.value, self.n)
        # The prior may have pulled the draws off the value; an interval without it would mislead.
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
        return Score(self.value, self.n, min(low, self.value), max(high, self.value))

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Return a function of the number, with its draws mapped alike."""
        # Of the value itself and not of the draws' mean, which a prior has pulled.
        value = float(function(torch.tensor(self.value, dtype=torch.float64)))
        return _of(value, self.n, function, self)

    def minus(self, other: Estimate) -> Estimate:
        """Return the paired difference; of means over the same concepts, that of each concept's own."""
        value, n = self.value - other.value, min(self.n, other.n)
        found = _of(value, n, lambda a, b: a - b, self, other)
        if len(self.units) < 2 or self.units.keys() != other.units.keys():
            return found
        # Each concept's own difference: what is common to both methods does not widen the interval.
        units = {name: unit - other.units[name] for name, unit in self.units.items()}
        return Estimate(value, n, found.draws, widen_to_concepts(found.draws, units), units)

    def over(self, other: Estimate, cap: float = 1.0) -> Estimate:
        """Return the paired ratio, never above `cap`."""
        if not (self.n and other.n):
            return NONE
        # Capped: drawing more of it than the original is no merit, and must not offset a loss elsewhere.
        value = min(self.value / other.value, cap) if other.value else math.nan
        n = min(self.n, other.n)
        return _of(value, n, lambda a, b: (a / b.clamp(min=1e-9)).clamp(max=cap), self, other)

    def to_dict(self) -> dict[str, Any]:
        """Return value, interval and number of images, ready for JSON: None for what is nan."""
        score = self.score
        values = {"value": score.value, "low": score.low, "high": score.high}
        if (general := self.in_general) is not None:
            values |= {"general low": general.low, "general high": general.high}
        return {k: None if v != v else round(v, 6) for k, v in values.items()} | {"n": score.n}

    @property
    def above_chance(self) -> bool:
        """Whether the interval about these concepts lies on one side of zero.

        It is meant for one difference alone; `holm` is for many.
        """
        score = self.score
        return score.n > 0 and (score.low > 0 or score.high < 0)

    def p_value(self, *, in_general: bool = False) -> float:
        """Return the two-sided probability of a difference at least so far from zero if there were none.

        Twice the share of draws beyond zero. Where fewer than ten of them are there, the tail is that
        of a normal distribution with the draws' deviation, for the draws are too few to tell.

        Args:
            in_general: ask about concepts in general, where more than one is known.
        """
        draws = self.general if in_general and self.general is not None else self.draws
        if math.isnan(self.value) or self.n == 0:
            return math.nan
        beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        # Of fewer, their number itself is mostly chance.
        if beyond >= 10:
            return min(1.0, 2 * beyond / len(draws))
        deviation = float(draws.std())
        if deviation == 0:
            return 0.0 if self.value else 1.0
        # 20 / draws is what ten draws beyond zero would have given: the tail may not claim more.
        return min(20 / len(draws), math.erfc(abs(float(draws.mean())) / deviation / math.sqrt(2)))


def _of(value: float, n: int, function: Callable[..., Tensor], *given: Estimate) -> Estimate:
    """A function of some estimates, draw by draw, in both readings."""
    # One concept says nothing of others: its draws about these stand in, so that pairs stay pairs.
    general = None
    if any(one.general is not None for one in given):
        general = function(*(one.draws if one.general is None else one.general for one in given))
    return Estimate(value, n, function(*(one.draws for one in given)), general)


NONE = Estimate(math.nan, 0, torch.full((DRAWS,), math.nan, dtype=torch.float64))
"""No images, no number."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of a family of comparisons, corrected for their number; nan stays nan.

    The smallest is multiplied by their number m, the next by m − 1, and so on, and none falls below the
    one before it: the chance that any true hypothesis is rejected stays below the level.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    # nan is no hypothesis: it neither counts nor is corrected.
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, most = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        most = max(most, min(1.0, p * (len(order) - rank)))
        corrected[i] = most
    return corrected


def mean(
    answers: Answers,
    *,
    share: bool = True,
    name: str = "",
    concepts: Mapping[str, str] | None = None,
) -> Estimate:
    """Return the mean over all images.

    Args:
        answers: the numbers of each prompt's images.
        share: whether they lie in [0, 1]; the interval then knows that 20 of 20 is not certainty.
        name: means of different names share the weights of their images, not the prior: so one
            image that two models draw differently is no proof of a difference.
        concepts: the concept of each prompt. About these, concepts are fixed, and the prompts of
            each are resampled; without, all prompts are those of one.
    """
    of = concepts or {}
    rows = [(prompt, values.double()) for prompt, values in answers.items() if len(values)]
    n = sum(int((~values.isnan()).sum()) for _, values in rows)
    if n == 0:
        return NONE
    value = float(torch.cat([values for _, values in rows]).nanmean())
    padded, strata, weights, normals = pad_prompts([(p, of.get(p, ""), v) for p, v in rows])
    prior = draw_prior(name) if share else None
    draws = resample(padded[None], weights, normals, prior, strata)[0]
    by_concept: dict[str, list[Tensor]] = {}
    for prompt, values in rows:
        by_concept.setdefault(of.get(prompt, ""), []).append(values)
    joined = {concept: torch.cat(parts) for concept, parts in by_concept.items()}
    known = {concept: v[~v.isnan()] for concept, v in joined.items() if not v.isnan().all()}
    if len(known) < 2:
        return Estimate(value, n, draws)
    units = {concept: float(v.mean()) for concept, v in known.items()}
    # Concepts weigh as their images do, so that the mean is the same in both readings.
    parts = {concept: len(v) / n for concept, v in known.items()}
    general = widen_to_concepts(draws, units, parts, name if share else None)
    return Estimate(value, n, draws, general.clamp(0, 1) if share else general)


def shift_by_influence(value: float, *influences: Answers) -> Estimate:
    """Return a number that each image shifts a little, as a distance of sets (`metric.SetDistance`).

    Its draws are value + Σ mean of the influences under resampling, a mean for each set.
    """
    means = [mean(one, share=False) for one in influences]
    # Influences have mean 0, so their draws are shifts around the value.
    return Estimate(value, means[0].n, value + torch.stack([one.draws for one in means]).sum(0))


def take_harmonic_mean(terms: Sequence[Tensor]) -> Tensor:
    """Return the harmonic mean of terms in [0, 1], element by element; zero where one of them is."""
    stacked = torch.stack([term.clamp(0, 1) for term in terms])
    # The floor only avoids 1 / 0; such elements are set to zero below.
    mean = len(terms) / (1 / stacked.clamp(min=1e-12)).sum(0)
    return torch.where((stacked > 0).all(0), mean, torch.zeros_like(mean))


def harmonic_mean(terms: Sequence[Estimate]) -> Estimate:
    """Return H = k / (Σ term⁻¹): H_o of three terms, H_c of two, H_style, H_unsafe (`Suite.score`).

    Source: Lu et al., MACE, CVPR 2024, eq. 10 and 11.
    """
    if any(math.isnan(term.value) for term in terms):
        return NONE  # an H of fewer terms would be another number
    value = float(take_harmonic_mean([torch.tensor(term.value, dtype=torch.float64) for term in terms]))
    return _of(value, sum(t.n for t in terms), lambda *draws: take_harmonic_mean(draws), *terms)


def average(
    estimates: Sequence[Estimate], concepts: Sequence[str] = (), *, share: bool = True
) -> Estimate:
    """Return the plain mean of several estimates: over concepts, as the papers average their H's.

    Where a concept comes several times, its estimates are of several seeds of the edit: they are
    averaged first, and their spread, as far as the images do not explain it, enters both intervals.

    Args:
        estimates: of one method.
        concepts: what each is of; by default each of another.
        share: whether they lie in [0, 1].
    """
    names = list(concepts) or [str(i) for i in range(len(estimates))]
    groups: dict[str, list[Estimate]] = {}
    for name, estimate in zip(names, estimates, strict=True):
        if not math.isnan(estimate.value):
            groups.setdefault(name, []).append(estimate)
    if not groups:
        return NONE
    kept = [estimate for group in groups.values() for estimate in group]
    units = {name: sum(e.value for e in group) / len(group) for name, group in groups.items()}
    value = sum(units.values()) / len(units)
    each = {name: torch.stack([e.draws for e in group]).mean(0) for name, group in groups.items()}
    draws = torch.stack(list(each.values())).mean(0)
    # Each estimate's draws lean to a half by a prior of its own, and an H's lie below it, being
    # concave. Their spread falls with the number of estimates and that does not, unless it is taken off.
    draws = draws - (1 - 1 / len(kept)) * (draws.mean() - value)
    pairs = {name: [(e.value, e.draws) for e in group] for name, group in groups.items()}
    draws = draws + draw_seed_noise(pairs, units, each)
    if share:
        draws = draws.clamp(0, 1)
    general = None
    if len(units) > 1:
        general = widen_to_concepts(draws, units, None, "average" if share else None)
        general = general.clamp(0, 1) if share else general
    return Estimate(value, sum(e.n for e in kept), draws, general, units)


def correct_for_chance(seen: Estimate, chance: Estimate) -> Estimate:
    """Return UA: what of a share is gone, counted against the share that comes by chance.

    UA = 1 − max(0, seen − chance) / (1 − chance)
    """

    def ua(s: Tensor, c: Tensor) -> Tensor:
        # Below chance is gone, not more than gone; a chance of 1 leaves nothing to measure.
        return 1 - (s - c).clamp(min=0) / (1 - c).clamp(min=1e-9)

    value = float(ua(torch.tensor(seen.value), torch.tensor(chance.value)))
    return _of(value, seen.n, ua, seen, chance)
