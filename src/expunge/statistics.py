"""Means with their intervals, and what an erasure is worth: the harmonic means.

Every interval comes from one resampling of prompts and seeds. Each picture gets random weights that
hang on its prompt and place alone, so that all edits, and the original, are resampled alike: a
difference or a ratio of two of them is paired.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

DRAWS = 2000
Z = 1.959964  # the normal distribution's 97.5 % point

Answers = Mapping[str, Tensor]
"""For each prompt (pictures,) numbers in the order of their seeds; nan counts neither way."""


@dataclass(frozen=True)
class Score:
    """A number, how many pictures are behind it, and its 95 % interval."""

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
    """(draws,)"""

    @property
    def score(self) -> Score:
        """The number with its interval: the 2.5 % and 97.5 % points of the draws, and itself."""
        if math.isnan(self.value) or self.n == 0:
            return Score(self.value, self.n)
        low, high = self.draws.quantile(torch.tensor([0.025, 0.975], dtype=self.draws.dtype)).tolist()
        return Score(self.value, self.n, min(low, self.value), max(high, self.value))

    def map(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """A function of the number."""
        value = float(function(torch.tensor(self.value, dtype=torch.float64)))
        return Estimate(value, self.n, function(self.draws))

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference."""
        return Estimate(self.value - other.value, min(self.n, other.n), self.draws - other.draws)

    def over(self, other: Estimate, cap: float = 1.0) -> Estimate:
        """The paired ratio, never above `cap`."""
        if not (self.n and other.n):
            return NONE
        value = min(self.value / other.value, cap) if other.value else math.nan
        draws = (self.draws / other.draws.clamp(min=1e-9)).clamp(max=cap)
        return Estimate(value, min(self.n, other.n), draws)

    @property
    def above_chance(self) -> bool:
        """Whether the interval lies on one side of zero: meant for differences."""
        score = self.score
        return score.n > 0 and (score.low > 0 or score.high < 0)


NONE = Estimate(math.nan, 0, torch.full((DRAWS,), math.nan, dtype=torch.float64))
"""No pictures, no number."""


def mean(answers: Answers, *, share: bool = True, name: str = "") -> Estimate:
    """The mean over all pictures.

    Args:
        answers: the numbers of each prompt's pictures.
        share: whether they lie in [0, 1]; the interval then knows that 20 of 20 is not certainty.
        name: means of different names share the weights of their pictures, not the prior: so one
            picture that two models draw differently is no proof of a difference.
    """
    rows = [(prompt, values.double()) for prompt, values in answers.items() if len(values)]
    n = sum(int((~values.isnan()).sum()) for _, values in rows)
    if n == 0:
        return NONE
    longest = max(len(values) for _, values in rows)
    padded = torch.full((len(rows), longest), math.nan, dtype=torch.float64)
    for row, (_, values) in zip(padded, rows, strict=True):
        row[: len(values)] = values
    value = float(padded.nanmean())
    weights, normals = _stacked(tuple(prompt for prompt, _ in rows), longest)
    draws = resample(padded[None], weights, normals, _prior(name) if share else None)[0]
    return Estimate(value, n, draws)


def moved(value: float, *influences: Answers) -> Estimate:
    """A number that each picture moves a little, as a distance between sets (`metric.Apart`).

    Its draws are value + Σ mean of the influences under resampling, a mean for each set.
    """
    means = [mean(one, share=False) for one in influences]
    return Estimate(value, means[0].n, value + torch.stack([one.draws for one in means]).sum(0))


