"""Closed forms of other papers, each against an independent reading of its problem."""

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.base.errors import ExpungeWarning
from expunge.erasing.concept_tokens import last_tokens
from expunge.methods.oce import OCE, nearest_rotation, projector
from expunge.methods.rece import RECE, find_returning, sum_projections
from expunge.methods.speed import SPEED, influential, invariants, null_space_change
from expunge.methods.uce import UCE
from expunge.runtime.context import RunContext


def rows(n, width=12, seed=0):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestTokens:
    def test_the_last_own_token(self, model):
        text = model.encode(["a photo of the ship", "ship", ""])
        found = last_tokens(text)
        own = text.content_mask.sum(1)
        assert torch.equal(found[0], text.embeddings[0, own[0]].double())
        assert torch.equal(found[1], text.embeddings[1, 1].double())
        assert torch.equal(found[2], text.embeddings[2, 0].double())


class TestSpeed:
    @pytest.mark.parametrize("slack", [0.0, 0.5])
    def test_against_the_constrained_least_squares_problem(self, slack):
        """Row by row of W, as one system of the optimality conditions of min over z of
        ‖(w + Û z)ᵀ C₁ − wᵀ C*‖² + s‖z‖² with ‖C₂ᵀÛ z‖² / λ added, or C₂ᵀÛ z = 0."""
        target, anchor, retained, fixed = (rows(n, seed=i) for i, n in enumerate((3, 3, 7, 2)))
        weight = rows(4, seed=9)
        change = null_space_change(target, retained, fixed, 1e-6, 0.3, slack)
        ours = weight @ (anchor - target).T @ target @ change
        values, vectors = torch.linalg.eigh(retained.T @ retained)
        free = vectors[:, values < 1e-6]
        assert free.shape[1] == 12 - 7
        c1, c2, r = (target @ free).T, (fixed @ free).T, free.shape[1]
        k = torch.zeros(r + 2, r + 2, dtype=torch.float64)
        k[:r, :r] = c1 @ c1.T + 0.3 * torch.eye(r, dtype=torch.float64)
        k[:r, r:], k[r:, :r], k[r:, r:] = c2, c2.T, -slack * torch.eye(2, dtype=torch.float64)
        for w, found in zip(weight, ours, strict=True):
            wanted = torch.cat([c1 @ (anchor @ w - target @ w), torch.zeros(2, dtype=torch.float64)])
            z = torch.linalg.solve(k, wanted)[:r]
            torch.testing.assert_close(found, free @ z, rtol=1e-6, atol=1e-9)
        assert (ours @ retained.T).abs().max() < 1e-8
        if not slack:
            assert (ours @ fixed.T).abs().max() < 1e-8

    def test_no_direction_left(self):
        with pytest.raises(ExpungeError, match="no direction below its threshold"):
            null_space_change(rows(2), rows(40), rows(1), 1e-6, 1.0, 0.0)

    def test_influence_is_that_of_the_plain_edit(self):
        weight, target, anchor, kept = rows(4), rows(2, seed=1), rows(2, seed=2), rows(30, seed=3)
        plain = weight @ (anchor.T @ target - target.T @ target)
        plain = plain @ torch.linalg.inv(torch.eye(12, dtype=torch.float64) + target.T @ target)
        moved = torch.stack([(plain @ c).norm() for c in kept])
        assert torch.equal(influential(weight, target, anchor, kept), moved >= moved.mean())

    def test_invariants_are_the_start_and_centres(self):
        empty = torch.cat([rows(1), *(10 * rows(1, seed=i).repeat(5, 1) for i in (1, 2, 3))])
        found = invariants(empty, torch.Generator().manual_seed(0))
        assert torch.equal(found[0], empty[0])
        assert len(found) == 4
        assert torch.cdist(found[1:], empty[[1, 6, 11]]).min(0).values.max() < 1e-6

    def test_values_alone_change_and_the_retained_stay(self, model):
        problem = Problem((Concept("airplane", "sky"), Concept("horse", "")), ("ship", "bird"))
        edit = expunge.erase(model, problem, SPEED(threshold=1.0, num_retain_words=3, augmentations=2))
        assert all(layer.endswith("to_v") for change in edit.changes for layer in change.layers)
        assert len(edit.changes) == 7
        assert all(change.down.shape[0] == 2 for change in edit.changes)

    def test_all_tokens_are_those_that_differ_from_the_anchors(self, model):
        """Place by place, end and padding too; the start token is the same in both."""
        problem = Problem((Concept("airplane", "sky"),), ("ship",))
        method = SPEED(threshold=1.0, num_retain_words=3, augmentations=0, positions="all")
        pair = model.encode(["airplane", "sky"])
        target, anchor = method._pairs(pair[[0]], pair[[1]])
        tokens = pair.embeddings.shape[1]
        assert len(target) == len(anchor) == tokens - 1
        torch.testing.assert_close(target, pair.embeddings[0, 1:].double())
        torch.testing.assert_close(anchor, pair.embeddings[1, 1:].double())
        edit = expunge.erase(model, problem, method)
        width = pair.embeddings.shape[2]
        assert all(change.down.shape[0] == min(width, tokens - 1) for change in edit.changes)

    @pytest.mark.parametrize("positions", ["last", "all"])
    def test_the_change_is_w_times_the_moves_times_the_null_space_map(self, model, positions):
        """However many tokens there are, and so in which factors it is kept."""
        problem = Problem((Concept("airplane", "sky"),), ("ship", "bird"))
        method = SPEED(threshold=1.0, num_retain_words=0, augmentations=0, positions=positions)
        edit, pair = expunge.erase(model, problem, method), model.encode(["airplane", "sky"])
        target, anchor = method._pairs(pair[[0]], pair[[1]])
        kept = last_tokens(model.encode(["ship", "bird", "sky"]))
        draw = RunContext().generator("centres")
        fixed = invariants(model.encode([""]).embeddings[0].double(), draw)
        for change in edit.changes:
            w = model.weight(change.layers[0]).double()
            chosen = method._retained(w, target, anchor, kept, draw)
            inner = null_space_change(target, chosen, fixed, 1.0, 1.0, 0.0)
            slow = w @ (anchor - target).T @ target @ inner
            assert slow.norm() > 0
            assert (change.up.double() @ change.down.double() - slow).norm() < 1e-5 * slow.norm()

    def test_without_the_filter_everything_is_retained(self, model):
        given = rows(4), rows(2, seed=1), rows(2, seed=2), rows(9, seed=3), torch.Generator()
        few, all_of_them = (
            SPEED(augmentations=2, influence_filter=yes)._retained(*given) for yes in (True, False)
        )
        assert len(all_of_them) == 9 * 3
        assert len(few) < len(all_of_them)

    def test_nothing_to_retain(self, model):
        with pytest.raises(ExpungeError, match="something to retain"):
            expunge.erase(model, Problem((Concept("airplane", ""),)), SPEED(num_retain_words=0))


