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

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

DRAWS = 2000
Z = 1.959964  # the normal distribution's 97.5 % point
PSEUDO_CONCEPTS = 0.05
"""How much of a further concept, half of it lost and half of it kept, stands beside those that were
tried: ten of ten concepts without a fault do not prove that there is no faulty one."""
LEVEL = 0.05
"""How often chance alone may find a difference, over all comparisons of a family."""

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
        """The number with its interval about these concepts: the 2.5 % and 97.5 % points of the draws,
        and itself."""
        return self._score(self.draws)

    @property
    def in_general(self) -> Score | None:
        """The number with its interval about concepts in general; None where one concept alone is known,
        for one says nothing of others."""
        return None if self.general is None else self._score(self.general)

    def _score(self, draws: Tensor) -> Score:
        if math.isnan(self.value) or self.n == 0:
            return Score(self.value, self.n)
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
        return Score(self.value, self.n, min(low, self.value), max(high, self.value))

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """A function of the number."""
        value = float(function(torch.tensor(self.value, dtype=torch.float64)))
        return _of(value, self.n, function, self)

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference; of means over the same concepts it is that of each concept's own."""
        value, n = self.value - other.value, min(self.n, other.n)
        found = _of(value, n, lambda a, b: a - b, self, other)
        if len(self.units) < 2 or self.units.keys() != other.units.keys():
            return found
        units = {name: unit - other.units[name] for name, unit in self.units.items()}
        return Estimate(value, n, found.draws, _over_concepts(found.draws, units), units)

    def over(self, other: Estimate, cap: float = 1.0) -> Estimate:
        """The paired ratio, never above `cap`."""
        if not (self.n and other.n):
            return NONE
        value = min(self.value / other.value, cap) if other.value else math.nan
        n = min(self.n, other.n)
        return _of(value, n, lambda a, b: (a / b.clamp(min=1e-9)).clamp(max=cap), self, other)

    @property
    def above_chance(self) -> bool:
        """Whether the interval about these lies on one side of zero: meant for one difference alone;
        `holm` is for many."""
        score = self.score
        return score.n > 0 and (score.low > 0 or score.high < 0)

    def p_value(self, *, in_general: bool = False) -> float:
        """How likely a difference at least so far from zero would be if there were none, two-sided.

        Twice the share of draws beyond zero. Where fewer than ten of them are there, the tail is that
        of a normal distribution with the draws' deviation, for the draws are too few to tell.

        Args:
            in_general: ask about concepts in general, where more than one is known.
        """
        draws = self.general if in_general and self.general is not None else self.draws
        if math.isnan(self.value) or self.n == 0:
            return math.nan
        beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        if beyond >= 10:
            return min(1.0, 2 * beyond / len(draws))
        deviation = float(draws.std())
        if deviation == 0:
            return 0.0 if self.value else 1.0
        return min(20 / len(draws), math.erfc(abs(float(draws.mean())) / deviation / math.sqrt(2)))


def _of(value: float, n: int, function: Callable[..., Tensor], *given: Estimate) -> Estimate:
    """A function of some estimates, in both readings."""
    general = None
    if any(one.general is not None for one in given):
        general = function(*(one.draws if one.general is None else one.general for one in given))
    return Estimate(value, n, function(*(one.draws for one in given)), general)


