"""Sluice: its equation against a slow reading, its gates against those solved singly, and behaviour."""

import math

import pytest
import torch

import expunge
from expunge import Concept, Problem
from expunge.erasing.gate_tokens import GateTokens
from expunge.erasing.neighbours import count_neighbours, make_neighbours
from expunge.methods.sluice import Sluice, measure_left, shorten, solve_shared, take_last
from expunge.ops.gates import Background, fit_gate, fit_gates
from tiny import sdxl


def rows(n, width=12, seed=0):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def groups(*sizes):
    return [
        GateTokens(rows(n, seed=i), rows(n, seed=50 + i), rows(1, seed=90 + i))
        for i, n in enumerate(sizes)
    ]


def generator():
    return torch.Generator().manual_seed(0)


class TestMatrix:
    def test_against_the_gradient_of_the_stated_sum(self):
        """The sum as it is written, token by token; at its least, its gradient is zero."""
        some, general, anchors = groups(3, 7), rows(20, seed=7), rows(4, seed=8)
        size = sum(float(g.rows.square().sum(1).mean()) for g in some) / len(some)
        matrix = solve_shared(some, general, anchors, 0.3, 0.8, 0).requires_grad_()
        total = 0.3 * size * (matrix - torch.eye(12, dtype=torch.float64)).square().sum()
        for g in some:
            for e, a in zip(g.rows, g.neutral, strict=True):
                total = total + (matrix @ e - a).square().sum() / len(g.rows)
        for kept in (general, anchors):
            for v in kept:
                total = total + 0.4 * (matrix @ v - v).square().sum() / len(kept)
        (gradient,) = torch.autograd.grad(total, matrix)
        assert gradient.abs().max() < 1e-6

    def test_what_resists_gets_weight(self):
        """One gate's tokens lie among general ones, so they are held back; rounds bring them on."""
        some = groups(4, 4)
        general = torch.cat([some[1].rows * 3, rows(5, seed=9)])

        def left(rounds):
            matrix = solve_shared(some, general, rows(2, seed=8), 0.05, 1.0, rounds)
            return [
                float(
                    (g.rows @ matrix.T - g.neutral).square().sum() / (g.rows - g.neutral).square().sum()
                )
                for g in some
            ]

        plain, budgeted = left(0), left(3)
        assert plain[1] > 2 * plain[0]
        assert budgeted[1] < plain[1]

    def test_budgets_are_bounded(self):
        some = groups(3, 3)
        matrix = torch.linalg.lstsq(some[0].rows, some[0].neutral).solution.T
        assert measure_left(matrix, some).tolist() == pytest.approx([0.5, 2**0.5], abs=1e-6)

    def test_all_directions_are_the_matrix(self):
        some = groups(9, 8)
        matrix = solve_shared(some, rows(20, seed=7), rows(4, seed=8), 0.1, 1.0, 0)
        up, down = shorten(matrix, some, 1.0)
        torch.testing.assert_close(torch.eye(12, dtype=torch.float64) - up @ down, matrix)
        assert shorten(matrix, some, 0.5)[0].shape[1] < 12


class TestGates:
    def test_many_are_what_each_is(self):
        ground = Background(rows(60), rows(9, seed=3), 1.0, 4.0, rows(20, seed=3))
        # Near, far, and within what stays: with no ridge lowered, some, and all.
        some = [rows(5, seed=i) * 0.1 + shift for i, shift in ((11, 9.0), (12, 2.0), (13, 0.0))]
        many = fit_gates(some, ground, margin=0.4, retain_openness=0.01)
        for i, one in enumerate(some):
            alone = fit_gate(one, ground, margin=0.4, retain_openness=0.01)
            for ours, theirs in zip(many, alone, strict=True):
                torch.testing.assert_close(ours[i], theirs, rtol=1e-6, atol=1e-9)

    def test_nothing_retained(self):
        ground = Background(rows(60), rows(0), 1.0, 4.0)
        many = fit_gates([rows(5, seed=1) + 9], ground, margin=0.4, retain_openness=0.01)
        alone = fit_gate(rows(5, seed=1) + 9, ground, margin=0.4, retain_openness=0.01)
        torch.testing.assert_close(many.slope[0], alone.slope)