class TestOce:
    def test_the_rotation_is_the_best(self):
        matrix = rows(5, 5)
        q = nearest_rotation(matrix)
        torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=torch.float64))
        best = (q * matrix).sum()
        for seed in range(200):
            other = torch.linalg.qr(rows(5, 5, seed=seed)).Q
            assert (other * matrix).sum() <= best + 1e-9

    def test_the_projector_against_least_squares(self):
        columns = rows(3, 8).T
        p = projector(torch.cat([columns, columns[:, :1] * 4], 1))
        x = rows(1, 8)[0]
        fitted = columns @ torch.linalg.lstsq(columns, x[:, None]).solution[:, 0]
        torch.testing.assert_close(p @ x, fitted)

    def test_too_many_concepts_for_a_layer_are_said(self, model):
        """The tiny model's narrowest layers have 16 outputs."""
        words = ("cat", "dog", "bird", "ship", "horse", "frog", "deer", "truck", "car", "rocket")
        concepts = tuple(Concept(f"{a} {b}", "sky") for a in words for b in words if a != b)
        with pytest.warns(ExpungeWarning, match="no direction is left to keep there; erase fewer"):
            OCE(captions="").fit(model, Problem(concepts[:80]), RunContext())

    def test_the_objective_summed_by_hand(self):
        method = OCE(erase_scale=3.0, captions_scale=0.5, retain_scale=2.0, ridge=0.1, captions="")
        weight, target, anchor, kept = rows(6, 8), rows(2, 8, 1), rows(2, 8, 2), rows(3, 8, 3)
        general = rows(5, 8, 4)
        general = general.T @ general
        g, a = (torch.linalg.qr(weight @ x.T).Q for x in (target, anchor))
        wanted = -3.0 * g @ g.T @ (torch.eye(6, dtype=torch.float64) - a @ a.T)
        wanted = wanted + 0.5 * weight @ general @ weight.T + 0.1 * weight @ weight.T
        for row in kept:
            wanted = wanted + 2.0 * torch.outer(weight @ row, weight @ row)
        torch.testing.assert_close(method.objective(weight, target, anchor, kept, general), wanted)

    def test_erasing_nothing_is_the_identity(self, model):
        edit = expunge.erase(
            model, Problem((Concept("airplane", "sky"),)), OCE(erase_scale=0.0, captions="")
        )
        for change in edit.changes:
            weight = model.weight(change.layers[0])
            torch.testing.assert_close(change.weight(weight), weight, rtol=1e-4, atol=1e-5)