NONE = Estimate(math.nan, 0, torch.full((DRAWS,), math.nan, dtype=torch.float64))
"""No images, no number."""


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, corrected for their number; nan stays nan.

    The smallest is multiplied by their number m, the next by m − 1, and so on, and none falls below the
    one before it: the chance that any true hypothesis is rejected stays below the level.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
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
    """The mean over all images.

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
    padded, strata, weights, normals = _laid_out([(p, of.get(p, ""), v) for p, v in rows])
    prior = _prior(name) if share else None
    draws = resample(padded[None], weights, normals, prior, strata)[0]
    by_concept: dict[str, list[Tensor]] = {}
    for prompt, values in rows:
        by_concept.setdefault(of.get(prompt, ""), []).append(values)
    joined = {concept: torch.cat(parts) for concept, parts in by_concept.items()}
    known = {concept: v[~v.isnan()] for concept, v in joined.items() if not v.isnan().all()}
    if len(known) < 2:
        return Estimate(value, n, draws)
    units = {concept: float(v.mean()) for concept, v in known.items()}
    parts = {concept: len(v) / n for concept, v in known.items()}
    general = _over_concepts(draws, units, parts, name if share else None)
    return Estimate(value, n, draws, general.clamp(0, 1) if share else general)


def moved(value: float, *influences: Answers) -> Estimate:
    """A number that each image moves a little, as a distance between sets (`metric.Apart`).

    Its draws are value + Σ mean of the influences under resampling, a mean for each set.
    """
    means = [mean(one, share=False) for one in influences]
    return Estimate(value, means[0].n, value + torch.stack([one.draws for one in means]).sum(0))


def resample(
    values: Tensor,
    weights: Tensor,
    normals: Tensor,
    prior: Tensor | None,
    strata: Tensor | None = None,
) -> Tensor:
    """Means under resampling of images, and of the prompts of each concept.

        mean = ȳ + Σ_p a_p √((n_p + 1)/(n_p − 1)) (Σ_s w_ps y_ps / Σ_s w_ps − ȳ_p) + √τ Σ_p u_p v_p
        share = (n mean + g₁) / (n + g₀ + g₁)

    a_p is prompt p's share of the images. w ~ Exp(1) for each image: the Bayesian bootstrap, whose
    variance is made that of a mean of n_p numbers. v ~ N(0, 1) for each prompt, along the unit vector u
    of the prompts' distances from their concept's mean, so that two models on the same prompts are
    resampled alike. τ is the variance of the mean that the spread between prompts shows, widened to
    Student's t for few of them, less what the images explain. g ~ Gamma(½) are Jeffreys' half
    success and half failure: one prompt alone gets the Jeffreys interval of a proportion.

    Args:
        values: (trials, prompts, images), nan where there is none.
        weights: (draws, prompts, images), Exp(1).
        normals: (draws, prompts), standard normal.
        prior: (draws, 2), Gamma(½); None for numbers that are no shares.
        strata: (prompts,), the number of each prompt's concept, from 0; one concept by default.

    Returns:
        (trials, draws)

    Source: Rubin 1981 (the Bayesian bootstrap); Davison, Hinkley 1997, sections 3.2 (strata) and 3.8
    (two levels).
    """
    there = ~values.isnan()
    filled, counts = values.nan_to_num(), there.sum(-1)
    n = counts.sum(-1, keepdim=True).to(values.dtype)
    w = weights.permute(1, 2, 0)
    top = torch.einsum("tps,psd->tpd", filled, w)
    bottom = torch.einsum("tps,psd->tpd", there.to(values.dtype), w).clamp(min=1e-30)
    means = filled.sum(-1) / counts.clamp(min=1)
    part = counts / n
    wide = ((counts + 1) / (counts - 1).clamp(min=1)).sqrt() * part
    moved = (wide[..., None] * (top / bottom - means[..., None])).sum(1)
    moved = moved + _between(filled, there, counts, part, strata)(normals)
    found = (part * means).sum(-1, keepdim=True) + moved
    if prior is None:
        return found
    return (n * found.clamp(0, 1) + prior[:, 0]) / (n + prior.sum(1))


def _between(
    filled: Tensor,
    there: Tensor,
    counts: Tensor,
    part: Tensor,
    strata: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """What prompts of their own add: a function from (draws, prompts) normals to (trials, draws)."""
    prompts = filled.shape[1]
    of = torch.zeros(prompts, dtype=torch.long) if strata is None else strata
    member = torch.nn.functional.one_hot(of, int(of.max()) + 1).to(filled.dtype)  # (prompts, concepts)
    seen = (counts >= 1).to(filled.dtype)
    many = seen @ member  # (trials, concepts): how many prompts each concept has
    means = filled.sum(-1) / counts.clamp(min=1)
    centre = (part * means) @ member / (part @ member).clamp(min=1e-30)
    # n/(n − 1) of the squares of one concept's prompts, as in any variance.
    free = ((many / (many - 1).clamp(min=1)).sqrt() * (many >= 2)) @ member.T
    apart = part * (means - centre @ member.T) * free
    inside = ((filled - means[..., None]) ** 2 * there).sum(-1) / (counts - 1).clamp(min=1)
    explained = (part**2 * inside / counts.clamp(min=1)).sum(-1)
    degrees = ((many - 1).clamp(min=0)).sum(-1)
    squares = apart.square().sum(-1)
    told = ((counts >= 2).to(filled.dtype) * (free > 0)).sum(-1) > 0
    # Of two prompts Student's t would make an interval that is all there is: they count as three, and
    # only where they are farther apart than their images explain.
    widened = squares * (_student(degrees.clamp(min=2)) / Z) ** 2
    counted = told & (degrees > 0) & ((degrees > 1) | (squares > explained))
    extra = (widened - explained).clamp(min=0) * counted

    def add(normals: Tensor) -> Tensor:
        along = apart @ normals.T.to(apart.dtype) / squares.clamp(min=1e-30).sqrt()[:, None]
        return extra.sqrt()[:, None] * along

    return add


def _over_concepts(
    draws: Tensor,
    units: Mapping[str, float],
    parts: Mapping[str, float] | None = None,
    share_of: str | None = None,
) -> Tensor:
    """Draws about these concepts, made draws about concepts in general: (draws,).

    Added is √τ Σ_c u_c v_c, as for prompts in `resample`: v ~ N(0, 1) for each concept, u along their
    distances from the mean, τ the variance of a mean of so many concepts, widened to Student's t, less
    what the draws have already.

    Args:
        draws: about these.
        units: what each concept came to.
        parts: what each counts in the mean; by default the same.
        share_of: the name of a share, for `PSEUDO_CONCEPTS`; None for what is none.
    """
    k = len(units)
    values = torch.tensor(list(units.values()), dtype=torch.float64)
    weights = torch.tensor([parts[c] for c in units] if parts else [1 / k] * k, dtype=torch.float64)
    centre = float((weights * values).sum())
    apart = weights * (values - centre) * (k / (k - 1)) ** 0.5
    normals = torch.stack([_normals(f"concept\0{concept}") for concept in units])
    noise, squares = apart @ normals, float(apart.square().sum())
    if share_of is not None:
        m = k + PSEUDO_CONCEPTS
        pseudo = PSEUDO_CONCEPTS / 2 * (centre**2 + (1 - centre) ** 2) / (m * (m - 1))
        noise = noise + pseudo**0.5 * _normals(f"further concept\0{share_of}")
        squares += pseudo
    t = float(_student(torch.tensor(k - 1.0)))
    extra = max(squares * (t / Z) ** 2 - float(draws.var()), 0.0)
    return draws + (extra / max(squares, 1e-30)) ** 0.5 * noise


def _student(free: Tensor) -> Tensor:
    """The 97.5 % point of Student's t: exact for one and two degrees of freedom, else its expansion."""
    z, free = Z, free.double()
    found = (
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * free**4)
    )
    few = torch.where(free < 1.5, torch.full_like(found, 12.7062), torch.full_like(found, 4.30265))
    return torch.where(free < 2.5, few, found)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@lru_cache(maxsize=64)
