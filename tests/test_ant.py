"""ANT and ESD: the objective, its points, saliency, training in place and in batches; and bad input."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler

import expunge
import tiny
from conftest import tiny_pipeline, weights
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Problem
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_factors, train_weights
from expunge.erasing.parameters import select_layers, select_parameters
from expunge.erasing.saliency import Mask
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.evaluation.experiment import Experiment
from expunge.methods.ant import ANT
from expunge.methods.esd import ESD
from expunge.methods.mace import MACE
from expunge.ops.in_place import InPlace
from expunge.ops.trajectory import Objective
from expunge.runtime.context import RunContext
from quick import quick

FOUR = Objective(0.7, 0.4, 0.5, 0.2)
COURSE = TrajectoryConfig(FOUR, -2.0, num_inference_steps=6)
PROBLEM = Problem((Concept("airplane", "sky"),))
QUICK = {"trajectory_steps": 4, "turn": -2.0, "maps": 3, "map_samples": 2, "max_train_steps": 4,
         "learning_rate": 1e-3, "templates": ("{}", "a photo of the {}")}  # fmt: skip

EPSILON: dict[str, str] = {}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def double(**scheduler):
    return expunge.load(tiny_pipeline(**scheduler).to(torch.float64))


def subject(model, name="airplane", seed=0, anchor=None):
    text, anchored = (one and model.encode([one, f"a photo of the {one}"]) for one in (name, anchor))
    return TrainingConcept(name, text, RunContext(seed).generator(name), anchored)


def disturb(trained, size=0.02):
    g = torch.Generator().manual_seed(5)
    for value in trained.values:
        value += size * torch.randn(value.shape, generator=g, dtype=value.dtype)
    trained.write()


def epsilon(pipe, unet, z, t, embeddings):
    """ε by itself, whatever the network predicts: one sample, one pass."""
    raw = unet(z[None], t, encoder_hidden_states=embeddings[None]).sample[0]
    signal = pipe.scheduler.alphas_cumprod[t].double()
    if pipe.scheduler.config.prediction_type == "v_prediction":
        return signal.sqrt() * raw + (1 - signal).sqrt() * z
    return raw


def slow_loss(model, unet, original, sample, course, row):
    """The paper's four terms, one after the other, in ε."""
    objective, g = course.objective, course.objective.prediction_guidance
    c = sample.text.embeddings[row]
    nothing = model.encode([""]).embeddings[0]

    def guided(net, z, t, scale):
        empty = epsilon(model.pipe, net, z, t, nothing)
        return empty + scale * (epsilon(model.pipe, net, z, t, c) - empty)

    def square(x):
        return x.square().mean()

    late = (sample.late.latents[row], int(sample.late.t[row]))
    early = (sample.early.latents[row], int(sample.early.t[row]))
    with torch.no_grad():
        away = guided(original, *late, -objective.negative_guidance * g)
        if objective.anchored:
            to = epsilon(model.pipe, original, *late, sample.anchor.embeddings[row])
            away = away + g * (to - epsilon(model.pipe, original, *late, nothing))
        towards = guided(original, *early, objective.negative_guidance * g)
        still = [epsilon(model.pipe, original, *point, nothing) for point in (late, early)]
    return (
        square(guided(unet, *late, g) - away)
        + objective.preserve * square(guided(unet, *early, g) - towards)
        + objective.unconditional_late * square(epsilon(model.pipe, unet, *late, nothing) - still[0])
        + objective.unconditional_early * square(epsilon(model.pipe, unet, *early, nothing) - still[1])
    )


class TestObjective:
    @pytest.mark.parametrize("scheduler", [EPSILON, V], ids=["epsilon", "v"])
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    @pytest.mark.parametrize("anchored", [False, True], ids=["empty", "anchor"])
    def test_against_a_slow_reading(self, scheduler, guidance, anchored):
        model = double(**scheduler)
        objective = dataclasses.replace(FOUR, prediction_guidance=guidance, anchored=anchored)
        course = dataclasses.replace(COURSE, objective=objective)
        steering, original = Steering(model, course), copy.deepcopy(model.pipe.unet)
        with InPlace(select_parameters(model, "denoiser")) as trained:
            disturb(trained)
            sample = steering.draw_points([subject(model, anchor="sky"), subject(model, "ship")])
            with trained.off():
                targets = steering.predict_original(sample)
            found = steering.compute_losses(sample, targets)
            plain = [
                slow_loss(model, model.pipe.unet, original, sample, course, row) for row in range(2)
            ]
        torch.testing.assert_close(found, torch.stack(plain).to(found.dtype), rtol=1e-5, atol=0)
        assert float(found.detach().min()) > 1e-4

    def test_an_empty_anchor_is_the_papers_form(self):
        model = double()
        edits = {
            (anchor, to): expunge.erase(
                model, Problem((Concept("airplane", anchor),)),
                ANT.of(**QUICK, trained="low-rank", drawn_by="original", turn_to=to),
            ).hash
            for anchor in ("", "sky")
            for to in ("empty", "anchor")
        }  # fmt: skip
        assert edits["sky", "anchor"] != edits["sky", "empty"]
        assert edits["", "anchor"] == edits["", "empty"]

    def test_a_term_without_weight_asks_for_nothing(self):
        assert Objective().of_student == ("late",)
        assert Objective().of_original == ("late", "late empty")
        assert not Objective(unconditional_late=1.0).meets_early
        assert Objective(preserve=1.0, prediction_guidance=2.0).of_student == (
            "late", "late empty", "early", "early empty")  # fmt: skip

    def test_what_stays_is_the_originals_prediction_at_every_step(self):
        model = double()
        steering, one = Steering(model, COURSE).unreversed(), subject(model, "ship")
        assert steering.late == tuple(range(6))
        with InPlace(select_parameters(model, "denoiser")) as trained:
            sample = steering.draw_points([one])
            targets = steering.predict_original(sample)
            torch.testing.assert_close(steering.compute_losses(sample, targets), torch.zeros(1).double())
            disturb(trained)
            moved = model.predict(sample.late.latents, sample.late.t, sample.text) - targets["late"]
            found = steering.compute_losses(sample, targets)
            torch.testing.assert_close(found, moved.square().mean().reshape(1))
        assert float(found.detach()) > 1e-4

    def test_an_error_in_v_is_worth_its_error_in_epsilon(self):
        model = double(**V)
        torch.manual_seed(0)
        z, v, other = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
        scale = model.noise_scale()
        for t in (0, 300, 999):
            signal = model.log_snr()[t].sigmoid()
            as_noise = [signal.sqrt() * x + (1 - signal).sqrt() * z for x in (v, other)]
            torch.testing.assert_close(as_noise[0] - as_noise[1], scale[t] * (v - other))
        assert torch.equal(double().noise_scale(), torch.ones(1000, dtype=torch.float64))


