"""Intervals that cover, pairs that are paired, and the harmonic means as published."""

import math

import pytest
import torch

from expunge.evaluation import statistics
from expunge.evaluation.statistics import (
    NONE,
    average,
    correct_for_chance,
    harmonic_mean,
    holm,
    mean,
    resample,
    take_harmonic_mean,
)

# Acc_e, Acc_s and perhaps Acc_g as printed, and the H beside them.
PUBLISHED = [
    ("MACE, airplane", (9.06, 95.39, 10.03), 92.03),
    ("MACE, 100 celebrities", (4.31, 84.56), 89.78),
    ("UCE, 100 celebrities", (0.12, 37.90), 54.95),
    ("ESD-x, 100 celebrities", (27.84, 27.93), 40.27),
    ("ANT, 100 celebrities", (4.30, 88.07), 91.73),
    ("SPEED, 100 celebrities", (5.87, 85.54), 89.63),
    ("OCE, 100 celebrities", (3.44, 94.42), 95.48),
]


@pytest.mark.parametrize(("name", "row", "printed"), PUBLISHED)
def test_published_rows(name, row, printed):
    erased, retained, *synonyms = (torch.tensor(x / 100, dtype=torch.float64) for x in row)
    terms = [1 - erased, retained, *(1 - x for x in synonyms)]
    assert 100 * float(take_harmonic_mean(terms)) == pytest.approx(printed, abs=0.02)


def test_nothing_erased_or_nothing_kept_is_worth_nothing():
    one, none = torch.ones(3), torch.zeros(3)
    assert take_harmonic_mean([one, none]).tolist() == [0, 0, 0]
    assert take_harmonic_mean([one, one, one]).tolist() == [1, 1, 1]


def simulate(prompts, images, accuracy, varying=None, trials=1000, draws=800):
    """(covered, width) of the intervals for detectors of a known accuracy."""
    generator = torch.Generator().manual_seed(prompts * 1000 + images)
    shape = (trials, prompts, images)
    truth = torch.as_tensor(accuracy, dtype=torch.float64).expand(trials)
    each = truth[:, None].expand(trials, prompts)
    if varying:  # prompts differ: a Beta distribution with this many counts
        torch.manual_seed(7)
        each = torch.distributions.Beta(each * varying, (1 - each) * varying).sample()
    answers = (torch.rand(shape, generator=generator, dtype=torch.float64) < each[..., None]).double()
    uniform = torch.rand(draws, prompts, images, generator=generator, dtype=torch.float64)
    normals = torch.randn(draws, prompts, generator=generator, dtype=torch.float64)
    prior = torch.randn(draws, 2, generator=generator, dtype=torch.float64) ** 2 / 2
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    parts = [
        resample(part, -torch.log1p(-uniform), normals, prior).quantile(bounds, 1)
        for part in answers.split(200)
    ]
    (low, high), found = torch.cat(parts, 1), answers.mean((1, 2))
    low, high = torch.minimum(low, found), torch.maximum(high, found)
    inside = (low <= truth) & (truth <= high)
    return float(inside.double().mean()), float((high - low).mean())


@pytest.mark.parametrize(
    ("prompts", "images", "accuracy", "varying"),
    [
        (1, 20, "any", None),
        (1, 200, 0.02, None),
        (9, 12, 0.9, None),
        (10, 5, 0.5, 8),
        (20, 5, 0.9, 8),
    ],
)
def test_intervals_cover_the_truth(prompts, images, accuracy, varying):
    if accuracy == "any":  # one prompt's few images give few different intervals: take many truths
        accuracy = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)
    covered, width = simulate(prompts, images, accuracy, varying)
    assert 0.93 <= covered <= 0.97
    assert width < 0.5


def test_twenty_of_twenty_is_not_certain():
    score = mean({"a": torch.ones(20)}).score
    assert (score.value, score.n) == (1.0, 20)
    assert 0.85 < score.low < 0.95
    assert score.high == 1
    assert mean({"a": torch.zeros(20)}).score.high == pytest.approx(1 - score.low, abs=0.02)


def test_images_that_cannot_be_judged_count_neither_way():
    nan = math.nan
    estimate = mean({"a": torch.tensor([1.0, nan, 0.0]), "b": torch.tensor([1.0, nan])})
    assert (estimate.n, estimate.value) == (3, pytest.approx(2 / 3))
    assert mean({"a": torch.tensor([nan])}).n == 0
    assert math.isnan(mean({}).value)