def _weights(prompt: str, images: int) -> tuple[Tensor, Tensor]:
    """The prompt's (draws, images) and (draws,): the first images' weights hang not on how many."""
    generator = _generator(f"prompt\0{prompt}")
    normals = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
    uniform = torch.rand(images, DRAWS, generator=generator, dtype=torch.float64)
    return -torch.log1p(-uniform).T, normals


@lru_cache(maxsize=4096)
def _normals(text: str) -> Tensor:
    """(draws,) of a standard normal, always the same for a text."""
    return torch.randn(DRAWS, generator=_generator(text), dtype=torch.float64)


def _laid_out(rows: Sequence[tuple[str, str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (prompts, images), the prompts' strata (prompts,), and their random numbers.

    One image alone tells nothing of how much its prompt's images differ. So the prompts of a concept
    with one image each count as one prompt with many; and where a concept has but one image in
    all, it counts with others like it.

    Args:
        rows: (prompt, concept, images' numbers).
    """
    groups: dict[tuple[str, str], list[tuple[str, Tensor]]] = {}
    for prompt, concept, values in rows:
        key = (concept, prompt if len(values) > 1 else "")
        groups.setdefault(key, []).append((prompt, values))
    lone = [key for key, parts in groups.items() if sum(len(v) for _, v in parts) == 1]
    if len(groups) > 1 and lone:
        groups[("\0", "")] = [part for key in lone for part in groups.pop(key)]
    concepts = list(dict.fromkeys(concept for concept, _ in groups))
    strata = torch.tensor([concepts.index(concept) for concept, _ in groups])
    longest = max(sum(len(v) for _, v in parts) for parts in groups.values())
    padded = torch.full((len(groups), longest), math.nan, dtype=torch.float64)
    for row, parts in zip(padded, groups.values(), strict=True):
        joined = torch.cat([v for _, v in parts])
        row[: len(joined)] = joined
    shape = tuple(tuple((prompt, len(v)) for prompt, v in parts) for parts in groups.values())
    return padded, strata, *_stacked(shape, longest)


@lru_cache(maxsize=1)
def _stacked(rows: tuple[tuple[tuple[str, int], ...], ...], longest: int) -> tuple[Tensor, Tensor]:
    """The random numbers of several rows, (draws, rows, longest) and (draws, rows): many means of the
    same images follow one another."""
    weights = torch.ones(DRAWS, len(rows), longest, dtype=torch.float64)
    normals = []
    for i, row in enumerate(rows):
        found = [_weights(prompt, images) for prompt, images in row]
        joined = torch.cat([w for w, _ in found], 1)
        weights[:, i, : joined.shape[1]] = joined
        normals.append(found[0][1])
    return weights, torch.stack(normals, 1)


def _prior(name: str) -> Tensor:
    """(draws, 2) of Gamma(½): half the square of a standard normal."""
    generator = _generator(f"prior\0{name}")
    return torch.randn(DRAWS, 2, generator=generator, dtype=torch.float64) ** 2 / 2


def harmonic(terms: Sequence[Tensor]) -> Tensor:
    """The harmonic mean of terms in [0, 1]; zero where one of them is."""
    stacked = torch.stack([term.clamp(0, 1) for term in terms])
    mean = len(terms) / (1 / stacked.clamp(min=1e-12)).sum(0)
    return torch.where((stacked > 0).all(0), mean, torch.zeros_like(mean))


def harmonic_mean(terms: Sequence[Estimate]) -> Estimate:
    """H = k / (Σ term⁻¹): H_o of three terms, H_c of two, H_style, H_unsafe (`Suite.score`).

    Source: Lu et al., MACE, CVPR 2024, eq. 10 and 11.
    """
    if any(math.isnan(term.value) for term in terms):
        return NONE
    value = float(harmonic([torch.tensor(term.value, dtype=torch.float64) for term in terms]))
    return _of(value, sum(t.n for t in terms), lambda *draws: harmonic(draws), *terms)


def average(
    estimates: Sequence[Estimate], concepts: Sequence[str] = (), *, share: bool = True
) -> Estimate:
    """The plain mean of several estimates: over concepts, as the papers average their H's.

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
    draws = draws + _over_seeds(groups, units, each)
    if share:
        draws = draws.clamp(0, 1)
    general = None
    if len(units) > 1:
        general = _over_concepts(draws, units, None, "average" if share else None)
        general = general.clamp(0, 1) if share else general
    return Estimate(value, sum(e.n for e in kept), draws, general, units)


def _over_seeds(
    groups: Mapping[str, Sequence[Estimate]], units: Mapping[str, float], each: Mapping[str, Tensor]
) -> Tensor:
    """What several seeds of the edit add to the draws of a mean over concepts: (draws,)."""
    noise = torch.zeros(DRAWS, dtype=torch.float64)
    squares = explained = 0.0
    degrees = 0
    for name, group in groups.items():
        seeds = len(group)
        if seeds < 2:
            continue
        degrees += seeds - 1
        scale = 1 / (len(groups) * (seeds * (seeds - 1)) ** 0.5)
        for i, one in enumerate(group):
            apart = scale * (one.value - units[name])
            noise = noise + apart * _normals(f"seed\0{name}\0{i}")
            squares += apart**2
            explained += scale**2 * float((one.draws - each[name]).var())
    if not squares:
        return noise
    t = float(_student(torch.tensor(float(degrees))))
    extra = max(squares * (t / Z) ** 2 - explained, 0.0)
    return (extra / squares) ** 0.5 * noise


def corrected(seen: Estimate, chance: Estimate) -> Estimate:
    """UA: what of a share is gone, counted against the share that comes by chance.

    UA = 1 − max(0, seen − chance) / (1 − chance)
    """

    def ua(s: Tensor, c: Tensor) -> Tensor:
        return 1 - (s - c).clamp(min=0) / (1 - c).clamp(min=1e-9)

    value = float(ua(torch.tensor(seen.value), torch.tensor(chance.value)))
    return _of(value, seen.n, ua, seen, chance)