class TestPoints:
    def test_one_run_is_the_plain_form_in_fewer_evaluations(self):
        """The plain form: two trajectories, every prediction a pass of its own, another network."""
        model = double()
        original, rows, passes = copy.deepcopy(model.pipe.unet), [], []
        steering = Steering(model, COURSE)
        predict = type(model).predict

        def counted(latents, t, text):
            rows.append(len(latents))
            passes.append(1)
            return predict(model, latents, t, text)

        with InPlace(select_parameters(model, "rest")) as trained:
            disturb(trained)
            model.predict = counted
            sample = steering.draw_points([subject(model)])
            with trained.off():
                targets = steering.predict_original(sample)
            found = steering.compute_losses(sample, targets)
            del model.predict
            late, early = (steering.timesteps.index(int(p.t)) for p in (sample.late, sample.early))
            assert early < late
            assert (sum(rows), len(passes)) == (2 * late + 8, late + 2)

            g = RunContext(0).generator("airplane")
            text = subject(model).text[[int(torch.randint(2, (), generator=g))]]
            seed = int(torch.randint(2**31, (), generator=g))
            plain = 0
            for step, point in ((late, sample.late), (early, sample.early)):
                z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
                scheduler = copy.deepcopy(model.pipe.scheduler)
                scheduler.set_timesteps(6)
                for t in scheduler.timesteps[:step]:
                    empty, prompted = (
                        model.pipe.unet(z, t, encoder_hidden_states=e).sample
                        for e in (model.encode([""]).embeddings, text.embeddings)
                    )
                    plain += 2
                    z = scheduler.step(empty + 3 * (prompted - empty), t, z).prev_sample.detach()
                torch.testing.assert_close(point.latents, z, rtol=1e-9, atol=1e-9)
            plain += 8
            slow = slow_loss(model, model.pipe.unet, original, sample, COURSE, 0)
        assert float(found.detach()[0]) == pytest.approx(float(slow.detach()), rel=1e-5)
        assert sum(rows) == plain - 2 * early
        assert len(passes) < plain / 2

    @pytest.mark.parametrize("anchored", [False, True], ids=["empty", "anchor"])
    def test_what_is_kept_is_what_the_original_says(self, anchored):
        model = double()
        objective = dataclasses.replace(FOUR, anchored=anchored)
        steering = Steering(model, dataclasses.replace(COURSE, objective=objective))
        one = subject(model, anchor="sky")
        kept = steering.store_trajectories(one, 2)
        sample, original = steering.pick_points([one] * 5, [kept] * 5)
        again = steering.predict_original(sample)
        assert ("late anchor" in original) == anchored
        for asked in objective.of_original:
            torch.testing.assert_close(original[asked], again[asked], rtol=1e-9, atol=1e-9)
        assert set(sample.late.t.tolist()) <= {steering.timesteps[i] for i in steering.late}
        assert set(sample.early.t.tolist()) <= {steering.timesteps[i] for i in steering.early}

    def test_time_direction(self):
        model = double()
        for reverse, beyond in (("late", True), ("early", False)):
            steering = Steering(model, dataclasses.replace(COURSE, reverse=reverse))
            one = subject(model)
            sample, _ = steering.pick_points([one] * 9, [steering.store_trajectories(one, 1)] * 9)
            assert bool((sample.early.t > sample.late.t).all()) == beyond

    @pytest.mark.parametrize(("preset", "step"), [("explicit", 43), ("identity", 40), ("style", 47)])
    def test_the_papers_steps(self, preset, step):
        """Stable Diffusion's schedule, 50 steps, counted down to 1."""
        stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        steering = Steering(expunge.load(tiny_pipeline(**stable)), ANT.preset(preset).trajectory_config)
        assert steering.title == f"steering, reversed from step {step} of 50 on"
        assert len(steering.early) == 50 - step


