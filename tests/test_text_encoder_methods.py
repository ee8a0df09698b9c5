"""HiRM and AdvUnlearn: their losses by hand, and that they stay within the text encoder."""

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, ExpungeError, Problem
from expunge.changes import find_text_encoders
from expunge.erasing.text_encoders import select_text_parameters, train_text_encoders
from expunge.methods import advunlearn
from expunge.methods.advunlearn import AdvUnlearn, error
from expunge.methods.hirm import HiRM, compare
from expunge.runtime.context import RunContext
from expunge.text import Text
from tiny import PIPELINES, loaded

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship", "bird"))


def text(embeddings, own, pooled=None):
    mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    for row, n in enumerate(own):
        mask[row, 1 : 1 + n] = True
    prompts = tuple("x" * len(own))
    return Text(prompts, embeddings, mask, torch.zeros(mask.shape, dtype=torch.int64), pooled)


class TestWhatIsTrained:
    @pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "qwen_image", "pixart"])
    def test_the_first_block_of_each_encoder(self, family):
        model = loaded(PIPELINES[family](), family)
        first = select_text_parameters(model, "first block")
        every = select_text_parameters(model, "blocks")
        there = {name for name, part in model.pipe.components.items() if part is not None}
        parts = {name for name in there if name.startswith("text_encoder")}
        assert {name.partition(".")[0] for name in first} == parts
        assert set(first) < set(every)
        assert all(".0." in name and name.endswith(".weight") for name in first)
        assert not any("visual" in name or "norm" in name or "embed" in name for name in every)

    def test_training_is_adam_on_the_summed_gradients(self, model):
        """One step by hand: the first of Adam's goes against the sign of the gradient."""
        parameters = select_text_parameters(model, "first block")
        name, parameter = next(iter(parameters.items()))
        before = parameter.detach().clone()

        def loss(step, trained):
            yield model.encode_in_training(["ship"]).embeddings[..., 0].square().sum()
            yield 2 * model.encode_in_training(["ship"]).embeddings[..., 1].sum()

        changes = train_text_encoders(
            model, parameters, RunContext(0), loss, max_train_steps=1, learning_rate=1e-3, title="t"
        )
        states = model.encode_in_training(["ship"]).embeddings
        whole = states[..., 0].square().sum() + 2 * states[..., 1].sum()
        (gradient,) = torch.autograd.grad(whole, parameter)
        (ours,) = (c.value for c in changes if f"{c.layers[0]}.weight" == name)
        assert torch.equal(parameter, before)
        wanted = before - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)

    def test_what_runs_away_ends_at_a_sound_state(self, model):
        parameters = select_text_parameters(model, "first block")

        def loss(step, trained):
            yield model.encode_in_training(["ship"]).embeddings.mean() * (float("nan") if step else 1)

        with pytest.warns(expunge.ExpungeWarning, match="the loss runs away"):
            changes = train_text_encoders(
                model, parameters, RunContext(0), loss, max_train_steps=3, learning_rate=1.0, title="t"
            )
        assert changes == ()