class TestRece:
    def test_what_returns_is_the_least_squares_solution(self, model):
        """Layer by layer as one tall system, against the shared S."""
        layers = [model.weight(e.layer).double() for e in model.text_entries()]
        width = layers[0].shape[1]
        matrix = torch.eye(width, dtype=torch.float64) - 0.2 * rows(width, width, 4) / width**0.5
        e = rows(2, width, 5)
        found = find_returning(e, matrix, sum_projections(model), 0.3)
        tall = torch.cat([*(w @ matrix for w in layers), 0.3**0.5 * torch.eye(width).double()])
        for row, ours in zip(e, found, strict=True):
            goal = torch.cat([*(w @ row for w in layers), torch.zeros(width, dtype=torch.float64)])
            slow = torch.linalg.lstsq(tall, goal[:, None]).solution[:, 0]
            torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-9)

    def test_without_rounds_it_is_uce(self, model):
        problem = Problem((Concept("airplane", "sky"),), ("ship",))
        method = RECE(rounds=0, num_retain_words=5)
        plain = UCE(ridge=method.ridge, num_retain_words=5, templates=method.templates)
        ours, plain = (expunge.erase(model, problem, one) for one in (method, plain))
        assert torch.equal(ours.changes[0].matrix, plain.changes[0].matrix)

    def test_what_came_back_after_uce_comes_back_less(self, model):
        """The embedding that undoes UCE is sent further from the concept after a round."""
        problem = Problem((Concept("airplane", "sky"),), ("ship",))
        method = RECE(rounds=1, num_retain_words=5, ridge=0.05, norm_weight=1e-3)
        sent = sum_projections(model)
        text = model.encode(["airplane"])
        span = text.from_last_token(0)[0]
        e = text.embeddings[0, span][:1].double()
        plain = (
            expunge.erase(model, problem, RECE(rounds=0, num_retain_words=5, ridge=0.05))
            .changes[0]
            .matrix.double()
        )
        found = find_returning(e, plain, sent, 1e-3)
        ours = expunge.erase(model, problem, method).changes[0].matrix.double()

        def apart(matrix):
            off = matrix @ found[0] - e[0]
            return float(off @ sent @ off)

        assert apart(ours) > 2 * apart(plain)