def plain_training(model, one, mask, course, steps, learning_rate):
    """A second network, all weights and all of Adam's state; gradients are multiplied by the mask."""
    network, original = model.pipe.unet, copy.deepcopy(model.pipe.unet)
    found = copy.deepcopy(network)
    adam, steering = torch.optim.Adam(found.parameters(), lr=learning_rate), Steering(model, course)
    for _ in range(steps):
        model.pipe.unet = found
        sample = steering.draw_points([one])
        adam.zero_grad()
        slow_loss(model, found, original, sample, course, 0).backward()
        for name, parameter in found.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= mask[f"unet.{name}"]
        adam.step()
    model.pipe.unet = network
    return {f"unet.{k}": (p - q).detach() for (k, p), q in zip(
        found.named_parameters(), original.parameters(), strict=True)}  # fmt: skip


class TestWeights:
    def test_masked_training_against_a_second_network_and_dense_adam(self):
        model = double()
        parameters, before = select_parameters(model, "denoiser"), weights(model.pipe)
        g = torch.Generator().manual_seed(1)
        mask = {k: torch.rand(p.shape, generator=g) < 0.3 for k, p in parameters.items()}
        changes = train_weights(
            Steering(model, COURSE), subject(model), InPlace(parameters, mask), RunContext(),
            max_train_steps=3, learning_rate=1e-3,
        )  # fmt: skip
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        plain = plain_training(model, subject(model), mask, COURSE, 3, 1e-3)
        assert {change.kind for change in changes} == {"sparse"}
        for change in changes:
            (name,) = (f"{layer}.{change.parameter}" for layer in change.layers)
            ours = torch.zeros(plain[name].numel(), dtype=torch.float64)
            ours[change.index.long()] = change.difference.double()
            # Differences are kept in half precision.
            torch.testing.assert_close(ours, plain[name].flatten(), rtol=1e-3, atol=1e-7)
        assert sum(float(d.abs().max()) > 1e-3 for d in plain.values()) > 100

    def test_it_is_in_place_and_all_comes_back(self, model):
        for layout in (torch.contiguous_format, torch.channels_last):
            model.pipe.unet.to(memory_format=layout)
            parameters, before = select_parameters(model, "denoiser"), weights(model.pipe)
            masks = {k: torch.rand_like(p) < 0.5 for k, p in parameters.items()}
            model.pipe.unet.conv_in.weight.grad = kept = torch.ones_like(model.pipe.unet.conv_in.weight)
            with pytest.raises(KeyboardInterrupt), InPlace(parameters, masks) as trained:
                for value in trained.values:
                    value += 1
                trained.write()
                moved = {k: (p.detach() - before[k]).bool() for k, p in parameters.items()}
                assert all(torch.equal(moved[k], masks[k]) for k in trained.parameters)
                with trained.off():
                    assert all(torch.equal(p, before[k]) for k, p in parameters.items())
                torch.testing.assert_close(
                    trained.values[0],
                    parameters["unet.conv_in.weight"].detach()[masks["unet.conv_in.weight"]],
                )
                raise KeyboardInterrupt
            assert all(torch.equal(p, before[k]) for k, p in parameters.items())
            assert model.pipe.unet.conv_in.weight.grad is kept
            model.pipe.unet.conv_in.weight.grad = None

    def test_gradients_are_autograds_and_leave_nothing_behind(self):
        model = double()
        parameters = select_parameters(model, "denoiser")
        masks = {k: torch.rand(p.shape) < 0.5 for k, p in parameters.items()}
        noisy, text = torch.randn(1, 4, 8, 8, dtype=torch.float64), model.encode(["ship"])
        dense = torch.autograd.grad(
            model.predict(noisy, 500, text).square().sum(), list(parameters.values())
        )
        with InPlace(parameters, masks) as trained:
            found = trained.gradients(model.predict(noisy, 500, text).square().sum())
            for name, ours in zip(trained.parameters, found, strict=True):
                plain = dense[list(parameters).index(name)]
                torch.testing.assert_close(ours, plain[masks[name]])
        assert all(p.grad is None for p in parameters.values())

    def test_a_term_of_its_own_keeps_what_is_retained(self, model):
        ship, problem = subject(model, "ship"), Problem(PROBLEM.erase, ("ship",))
        steering = Steering(model, COURSE).unreversed()
        with torch.no_grad():
            sample = steering.draw_points([ship] * 8)
            targets = steering.predict_original(sample)
        moved = []
        for weight in (0.0, 30.0):
            fields = {**QUICK, "max_train_steps": 40, "maps": 0, "captions": "", "retain_weight": weight}
            method = ANT.of(**fields, part="text", negative_guidance=10.0, drawn_by="original")
            changes = expunge.erase(model, problem, method).changes
            with model.using(changes), torch.no_grad():
                moved.append(float(steering.compute_losses(sample, targets).mean()))
        assert 0 < moved[1] < moved[0] / 2

    @pytest.mark.parametrize(
        "fields",
        [
            {"drawn_by": "current"},
            {"drawn_by": "original"},
            {"drawn_by": "original", "retain_weight": 1.0},
        ],
        ids=["current", "original", "retained"],
    )
    def test_cut_short_and_given_again(self, model, tmp_path, fields, monkeypatch):
        for module in ("erasing.in_place_training", "ops.finetune"):
            monkeypatch.setattr(f"expunge.{module}.KEEP_EVERY", 2)
        method = ANT.of(**{**QUICK, "max_train_steps": 7}, **fields, part="text")
        whole = expunge.erase(model, PROBLEM, method)

        def cut(label, done, total):
            if "steering" in label and done == 5:
                raise KeyboardInterrupt

        before = weights(model.pipe)
        with pytest.raises(KeyboardInterrupt):
            expunge.erase(model, PROBLEM, method, progress=cut, work=tmp_path / "w")
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        seen = []
        again = expunge.erase(
            model, PROBLEM, method, progress=lambda *x: seen.append(x), work=tmp_path / "w"
        )
        assert ("steering, reversed from step 2 of 4 on", 4, 7) in seen
        assert not any(label == "saliency" for label, _, _ in seen)
        assert again.hash == whole.hash

    def test_a_loss_that_runs_away(self, model):
        method = ANT.of(**{**QUICK, "learning_rate": 1e4}, drawn_by="original")
        before = weights(model.pipe)
        with pytest.raises(
            ExpungeError, match="broke off at step 2: the loss runs away; lower the rate"
        ):
            expunge.erase(model, PROBLEM, method)
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())

    def test_the_last_good_state_counts(self, model, monkeypatch):
        for module in ("erasing.in_place_training", "ops.finetune"):
            monkeypatch.setattr(f"expunge.{module}.KEEP_EVERY", 2)
        method = ANT.of(**{**QUICK, "max_train_steps": 3}, part="text")
        good = expunge.erase(model, PROBLEM, dataclasses.replace(method, max_train_steps=2))
        monkeypatch.setattr("expunge.erasing.in_place_training.diverged", lambda losses: len(losses) > 3)
        with pytest.warns(
            ExpungeWarning, match="step 4: the loss runs away; the edit is that of step 2"
        ):
            stopped = expunge.erase(model, PROBLEM, dataclasses.replace(method, max_train_steps=9))
        assert stopped.hash == good.hash


