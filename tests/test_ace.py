"""ACE: its closed form against a slow reading, what hardening gains, its variants, and bad input."""

import dataclasses

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.methods.ace import ACE, BANDS, FACTORS, check_memory
from expunge.run import Run
from expunge.templates import TEMPLATES

GATE = ACE(stages=("gate",))


def slow_groups(model, name, anchor, template):
    """The concept's tokens and their anchor's in one prompt, read off token by token."""
    found = {}
    text, goal = model.encode([template.format(name)]), model.encode([template.format(anchor)])
    e, n = text.embeddings[0], goal.embeddings[0]
    before = model.count_tokens(template.split("{}")[0].strip())
    length = model.count_tokens(name)
    last = before + model.count_tokens(anchor)
    found["phrase"] = [(e[i], n[last]) for i in range(1 + before, 1 + before + length)]
    end, their_end = int(text.own.sum()) + 1, int(goal.own.sum()) + 1
    tail = min(77 - end, 77 - their_end)
    for start, stop in zip(BANDS, (*BANDS[1:], 77), strict=True):
        found[start] = [(e[end + k], n[their_end + k]) for k in range(start, min(stop, tail))]
    return found


def test_gates_and_directions_against_a_slow_reading(model):
    templates = TEMPLATES["object"][:4]
    method = dataclasses.replace(GATE, templates=templates, energy=0.8, general=10)
    problem = Problem((Concept("airplane", "sky", synonyms=("jet",)),), ("ship",))
    (change,) = expunge.erase(model, problem, method).changes
    assert len(change.centre) == 1 + len(BANDS)
    weights = [model.weight(e.layer).double() for e in model.text_entries()]
    read = [slow_groups(model, name, "sky", t) for name in ("airplane", "jet") for t in templates]
    background = method._background(model, problem, method._staying(model, problem), Run())
    for i, place in enumerate(("phrase", *BANDS)):
        pairs = [[(e.double(), n.double()) for e, n in one[place]] for one in read]
        rows = torch.stack([e for one in pairs for e, _ in one])
        # The directions: what each layer's W would subtract, all layers one above the other.
        means = torch.stack([torch.stack([e - n for e, n in one]).mean(0) for one in pairs])
        tall = torch.cat(weights)
        u, s, _ = torch.linalg.svd(tall @ means.T, full_matrices=False)
        r = int((s.square().cumsum(0) / s.square().sum() < 0.8).sum()) + 1
        mine = change.owner == i
        assert int(mine.sum()) == r
        neutral = torch.stack([n for one in pairs for _, n in one]).mean(0)
        x = rows[0]
        slow = u[:, :r] @ u[:, :r].T @ tall @ (x - neutral)
        up, down, goal = (
            change.up[:, mine].double(),
            change.down[mine].double(),
            change.goal[mine].double(),
        )
        torch.testing.assert_close(tall @ up @ (down @ x - goal), slow, rtol=1e-3, atol=1e-3)
        # The gate.
        spread = torch.cov(torch.cat([background.general, background.retained]).T, correction=0)
        ways = []
        for ridge in (1, 0.1, 0.01, 1e-3, 1e-4):  # lowered until it tells them apart
            sphere = spread + ridge * spread.diagonal().mean() * torch.eye(32).double()
            w = torch.linalg.inv(sphere) @ (rows.mean(0) - background.mean)
            ways.append(w / (w @ (rows.mean(0) - background.mean)))
        mine = change.direction[i].double()
        assert min((mine - w).norm() / w.norm() for w in ways) < 1e-4
        opened = change.gates(rows.float())[:, i]
        assert opened.mean() > 0.5
        kept = change.gates(background.retained.float())[:, i]
        assert kept.max() <= method.leak * 1.01


def test_what_is_erased_becomes_its_anchor_and_the_rest_stays(model):
    problem = Problem((Concept("airplane", "sky"),), ("ship", "bird"))
    edit = expunge.erase(model, problem, dataclasses.replace(GATE, energy=1.0))
    (change,) = edit.changes
    text = model.encode(["a photo of the airplane", "a photo of the sky", "a photo of the ship"])
    e, n, r = text.embeddings
    moved, kept = change.given(e), change.given(r)
    assert (moved - n).norm() < 0.35 * (e - n).norm()
    assert (kept - r).norm() < 0.05 * (e - n).norm()


def test_several_concepts_share_one_change_and_do_not_disturb_one_another(model):
    both = Problem((Concept("airplane", "sky"), Concept("dog", "ground")), ("ship",))
    (change,) = expunge.erase(model, both, GATE).changes
    assert len(change.layers) == 14
    assert 4 <= len(change.centre) <= 2 * (2 + len(BANDS))
    text = model.encode(
        ["a photo of the airplane", "a photo of the sky", "a photo of the dog", "a photo of the ground"]
    )
    plane, sky, dog, ground = text.embeddings
    for e, n in ((plane, sky), (dog, ground)):
        assert (change.given(e) - n).norm() < 0.5 * (e - n).norm()