def test_prompts_of_their_own_make_the_interval_wider():
    same = {str(p): (torch.arange(20) < 10).float() for p in range(8)}
    apart = {str(p): torch.full((20,), float(p < 4)) for p in range(8)}
    narrow, wide = mean(same).score, mean(apart).score
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_differences_are_paired():
    torch.manual_seed(0)
    hard = (torch.rand(10, 20) < 0.5).float()
    worse = hard * (torch.rand(10, 20) < 0.85)
    one, other = (mean({str(p): row for p, row in enumerate(rows)}) for rows in (hard, worse))
    difference = one.minus(other)
    apart = math.hypot(*(e.score.high - e.score.low for e in (one, other)))
    assert difference.above_chance
    assert difference.score.high - difference.score.low < 0.8 * apart
    assert one.minus(one).score.low == one.minus(one).score.high == 0
    assert not one.minus(one).above_chance


def test_models_that_do_not_differ_are_seldom_said_to():
    """200 pairs of models, equally good; some fail on the same images more often than others."""
    generator = torch.Generator().manual_seed(3)
    said = 0
    for trial in range(200):
        chance = (0.02, 0.1, 0.5, 0.9)[trial % 4]
        common, one, other = (torch.rand(20, generator=generator) < chance for _ in range(3))
        alike = torch.rand(20, generator=generator) < 0.5
        pair = [torch.where(alike, common, own).float() for own in (one, other)]
        a, b = (mean({"p": answers}, name=str(k)) for k, answers in enumerate(pair))
        said += a.minus(b).above_chance
    assert said / 200 < 0.06


def test_relative_to_the_original_is_capped():
    better, worse = mean({"a": torch.ones(10)}), mean({"a": torch.tensor([1.0, 0.0] * 5)})
    assert better.over(worse).value == 1
    assert better.over(worse).score.high == 1
    assert worse.over(better).value == 0.5
    assert math.isnan(worse.over(mean({"a": torch.zeros(4)})).value)


def test_means_widen_to_concepts_average_the_h():
    a, b = mean({"a": torch.ones(10)}), mean({"b": torch.zeros(10)})
    assert average([a, b]).value == 0.5
    assert average([a, NONE]).value == 1
    assert harmonic_mean([a, b]).value == 0
    assert math.isnan(harmonic_mean([a, NONE]).value)


def test_a_style_is_counted_against_chance():
    def share(x):
        return mean({"a": (torch.arange(100) < 100 * x).float()})

    assert correct_for_chance(share(0.25), share(0.25)).value == pytest.approx(1)
    assert correct_for_chance(share(1.0), share(0.25)).value == pytest.approx(0)
    assert correct_for_chance(share(0.1), share(0.25)).value == pytest.approx(1)
    assert correct_for_chance(share(0.5), share(0.2)).value == pytest.approx(1 - 0.3 / 0.8)


