"""Double Projections against a slow reading: least squares row by row of W, projectors from scratch."""

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.methods.double_projections import (
    DoubleProjections,
    free_directions,
    project_on_span,
    solve_projected,
)


def rows(n, width=12, seed=0):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestFirstProjection:
    def test_the_proxy_is_the_nearest_point_of_the_safe_span(self):
        safe, concept = rows(4), rows(3, seed=1)
        found = project_on_span(concept, safe.T @ safe)
        for c, ours in zip(concept, found, strict=True):
            shares = torch.linalg.lstsq(safe.T, c[:, None]).solution
            torch.testing.assert_close(ours, (safe.T @ shares)[:, 0], rtol=1e-6, atol=1e-9)

    def test_what_is_safe_stays(self):
        safe = rows(4)
        torch.testing.assert_close(project_on_span(safe, safe.T @ safe), safe, rtol=1e-6, atol=1e-9)


class TestSecondProjection:
    @pytest.mark.parametrize("penalty", [0.0, 0.3])
    def test_against_least_squares_row_by_row_of_w(self, penalty):
        """min over z of ‖Cᵀ N z − (C* − C)ᵀ w‖² + s ‖z‖², as one tall system a row w of W."""
        known, concept, proxies = rows(6), rows(3, seed=1), rows(3, seed=2)
        free = free_directions(known.T @ known, 1e-9)
        assert free.shape == (12, 6)
        change = solve_projected(concept, proxies, free, penalty) - torch.eye(12, dtype=torch.float64)
        # The projector by QR of the known rows, and not by eigenvectors of their Gram matrix.
        q = torch.linalg.qr(known.T).Q
        null = torch.eye(12, dtype=torch.float64) - q @ q.T
        for w in rows(5, seed=3):
            tall = torch.cat([concept @ null, penalty**0.5 * torch.eye(12, dtype=torch.float64)])
            goal = torch.cat([(proxies - concept) @ w, torch.zeros(12, dtype=torch.float64)])
            z = torch.linalg.lstsq(tall, goal[:, None], driver="gelsd").solution[:, 0]
            torch.testing.assert_close(w @ change, null @ z, rtol=1e-6, atol=1e-9)
        assert (known @ change.T).abs().max() < 1e-8

    def test_without_a_penalty_the_concept_goes_to_its_proxy(self):
        known, concept, proxies = rows(6), rows(3, seed=1), rows(3, seed=2)
        matrix = solve_projected(concept, proxies, free_directions(known.T @ known, 1e-9), 0.0)
        torch.testing.assert_close(concept @ matrix.T, proxies, rtol=1e-6, atol=1e-8)

    def test_a_slack_of_1_takes_every_direction(self):
        for seed in range(40):
            known = rows(60, 24, seed)
            assert free_directions(known.T @ known, 1.0).shape == (24, 24)

    def test_slack_is_the_share_of_energy_left_free(self):
        known = torch.diag(torch.tensor([1.0, 2.0, 7.0, 90.0], dtype=torch.float64))
        for slack, n in ((0.005, 0), (0.01, 1), (0.03, 2), (0.1, 3), (1.0, 4)):
            if n:
                assert free_directions(known, slack).shape == (4, n)
                continue
            with pytest.raises(ExpungeError, match="no direction with a slack of 0.005; raise it"):
                free_directions(known, slack)


class TestEdit:
    @pytest.mark.parametrize("safe", ["known", "anchor"])
    def test_one_matrix_serves_every_entry_and_keeps_the_known(self, wide, safe):
        problem = Problem((Concept("airplane", "sky"),), ("ship",))
        # The slack of round-off alone: nothing that is known moves.
        method = DoubleProjections(safe=safe, slack=1e-12, num_retain_words=30, positions="last")
        (change,) = expunge.erase(wide, problem, method).changes
        assert change.layers == tuple(entry.layer for entry in wide.text_entries())
        text = wide.encode(["airplane", "ship", "sky", ""])
        at = text.content_mask.sum(1)
        e = text.embeddings[torch.arange(4), at]
        moved = ((e @ change.matrix.T - e).norm(dim=1) / e.norm(dim=1)).tolist()
        assert moved[0] > 0.1
        assert max(moved[1:]) < 1e-4

    def test_the_known_as_safe_takes_out_what_the_concept_alone_has(self, wide):
        """M e = Π_known e for the concept, and nothing else changes: an erasure without a goal."""
        method = DoubleProjections(
            safe="known", slack=1e-12, num_retain_words=30, positions="last", strength_penalty=1e-9
        )
        (change,) = expunge.erase(wide, Problem((Concept("airplane", "sky"),)), method).changes
        text = wide.encode(["airplane"])
        e = text.embeddings[0, text.content_mask.sum()].double()
        once = change.matrix.double() @ e
        torch.testing.assert_close(change.matrix.double() @ once, once, rtol=1e-3, atol=1e-3)