def resample(values: Tensor, weights: Tensor, normals: Tensor, prior: Tensor | None) -> Tensor:
    """Means under a Bayesian bootstrap over prompts and seeds.

        mean = (Σ_p v_p Σ_s w_ps y_ps + g₁) / (Σ_p v_p Σ_s w_ps + g₀ + g₁)

    w ~ Exp(1) for each picture. v, of mean one and variance τ, for each prompt: τ is the part of the
    variance between the prompts' means that their few pictures do not explain, so that prompts of
    like accuracy are not counted as a source of error twice; for few prompts it is widened as
    Student's t is. g ~ Gamma(½) are Jeffreys' half success and half failure: one prompt alone gets
    the Jeffreys interval of a proportion.

    Args:
        values: (trials, prompts, pictures), nan where there is none.
        weights: (draws, prompts, pictures), Exp(1).
        normals: (draws, prompts), standard normal.
        prior: (draws, 2), Gamma(½); None for numbers that are no shares.

    Returns:
        (trials, draws)

    Source: Rubin 1981 (the Bayesian bootstrap); Davison, Hinkley 1997, section 3.8 (two levels).
    """
    there = ~values.isnan()
    filled, counts = values.nan_to_num(), there.sum(-1)
    # (trials, prompts, draws): what each prompt's pictures weigh, and weigh times their value.
    w = weights.permute(1, 2, 0)
    top = torch.einsum("tps,psd->tpd", filled, w)
    bottom = torch.einsum("tps,psd->tpd", there.to(values.dtype), w)
    spread = (_between(filled, there, counts).log1p().sqrt())[:, None, None]
    v = (spread * normals.T - spread**2 / 2).exp()
    top, bottom = (top * v).sum(1), (bottom * v).sum(1)
    if prior is None:
        return top / bottom
    return (top + prior[:, 0]) / (bottom + prior.sum(1))


def _between(filled: Tensor, there: Tensor, counts: Tensor) -> Tensor:
    """τ for each trial, (trials,)."""
    means = filled.sum(-1) / counts.clamp(min=1)
    inside = ((filled - means[..., None]) ** 2 * there).sum(-1) / (counts - 1).clamp(min=1)
    of_mean = inside / counts.clamp(min=1)  # variance of a prompt's mean by its pictures alone
    told, seen = counts >= 2, counts >= 1
    prompts = seen.sum(-1)
    centre = (means * seen).sum(-1, keepdim=True) / prompts.clamp(min=1)[:, None]
    total = ((means - centre) ** 2 * seen).sum(-1) / (prompts - 1).clamp(min=1)
    explained = (of_mean * told).sum(-1) / told.sum(-1).clamp(min=1)
    share = (1 - explained / total.clamp(min=1e-12)).clamp(0, 1)
    share = torch.where((prompts >= 2) & told.any(-1) & (total > 0), share, torch.zeros_like(share))
    free = (prompts - 1).clamp(min=1).to(share.dtype)
    return share * (_student(free) / Z) ** 2 * (free + 2) / free


def _student(free: Tensor) -> Tensor:
    """The 97.5 % point of Student's t, by its expansion in 1/degrees of freedom."""
    z = Z
    return (
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    )


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@lru_cache(maxsize=64)
def _weights(prompt: str, pictures: int) -> tuple[Tensor, Tensor]:
    """The prompt's (draws, pictures) and (draws,): the first pictures' weights hang not on how many."""
    generator = _generator(f"prompt\0{prompt}")
    normals = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
    uniform = torch.rand(pictures, DRAWS, generator=generator, dtype=torch.float64)
    return -torch.log1p(-uniform).T, normals


@lru_cache(maxsize=1)
def _stacked(prompts: tuple[str, ...], pictures: int) -> tuple[Tensor, Tensor]:
    """Those of several prompts, (draws, prompts, pictures) and (draws, prompts): many means of the same
    pictures follow one another."""
    found = [_weights(prompt, pictures) for prompt in prompts]
    return torch.stack([w for w, _ in found], 1), torch.stack([z for _, z in found], 1)


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
    return Estimate(value, sum(t.n for t in terms), harmonic([t.draws for t in terms]))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of several estimates: over concepts, as the papers average their H's."""
    kept = [e for e in estimates if not math.isnan(e.value)]
    if not kept:
        return NONE
    draws = torch.stack([e.draws for e in kept]).mean(0)
    return Estimate(sum(e.value for e in kept) / len(kept), sum(e.n for e in kept), draws)


def corrected(seen: Estimate, chance: Estimate) -> Estimate:
    """UA: what of a share is gone, counted against the share that comes by chance.

    UA = 1 − max(0, seen − chance) / (1 − chance)
    """

    def ua(s: Tensor, c: Tensor) -> Tensor:
        return 1 - (s - c).clamp(min=0) / (1 - c).clamp(min=1e-9)

    value = float(ua(torch.tensor(seen.value), torch.tensor(chance.value)))
    return Estimate(value, seen.n, ua(seen.draws, chance.draws))