class TestHiRM:
    @pytest.mark.parametrize("behind", [False, True])
    def test_the_loss_prompt_by_prompt(self, behind):
        torch.manual_seed(0)
        h, g, h0 = (torch.randn(3, 6, 4).double() for _ in range(3))
        own, vectors = (1, 3, 2), [torch.randn(3, 5).double() for _ in range(3)]
        slow = 0.0
        for row, n in enumerate(own):
            # Start, own tokens, end and padding: the last own one stands at place n.
            places = range(n, 6) if behind else range(6)
            apart = sum(float((h[row, i] - g[row, i]).square().sum()) for i in places)
            slow += apart / sum(float(h0[row, i].square().sum()) for i in places) / 3
            p, q, p0 = (v[row] for v in vectors)
            slow += float((p - q).square().sum() / p0.square().sum()) / 3
        texts = (text(x, own, v) for x, v in zip((h, g, h0), vectors, strict=True))
        found = compare(*texts, behind=behind)
        assert float(found) == pytest.approx(slow, abs=1e-6)

    def test_a_random_goal_is_one_direction_of_a_tokens_length(self, model):
        before = model.encode(["airplane", "a photo of the airplane"])
        anchored = model.encode(["sky"] * 2)
        goal = HiRM(size=2.0)._goal(before, anchored, torch.Generator().manual_seed(1)).embeddings
        assert torch.equal(goal[0, 0], goal[1, 40])
        length = before.embeddings.norm(dim=-1).mean()
        torch.testing.assert_close(goal[0, 0].norm(), 2 * length)

    def test_an_anchors_goal_is_counted_from_the_last_own_token(self, model):
        before, anchored = model.encode(["a photo of the airplane"]), model.encode(["sky"])
        goal = HiRM(direction="anchor")._goal(before, anchored, torch.Generator()).embeddings
        n = int(before.content_mask.sum())
        torch.testing.assert_close(goal[0, n:], anchored.embeddings[0, 1 : 1 + 77 - n])

    def test_only_first_blocks_change_and_the_loss_falls(self, model):
        before = weights(model.pipe)
        method = HiRM(direction="anchor", max_train_steps=30, learning_rate=2e-3)
        edit = expunge.erase(model, PROBLEM, method)
        layers = {layer for change in edit.changes for layer in change.layers}
        assert layers
        assert all("layers.0." in layer for layer in layers)
        assert find_text_encoders(edit.changes) == ("text_encoder",)
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        prompts = ["an image of the airplane", "an image of the sky"]
        airplane, sky = model.encode(prompts).embeddings
        with model.using(edit):
            after = model.encode(prompts[:1]).embeddings[0]
        assert (after - sky)[4:].norm() < 0.85 * (airplane - sky)[4:].norm()

    def test_pooled_vectors_are_misdirected_too(self):
        model = loaded(PIPELINES["sdxl"](), "sdxl")
        method = HiRM(direction="anchor", max_train_steps=20, learning_rate=2e-3)
        edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)
        assert find_text_encoders(edit.changes) == ("text_encoder", "text_encoder_2")
        prompts = ["an image of the airplane", "an image of the sky"]
        airplane, sky = model.encode(prompts).pooled
        with model.using(edit):
            after = model.encode(prompts[:1]).pooled[0]
        assert (after - sky).norm() < 0.7 * (airplane - sky).norm()


QUICK = {"trajectory_steps": 4, "attack_steps": 2, "num_retain_words": 5, "retain_batch": 2}