class TestSaliency:
    def test_against_a_slow_reading(self):
        model = double()
        method = ANT.of(
            **{**QUICK, "maps": 2, "map_samples": 3, "batch_size": 2},
            augmentations=("airplane", "a jet"),
        )
        steering = Steering(model, method.trajectory_config)
        mask = method.weights.find_mask(method, steering, method.weights.augmentations, RunContext(4))
        expected, objective = None, Objective()
        bare = dataclasses.replace(method.trajectory_config, objective=objective)
        for i, prompt in enumerate(method.weights.augmentations):
            one = TrainingConcept(
                prompt, model.encode([prompt]), RunContext(4).generator("saliency", str(i))
            )
            other = Steering(model, bare)
            sample = other.draw_points_along(one, 3)
            assert len(sample.late.t.unique()) > 1
            sample = dataclasses.replace(sample, early=sample.late)
            original = copy.deepcopy(model.pipe.unet)
            loss = sum(
                slow_loss(model, model.pipe.unet, original, sample, bare, row) for row in range(3)
            )
            found = torch.autograd.grad(loss, list(model.pipe.unet.parameters()), allow_unused=True)
            total = {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(select_parameters(model, "denoiser").items(), found, strict=True)
            }
            halves = {}
            for k, g in total.items():
                size = g.abs().flatten()
                halves[k] = (size > size.sort().values[(len(size) - 1) // 2]).reshape(g.shape)
            expected = halves if expected is None else {k: halves[k] & m for k, m in expected.items()}
        wrong = sum(int((mask.masks[k] ^ expected[k]).sum()) for k in expected)
        assert wrong <= 0.001 * mask.counts[0]  # ties at the median fall to rounding
        assert mask.counts[1] < mask.counts[0] <= sum(m.numel() for m in expected.values()) / 2

    def test_the_edit_is_the_mask_and_small(self, model, tmp_path):
        masked = expunge.erase(
            model, PROBLEM, ANT.of(**QUICK, drawn_by="original", mask=str(tmp_path / "m.safetensors"))
        )
        mask = Mask.load(tmp_path / "m.safetensors")
        assert sum(len(change.index) for change in masked.changes) == mask.counts[-1]
        assert len(mask.counts) == 3
        masked.save(tmp_path / "e.safetensors")
        assert Edit.load(tmp_path / "e.safetensors").hash == masked.hash

        told = []
        again = expunge.erase(
            model,
            PROBLEM,
            ANT.of(**QUICK, drawn_by="original", mask=str(tmp_path / "m.safetensors")),
            progress=lambda label, *_: told.append(label),
        )
        assert again.hash == masked.hash
        assert "saliency" not in told

    def test_the_maps_are_of_the_loss_that_is_trained(self, model):
        """With an anchor to turn to, another loss, and so another mask."""
        problem, counts = Problem((Concept("airplane", "ship"),)), {}
        for turn_to in ("empty", "anchor"):
            method = ANT.of(**QUICK, turn_to=turn_to)
            steering = Steering(model, method.trajectory_config)
            prompts = method.prompts(model, problem.erase[0])
            anchors = method.encode_anchors(model, problem.erase)
            counts[turn_to] = method.weights.find_mask(
                method, steering, prompts, RunContext(4), anchors
            ).counts
        assert counts["empty"] != counts["anchor"]
        with pytest.raises(ExpungeError, match="augmentations have no anchor"):
            expunge.erase(model, problem, ANT.of(**QUICK, turn_to="anchor", augmentations=("airplane",)))

    def test_no_maps_no_mask(self, model):
        edit = expunge.erase(
            model, PROBLEM, ANT.of(**{**QUICK, "maps": 0, "max_train_steps": 1}, part="text")
        )
        assert {change.kind for change in edit.changes} == {"dense"}
        assert len(edit.changes) == 14


class TestMany:
    @pytest.mark.parametrize("kept", [0, 2], ids=["current", "original"])
    def test_in_one_batch_as_one_by_one(self, kept):
        model = double()
        layers, before = select_layers(model, "all"), weights(model.pipe)
        names = ("airplane", "ship", "horse")
        how = {"rank": 2, "alpha": 3.0, "max_train_steps": 3, "learning_rate": 1e-2,
               "weight_decay": 0.01, "max_grad_norm": 1.0, "samples": 2, "n_stored": kept}  # fmt: skip

        def train(some):
            steering = Steering(model, COURSE)
            return train_factors(
                steering, [subject(model, name) for name in some], layers, RunContext(2), **how
            )

        together = train(names)
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        for name in names:
            (alone,) = train([name]).values()
            for key, tensor in alone.items():
                torch.testing.assert_close(together[name][key], tensor, rtol=1e-7, atol=1e-9)
        assert len(together["ship"]) == 2 * 14
        assert together["ship"]["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.up"].any()

    def test_trained_through_what_comes_later(self):
        model = double()
        layers, eye = select_layers(model, "text"), torch.eye(32, dtype=torch.float64)
        how = {
            "rank": 2,
            "alpha": 3.0,
            "max_train_steps": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }

        def train(through):
            steering, one = Steering(model, COURSE), [subject(model)]
            (found,) = train_factors(
                steering, one, layers, RunContext(2), through=through, **how
            ).values()
            return found

        plain, same, double_, none = (train(x) for x in ([], [eye], [2 * eye], [0 * eye]))
        up = f"{layers[0]}.up"
        assert plain[up].any()
        assert all(torch.equal(plain[k], same[k]) for k in plain)
        assert not torch.equal(plain[up], double_[up])
        assert not none[up].any()  # what nothing will be left of has no gradient

    @pytest.mark.parametrize(
        "given",
        [{"mask": "m.safetensors"}, {"augmentations": ("an airplane",)}, {"retain_weight": 1.0}],
        ids=["mask", "augmentations", "retain_weight"],
    )
    def test_what_only_weights_have(self, model, given):
        method = quick("ant", **given)
        (what,) = given
        with pytest.raises(ExpungeError, match=f"know no {what}: leave it out, or train weights"):
            expunge.erase(model, PROBLEM, method)

    def test_through_the_fusion_is_another_edit(self, model):
        problem = Problem((Concept("airplane", "sky"), Concept("horse", "sky")), ("ship",))
        one, two = (
            expunge.erase(model, problem, quick("ant", through_fusion=through))
            for through in (False, True)
        )
        assert [c.kind for c in one.changes] == [c.kind for c in two.changes]
        assert one.hash != two.hash

    def test_the_edit_is_one_matrix_and_one_change_a_layer(self):
        model = double()
        problem = Problem((Concept("airplane", "sky"), Concept("horse", "sky")), ("ship",))
        edit = expunge.erase(model, problem, quick("ant", trained="auto", batch_size=2))
        right, *low = edit.changes
        assert right.kind == "right"
        assert len(low) == 14
        assert {change.down.shape for change in low} == {(2, 32)}
        one = expunge.erase(model, problem, quick("ant", trained="auto", batch_size=1))
        for a, b in zip(edit.changes[1:], one.changes[1:], strict=True):
            w = model.weight(a.layers[0])
            torch.testing.assert_close(a.weight(w), b.weight(w), rtol=1e-3, atol=1e-4)

    def test_others_can_be_trained_with_it(self, model):
        method = MACE(num_images=2, num_inference_steps=4, max_train_steps=3, templates=("the {}",),
                      captions="", learning_rate=0.01)  # fmt: skip
        lessons = ("attention", "trajectory")
        one, two = (
            expunge.erase(model, PROBLEM, dataclasses.replace(method, objective=lesson))
            for lesson in lessons
        )
        assert [c.kind for c in one.changes] == [c.kind for c in two.changes]
        assert one.hash != two.hash


class Rows:
    """How many rows a network was asked for at once while gradients were kept."""

    def __init__(self, model):
        self.most, self.calls = 0, 0
        model.network.register_forward_hook(self._hear)

    def _hear(self, network, given, output):
        out = output[0] if isinstance(output, tuple) else output.sample
        if out.requires_grad:
            self.most, self.calls = max(self.most, len(out)), self.calls + 1


GUIDED = dataclasses.replace(FOUR, prediction_guidance=7.5)


class TestMicroBatches:
    """A few rows with gradients at a time: the same gradients, and so the same edit, in less memory."""

    @pytest.mark.parametrize("objective", [FOUR, GUIDED], ids=["plain", "guided"])
    @pytest.mark.parametrize("kept", [0, 2], ids=["new", "kept"])
    def test_of_low_rank_changes(self, objective, kept):
        layers = select_layers(double(), "all")
        eye = torch.eye(32, dtype=torch.float64)
        how = {"rank": 2, "alpha": 3.0, "max_train_steps": 3, "learning_rate": 1e-2,
               "weight_decay": 0.01, "max_grad_norm": 1.0, "samples": 3, "n_stored": kept,
               "drawn_by_original": True, "through": [eye, 0.5 * eye]}  # fmt: skip

        def train(micro_batch):
            model = double()
            steering = Steering(model, dataclasses.replace(COURSE, objective=objective))
            rows = Rows(model)
            both = [subject(model, name) for name in ("airplane", "ship")]
            return train_factors(
                steering, both, layers, RunContext(2), micro_batch=micro_batch, **how
            ), rows

        (whole, all_rows), (parts, few), (least, fewest) = (train(m) for m in (0, 8, 1))
        assert (all_rows.most, few.most, fewest.most) == (24, 8, 4)  # 2 concepts, 3 samples, 4 rows
        for name, tensors in whole.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(parts[name][key], tensor, rtol=1e-8, atol=1e-11)
                torch.testing.assert_close(least[name][key], tensor, rtol=1e-8, atol=1e-11)

    def test_of_weights(self):
        def train(micro_batch):
            model = double()
            rows = Rows(model)
            parameters = select_parameters(model, "text")
            steering = Steering(model, COURSE)
            text = model.encode(["airplane", "a photo of the airplane"])
            one, other = (
                TrainingConcept(n, text, RunContext(0).generator(n)) for n in ("airplane", "retained")
            )
            changes = train_weights(
                steering, one, InPlace(parameters), RunContext(0), max_train_steps=3,
                learning_rate=1e-3, samples=3, micro_batch=micro_batch, retained=other,
                retain_weight=0.5)  # fmt: skip
            return [change.value for change in changes], rows.most

        (whole, all_rows), (parts, few) = train(0), train(2)
        assert (all_rows, few) == (12, 2)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)

    @pytest.mark.parametrize("preset", ["identity", "style", "explicit", "explicit-as-released"])
    def test_the_papers_presets_keep_few_rows(self, model, preset):
        """At Stable Diffusion's size four rows with gradients take about 12 GB; 32 took 100."""
        problem = Problem((Concept("airplane", "sky"), Concept("horse", "sky"), Concept("ship", "sky")))
        rows = Rows(model)
        few = {"max_train_steps": 1, "maps": 1, "trajectory_steps": 12, "turn": -2.0, "captions": ""}
        few |= {"rank": 2} if preset in ("identity", "style") else {"map_samples": 5}
        expunge.erase(model, problem, ANT.preset(preset, **few))
        assert 0 < rows.most <= 4


class TestAsReleased:
    def test_the_empty_prompts_terms_carry_no_gradient(self):
        """The loss is the same; its gradient is that of the two other terms."""
        model = double()
        steering = Steering(model, COURSE)
        sample = steering.draw_points([subject(model)])
        weight = next(iter(select_parameters(model, "text").values()))
        original = {k: v + 0.1 for k, v in steering.predict_original(sample).items()}

        def found(**fields):
            objective = dataclasses.replace(FOUR, **fields)
            one = Steering(model, dataclasses.replace(COURSE, objective=objective))
            loss = one.compute_losses(sample, original).sum()
            return float(loss.detach()), torch.autograd.grad(loss, weight)[0]

        (loss, with_them), (same, without) = found(), found(unconditional_gradient=False)
        _, alone = found(unconditional_late=0.0, unconditional_early=0.0)
        assert loss == pytest.approx(same, rel=1e-12)
        torch.testing.assert_close(without, alone, rtol=1e-9, atol=1e-14)
        assert float((with_them - without).norm()) > 1e-6 * float(without.norm())

    def test_the_smallest_halves(self):
        model = double()
        how = {**QUICK, "maps": 2, "map_samples": 2, "augmentations": ("airplane", "a jet")}
        masks = [
            ANT.of(**how, mask_half=half).weights.find_mask(
                ANT.of(**how),
                Steering(model, ANT.of(**how).trajectory_config),
                how["augmentations"],
                RunContext(4),
            )
            for half in ("largest", "smallest")
        ]
        for name, large in masks[0].masks.items():
            assert not (large & masks[1].masks[name]).any()
        assert all(mask.counts[0] > 0 for mask in masks)
        total = sum(m.numel() for m in masks[0].masks.values())
        assert masks[0].counts[0] + masks[1].counts[0] > 0.9 * total  # one map: all but the medians
        one = expunge.erase(model, PROBLEM, ANT.preset("explicit-as-released", **{**QUICK, "maps": 1}))
        assert one.record.fields["mask_half"] == "smallest"

    @pytest.mark.parametrize("trained", ["weights", "low-rank"])
    def test_the_original_draws_anew_at_each_step(self, model, monkeypatch, trained):
        """While trajectories are drawn, the network is the original, whatever it has learnt."""
        probe = (torch.randn(1, 4, 8, 8), 500, model.encode(["airplane"]))
        with torch.no_grad():
            first, seen = model.predict(*probe), []
        draw = Steering.draw_points

        def spy(self, subjects):
            with torch.no_grad():
                rows = len(subjects)
                z, t, text = probe
                now = self.model.predict(z.repeat(rows, 1, 1, 1), t, text[[0] * rows])
            seen.append((now - first).abs().max())
            return draw(self, subjects)

        monkeypatch.setattr(Steering, "draw_points", spy)
        fields = {
            **QUICK,
            "trained": trained,
            "maps": 0,
            "max_train_steps": 3,
            "learning_rate": 0.05,
            "captions": "",
        }

        def erase(drawn_by):
            seen.clear()
            expunge.erase(model, PROBLEM, ANT.of(**fields, drawn_by=drawn_by, trajectories=0))
            return torch.stack(seen).tolist()

        assert max(erase("original")) < 1e-5
        current = erase("current")
        assert len(current) == 3
        assert current[2] > 1e-4

    def test_trained_in_the_bare_name_and_fused_for_its_prompts(self, model, monkeypatch):
        told = []
        train = train_factors

        def spy(steering, subjects, layers, run, **how):
            told.append((subjects[0].text.prompts, layers, how["n_stored"], how["drawn_by_original"]))
            return train(steering, subjects, layers, run, **how)

        monkeypatch.setattr("expunge.methods.ant.low_rank.train_factors", spy)
        method = ANT.preset(
            "identity", max_train_steps=1, rank=1, trajectory_steps=12, turn=-2.0, captions=""
        )
        expunge.erase(model, PROBLEM, method)
        ((prompts, layers, kept, by_original),) = told
        assert (prompts, kept, by_original) == (("airplane",), 0, True)
        assert layers == select_layers(model, "blocks")
        (rows,) = method.low_rank._rows(method, model, PROBLEM).values()
        assert len(rows) == 77 * len(method.prompts(model, PROBLEM.erase[0]))
        assert len(method.prompts(model, PROBLEM.erase[0])) > 20

    def test_which_layers(self, model):
        every, blocks = set(select_layers(model, "all")), set(select_layers(model, "blocks"))
        outside = {"unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1",
                   "unet.time_embedding.linear_2"}  # fmt: skip
        assert every - blocks == outside
        assert blocks < every
        assert set(select_layers(model, "text")) < blocks
        with pytest.raises(ExpungeError, match="no transformer, residual and sampler blocks"):
            select_layers(expunge.load(tiny.sd3()), "blocks")

    @pytest.mark.parametrize(
        ("preset", "retain"), [("identity", ()), ("identity", ("ship", "dog")), ("style", ("ship",))]
    )
    @pytest.mark.parametrize("told", [False, True], ids=["no captions", "few captions"])
    def test_the_fusion_is_never_singular(self, worded, preset, retain, told, tmp_path, recwarn):
        """The published scales, on an encoder that ships: nothing is said, and words apart stay."""
        names = ("airplane", "cat", "horse")
        problem = Problem(tuple(Concept(name, "sky") for name in names), retain)
        (tmp_path / "captions.txt").write_text("a man on a bench\na red bus\n", encoding="utf-8")
        captions = str(tmp_path / "captions.txt") if told else ""
        method = ANT.preset(preset, captions=captions)
        sums = method.low_rank.sum_grams(method, worded, problem, RunContext(0))
        torch.manual_seed(0)
        factors = {name: {} for name in names}
        for tensors in factors.values():
            for entry in worded.text_entries():
                out, width = worded.weight(entry.layer).shape
                tensors[f"{entry.layer}.up"] = torch.randn(out, 2)
                tensors[f"{entry.layer}.down"] = torch.randn(2, width)
        right, *_ = method.low_rank.fuse(method, worded, problem, factors, *sums)
        assert right.matrix.isfinite().all()
        apart = worded.encode(["a photo of the castle"]).embeddings[0]
        moved = (apart @ right.matrix.T - apart).norm() / apart.norm()
        assert moved < 0.05
        assert not [w for w in recwarn if "singular" in str(w.message)]


class TestSchedulers:
    def test_trajectories_are_ddims_whatever_the_model_has(self):
        pipe = tiny_pipeline()
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
        model, ddim = expunge.load(pipe), expunge.load(tiny_pipeline())
        course = ANT.of(**QUICK).trajectory_config
        own = Steering(model, dataclasses.replace(course, scheduler=""))
        steering, expected = Steering(model, course), Steering(ddim, course)
        assert steering.timesteps == expected.timesteps != own.timesteps
        torch.testing.assert_close(
            steering.draw_points([subject(model)]).late.latents,
            expected.draw_points([subject(ddim)]).late.latents,
        )
        assert type(model.pipe.scheduler) is PNDMScheduler

    def test_a_flow_keeps_its_own_and_refuses_ddim(self):
        model = expunge.load(tiny.sd3())
        course = dataclasses.replace(ANT.of(**QUICK).trajectory_config, turn=0.0)
        assert Steering(model, course).timesteps == model.timesteps(4)
        with pytest.raises(ExpungeError, match="DDIM is for models that predict noise"):
            Steering(model, dataclasses.replace(course, scheduler="DDIM"))


class TestESD:
    def test_against_a_slow_reading(self):
        model = double()
        method = ESD(
            part="x", max_train_steps=3, learning_rate=1e-3, trajectory_steps=4, negative_guidance=1.5
        )
        changes = expunge.erase(model, PROBLEM, method, seed=6).changes
        assert len(changes) == 5 * 7  # queries, keys, values, output's weight and bias
        network, original = model.pipe.unet, copy.deepcopy(model.pipe.unet)
        found = copy.deepcopy(network)
        trained = [p for name, p in found.named_parameters() if "attn2" in name]
        adam, g = torch.optim.Adam(trained, lr=1e-3), RunContext(6).generator("training")
        c, nothing = (model.encode([prompt]).embeddings[0] for prompt in ("airplane", ""))
        for _ in range(3):
            torch.randint(1, (), generator=g)
            seed = int(torch.randint(2**31, (), generator=g))
            step = int(torch.randint(4, (), generator=g))
            z = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
            scheduler = copy.deepcopy(model.pipe.scheduler)
            scheduler.set_timesteps(4)
            t = scheduler.timesteps[step]
            with torch.no_grad():
                for s in scheduler.timesteps[:step]:
                    empty = epsilon(model.pipe, found, z, s, nothing)
                    noise = empty + 3 * (epsilon(model.pipe, found, z, s, c) - empty)
                    z = scheduler.step(noise, s, z).prev_sample
                empty = epsilon(model.pipe, original, z, t, nothing)
                target = empty - 1.5 * (epsilon(model.pipe, original, z, t, c) - empty)
            adam.zero_grad()
            (epsilon(model.pipe, found, z, t, c) - target).square().mean().backward()
            adam.step()
        for change in changes:
            name = f"{change.layers[0]}.{change.parameter}".removeprefix("unet.")
            plain = found.get_parameter(name).detach()
            assert (change.value - plain).abs().max() < 1e-7, name

    def test_the_rest_is_all_the_others(self, model):
        parts = ("cross-attention", "rest", "denoiser")
        x, u, whole = (select_parameters(model, part).keys() for part in parts)
        assert x | u == whole
        assert not x & u
        assert select_parameters(model, "text").keys() < x

    def test_with_ants_objective(self, model):
        method = quick("esd", max_train_steps=2, turn=-2.0)
        edits = [
            expunge.erase(model, PROBLEM, dataclasses.replace(method, objective=name))
            for name in ("esd", "ant")
        ]
        assert edits[0].hash != edits[1].hash


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_guidance": 0.0}, "negative_guidance must be above 0"),
        ({"negative_guidance": -1.0}, "negative_guidance must be above 0"),
        ({"turn": -40.0}, "turn is t' as a log-SNR, on this model's schedule between .*, not -40"),
        ({"turn": 30.0}, "turn is t' as a log-SNR, .*, not 30"),
        ({"turn": -9.0}, "none of 4 steps lies before t' .turn -9.: take more trajectory_steps"),
        ({"turn": 8.9}, "none of 4 steps lies at or after t'"),
        ({"reverse": "always"}, "no early points: set preserve and unconditional_early to 0"),
        ({"augmentations": ("a ship", "an aircraft")}, "the augmentations names 'airplane'"),
        ({"mask": "mask.pt"}, "a mask is a .safetensors file; mask.pt should end so"),
        ({"templates": ("no place",)}, "one {} for the concept"),
        ({"training_templates": ("no place",), "trained": "low-rank"}, "one {} for the concept"),
        ({"training_templates": ("{}",)}, "weights know no training_templates"),
        ({"scheduler": "DIMM"}, "no scheduler 'DIMM'; did you mean 'DDIM'"),
        ({"mask_half": "smaller"}, "mask_half must be .*did you mean 'smallest'"),
        ({"retain_weight": 1.0, "captions": ""}, "keeps nothing: retain something, or give captions"),
        ({"part": "attention"}, "part must be .*did you mean 'cross-attention'"),
    ],
)
def test_bad_input(model, settings, message):
    with pytest.raises(ExpungeError, match=message):
        expunge.erase(model, PROBLEM, ANT.of(**{**QUICK, **settings}))


