"""Stochastic rounding to eight bits: right in the mean, and equal at equal seeds."""

import pytest
import torch

from expunge.ops.rounding import RoundingCost, round_stochastically

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(dtype):
    """All finite numbers of a format."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[every.isfinite()]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_the_mean_is_kept(dtype):
    value = torch.tensor([0.1, -0.33, 1.0, 0.0, 1e-4, 300.0, 1e9, -1e9]).repeat(4000, 1)
    found = round_stochastically(value, dtype, generator())
    assert found.dtype == dtype
    largest = torch.finfo(dtype).max
    wanted = value[0].clamp(-largest, largest)
    torch.testing.assert_close(found.float().mean(0), wanted, rtol=0.02, atol=2e-5)
    for one in found.float()[:5].unique():
        assert one in numbers(dtype)


def test_what_would_vanish_to_the_nearest_is_kept():
    x = torch.full((4096,), 1.03125)  # a quarter of the way from 1 to 1.125
    assert bool((x.to(torch.float8_e4m3fn).float() == 1).all())
    found = round_stochastically(x, torch.float8_e4m3fn, generator()).float()
    assert set(found.tolist()) == {1.0, 1.125}
    assert abs(float(found.mean()) - 1.03125) < 0.005


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("error", [0.0, 1e-7, -1e-7])
def test_numbers_of_the_format_stay_though_float32_missed_them(dtype, error):
    exact = numbers(dtype)
    found = round_stochastically(exact * (1 + error), dtype, generator(1))
    assert torch.equal(found.float(), exact)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_values_of_every_size_go_to_a_neighbour(dtype):
    wild = torch.randn(4096, dtype=torch.float64) * torch.logspace(-6, 4, 4096, dtype=torch.float64)
    found, most = round_stochastically(wild, dtype, generator()).double(), torch.finfo(dtype).max
    inside = wild.clamp(-most, most)
    step = 2.0 ** -(2 if dtype == torch.float8_e5m2 else 3)
    assert bool(((found - inside).abs() <= step * inside.abs() + torch.finfo(dtype).tiny).all())
    assert bool((found * wild >= 0).all())
    assert torch.equal(found, round_stochastically(wild, dtype, generator()).double())
    assert not torch.equal(found, round_stochastically(wild, dtype, generator(1)).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_other_formats_are_rounded_to_the_nearest(dtype):
    value = torch.tensor([0.1, 100.7, -3.3])
    assert torch.equal(round_stochastically(value, dtype, generator()), value.to(dtype))


def test_the_cost_is_measured_along_the_change():
    cost = RoundingCost()
    assert cost.describe() == ""
    original, wanted = torch.zeros(2), torch.tensor([1.0, 1.0])
    cost.add(original, wanted, torch.tensor([1.0, 0.5]).half())
    assert cost.error == pytest.approx((0.25 / 2) ** 0.5)
    assert cost.kept == pytest.approx(1.5 / 2)
    assert cost.describe().startswith("Rounding to float16 keeps 75.0% of the change")