class TestNeighbours:
    people = tuple(Concept(n, kind="identity") for n in ("Ada Lovelace", "Kurt Gödel", "Emmy Noether"))

    def test_share_a_word_and_are_not_erased(self):
        made = make_neighbours(Problem(self.people, ("Alan Turing",)), (), 9, generator())
        assert len(made) == 12  # 4 · 4 names in all, less the four there are
        assert "Ada Turing" in made
        assert not set(made) & {c.name for c in self.people}

    def test_things_have_none(self):
        assert make_neighbours(Problem((Concept("alarm clock"),)), ("sky",), 9, generator()) == []

    def test_a_single_person_has_general_words(self):
        made = make_neighbours(Problem(self.people[:1]), ("sky",), 9, generator())
        assert sorted(made) == ["Ada sky", "sky Lovelace"]

    def test_a_word_that_all_names_have_is_not_exchanged(self):
        flags = tuple(Concept(f"flag of {land}", kind="identity") for land in ("France", "Italy"))
        made = make_neighbours(Problem(flags, ("flag of Spain",)), ("king",), 9, generator())
        assert sorted(made) == ["flag of Spain", "flag of king"]

    def test_none_holds_an_erased_name(self):
        problem = Problem((*self.people[:1], Concept("Ada", kind="identity"), *self.people[1:]))
        assert not [n for n in make_neighbours(problem, (), 9, generator()) if "Ada" in n.split()]

    def test_no_more_than_counted(self):
        made = make_neighbours(Problem(self.people), (), 1, generator())
        assert len(made) <= count_neighbours(self.people, 1) == 6


class TestSluice:
    def test_shared_words_are_kept(self, worded):
        """Beside "flag of Guinea" another flag, of which the method is told nothing, moves less."""
        problem = Problem(
            (Concept("flag of Japan", "sky", "identity"), Concept("flag of Chad", "sky", "identity"))
        )

        def moved(method):
            edit = expunge.erase(worded, problem, method)
            text = worded.encode(["a photo of flag of Japan", "a photo of flag of Peru"])
            after = edit.changes[0].change_input(text.embeddings)
            shift = (after - text.embeddings).flatten(1).norm(dim=1)
            return shift[1] / shift[0]

        few = {"num_retain_words": 50, "num_captions": 20}
        kept, let_go = moved(Sluice(**few, neighbours=8)), moved(Sluice(**few, neighbours=0))
        assert kept < 0.9 * let_go

    def test_one_owner_of_all(self, worded):
        problem = Problem((Concept("cat", "sky"), Concept("dog", "sky")), ("ship",))
        edit = expunge.erase(worded, problem, Sluice(num_retain_words=50, num_captions=20))
        (gated,) = edit.changes
        assert gated.owner.unique().tolist() == gated.concept.unique().tolist() == [0]
        x = worded.encode(["a photo of the cat"]).embeddings
        share = gated.gates(x).amax(-1, keepdim=True)
        by_hand = x - share * (x @ gated.down.T) @ gated.up.T
        torch.testing.assert_close(gated.change_input(x), by_hand, rtol=1e-4, atol=1e-4)
        assert math.isclose(float(share.max()), 1, abs_tol=0.05)

    def test_the_last_word_of_a_name_opens_the_whole_prompt(self, worded):
        problem = Problem((Concept("cat", "sky"),), ("ship",))
        few = {"num_retain_words": 50, "num_captions": 20}
        texts = worded.encode(["a photo of the cat", "a photo of the ship"]).embeddings
        (gated,) = expunge.erase(worded, problem, Sluice(**few)).changes
        opened = gated.gates(texts).amax(-1)
        assert opened[0].min() == opened[0].max() > 0.9
        assert opened[1].max() < 0.1
        (single,) = expunge.erase(worded, problem, Sluice(**few, opens="token")).changes
        assert single.gates(texts).amax(-1)[0, 0] < 0.1  # the start says nothing of a cat
        assert len(single.centre) > len(gated.centre) == 1

    def test_neighbours_and_captions_hold_the_vectors_gates_too(self, monkeypatch):
        """Of a model that also reads a vector of the whole prompt, as SDXL does."""
        model, seen = expunge.load(sdxl()), []

        def solve(self, model, vectors, closed_on, anchors):
            seen.append(closed_on["airplane ship"])
            return []

        monkeypatch.setattr(Sluice, "_solve_vectors", solve)
        problem = Problem((Concept("airplane ship", "dog", "identity"),), ("cat horse",))
        for more in ({"neighbours": 0, "captions": ""}, {"neighbours": 4, "num_captions": 5}):
            expunge.erase(model, problem, Sluice(num_retain_words=10, max_overlap=1.0, **more))
        narrow, wide = seen
        assert len(wide.retained) > len(narrow.retained)
        assert len(wide.general) > len(narrow.general)

    def test_a_phrase_is_known_by_its_last_token(self):
        pairs = [(rows(2, seed=1), rows(2, seed=2)), (rows(3, seed=3), rows(3, seed=4))]
        last = take_last(GateTokens.of(pairs))
        assert torch.equal(last.rows, torch.stack([pairs[0][0][-1], pairs[1][0][-1]]))
        assert torch.equal(last.neutral, torch.stack([pairs[0][1][-1], pairs[1][1][-1]]))
