"""The losses of predictions: against an integral, and as a switch of every trained method."""

import math

import pytest
import torch

import expunge
from expunge.base import registry
from expunge.base.fields import leaves
from expunge.ops.noise_error import VARIANCE, average_error, bound_error, measure_error
from quick import quick


def gaussian(x, mean):
    return torch.exp(-((x - mean) ** 2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)


@pytest.mark.parametrize("apart", [0.01, 0.1, 0.5])
def test_hellinger_is_the_distance_of_two_gaussians_by_quadrature(apart):
    x = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    p, q = gaussian(x, 0.0), gaussian(x, apart)
    squared_distance = 0.5 * torch.trapezoid((p.sqrt() - q.sqrt()) ** 2, x)
    one = torch.ones(1, dtype=torch.float64)
    found = measure_error(0 * one[:, None], apart * one[:, None], one, "hellinger")
    torch.testing.assert_close(found, 8 * VARIANCE * squared_distance[None], rtol=1e-6, atol=0)


def test_a_small_error_is_the_squared_one_and_a_large_one_is_bounded():
    found, scale = torch.tensor([[[1e-4]], [[5.0]]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    wanted = torch.zeros_like(found)
    squared, bounded = (
        measure_error(found, wanted, scale.double(), x) for x in ("squared", "hellinger")
    )
    torch.testing.assert_close(squared, torch.tensor([1e-8, 100.0], dtype=torch.float64))
    assert abs(float(bounded[0] / squared[0]) - 1) < 1e-6
    assert float(bounded[1]) == pytest.approx(8 * VARIANCE)


@pytest.mark.parametrize("loss", ["squared", "hellinger"])
def test_an_average_is_that_of_the_samples(loss):
    difference = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    each = torch.stack([bound_error(one.square().mean()[None], loss)[0] for one in difference])
    torch.testing.assert_close(average_error(difference, loss), each.mean())


def test_every_method_that_learns_from_predictions_has_the_switch(problem):
    """Two have none: MACE is trained on attention, AdvUnlearn's two terms are the paper's."""
    without = {
        name
        for name in registry.list_names("methods")
        if (cost := quick(name).estimate_cost(problem, 4)) and cost.gradients
        if "loss" not in {field.name for field in leaves(registry.get("methods", name))}
    }
    assert without == {"mace", "advunlearn"}


@pytest.mark.parametrize("name", ["esd", "ant", "ace"])
def test_the_switch_makes_another_edit(model, problem, name):
    more = (
        {"recovery_threshold": 0.0, "radius": 1.0, "attack_steps": 6} if name == "ace" else {}
    )  # an attack succeeds
    edits = [
        expunge.erase(model, problem, quick(name, loss=loss, **more))
        for loss in ("squared", "hellinger")
    ]
    assert edits[0].hash != edits[1].hash
    assert edits[1].record.fields["loss"] == "hellinger"