class TestAdvUnlearn:
    def test_the_two_terms_by_hand(self, model, monkeypatch):
        """The first step's losses, from the points, the prefix and the prompts that it chose."""
        seen, terms = {}, []
        draw_points, attack = advunlearn.Steering.draw_points, AdvUnlearn._attack

        def drawn(self, subjects):
            seen["sample"] = draw_points(self, subjects)
            return seen["sample"]

        def attacked(*given):
            seen["prefixed"] = attack(*given)
            return seen["prefixed"]

        def train(model, parameters, run, loss, **_):
            with torch.enable_grad():
                terms.extend(loss(0, None))
            return ()

        def predicted(z, t, prompts):
            with torch.no_grad():
                return model.predict(z, t, model.encode(prompts)).double()

        monkeypatch.setattr(advunlearn.Steering, "draw_points", drawn)
        monkeypatch.setattr(AdvUnlearn, "_attack", attacked)
        monkeypatch.setattr(advunlearn, "train_text_encoders", train)
        method = AdvUnlearn(negative_guidance=1.5, attack_rate=0.05, **QUICK)
        expunge.erase(model, PROBLEM, method)
        z, t = seen["sample"].late.latents, seen["sample"].late.t
        named, empty = (predicted(z, t, [p]) for p in ("airplane", ""))
        with torch.no_grad():
            found = model.predict(z, t, seen["prefixed"]()).double()
        slow = (found - (empty - 1.5 * (named - empty))).square().mean()
        assert float(terms[0].detach()) == pytest.approx(float(slow), rel=1e-5, abs=1e-6)
        # Nothing is trained yet, so what is retained is predicted as before.
        assert float(terms[1].detach()) == pytest.approx(0, abs=1e-6)
        assert len(terms) == 2

    def test_the_second_term_counts_what_a_changed_encoder_does(self, model, monkeypatch):
        """It is 0 before training, grows with a change of the weights, and is linear in γ."""
        found = []

        def train(model, parameters, run, loss, **_):
            weights = list(parameters.values())
            before = [weight.detach().clone() for weight in weights]
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(20)
            with torch.enable_grad():
                found.append([float(term.detach()) for term in loss(0, None)][1])
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
            return ()

        monkeypatch.setattr(advunlearn, "train_text_encoders", train)
        for gamma in (0.3, 0.6):
            expunge.erase(model, PROBLEM, AdvUnlearn(**{**QUICK, "retain_scale": gamma}))
        assert found[0] > 1e-5
        assert found[1] == pytest.approx(2 * found[0], rel=1e-5)

    def test_the_attack_is_sign_steps_on_the_prefix_alone(self, model):
        z = torch.randn(1, *model._latent_shape, generator=torch.Generator().manual_seed(2))
        t = torch.tensor([500])
        with torch.no_grad():
            goal = model.predict(z, t, model.encode(["airplane"]))
        method = AdvUnlearn(attack_steps=3, attack_rate=0.02)
        draw = torch.Generator().manual_seed(0)
        found = method._attack(model, "airplane", "dog", ["cat"], (z, t, goal), draw).vectors
        (vector,) = model.word_vectors("cat")
        for _ in range(3):
            vector = vector.detach().requires_grad_()
            encoded = model.encode_with(["dog airplane"], "dog", [vector])
            away = (model.predict(z, t, encoded) - goal).square().mean()
            (gradient,) = torch.autograd.grad(away, vector)
            vector = vector - 0.02 * gradient.sign()
        torch.testing.assert_close(found[0], vector.detach())

    def test_no_attack_while_it_warms_up(self, model, monkeypatch):
        words = []

        def train(model, parameters, run, loss, **_):
            for step in range(4):
                with torch.enable_grad():
                    list(loss(step, None))
            return ()

        attack = AdvUnlearn._attack
        monkeypatch.setattr(
            AdvUnlearn, "_attack", lambda *given: words.append(given[3]) or attack(*given)
        )
        monkeypatch.setattr(advunlearn, "train_text_encoders", train)
        expunge.erase(model, PROBLEM, AdvUnlearn(warmup_steps=2, **QUICK))
        assert [bool(word) for word in words] == [False, False, True, True]

    def test_the_error_is_one_of_noise(self):
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        slow = sum((0.5 * (x - y)) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)) / 6
        torch.testing.assert_close(error(a, b, 0.5), slow)

    def test_only_the_text_encoder_changes(self, model):
        before = weights(model.pipe)
        method = AdvUnlearn(max_train_steps=2, learning_rate=1e-3, **QUICK)
        edit = expunge.erase(model, PROBLEM, method)
        assert find_text_encoders(edit.changes) == ("text_encoder",)
        assert {layer.partition(".")[0] for c in edit.changes for layer in c.layers} == {"text_encoder"}
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_nothing_to_retain(self, model):
        method = AdvUnlearn(num_retain_words=0, max_train_steps=1, trajectory_steps=4)
        with pytest.raises(ExpungeError, match="needs something to retain"):
            expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)


@pytest.mark.parametrize("method", [HiRM, AdvUnlearn])
def test_a_template_has_one_place(method):
    with pytest.raises(ExpungeError, match="a template has one {} for the concept; 'no place' has not"):
        method(templates=("no place",))