class TestVariants:
    def changes(self, model, problem, **fields):
        return expunge.erase(model, problem, dataclasses.replace(GATE, general=10, **fields)).changes

    def test_keys_or_values(self, model, problem):
        for projections, end in (("keys", "to_k"), ("values", "to_v")):
            (change,) = self.changes(model, problem, projections=projections)
            assert len(change.layers) == 7
            assert all(layer.endswith(end) for layer in change.layers)

    def test_directions_of_each_layer(self, model, problem):
        changes = self.changes(model, problem, reduction="layer")
        assert [len(change.layers) for change in changes] == [1] * 14
        w = model.weight(changes[0].layers[0])
        both = w @ changes[0].up @ changes[0].down
        one = changes[0].owner == 0
        u = w @ changes[0].up[:, one]
        torch.testing.assert_close(u.T @ u, torch.eye(int(one.sum())), rtol=0, atol=1e-4)
        assert both.shape == w.shape

    def test_damped(self, model, problem):
        changes = self.changes(model, problem, reduction="damped")
        assert {change.kind for change in changes} == {"damped"}
        assert all(0 <= float(c.damping.min()) <= float(c.damping.max()) <= 1 for c in changes)

    def test_where_gates_open(self, model, problem):
        text = model.encode(["a photo of the airplane"])
        opened = {}
        for gate_on in ("end", "phrase", "prompt"):
            (change,) = self.changes(model, problem, gate_on=gate_on)
            opened[gate_on] = change.gates(text.embeddings[0]).amax(1) > 0.5
        assert opened["phrase"].nonzero()[:, 0].tolist() == [5]
        assert opened["end"][5:].all()
        assert not opened["end"][:5].any()
        assert opened["prompt"].all()

    def test_presets_and_stages(self):
        assert ACE.preset("gate").stages == ("gate",)
        assert ACE(stages=("harden", "gate")).stages == ("gate", "harden")


class TestHarden:
    def test_an_attack_gets_less_from_a_hardened_edit(self, model, problem):
        method = ACE(radius=0.6, rounds=6, steps=6, rate=0.02, recovered=0.0, general=10)
        soft = expunge.erase(model, problem, dataclasses.replace(method, stages=("gate",))).changes[0]
        hard = expunge.erase(model, problem, method).changes[0]
        assert any(not torch.equal(getattr(soft, name), getattr(hard, name)) for name in FACTORS)
        from expunge.methods.ace import _apart
        from expunge.ops.gates import stacked
        from expunge.ops.pgd import bounded

        e = model.encode(["a photo of the airplane"]).embeddings
        root = stacked([model.weight(layer) for layer in soft.layers]).float()
        lacks = [
            float(bounded(lambda x, c=change: _apart(root, c.given(x), e), e, 0.6, 20)[1])
            for change in (soft, hard)
        ]
        assert lacks[1] > lacks[0]

    def test_stops_when_the_attack_fails(self, model, problem):
        method = ACE(radius=0.0, recovered=1.0, general=10)
        soft = expunge.erase(model, problem, dataclasses.replace(method, stages=("gate",)))
        assert expunge.erase(model, problem, method).hash == soft.hash

    def test_concepts_are_hardened_apart(self, model):
        method = ACE(pictures=1, picture_steps=2, rounds=1, steps=2, general=10)
        two = Problem((Concept("airplane", "sky"), Concept("dog", "ground")))
        first = expunge.erase(model, two, method).changes[0]
        turned = expunge.erase(model, Problem(two.erase[::-1]), method).changes[0]
        one = expunge.erase(model, Problem(two.erase[:1]), method).changes[0]
        n = len(one.centre)
        assert len(first.centre) == len(turned.centre) > n
        torch.testing.assert_close(first.centre[:n], turned.centre[-n:], rtol=1e-2, atol=1e-2)


class TestBadInput:
    """The tiny tokenizer knows ASCII alone: to it, "é" and "è" are one."""

    def test_concept_and_anchor_are_one_to_the_model(self, model):
        with pytest.raises(ExpungeError, match="'é ship' and its anchor 'è ship' are the same to this"):
            expunge.erase(model, Problem((Concept("é ship", "è ship"),)), GATE)

    def test_retained_within_the_concept(self, model):
        problem = Problem((Concept("é ship", "sky"),), ("è ship",))
        said = r"'è ship' to retain lies in what is erased with 'é ship': their overlap is [01]\.\d\d"
        with pytest.raises(ExpungeError, match=said):
            expunge.erase(model, problem, GATE)

    def test_more_gates_than_memory(self):
        check_memory(10, 8, 768, free=10**9)
        with pytest.raises(
            ExpungeError, match=r"1000 gates of 8 directions need .* GB, and 0.1 GB are free"
        ):
            check_memory(1000, 8, 768, free=10**8)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stages": ("harden",)}, "must have 'gate'"),
            ({"reduction": "layer"}, "only directions shared by all layers can be hardened"),
            ({"templates": ("a photo",)}, "one {} for the concept"),
            ({"energy": 0.0}, "energy must be above 0"),
            ({"gate_on": "ends"}, "did you mean 'end'"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ExpungeError, match=message):
            ACE(**fields)
