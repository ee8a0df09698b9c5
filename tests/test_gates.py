"""Gated changes: what they compute, where they do nothing, how they stack, and their closed form."""

import dataclasses

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.changes import Applied, Damped, Gated, LowRank, Right, summarize
from expunge.checkpoints.linearize import fit_static_weights
from expunge.edit import Record
from expunge.methods.ace import ACE
from expunge.ops.gates import Background, find_directions, fit_affine, fit_gate, stack_root
from expunge.ops.pgd import minimise_in_ball
from test_changes import KEY, VALUE, gated, linear

WIDTH = 32
GATE = ACE(stages=("gate",), num_retain_words=20)


def slowly(change: Gated, x: torch.Tensor) -> torch.Tensor:
    """One token, direction by direction."""
    doubles = {name: t.double() for name, t in change.tensors.items() if t.is_floating_point()}
    change, x = dataclasses.replace(change, **doubles), x.double()
    s = [1 / (1 + torch.exp(-k * (w @ x - c))) for w, c, k in zip(*switch(change), strict=True)]
    owner, concept = change.owner.tolist(), change.concept.tolist()
    s = [max(one for one, c in zip(s, concept, strict=True) if c == mine) for mine in owner]
    w = [one * (one / (1 - one)) ** 0.2 for one in s]
    new = x.clone()
    for k, mine in enumerate(owner):
        shared = sum(
            w[j] * (change.down[k] @ change.up[:, j]).abs()
            for j, theirs in enumerate(owner)
            if theirs != mine
        )
        left = change.down[k] @ x - change.toward[k] @ x - change.goal[k]
        new -= s[k] * w[k] / (w[k] + shared) * left * change.up[:, k]
    return new


def switch(change):
    return change.direction, change.centre, change.slope


def wide_open(change: Gated, layers=None) -> Gated:
    return dataclasses.replace(change, centre=torch.full_like(change.centre, -1e6))


def closed(change):
    return dataclasses.replace(
        change, centre=torch.full_like(change.centre, 1e6), slope=torch.full_like(change.slope, 10.0)
    )


