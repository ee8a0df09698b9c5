"""Theorems about the closed form."""

import pytest
import torch

from expunge import ExpungeError
from expunge.ops.least_squares import outer, right_factor

D = 12


@pytest.fixture
def rows():
    torch.manual_seed(0)
    erased, anchors, retained = (torch.randn(n, D, dtype=torch.float64) for n in (5, 5, 7))
    return erased, anchors, retained


def sums(erased, anchors, retained):
    return outer(anchors, erased), outer(erased, erased), outer(retained, retained)


def test_gradient_is_zero_at_the_solution(rows):
    erased, anchors, retained = rows
    weight = torch.randn(3, D, dtype=torch.float64)
    solution = (weight @ right_factor(*sums(*rows), ridge=0.3)).requires_grad_()
    loss = (
        (erased @ solution.T - anchors @ weight.T).square().sum()
        + (retained @ solution.T - retained @ weight.T).square().sum()
        + 0.3 * (solution - weight).square().sum()
    )
    loss.backward()
    assert solution.grad.abs().max() < 1e-11


def test_equals_a_plain_least_squares(rows):
    erased, anchors, retained = rows
    eye = torch.eye(D, dtype=torch.float64)
    given = torch.cat([erased, retained, 0.3**0.5 * eye])
    wanted = torch.cat([anchors, retained, 0.3**0.5 * eye])
    plain = torch.linalg.lstsq(given, wanted).solution.T
    torch.testing.assert_close(right_factor(*sums(*rows), ridge=0.3), plain, rtol=1e-10, atol=1e-10)


def test_a_large_ridge_returns_the_weight(rows):
    matrix = right_factor(*sums(*rows), ridge=1e12)
    torch.testing.assert_close(matrix, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nothing_to_move_returns_the_weight(rows):
    erased, _, retained = rows
    matrix = right_factor(*sums(erased, erased, retained), ridge=0.1)
    torch.testing.assert_close(matrix, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_change_has_at_most_the_rank_of_the_erased_rows(rows):
    matrix = right_factor(*sums(*rows), ridge=0.1)
    assert torch.linalg.matrix_rank(matrix - torch.eye(D, dtype=torch.float64), rtol=1e-10) == 5


def test_a_heavy_prior_holds_its_rows(rows):
    retained = rows[2]
    cross, gram, prior = sums(*rows)
    moved = [
        (retained @ right_factor(cross, gram, scale * prior, 0.1).T - retained).norm()
        for scale in (1, 100, 1e4)
    ]
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-2 * retained.norm()


def test_sums_are_additive(rows):
    erased, anchors, _ = rows
    halves = outer(anchors[:2], erased[:2]) + outer(anchors[2:], erased[2:])
    torch.testing.assert_close(halves, outer(anchors, erased))


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_singular_system_names_the_remedy(rows, noise):
    erased, anchors, _ = rows
    prior = noise * torch.eye(D, dtype=torch.float64) * 1e-6
    with pytest.raises(ExpungeError, match="singular.*raise the ridge"):
        right_factor(outer(anchors, erased), outer(erased, erased), prior, ridge=0.0)
