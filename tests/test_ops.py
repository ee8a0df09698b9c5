"""Theorems about the numbers beneath the methods."""

import copy
import math

import pytest
import torch
from torch import nn

from expunge import ExpungeError
from expunge.base.errors import ExpungeWarning
from expunge.ops.attention import CrossAttention, energy, infer_grid, read_attention
from expunge.ops.finetune import frozen, minimise
from expunge.ops.least_squares import gram, multiply_by_gram, outer, solve_fusion, solve_right_factor
from expunge.ops.low_rank import balance, init_factors, use_own_factors
from expunge.ops.otsu import otsu
from expunge.ops.prompt_alignment import locate_phrases, match_tokens
from expunge.ops.saliency import Intersection, pack_bits, settled, top_half, unpack_bits

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
    solution = (weight @ solve_right_factor(*sums(*rows), ridge=0.3)).requires_grad_()
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
    torch.testing.assert_close(
        solve_right_factor(*sums(*rows), ridge=0.3), plain, rtol=1e-10, atol=1e-10
    )


def test_a_large_ridge_returns_the_weight(rows):
    matrix = solve_right_factor(*sums(*rows), ridge=1e12)
    torch.testing.assert_close(matrix, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nothing_to_move_returns_the_weight(rows):
    erased, _, retained = rows
    matrix = solve_right_factor(*sums(erased, erased, retained), ridge=0.1)
    torch.testing.assert_close(matrix, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_change_has_at_most_the_rank_of_the_erased_rows(rows):
    matrix = solve_right_factor(*sums(*rows), ridge=0.1)
    assert torch.linalg.matrix_rank(matrix - torch.eye(D, dtype=torch.float64), rtol=1e-10) == 5


def test_a_heavy_prior_holds_its_rows(rows):
    retained = rows[2]
    cross, gram, prior = sums(*rows)
    moved = [
        (retained @ solve_right_factor(cross, gram, scale * prior, 0.1).T - retained).norm()
        for scale in (1, 100, 1e4)
    ]
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-2 * retained.norm()


def test_sums_are_additive(rows):
    erased, anchors, _ = rows
    halves = outer(anchors[:2], erased[:2]) + outer(anchors[2:], erased[2:])
    torch.testing.assert_close(halves, outer(anchors, erased))


def test_a_gram_is_the_outer_sum_of_rows_with_themselves(rows):
    for width in (1, 4, D):
        some = rows[0][:, :width]
        torch.testing.assert_close(gram(some), outer(some, some), rtol=1e-12, atol=1e-12)
        assert torch.equal(gram(some), gram(some).T)


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_singular_system_names_the_remedy(rows, noise):
    erased, anchors, _ = rows
    prior = noise * torch.eye(D, dtype=torch.float64) * 1e-6
    with pytest.raises(ExpungeError, match="singular.*raise the ridge"):
        solve_right_factor(outer(anchors, erased), outer(erased, erased), prior, ridge=0.0)


def plain_fusion(weight, refined, concepts, changes, retained, scale, ridge):
    """The paper's minimisation for one layer, as one tall least squares in float64."""
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    given = [ridge**0.5 * eye, scale**0.5 * retained]
    wanted = [ridge**0.5 * eye @ refined.T, scale**0.5 * retained @ weight.T]
    for rows, (up, down) in zip(concepts, changes, strict=True):
        given.append(rows)
        wanted.append(rows @ (refined + up @ down).T)
    return torch.linalg.lstsq(torch.cat(given), torch.cat(wanted)).solution.T


class TestFusion:
    """Changes of several concepts in one weight."""

    @pytest.fixture
    def parts(self):
        torch.manual_seed(1)
        make = {"dtype": torch.float64}
        concepts = [torch.randn(n, D, **make) for n in (4, 6, 9)]
        weights = [torch.randn(out, D, **make) for out in (3, 5)]
        changes = [[(torch.randn(len(w), 2, **make), torch.randn(2, D, **make)) for w in weights]
                   for _ in concepts]  # fmt: skip
        return torch.randn(D, D, **make), concepts, weights, changes, torch.randn(7, D, **make)

    @staticmethod
    def solve(parts, scale, ridge):
        matrix, concepts, weights, changes, retained = parts
        gram = sum(outer(e, e) for e in concepts)
        moved = torch.cat([
            multiply_by_gram(torch.cat([down for _, down in layers]), e)
            for e, layers in zip(concepts, changes, strict=True)
        ])  # fmt: skip
        right, downs = solve_fusion(matrix, gram, scale * outer(retained, retained), ridge, moved)
        downs = downs.reshape(len(concepts), len(weights), 2, D)
        return [
            w @ right + sum(changes[i][layer][0] @ downs[i, layer] for i in range(len(concepts)))
            for layer, w in enumerate(weights)
        ]

    @pytest.mark.parametrize(("scale", "ridge"), [(0.5, 0.1), (0.0, 2.0), (1.0, 0.0)])
    def test_equals_a_plain_least_squares(self, parts, scale, ridge):
        matrix, concepts, weights, changes, retained = parts
        for layer, ours in enumerate(self.solve(parts, scale, ridge)):
            plain = plain_fusion(
                weights[layer], weights[layer] @ matrix, concepts,
                [layers[layer] for layers in changes], retained, scale, ridge,
            )  # fmt: skip
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)

    def test_a_large_ridge_returns_the_refined_weight(self, parts):
        for weight, ours in zip(parts[2], self.solve(parts, 0.5, 1e12), strict=True):
            torch.testing.assert_close(ours, weight @ parts[0], rtol=0, atol=1e-8)

    def test_a_heavy_prior_returns_the_weight_on_its_rows(self, parts):
        for weight, ours in zip(parts[2], self.solve(parts, 1e9, 0.1), strict=True):
            torch.testing.assert_close(parts[4] @ ours.T, parts[4] @ weight.T, rtol=0, atol=1e-5)

    def test_one_change_on_rows_that_span_the_space_is_kept_whole(self, parts):
        matrix, concepts, _, changes, _ = parts
        rows = torch.cat(concepts)
        right, down = solve_fusion(
            matrix, outer(rows, rows), 0 * matrix, 0.0, multiply_by_gram(changes[0][0][1], rows)
        )
        torch.testing.assert_close(right, matrix, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(down, changes[0][0][1], rtol=1e-8, atol=1e-8)

    def test_sums_are_additive(self, parts):
        rows, down = parts[1][2], parts[3][0][0][1]
        halves = multiply_by_gram(down, rows[:4]) + multiply_by_gram(down, rows[4:])
        torch.testing.assert_close(halves, down @ outer(rows, rows))

    def test_a_singular_system_names_the_remedy(self, parts):
        rows = parts[1][0]
        with pytest.raises(ExpungeError, match="singular.*raise the ridge"):
            solve_fusion(parts[0], outer(rows, rows), 0 * parts[0], 0.0, rows[:1])


def test_at_the_size_of_stable_diffusion():
    """Both closed forms, float32 embeddings 768 wide, against the equations read plainly."""
    torch.manual_seed(2)
    d, scale, ridge = 768, 0.3, 5.0
    mix = torch.randn(d, d) / d**0.5
    erased, anchors, retained = (torch.randn(n, d) @ mix + 1 for n in (400, 400, 900))
    weights = [torch.randn(out, d) / d**0.5 for out in (320, 640)]
    changes = [(torch.randn(len(w), 1) / 30, torch.randn(1, d)) for w in weights]
    e, a, p = erased.double(), anchors.double(), retained.double()
    prior = scale * outer(retained, retained)
    matrix = solve_right_factor(outer(anchors, erased), outer(erased, erased), prior, ridge)
    moved = multiply_by_gram(torch.cat([down for _, down in changes]), erased)
    right, downs = solve_fusion(matrix, outer(erased, erased), prior, ridge, moved)
    for w, (up, down), ours in zip(weights, changes, downs, strict=True):
        w, change, eye = w.double(), up.double() @ down.double(), torch.eye(d, dtype=torch.float64)
        inverse = torch.linalg.inv(e.T @ e + scale * p.T @ p + ridge * eye)
        refined = (w @ a.T @ e + scale * w @ p.T @ p + ridge * w) @ inverse
        assert (w @ matrix - refined).norm() / refined.norm() < 1e-6
        plain = ((refined + change) @ e.T @ e + scale * w @ p.T @ p + ridge * refined) @ inverse
        assert (w @ right + up.double() @ ours[None] - plain).norm() / plain.norm() < 1e-6


class TestContexts:
    """Which tokens of two prompts correspond. 0 is the start, 1 the end and the padding."""

    @pytest.mark.parametrize(
        ("first", "second", "pairs"),
        [
            # the longer phrase first, and the other way round
            ([0, 5, 8, 9, 7, 1, 1], [0, 5, 6, 7, 1, 1, 1], [(0, 0), (1, 1), (4, 3), (5, 4), (6, 5)]),
            ([0, 5, 6, 7, 1, 1, 1], [0, 5, 8, 9, 7, 1, 1], [(0, 0), (1, 1), (3, 4), (4, 5), (5, 6)]),
            # a word that both phrases share is a context
            ([0, 8, 7, 1, 1], [0, 6, 7, 1, 1], [(0, 0), (2, 2), (3, 3), (4, 4)]),
            # nothing in common, as with the empty prompt
            ([0, 5, 6, 1, 1], [0, 1, 1, 1, 1], [(0, 0), (3, 1), (4, 2)]),
            # a word said twice is not counted from both sides
            ([0, 5, 5, 1, 1], [0, 5, 1, 1, 1], [(0, 0), (1, 1), (3, 2), (4, 3)]),
            ([0, 5, 6, 1], [0, 5, 6, 1], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ],
    )
    def test_pairs(self, first, second, pairs):
        e, g = torch.tensor(first), torch.tensor(second)
        m = match_tokens(e, g, (first.index(1), second.index(1)))
        found = [(i, i) for i in range(m.head)]
        found += [(m.first + i, m.second + i) for i in range(m.tail)]
        assert found == pairs
        left = set(range(len(first))) - {i for i, _ in pairs}
        assert {i for s in m.alone for i in range(len(first))[s]} == left

    def test_a_phrase_lies_between_its_words(self):
        own = torch.zeros(2, 8, dtype=torch.bool)
        own[0, 1:6] = own[1, 1:5] = True
        found = locate_phrases([2, 2], [1, 1], own)
        assert [row.nonzero().flatten().tolist() for row in found] == [[3, 4], [3]]


class TestBatchedLowRank:
    """Rows of a batch through factors of their own."""

    def test_each_row_has_its_own_weight(self):
        torch.manual_seed(3)
        layer, x = nn.Linear(D, 5), torch.randn(4, 7, D)
        up, down = torch.randn(4, 5, 2), torch.randn(4, 2, D)
        with use_own_factors([layer], [up], [down]):
            together = layer(x)
        for b in range(4):
            alone = nn.functional.linear(x[b], layer.weight + up[b] @ down[b], layer.bias)
            torch.testing.assert_close(together[b], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert not layer._forward_hooks

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Linear(D, 5), (6, 7, D)),
            (nn.Linear(D, 5), (6, D)),
            (nn.Linear(D, 5), (6, 2, 3, D)),
            (nn.Conv2d(4, 5, 3, stride=2, padding=1), (6, 4, 7, 6)),
            (nn.Conv2d(4, 5, 1), (6, 4, 3, 3)),
        ],
    )
    def test_rows_take_turns_and_a_switch_takes_changes_off(self, layer, shape):
        torch.manual_seed(3)
        x = torch.randn(shape)
        ups, downs = init_factors([layer], 2, [torch.Generator().manual_seed(i) for i in range(3)])
        assert not ups[0].any()
        assert downs[0].shape == (3, 2, layer.weight[0].numel())
        ups[0] += torch.randn(ups[0].shape)
        plain = layer(x)
        with use_own_factors([layer], ups, downs, 0.7) as switch:
            together = layer(x)
            with switch.off():
                assert torch.equal(layer(x), plain)
            assert torch.equal(layer(x), together)
        for i in range(6):
            alone, b = copy.deepcopy(layer), i % 3
            alone.weight.data += 0.7 * (ups[0][b] @ downs[0][b]).reshape(layer.weight.shape)
            torch.testing.assert_close(together[i], alone(x[i : i + 1])[0], rtol=1e-4, atol=1e-5)

    def test_balance_keeps_the_product_and_half_precision_keeps_the_balance(self):
        torch.manual_seed(3)
        up, down = 1e-7 * torch.randn(5, 3), 1e3 * torch.randn(3, D)
        up[:, 2] = 0
        left, right = balance(up, down)
        torch.testing.assert_close(left @ right, up @ down)
        torch.testing.assert_close(left.abs().amax(0)[:2], right.abs().amax(1)[:2])
        half = left.half().float() @ right.half().float()
        assert (half - up @ down).norm() < 1e-3 * (up @ down).norm()


class TestMinimise:
    """Independent problems in one batch."""

    @staticmethod
    def problem(rows):
        torch.manual_seed(4)
        targets = 10 * torch.randn(6, 3, 2, dtype=torch.float64)[rows]
        starts = [torch.randn(6, 3, 2, dtype=torch.float64)[rows].clone() for _ in range(2)]
        idle = torch.ones(len(rows), 2, dtype=torch.float64)

        def losses(step):
            first, second = starts
            return ((first * second - targets).square().flatten(1).sum(1)) / (1 + step)

        return [*starts, idle], losses

    def test_a_batch_ends_where_each_ends_alone(self):
        settings = {
            "max_train_steps": 30,
            "learning_rate": 0.05,
            "weight_decay": 0.1,
            "max_grad_norm": 0.7,
        }
        together, losses = self.problem(range(6))
        before = float(losses(0).sum())
        minimise(together, losses, **settings)
        assert float(losses(0).sum()) < 0.9 * before
        for b in range(6):
            alone, one = self.problem([b])
            minimise(alone, one, **settings)
            for x, y in zip(together, alone, strict=True):
                torch.testing.assert_close(x[b : b + 1], y, rtol=0, atol=1e-12)
        assert torch.equal(together[2], torch.ones(6, 2, dtype=torch.float64))

    def test_equals_the_plain_loop_of_torch(self):
        (first, second, _), losses = self.problem([2])
        theirs = [nn.Parameter(first.clone()), nn.Parameter(second.clone())]
        minimise(
            [first, second],
            losses,
            max_train_steps=20,
            learning_rate=0.05,
            weight_decay=0.1,
            max_grad_norm=0.7,
        )
        torch.manual_seed(4)
        target = 10 * torch.randn(6, 3, 2, dtype=torch.float64)[[2]]
        adam = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
        for step in range(20):
            adam.zero_grad()
            ((theirs[0] * theirs[1] - target).square().sum() / (1 + step)).backward()
            nn.utils.clip_grad_norm_(theirs, 0.7)
            adam.step()
        torch.testing.assert_close(first, theirs[0].detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(second, theirs[1].detach(), rtol=0, atol=1e-12)

    def test_a_loss_that_is_not_finite(self):
        weight = torch.zeros(1, 2)
        with pytest.raises(ExpungeError, match="'cat' broke off at step 1: the loss runs away; lower"):
            minimise(
                [weight],
                lambda _: (weight / 0).sum(1),
                max_train_steps=2,
                learning_rate=1.0,
                names=["cat"],
            )

    def test_of_a_batch_one_runs_away(self, monkeypatch):
        monkeypatch.setattr("expunge.ops.finetune.KEEP_EVERY", 4)
        settings = {"learning_rate": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.7}
        sound, losses = self.problem([0, 1])
        minimise(sound, losses, max_train_steps=10, **settings)
        short, losses = self.problem([0, 1])
        minimise(short, losses, max_train_steps=4, **settings)
        found, losses = self.problem([0, 1])

        def second_breaks(step):
            return losses(step) * torch.tensor([1.0, 1.0 if step < 6 else math.nan])

        with pytest.warns(ExpungeWarning, match="'dog' broke off at step 7: .* that of step 4; lower"):
            minimise(found, second_breaks, max_train_steps=10, names=["cat", "dog"], **settings)
        for x, whole, kept in zip(found, sound, short, strict=True):
            assert torch.equal(x, torch.stack([whole[0], kept[1]]))

    def test_frozen_for_a_block(self):
        layer = nn.Linear(2, 2)
        layer.bias.requires_grad_(False)
        with frozen(layer.parameters()):
            assert not any(p.requires_grad for p in layer.parameters())
        assert [p.requires_grad for p in layer.parameters()] == [True, False]


class TestOtsu:
    """The threshold between dark and bright."""

    def test_against_every_cut_tried(self):
        torch.manual_seed(5)
        values = torch.cat([torch.randn(4, 30), 4 + torch.randn(4, 9)], 1)[:, torch.randperm(39)]
        for row, cut in zip(values, otsu(values), strict=True):

            def between(t, row=row):
                low, high = row[row <= t], row[row > t]
                return len(low) * len(high) * (low.mean() - high.mean()) ** 2

            best = max(row.sort().values[:-1], key=between)
            assert cut == best
            assert 6 < (row > cut).sum() < 16

    def test_equal_values_stay_together(self):
        values = torch.tensor([[0.0, 1, 0, 1, 1], [2, 2, 2, 2, 2]])
        assert (values > otsu(values)).tolist() == [[False, True, False, True, True], [False] * 5]


class TestAttention:
    """Maps read beside the layers."""

    def test_grid(self):
        assert infer_grid(64, 8, 8) == (8, 8)
        assert infer_grid(4, 8, 8) == (2, 2)
        assert infer_grid(6, 9, 6) == (3, 2)
        with pytest.raises(ExpungeError, match="15 pixels are no halving of latents of 8 × 8"):
            infer_grid(15, 8, 8)

    def test_energy_is_the_plain_sum(self):
        torch.manual_seed(6)
        maps = torch.rand(2, 3, 5, 4)
        tokens, mask = torch.rand(2, 4) > 0.5, torch.rand(2, 5) > 0.5
        found = energy(maps, tokens, mask)
        for b in range(2):
            plain = sum(
                (maps[b, h, :, i] * mask[b]).norm() ** 2
                for h in range(3) for i in range(4) if tokens[b, i]
            )  # fmt: skip
            torch.testing.assert_close(found[b], torch.as_tensor(plain, dtype=torch.float32))

    def test_reads_maps_and_leaves_the_rest(self):
        torch.manual_seed(7)
        query, key, after = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 2)
        pixels, tokens, ran = torch.randn(2, 9, 6), torch.randn(2, 4, 5), []

        def forward():
            ran.append(key(tokens) @ query(pixels).mT)
            ran.append(after)

        (found,) = read_attention([CrossAttention(query, key, 2, 0.5)], lambda a: a, forward)
        assert not ran
        assert not query._forward_hooks
        assert not key._forward_hooks
        q, k = query(pixels).reshape(2, 9, 2, 4), key(tokens).reshape(2, 4, 2, 4)
        for b in range(2):
            for h in range(2):
                plain = (0.5 * q[b, :, h] @ k[b, :, h].T).softmax(-1)
                torch.testing.assert_close(found[b, h], plain)

    def test_an_exception_takes_the_hooks_off(self):
        layer = nn.Linear(2, 2)

        def forward():
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            read_attention([CrossAttention(layer, layer, 1, 1.0)], lambda a: a, forward)
        assert not layer._forward_hooks


class TestSaliency:
    """Which entries have the largest gradients, in every map."""

    def test_at_most_half_and_never_without_a_gradient(self):
        torch.manual_seed(0)
        for gradient in (torch.randn(9, 11), torch.randn(8, 3, 2, 2), torch.randn(1)):
            half = top_half(gradient)
            assert int(half.sum()) == gradient.numel() // 2
            if half.any():
                assert gradient[half].abs().min() > gradient[~half].abs().max()
        assert not top_half(torch.zeros(10)).any()
        assert int(top_half(torch.tensor([0.0] * 8 + [1.0])).sum()) == 1

    def test_the_intersection_of_all_maps(self):
        torch.manual_seed(0)
        maps = [{"a": torch.randn(40), "b": torch.randn(6, 5)} for _ in range(3)]
        found = Intersection()
        for one in maps:
            for name, gradient in one.items():
                found.add(name, gradient)
            found.done()
        for name in ("a", "b"):
            expected = torch.stack([top_half(one[name]) for one in maps]).all(0)
            assert torch.equal(found.masks[name], expected)
        assert found.counts[0] == 35
        assert found.counts == sorted(found.counts, reverse=True)
        assert found.counts[-1] == sum(int(mask.sum()) for mask in found.masks.values())

    def test_settled(self):
        assert not settled([100] * 10, 0.01)
        assert settled([100] * 11, 0.01)
        assert not settled([100] * 10 + [98], 0.01)
        assert settled([100] * 10 + [98], 0.02)

    @pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 3, 3), ()])
    def test_bits(self, shape):
        mask = torch.rand(shape) < 0.5
        bits = pack_bits(mask)
        assert len(bits) == -(-mask.numel() // 8)
        assert torch.equal(unpack_bits(bits, shape), mask)