def orthonormal(rank: int, seed: int) -> torch.Tensor:
    """(WIDTH, rank)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator)).Q


def projecting(*bases: torch.Tensor) -> Gated:
    """Open gates, each of which takes a space away."""
    up = torch.cat(bases, 1)
    n = len(bases)
    owner = torch.cat([torch.full((base.shape[1],), i) for i, base in enumerate(bases)])
    return Gated(
        (KEY, VALUE), torch.zeros(n, WIDTH), torch.full((n,), -30.0), torch.ones(n),
        up=up, down=up.T.clone(), goal=torch.zeros(len(owner)), owner=owner,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


class TestWhatTheyCompute:
    def test_against_a_slow_reading(self):
        change, x = gated((KEY,), WIDTH, gates=3), torch.randn(2, 5, WIDTH)
        toward = torch.randn_like(change.down) / 10
        of_two = torch.tensor([0, 1, 1])
        for one in (
            change,
            dataclasses.replace(change, toward=toward),
            dataclasses.replace(change, concept=of_two, owner=of_two[change.owner]),
        ):
            slow = torch.stack([torch.stack([slowly(one, token) for token in row]) for row in x])
            torch.testing.assert_close(one.change_input(x), slow.float())

    def test_the_surest_concept_takes_what_several_share(self):
        """A doubtful gate beside a sure one on the same direction has next to no say in the goal."""
        base = orthonormal(1, seed=0)
        change = dataclasses.replace(
            projecting(base, base),
            centre=torch.tensor([-30.0, -1.0]),
            goal=torch.tensor([1.0, -1.0]),
        )
        x = torch.randn(4, WIDTH)
        assert (change.change_input(x) @ base - 1).abs().max() < 0.05

    def test_one_gate_for_a_whole_prompt(self):
        change, x = gated((KEY,), WIDTH), torch.randn(2, 5, WIDTH)
        each = change.gates(x)
        whole = dataclasses.replace(change, whole=True).gates(x)
        assert torch.equal(whole, each.max(1, keepdim=True).values.expand(2, 5, 2))
        assert not torch.equal(whole, each)

    def test_damped(self, pipe):
        x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 5, 16)
        damping = torch.rand(2, 16)
        change = Damped((KEY,), torch.randn(2, WIDTH), torch.zeros(2), torch.ones(2), damping=damping)
        s = torch.sigmoid(x @ change.direction.T)
        slow = y * (1 - s[..., :1] * damping[0]) * (1 - s[..., 1:] * damping[1])
        torch.testing.assert_close(change.change_output(x, y), slow)

    @pytest.mark.parametrize("kind", ["gated", "damped"])
    def test_closed_gates_change_nothing(self, pipe, kind):
        change = gated((KEY, VALUE), WIDTH)
        if kind == "damped":
            change = Damped((KEY,), *switch(change), damping=torch.ones(2, linear(pipe).out_features))
        x = torch.randn(2, 3, WIDTH)
        answer = linear(pipe)(x)
        with Applied(pipe, [closed(change)]):
            assert torch.equal(linear(pipe)(x), answer)
        with Applied(pipe, [wide_open(change)]):
            assert not torch.allclose(linear(pipe)(x), answer)

    def test_an_open_gate_reaches_its_goal(self):
        base = orthonormal(3, seed=0)
        change = dataclasses.replace(projecting(base), goal=torch.tensor([1.0, -2.0, 0.5]))
        x = torch.randn(4, WIDTH)
        torch.testing.assert_close(change.change_input(x) @ base, change.goal.expand(4, 3))
        beside = torch.linalg.qr(torch.cat([base, torch.randn(WIDTH, 3)], 1)).Q[:, 3:]
        torch.testing.assert_close(change.change_input(x) @ beside, x @ beside)

    def test_half_precision_stays_so(self):
        change, x = gated((KEY,), WIDTH), torch.randn(2, 3, WIDTH)
        assert change.change_input(x.half()).dtype == torch.float16
        torch.testing.assert_close(
            change.change_input(x.half()).float(), change.change_input(x), rtol=1e-2, atol=1e-2
        )


class TestStacked:
    def test_the_same_concept_twice_is_subtracted_once(self):
        base, x = orthonormal(2, seed=0), torch.randn(6, WIDTH)
        once, twice = projecting(base), projecting(base, base)
        torch.testing.assert_close(twice.change_input(x), once.change_input(x))
        torch.testing.assert_close(twice.change_input(x) @ base, torch.zeros(6, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(once.change_input(once.change_input(x)), once.change_input(x))

    def test_concepts_at_right_angles_do_not_meet(self):
        base, x = orthonormal(4, seed=0), torch.randn(6, WIDTH)
        both = projecting(base[:, :2], base[:, 2:])
        torch.testing.assert_close(both.change_input(x), projecting(base).change_input(x))

    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_is_subtracted_twice_whatever_the_gates(self, seed):
        """The eigenvalues of what is subtracted lie in [0, 1]."""
        torch.manual_seed(seed)
        common = orthonormal(3, seed)
        bases = [torch.linalg.qr(common + 0.5 * torch.randn(WIDTH, 3)).Q for _ in range(5)]
        change = projecting(*bases)
        change = dataclasses.replace(change, centre=torch.randn(5) * 3)  # anything between 0 and 1
        taken = torch.eye(WIDTH) - change.change_input(torch.eye(WIDTH))
        values = torch.linalg.eigvals(taken).real
        assert values.min() > -1e-5
        assert values.max() < 1 + 1e-5
        assert values.max() > 0.2  # something is

    def test_edits_follow_one_another_and_come_off(self, pipe):
        first, second = gated((KEY, VALUE), WIDTH), gated((KEY,), WIDTH)
        low = LowRank((KEY,), torch.randn(16, 1), torch.randn(1, WIDTH))
        right = Right((KEY,), torch.randn(WIDTH, WIDTH))
        layer, x = linear(pipe), torch.randn(2, 3, WIDTH)
        before, w, answer = weights(pipe), layer.weight.detach(), layer(x)
        with Applied(pipe, [first, low, second, right]):
            weight = right.weight(low.weight(w))
            torch.testing.assert_close(layer(x), second.change_input(first.change_input(x)) @ weight.T)
        assert torch.equal(layer(x), answer)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        assert all(torch.equal(before[k], v) for k, v in weights(pipe).items())


class TestHooks:
    def test_gates_are_asked_once_for_all_layers_of_a_text(self, pipe):
        asked = []

        @dataclasses.dataclass(frozen=True, eq=False)
        class Counting(Gated):
            def change_input(self, x):
                asked.append(x)
                return super().change_input(x)

        change = gated((KEY, VALUE), WIDTH)
        change = Counting(**{f.name: getattr(change, f.name) for f in dataclasses.fields(change)})
        text = torch.randn(1, 3, WIDTH)
        with torch.no_grad(), Applied(pipe, [change]):
            for _ in range(3):
                key, value = linear(pipe)(text), linear(pipe, VALUE)(text)
            assert len(asked) == 1
            text += 1  # another text in the same place
            assert not torch.allclose(linear(pipe)(text), key)
            assert not torch.allclose(linear(pipe, VALUE)(text), value)
            assert len(asked) == 2
            linear(pipe)(text.clone())
            assert len(asked) == 3

    def test_gates_are_asked_in_full_precision_whatever_the_layers_compute_in(self, pipe):
        change, text = gated((KEY,), WIDTH), torch.randn(1, 3, WIDTH)
        exact = change.change_input(text)
        seen = []
        with Applied(pipe, [change]), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            hook = linear(pipe).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            assert linear(pipe)(text).dtype == torch.bfloat16
            assert not torch.equal(change.change_input(text), exact)  # so it would be, rounded
            hook.remove()
        assert torch.equal(seen[0], exact)

    def test_gradients_reach_gates_factors_and_text(self, pipe):
        change = gated((KEY, VALUE), WIDTH)
        names = ("direction", "centre", "slope", "up", "down", "toward", "goal")
        change = dataclasses.replace(
            change, **{name: getattr(change, name).clone().requires_grad_() for name in names}
        )
        text = torch.randn(1, 4, WIDTH, requires_grad=True)
        x = torch.randn(1, 4, 8, 8)
        with Applied(pipe, [change]):
            for _ in range(2):  # nothing is kept that holds gradients
                loss = pipe.unet(x, 10, encoder_hidden_states=text).sample.square().sum()
                found = torch.autograd.grad(loss, [text, *(getattr(change, name) for name in names)])
        for name, gradient in zip(("text", *names), found, strict=True):
            assert gradient.abs().max() > 0, name
        with torch.no_grad():
            step = 1e-3 * torch.randn_like(change.up)
            values = []
            for sign in (1, -1):
                moved = dataclasses.replace(change, up=change.up + sign * step)
                with Applied(pipe, [moved]):
                    out = pipe.unet(x, 10, encoder_hidden_states=text).sample
                values.append(out.double().square().sum())
        torch.testing.assert_close(
            float(values[0] - values[1]) / 2, float((found[4] * step).sum()), rtol=0.05, atol=1e-4
        )

    def test_a_plain_pipeline_draws_as_the_model_does(self, model, problem):
        edit = expunge.erase(model, problem, GATE)
        text = model.encode(["airplane", ""]).embeddings
        latents = torch.randn(1, 4, 8, 8)
        call = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], "latents": latents}
        call |= {"num_inference_steps": 2, "output_type": "pt"}
        model.pipe.set_progress_bar_config(disable=True)
        before = model.pipe(**call).images
        applied = edit.apply(model.pipe)
        after = model.pipe(**call).images
        applied.remove()
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(model.pipe(**call).images, before)


def test_saved_loaded_and_shown(pipe, tmp_path):
    changes = (gated((KEY, VALUE), WIDTH, gates=3), Right((KEY,), torch.eye(WIDTH)))
    record = Record("ace", {}, Problem((Concept("cat", "sky"),)), "", "", 0, 0.0, {})
    Edit(changes, record).save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again.hash == Edit(changes, record).hash
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(again.changes[0].change_input(x), changes[0].change_input(x))
    assert summarize(again.changes) == "gated by 3 on 2 layers, right on 1 layer"


def test_a_gate_is_no_weight():
    with pytest.raises(
        ExpungeError,
        match=r"no weight can hold it; `expunge\.checkpoints\.linearize\.fit_static_weights` fits",
    ):
        gated((KEY,), WIDTH).weight(torch.zeros(16, WIDTH))


class TestClosedForm:
    def test_directions_take_what_the_left_singular_vectors_take(self):
        w, rows = torch.randn(20, 8), torch.randn(12, 8)
        up, down = find_directions(w, rows, rank=2)
        u = torch.linalg.svd(w.double() @ rows.double().T).U[:, :2]
        x = torch.randn(8, 5).double()
        torch.testing.assert_close(w.double() @ up @ down @ x, u @ u.T @ w.double() @ x)
        torch.testing.assert_close(down @ up, torch.eye(2).double())

    def test_energy_and_rank(self):
        rows = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        shares = [9 / 14, 13 / 14, 1]
        for rank, share in enumerate(shares, 1):
            assert find_directions(torch.eye(3), rows, energy=share)[1].shape == (rank, 3)
            if rank < 3:
                assert len(find_directions(torch.eye(3), rows, energy=share + 0.01)[1]) == rank + 1
        assert len(find_directions(torch.eye(3), rows, rank=2)[1]) == 2
        with pytest.raises(ExpungeError, match="no difference"):
            find_directions(torch.eye(3), 0 * rows)

    def test_all_directions_carry_the_rows_over(self):
        """With all energy, what is taken from a difference is the whole difference."""
        w, rows = torch.randn(20, 8), torch.randn(3, 8).double()
        up, down = find_directions(w, rows)
        torch.testing.assert_close(rows @ down.T @ up.T, rows)

    def test_affine_against_a_slow_fit(self):
        x, y, w = torch.randn(30, 4).double(), torch.randn(30, 2).double(), torch.rand(30).double()
        line, at = fit_affine(x, y, w, 0.0)
        ones = torch.cat([x, torch.ones(30, 1).double()], 1) * w.sqrt()[:, None]
        slow = torch.linalg.lstsq(ones, y * w.sqrt()[:, None]).solution.T
        torch.testing.assert_close(torch.cat([line, at[:, None]], 1), slow)
        line, at = fit_affine(x, y, w, 1e9)
        assert line.abs().max() < 1e-6
        torch.testing.assert_close(at, (w @ y) / w.sum(), atol=1e-6, rtol=1e-6)

    def test_stacked_layers_are_one(self):
        layers = [torch.randn(n, 8) for n in (3, 5, 20)]
        root, x = stack_root(layers), torch.randn(8).double()
        whole = sum((w.double() @ x).square().sum() for w in layers)
        torch.testing.assert_close((root @ x).square().sum(), whole)
        rows = torch.randn(12, 8)
        up, down = find_directions(root, rows, rank=3)
        other_up, other_down = find_directions(torch.cat(layers), rows, rank=3)
        torch.testing.assert_close(up @ down, other_up @ other_down)

    def test_a_gate_opens_on_its_tokens_and_stays_shut_elsewhere(self):
        general, mean = torch.randn(500, 16), 8 * torch.eye(16)[0]
        concept, retained = mean + torch.randn(50, 16), 8 * torch.eye(16)[1] + torch.randn(50, 16)
        background = Background(general, retained, 1.0, 4.0)
        found = fit_gate(concept, background, margin=0.4, retain_openness=0.01)
        s = torch.sigmoid(
            found.slope
            * (torch.cat([concept, retained, general]) @ found.direction.float() - found.centre)
        )
        assert s[:50].quantile(0.05) > 0.98
        assert s[50:100].max() <= 0.0101
        assert s[100:].max() < 0.05
        edge = background.edge(found.direction)
        at_edge = found.slope * (edge + found.direction @ background.mean - found.centre)
        torch.testing.assert_close(torch.sigmoid(at_edge), torch.tensor(0.01).double())

    def test_a_smaller_margin_opens_wider(self):
        background = Background(torch.randn(500, 16), torch.zeros(0, 16), 1.0, 4.0)
        concept = 8 * torch.eye(16)[0] + torch.randn(50, 16)
        half_open = [
            float(fit_gate(concept, background, margin=m, retain_openness=0.01).centre)
            for m in (0.2, 0.4, 0.8)
        ]
        assert half_open == sorted(half_open)
        assert half_open[0] < half_open[2]


class TestBoundedAttack:
    def test_stays_in_its_balls_and_finds_the_edge(self):
        start, goal = torch.randn(2, 3, 8), torch.randn(2, 3, 8) * 5
        found, value = minimise_in_ball(lambda x: (x - goal).square().sum((1, 2)), start, 0.3, 60)
        reach = 0.3 * start.norm(dim=-1)
        assert bool(((found - start).norm(dim=-1) <= reach * (1 + 1e-5)).all())
        toward = start + reach[..., None] * torch.nn.functional.normalize(goal - start, dim=-1)
        torch.testing.assert_close(value, (toward - goal).square().sum((1, 2)), rtol=1e-2, atol=0)

    def test_no_budget_no_change_and_more_is_never_worse(self):
        start = torch.randn(2, 3, 8)

        def rough(x):
            return (7 * x).sin().sum((1, 2))

        assert torch.equal(minimise_in_ball(rough, start, 0.0, 5)[0], start)
        assert torch.equal(minimise_in_ball(rough, start, 0.5, 0)[0], start)
        values = torch.stack([minimise_in_ball(rough, start, 0.5, n)[1] for n in range(6)])
        assert bool((values.diff(dim=0) <= 0).all())
        assert bool((values[-1] < values[0]).all())


class TestPlainWeights:
    def test_against_a_slow_fit(self, model):
        """The matrix that `torch.linalg.lstsq` finds from all rows, each weighted, and the ridge's."""
        problem = Problem((Concept("cat", "sky"), Concept("dog", "sky")), ("ship",))
        change = gated(tuple(e.layer for e in model.text_entries()), WIDTH)
        found = fit_static_weights(
            model, (change,), problem, ridge=0.5, retain_scale=2.0, captions_from=""
        )
        from expunge.erasing.prompt_templates import KEPT, TEMPLATES

        left, right = [0.5**0.5 * torch.eye(WIDTH).double()], [0.5**0.5 * torch.eye(WIDTH).double()]
        for name in ("cat", "dog"):
            e = model.encode([t.format(name) for t in TEMPLATES["object"]]).embeddings.double()
            left.append(e.flatten(0, 1) / len(e) ** 0.5)
            right.append(change.change_input(e).flatten(0, 1) / len(e) ** 0.5)
        e = model.encode(["", "ship", KEPT["object"].format("ship")]).embeddings.double()
        left.append(e.flatten(0, 1) * (2 / 3) ** 0.5)
        right.append(e.flatten(0, 1) * (2 / 3) ** 0.5)
        slow = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
        torch.testing.assert_close(found.changes[0].matrix.double(), slow, rtol=1e-4, atol=1e-5)
        assert found.changes[0].layers == change.layers
        lost, moved, m = [], [], slow.T
        erased = [
            model.encode([t.format(name) for t in TEMPLATES["object"]]).embeddings.double()
            for name in ("cat", "dog")
        ]
        for layer in change.layers:
            w = model.weight(layer).double().T
            missed, wanted = (
                sum((x @ w).square().sum() / len(x) for x in rows)
                for rows in (
                    [e @ m - change.change_input(e) for e in erased],
                    [change.change_input(e) - e for e in erased],
                )
            )
            lost.append(missed / wanted)
            moved.append(((e @ m - e) @ w).square().sum() / (e @ w).square().sum())
        assert found.lost == pytest.approx(float(torch.stack(lost).mean()), rel=1e-6)
        assert found.moved == pytest.approx(float(torch.stack(moved).mean()), rel=1e-6)

    def test_the_loss_is_said(self, model, problem):
        edit = expunge.erase(model, problem, GATE)
        few = {"captions_from": "", "ridge": 1e-3}
        close = fit_static_weights(model, edit.changes, problem, retain_scale=0.01, **few)
        stiff = fit_static_weights(model, edit.changes, problem, retain_scale=1e6, **few)
        assert close.lost < 0.5 < stiff.lost
        assert stiff.moved < 1e-6 < close.moved
        assert "of the erasure is lost" in str(close)
        before = model.draw(Probe.of("airplane", num_inference_steps=2))
        with model.using(close.changes):
            assert not torch.equal(model.draw(Probe.of("airplane", num_inference_steps=2)), before)

    def test_weights_stay_and_what_cannot_be_fitted_is_refused(self, model, problem):
        layers = tuple(e.layer for e in model.text_entries())
        right = Right(layers, torch.eye(WIDTH))
        assert fit_static_weights(model, (right,), problem).changes == (right,)
        damped = Damped(
            (KEY,), torch.zeros(1, WIDTH), torch.zeros(1), torch.ones(1), damping=torch.zeros(1, 16)
        )
        with pytest.raises(ExpungeError, match="make the edit with reduction 'shared'"):
            fit_static_weights(model, (damped,), problem)
