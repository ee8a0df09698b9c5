"""Resampling: the random numbers and the equations behind every interval.

All random numbers are seeded by a text alone (a prompt, a concept, a name), so that two models on the
same prompts and seeds are resampled alike, and differences between them are paired.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

DRAWS = 2000
"""Resamples: enough that the 2.5 % point is the mean of some fifty of them."""
Z = 1.959964
"""The normal distribution's 97.5 % point."""
PSEUDO_CONCEPTS = 0.05
"""The weight of a pseudo-concept, half lost and half kept, beside those that were tried: ten of ten
concepts without a fault do not prove that no concept has one."""


def resample(
    values: Tensor,
    weights: Tensor,
    normals: Tensor,
    prior: Tensor | None,
    strata: Tensor | None = None,
) -> Tensor:
    """Return means under resampling of images, and of the prompts of each concept.

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
    # The mean of each prompt under the weights, by sums and not by copies: (trials, prompts, draws).
    top = torch.einsum("tps,psd->tpd", filled, w)
    bottom = torch.einsum("tps,psd->tpd", there.to(values.dtype), w).clamp(min=1e-30)
    means = filled.sum(-1) / counts.clamp(min=1)
    part = counts / n
    # The Bayesian bootstrap's variance is (n − 1)/(n + 1) of that of a mean: it is widened by that.
    wide = ((counts + 1) / (counts - 1).clamp(min=1)).sqrt() * part
    moved = (wide[..., None] * (top / bottom - means[..., None])).sum(1)
    moved = moved + _between(filled, there, counts, part, strata)(normals)
    found = (part * means).sum(-1, keepdim=True) + moved
    if prior is None:
        return found
    # A share of 1 in all images has no spread of its own; the pseudo-images give it one.
    return (n * found.clamp(0, 1) + prior[:, 0]) / (n + prior.sum(1))


def _between(
    filled: Tensor,
    there: Tensor,
    counts: Tensor,
    part: Tensor,
    strata: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """What the spread between prompts adds: a function from normals (draws, prompts) to (trials, draws).

    Arguments are those of `resample`, with nan as 0, and: `there` where there is a number, `counts` of
    them (trials, prompts), `part` each prompt's share of the images.
    """
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
    # What images alone would spread their prompts' means: that is in the draws already.
    inside = ((filled - means[..., None]) ** 2 * there).sum(-1) / (counts - 1).clamp(min=1)
    explained = (part**2 * inside / counts.clamp(min=1)).sum(-1)
    degrees = ((many - 1).clamp(min=0)).sum(-1)
    squares = apart.square().sum(-1)
    # Without a prompt of two images, nothing is known of how much images differ within one.
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


def widen_to_concepts(
    draws: Tensor,
    units: Mapping[str, float],
    parts: Mapping[str, float] | None = None,
    share_of: str | None = None,
) -> Tensor:
    """Return draws about concepts in general, (draws,), from draws about these.

    Added is √τ Σ_c u_c v_c, as for prompts in `resample`: v ~ N(0, 1) for each concept, u along their
    distances from the mean, τ the variance of a mean of so many concepts, widened to Student's t, less
    what the draws have already.

    Args:
        draws: about these.
        units: what each concept came to.
        parts: the weight of each in the mean; by default the same.
        share_of: the name of a share, for `PSEUDO_CONCEPTS`; None for numbers that are no shares.
    """
    k = len(units)
    values = torch.tensor(list(units.values()), dtype=torch.float64)
    weights = torch.tensor([parts[c] for c in units] if parts else [1 / k] * k, dtype=torch.float64)
    centre = float((weights * values).sum())
    apart = weights * (values - centre) * (k / (k - 1)) ** 0.5
    normals = torch.stack([_normals(f"concept\0{concept}") for concept in units])
    noise, squares = apart @ normals, float(apart.square().sum())
    if share_of is not None:
        # Half a concept at 0 and half at 1, of the weight that it would have among them.
        m = k + PSEUDO_CONCEPTS
        pseudo = PSEUDO_CONCEPTS / 2 * (centre**2 + (1 - centre) ** 2) / (m * (m - 1))
        noise = noise + pseudo**0.5 * _normals(f"further concept\0{share_of}")
        squares += pseudo
    t = float(_student(torch.tensor(k - 1.0)))
    # The draws hold some of the spread already: only what is lacking is added.
    extra = max(squares * (t / Z) ** 2 - float(draws.var()), 0.0)
    return draws + (extra / max(squares, 1e-30)) ** 0.5 * noise


def _student(free: Tensor) -> Tensor:
    """The 97.5 % point of Student's t: exact for one and two degrees of freedom, else its expansion."""
    # Off by 4e-3 at three degrees and less from there on, but useless below.
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
    """A prompt's weights (draws, images), Exp(1), and normals (draws,)."""
    generator = _generator(f"prompt\0{prompt}")
    normals = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
    # Drawn image by image: the first ones stay when a prompt is given more.
    uniform = torch.rand(images, DRAWS, generator=generator, dtype=torch.float64)
    return -torch.log1p(-uniform).T, normals


@lru_cache(maxsize=4096)
def _normals(text: str) -> Tensor:
    """Standard normals (draws,), always the same for a text."""
    return torch.randn(DRAWS, generator=_generator(text), dtype=torch.float64)


def pad_prompts(rows: Sequence[tuple[str, str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values (prompts, images), the prompts' strata (prompts,), and their random numbers.

    One image alone does not show how much its prompt's images differ. So the prompts of a concept with
    one image each are pooled as one prompt with many; and concepts with a single image are pooled with
    others like them.

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
    """The random numbers of several rows, (draws, rows, longest) and (draws, rows).

    The last are kept: many means of the same images follow one another.
    """
    weights = torch.ones(DRAWS, len(rows), longest, dtype=torch.float64)
    normals = []
    for i, row in enumerate(rows):
        found = [_weights(prompt, images) for prompt, images in row]
        joined = torch.cat([w for w, _ in found], 1)
        weights[:, i, : joined.shape[1]] = joined
        normals.append(found[0][1])
    return weights, torch.stack(normals, 1)


def draw_prior(name: str) -> Tensor:
    """Return Gamma(½), (draws, 2): half the square of a standard normal."""
    generator = _generator(f"prior\0{name}")
    return torch.randn(DRAWS, 2, generator=generator, dtype=torch.float64) ** 2 / 2


def draw_seed_noise(
    groups: Mapping[str, Sequence[tuple[float, Tensor]]],
    units: Mapping[str, float],
    each: Mapping[str, Tensor],
) -> Tensor:
    """Return what several seeds of the edit add to the draws of a mean over concepts, (draws,).

    Args:
        groups: for each concept, for each seed, the value and its draws (draws,).
        units: for each concept the mean of its values.
        each: for each concept the mean of its draws.
    """
    noise = torch.zeros(DRAWS, dtype=torch.float64)
    squares = explained = 0.0
    degrees = 0
    for name, group in groups.items():
        seeds = len(group)
        if seeds < 2:
            continue
        degrees += seeds - 1
        # The standard deviation of a mean over seeds, and then over concepts.
        scale = 1 / (len(groups) * (seeds * (seeds - 1)) ** 0.5)
        for i, (value, draws) in enumerate(group):
            apart = scale * (value - units[name])
            noise = noise + apart * _normals(f"seed\0{name}\0{i}")
            squares += apart**2
            explained += scale**2 * float((draws - each[name]).var())
    if not squares:
        return noise
    t = float(_student(torch.tensor(float(degrees))))
    extra = max(squares * (t / Z) ** 2 - explained, 0.0)
    return (extra / squares) ** 0.5 * noise