class TestMasksOfOthers:
    @pytest.fixture
    def made(self, model, tmp_path):
        """A mask for the keys and values."""
        path = tmp_path / "mask.safetensors"
        method = ANT.of(**{**QUICK, "maps": 1, "max_train_steps": 0}, part="text", mask=str(path))
        expunge.erase(model, PROBLEM, method)
        return method, path

    def test_of_another_model(self, made):
        other = expunge.load(tiny_pipeline(seed=1))
        with pytest.raises(ExpungeError, match="was made for another model, of other weights"):
            expunge.erase(other, PROBLEM, made[0])

    def test_of_another_part(self, model, made):
        with pytest.raises(ExpungeError, match="another part of it: it knows 14 parameters, and 35 are"):
            expunge.erase(model, PROBLEM, made[0].replace(part="cross-attention"))

    def test_of_another_method(self, model, made):
        method, path = made
        dataclasses.replace(Mask.load(path), method="other").save(path)
        with pytest.raises(ExpungeError, match="was made for the method other, not ant"):
            expunge.erase(model, PROBLEM, method)

    def test_no_mask_at_all(self, model, made):
        method, path = made
        expunge.erase(model, PROBLEM, "uce").save(path)
        with pytest.raises(ExpungeError, match="a safetensors file, but not a saliency mask"):
            expunge.erase(model, PROBLEM, method)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ExpungeError, match="is not a whole safetensors file"):
            expunge.erase(model, PROBLEM, method)


def test_the_experiments_can_be_read():
    files = sorted((Path(__file__).parents[1] / "experiments" / "ant").glob("*.toml"))
    assert len(files) >= 7
    jobs = {path.stem: Experiment.read(path).jobs() for path in files}
    assert len(jobs["ablation"]) == 6
    assert all(len({job.method for job in some}) > 1 for some in jobs.values())