def test_the_same_numbers_every_time():
    answers = {"a": torch.tensor([1.0, 0.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    assert mean(answers).score == mean(answers).score
    assert len(mean(answers).draws) == statistics.DRAWS


def worlds(concepts, images, accuracy, counts, trials=120):
    """Trials of a mean over concepts that differ: (the estimate, these concepts' true mean)."""
    torch.manual_seed(concepts * images)
    level = torch.full((concepts,), accuracy, dtype=torch.float64)
    for _ in range(trials):
        each = torch.distributions.Beta(level * counts, (1 - level) * counts).sample()
        seen = (torch.rand(concepts, images, dtype=torch.float64) < each[:, None]).double()
        answers = {f"a photo of {c}": row for c, row in enumerate(seen)}
        found = mean(answers, name="m", concepts={prompt: prompt for prompt in answers})
        yield found, float(each.mean())


def held(score, truth):
    return score.low <= truth <= score.high


@pytest.mark.parametrize(("concepts", "images", "accuracy"), [(5, 20, 0.8), (10, 30, 0.9)])
def test_both_readings_cover_their_own_truth(concepts, images, accuracy):
    """A thousand trials of 40 worlds are in experiments/results/coverage.json; this is a few of two."""
    found = list(worlds(concepts, images, accuracy, 6.0))
    these = sum(held(estimate.score, truth) for estimate, truth in found) / len(found)
    general = sum(held(estimate.in_general, accuracy) for estimate, _ in found) / len(found)
    narrow = sum(held(estimate.score, accuracy) for estimate, _ in found) / len(found)
    assert these >= 0.89  # 0.95 less three standard errors of 120 trials
    assert general >= 0.89
    assert narrow < 0.8  # what is said of these says too much of concepts in general


def test_one_concept_says_nothing_of_others():
    answers = {"a cat": torch.tensor([1.0, 0.0]), "the cat": torch.tensor([1.0, 1.0])}
    one = mean(answers, concepts=dict.fromkeys(answers, "cat"))
    assert one.in_general is None
    assert one.map(lambda x: 1 - x).in_general is None
    two = mean(answers, concepts={prompt: prompt for prompt in answers})
    assert two.in_general.low <= two.score.low
    assert two.minus(one).in_general is not None


def test_prompts_are_those_of_their_concept():
    """Concepts apart and prompts alike: these concepts' interval does not widen, that of others does."""
    answers = {f"{c} {p}": torch.full((20,), float(c < 2)) for c in range(4) for p in range(3)}
    for row in answers.values():
        row[0] = 0.5
    flat = mean(answers)
    told = mean(answers, concepts={prompt: prompt[0] for prompt in answers})
    assert flat.value == told.value

    def width(score):
        return score.high - score.low

    assert width(told.score) < 0.5 * width(flat.score)
    assert width(told.in_general) > width(flat.score)


def test_single_images_of_many_prompts_are_one_sample():
    rows = (torch.arange(40) % 4 > 0).float()
    apart = mean({f"caption {i}": row[None] for i, row in enumerate(rows)}).score
    whole = mean({"p": rows}).score
    assert apart.value == whole.value
    assert apart.high - apart.low == pytest.approx(whole.high - whole.low, rel=0.15)


def test_seeds_of_the_edit_enter():
    """Three edits of the same concept that end far apart: their mean is less certain."""

    def of(shares):
        return average(
            [
                mean({f"p {c}": (torch.arange(50) < 50 * x).float()}, name=f"{c} {i}")
                for c, i, x in shares
            ],
            [c for c, _, _ in shares],
        )

    alike = of([(c, i, 0.8) for c in "ab" for i in range(3)])
    apart = of([(c, i, 0.6 + 0.2 * i) for c in "ab" for i in range(3)])
    assert alike.value == pytest.approx(apart.value)
    assert alike.units.keys() == {"a", "b"}
    assert apart.score.high - apart.score.low > 1.5 * (alike.score.high - alike.score.low)


def test_differences_of_means_are_those_of_each_concept():
    """Concepts far apart, one method always a little better: the difference is sure for others, too."""
    levels = torch.linspace(0.3, 0.8, 8)

    def method(plus):
        parts = [
            mean({f"p {i}": (torch.arange(200) < 200 * (x + plus)).float()}, name=f"{plus} {i}")
            for i, x in enumerate(levels)
        ]
        return average(parts, [str(i) for i in range(8)])

    better, worse = method(0.1), method(0.0)
    difference = better.minus(worse)
    assert difference.value == pytest.approx(0.1, abs=0.01)
    assert difference.in_general.low > 0
    wide = better.in_general
    assert difference.in_general.high - difference.in_general.low < (wide.high - wide.low) / 2


def test_many_comparisons_at_once():
    """Holm by hand, and its family-wise error on pairs that do not differ."""
    nan = math.nan
    assert holm([0.01, nan, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(nan, nan_ok=True),
                                             pytest.approx(0.06), pytest.approx(0.06)]  # fmt: skip
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    generator = torch.Generator().manual_seed(11)
    plain = corrected_ = 0
    for _ in range(30):
        p = []
        for k in range(10):
            a, b = ((torch.rand(40, generator=generator) < 0.5).float() for _ in range(2))
            one, other = mean({"p": a}, name=f"a{k}"), mean({"p": b}, name=f"b{k}")
            p.append(one.minus(other).p_value())
        plain += min(p) < 0.05
        corrected_ += min(holm(p)) < 0.05
    assert corrected_ <= 4 < plain


def test_p_values_go_with_the_interval():
    good = mean({"p": torch.cat([torch.ones(90), torch.zeros(10)])}, name="good")
    poor = mean({"p": torch.cat([torch.ones(60), torch.zeros(40)])}, name="poor")
    same = mean({"p": torch.cat([torch.ones(89), torch.zeros(11)])}, name="same")
    assert good.minus(poor).p_value() < 1e-4
    assert good.minus(same).p_value() > 0.2  # one image apart
    assert good.minus(good).p_value() == 1
    assert math.isnan(NONE.p_value())
