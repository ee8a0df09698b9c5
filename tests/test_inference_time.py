"""Methods that act while an image is drawn: what their changes compute, and where they cannot go."""

import pytest
import torch

import expunge
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.changes import Guided, Projected, Subtracted, find_layer
from expunge.changes.presence import measure_cosine
from expunge.checkpoints.export import export
from expunge.methods.adavd import AdaVD, find_targets
from expunge.methods.semantic_surgery import SemanticSurgery
from expunge.methods.sld import SLD
from test_changes import KEY, VALUE
from tiny import PIPELINES, drawn_by_diffusers, loaded


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestAdaVD:
    @pytest.mark.parametrize("centred", [False, True])
    def test_one_target_against_the_equation(self, centred):
        """Token by token: v − δ(v) (v_tᵀ v / v_tᵀ v_t) v_t."""
        target, x, y = randn(1, 7), randn(2, 5, 3, seed=1), randn(2, 5, 7, seed=2)
        y[0, :3] = target + 0.4 * y[0, :3]
        origin = 0.3 * randn(7, seed=3) if centred else torch.zeros(7).double()
        change = Projected((VALUE,), target, slope=9.0, centre=0.5, top=1.7, origin=origin)
        found, t = change.change_output(x, y), target[0] - origin
        moved = 0
        for row, ours in zip(y.flatten(0, 1), found.flatten(0, 1), strict=True):
            v = row - origin
            share = 1 / (1 + torch.exp(-9.0 * (v @ t / (v.norm() * t.norm()) - 0.5)))
            slow = row - 1.7 * share * (t @ v) / (t @ t) * t if share > 1e-4 else row
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-6)
            moved += bool((slow - row).norm() > 0.1)
        assert moved >= 3

    def test_open_targets_leave_their_orthogonal_complement(self):
        """Of any number of targets, some of them alike: as by least squares."""
        target, y = randn(3, 7), randn(1, 6, 7, seed=2)
        target = torch.cat([target, target[:1] * 2])
        change = Projected((VALUE,), target, slope=50.0, centre=-3.0)
        found = change.change_output(y, y)
        for row, ours in zip(y[0], found[0], strict=True):
            fitted = torch.linalg.lstsq(target[:3].T, row[:, None]).solution
            torch.testing.assert_close(ours, row - (target[:3].T @ fitted)[:, 0], rtol=0, atol=1e-5)

    def test_several_targets_against_a_penalised_fit(self):
        """T a minimises ‖v − T a‖² + Σ (1 − s) / s · ‖v_k‖² a_k², as one tall system."""
        target, y = randn(3, 7), randn(1, 6, 7, seed=2)
        found = Projected((VALUE,), target, slope=6.0, centre=0.1).change_output(y, y)
        for row, ours in zip(y[0], found[0], strict=True):
            share = torch.sigmoid(6.0 * (torch.cosine_similarity(row, target) - 0.1))
            weights = ((1 - share) / share).sqrt() * target.norm(dim=1)
            tall = torch.cat([target.T, torch.diag(weights)])
            wanted = torch.cat([row, torch.zeros(3).double()])
            amount = torch.linalg.lstsq(tall, wanted[:, None]).solution
            torch.testing.assert_close(ours, row - (target.T @ amount)[:, 0], rtol=0, atol=1e-6)

    def test_a_row_does_not_depend_on_its_company(self):
        target, y = randn(4, 7), randn(3, 5, 7, seed=2)
        y[1, 2] = target[1]
        change = Projected((VALUE,), target, slope=30.0, centre=0.6)
        together = change.change_output(y, y)
        alone = torch.cat([change.change_output(one, one) for one in y.split(1)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    def test_a_bias_is_no_part_of_a_value(self):
        """SD 3's entry has one: targets are what the weight alone makes, and the bias comes through."""
        model = loaded(PIPELINES["sd3"](), "sd3")
        method = AdaVD(slope=50.0, centre=0.0)
        (change,) = expunge.erase(model, Problem((Concept("airplane"),)), method).changes
        layer = find_layer(model.pipe, change.layers[0])
        torch.testing.assert_close(change.origin, layer.bias.detach().float())
        assert layer.bias.norm() > 0.01
        output = layer.bias.detach()[None] + 0.0 * change.target
        torch.testing.assert_close(change.change_output(output, output), output)

    def test_what_is_unlike_stays_bit_for_bit(self):
        target = randn(2, 7)
        y = randn(1, 4, 7, seed=2)
        y = y - y @ torch.linalg.pinv(target) @ target
        change = Projected((VALUE,), target, slope=100.0, centre=0.9)
        assert torch.equal(change.change_output(y, y), y)

    def test_targets_are_last_tokens_and_what_is_behind_them(self, model):
        text = model.encode(["airplane", "a photo of the ship"])
        end = text.content_mask.sum(1) + 1
        last = torch.stack([text.embeddings[i, end[i] - 1] for i in range(2)]).double()
        assert torch.equal(find_targets(text), last)
        more = find_targets(text, after=True).unflatten(0, (2, 3))
        for i in range(2):
            wanted = text.embeddings[i, [end[i] - 1, end[i], 76]].double()
            assert torch.equal(more[i], wanted)

    def test_a_top_of_nothing_changes_nothing(self, model):
        edit = expunge.erase(model, Problem((Concept("airplane"),)), AdaVD(top=0.0))
        probe = Probe.of("airplane", num_inference_steps=2)
        with model.using(edit):
            drawn = model.draw(probe)
        assert torch.equal(drawn, model.draw(probe))

    def test_it_is_no_weights(self, model, folder, tmp_path):
        edit = expunge.erase(model, Problem((Concept("airplane"),)), "adavd")
        for to in ("lora", "diffusers"):
            name = "x.safetensors" if to == "lora" else "x"
            with pytest.raises(ExpungeError, match="projected change takes from each value.*no weights"):
                export(edit, to, folder, tmp_path / name)
        assert not list(tmp_path.iterdir())


class TestSemanticSurgery:
    def directions(self, n=1, **more):
        values = {"centre": torch.full((n,), 0.2), "width": torch.full((n,), 0.1), "threshold": 0.3}
        return Subtracted((KEY,), randn(n, 4, 5), **{**values, **more})

    def test_one_concept_against_the_equation(self):
        """Prompt by prompt: e − ρ Δ with ρ = σ((α − β) / γ) of the flattened cosine, ρ ≥ τ."""
        change = self.directions()
        x = randn(6, 4, 5, seed=1) + torch.linspace(-1, 3, 6)[:, None, None] * change.direction
        found, delta, moved = change.change_input(x), change.direction[0], 0
        for e, ours in zip(x, found, strict=True):
            alpha = torch.cosine_similarity(e.flatten(), delta.flatten(), dim=0)
            rho = 1 / (1 + torch.exp(-(alpha - 0.2) / 0.1))
            slow = e - rho * delta if rho >= 0.3 else e
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-6)
            moved += not torch.equal(ours, e)
        assert 0 < moved < 6

    def test_what_is_nowhere_in_a_direction_has_no_say_in_the_length(self):
        change = self.directions()
        change.direction[:, 0] = 0
        change.presence[:, 0] = 0
        x = randn(1, 4, 5, seed=1)
        loud = x.clone()
        loud[:, 0] = 100.0
        quiet, loud = (measure_cosine(rows, change.presence) for rows in (x, loud))
        torch.testing.assert_close(loud, quiet)

    def test_several_concepts_take_along_each_direction_what_each_takes_alone(self):
        """By least norm: the shortest j with ⟨j, Δ_c⟩ = ρ_c ⟨Δ_c, Δ_c⟩ for all that are found."""
        base = self.directions(3)
        delta = base.direction
        delta[1] = 0.8 * delta[0] + 0.2 * delta[1]
        change = Subtracted((KEY,), delta, base.centre, base.width, threshold=0.3)
        x = (delta[0] + delta[1] + 0.3 * randn(4, 5, seed=4))[None]
        rho = change.measure_presence(x)[0]
        found = rho >= 0.3
        assert found.tolist() == [True, True, False]
        flat = delta[found].flatten(1)
        wanted = rho[found] * flat.square().sum(1)
        shortest = torch.linalg.lstsq(flat, wanted[:, None], driver="gelsd").solution[:, 0]
        ours = (x - change.change_input(x)).flatten()
        torch.testing.assert_close(ours, shortest, rtol=1e-6, atol=1e-6)

    def test_two_equal_names_are_subtracted_once(self):
        one = self.directions()
        twice = one.direction.repeat(2, 1, 1)
        two = Subtracted((KEY,), twice, one.centre.repeat(2), one.width.repeat(2))
        x = 2 * one.direction + 0.1 * randn(1, 4, 5, seed=4)
        torch.testing.assert_close(two.change_input(x), one.change_input(x), rtol=0, atol=1e-6)

    def test_shorter_and_longer_prompts(self):
        change = self.directions(centre=torch.tensor([-2.0]))
        x = randn(2, 6, 5, seed=1)
        found = change.change_input(x)
        assert torch.equal(found[:, 4:], x[:, 4:])
        torch.testing.assert_close(found[:, :4], change.change_input(x[:, :4]))
        torch.testing.assert_close(change.change_input(x[:, :2]), x[:, :2] - change.direction[:, :2])

    def test_a_fitted_presence_finds_the_concept_and_not_the_rest(self, worded):
        problem = Problem((Concept("turtle", "sea", synonyms=("tortoise",)),), ("rabbit", "owl"))
        method = SemanticSurgery(presence="fitted", num_retain_words=40)
        (change,) = expunge.erase(worded, problem, method).changes
        prompts = ["the turtle", "a photo of the tortoise", "a photo of the owl", "rabbit", ""]
        rho = change.measure_presence(worded.encode(prompts).embeddings)
        assert bool((rho[0, 0] > 0.9) & (rho[1, 1] > 0.9))
        assert float(rho[2:].max()) < 0.1

    def test_the_concept_becomes_its_anchor(self, worded):
        problem = Problem((Concept("turtle", "sea"),))
        method = SemanticSurgery(centre=-1.0, toward="anchor")
        (change,) = expunge.erase(worded, problem, method).changes
        turtle, sea = worded.encode(["turtle", "sea"]).embeddings
        torch.testing.assert_close(change.change_input(turtle[None])[0], sea, rtol=0, atol=1e-4)

    def test_it_is_fitted_by_weights_with_a_loss(self, model, folder, tmp_path):
        problem = Problem((Concept("airplane", "sky"),), ("ship",))
        edit = expunge.erase(model, problem, WEAK["semantic_surgery"])
        done = export(edit, "lora", folder, tmp_path / "x.safetensors")
        assert "of the erasure is lost" in done.notes[0]


def guided(**more):
    momentum = {"momentum_scale": 0.5, "momentum_beta": 0.7}
    values = {"scale": 3.0, "threshold": 0.2, "until": 800.0, **momentum}
    noise = torch.linspace(0.5, 1.0, 1000).double()
    return Guided((KEY,), randn(1, 4, 5), torch.zeros(1, 4, 5), noise, **{**values, **more})


class TestSLD:
    @pytest.mark.parametrize("at_most", [True, False])
    def test_three_steps_against_the_equation(self, at_most):
        """Entry by entry, with the momentum and the warm-up carried along."""
        change, nu = guided(at_most=at_most), torch.zeros(1, 1, 2, 2).double()
        slow_nu = [0.0] * 4
        for step, t in enumerate((900, 600, 300)):
            c, s, none = (randn(1, 1, 2, 2, seed=10 * step + i) for i in range(3))
            gamma, nu = change.steer(c, s, none, nu, torch.tensor([t]))
            in_noise = float(change.noise_scale[t])
            for i in range(4):
                ci, si, ni = (float(x.flatten()[i]) for x in (c, s, none))
                phi = 3.0 * in_noise * (ci - si)
                bounded = min(1, abs(phi)) if at_most else max(1, abs(phi))
                mu = bounded if in_noise * (ci - si) < 0.2 else 0.0
                slow = mu * (si - ni) + 0.5 * slow_nu[i]
                slow_nu[i] = 0.7 * slow_nu[i] + (1 - 0.7) * slow
                assert float(gamma.flatten()[i]) == pytest.approx(slow if t <= 800 else 0, abs=1e-6)
                assert float(nu.flatten()[i]) == pytest.approx(slow_nu[i], abs=1e-6)

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_a_whole_run_against_one_by_hand(self, model, guidance):
        """expunge's drawing with the edit, and a loop that makes all three predictions itself."""
        method = SLD(safety_scale=5.0, threshold=0.5, warmup=0.4, momentum_scale=0.5)
        edit = expunge.erase(model, Problem((Concept("airplane", synonyms=("jet",)),)), method)
        (change,) = edit.changes
        c, s, none = (model.encode([p]) for p in ("a photo of the ship", "airplane, jet", ""))
        scheduler = model._sampler(5)
        x = torch.randn(1, *model._latent_shape, generator=torch.Generator().manual_seed(7))
        nu = torch.zeros_like(x)
        for t in scheduler.timesteps:
            with torch.no_grad():
                of_c, of_s, of_none = (model.predict(x, t, text) for text in (c, s, none))
            gamma, nu = change.steer(of_c, of_s, of_none, nu, t[None])
            led = of_c - gamma
            x = scheduler.step(of_none + guidance * (led - of_none), t, x, return_dict=False)[0]
        with model.using(edit), torch.no_grad():
            for _ in range(2):  # the second run begins without the momentum of the first
                run = model.trajectory(c, [7], num_inference_steps=5, guidance_scale=guidance)
                *_, (_, latents) = run
                torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-4)

    def test_one_step_runs_begin_anew(self, model):
        edit = expunge.erase(model, Problem((Concept("airplane"),)), SLD(warmup=0.0))
        probe = Probe.of("ship", num_inference_steps=1)
        with model.using(edit):
            first, second = model.draw(probe), model.draw(probe)
        assert torch.equal(first, second)
        assert not torch.equal(first, model.draw(probe))

    def test_prompts_are_found_by_what_they_hold(self):
        change = guided()
        text = torch.cat([change.empty, change.text, randn(1, 4, 5, seed=3)])
        assert change.find_prompts(text).tolist() == [False, True, True]
        asked = guided(presence=change.text, centre=torch.tensor([0.5]), width=torch.tensor([0.1]))
        assert asked.find_prompts(text).tolist() == [False, True, False]
        assert asked.find_prompts(torch.cat([text, text], 1)).tolist()[1]

    def test_only_the_concept_is_led_away_with_a_fitted_presence(self, worded):
        method = SLD(presence="fitted", bound="paper", warmup=0.0, num_retain_words=40)
        edit = expunge.erase(worded, Problem((Concept("turtle", "sea"),), ("owl",)), method)
        probe = Probe.of(["a photo of the turtle", "a photo of the owl"], num_inference_steps=2)
        before = worded.draw(probe)
        with worded.using(edit):
            after = worded.draw(probe)
        assert (after - before)[0].abs().max() > 1e-4
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)

    def test_at_half_strength_half_of_it_is_subtracted(self, model):
        edit = expunge.erase(model, Problem((Concept("airplane"),)), SLD(warmup=0.0))
        text, x = model.encode(["ship"]), randn(1, *model._latent_shape, dtype=torch.float32)
        with torch.no_grad():
            before = model.predict(x, 500, text)
            with model.using(edit):
                whole = model.predict(x, 500, text)
            with model.using(edit, strength=0.5):
                half = model.predict(x, 500, text)
        torch.testing.assert_close(half, (before + whole) / 2, rtol=1e-4, atol=1e-5)

    def test_two_edits_are_both_subtracted(self, model):
        method = SLD(warmup=0.0, bound="paper", threshold=99.0)
        edits = [
            expunge.erase(model, Problem((Concept(name),)), method) for name in ("airplane", "bird")
        ]
        text, x = model.encode(["ship"]), randn(1, *model._latent_shape, dtype=torch.float32)
        drawn = []
        with torch.no_grad():
            for some in ([], edits[:1], edits[1:], edits):
                with model.using(*some):
                    drawn.append(model.predict(x, 500, text))
        assert (drawn[3] - drawn[1]).abs().max() > 1e-3
        assert (drawn[3] - drawn[2]).abs().max() > 1e-3

    def test_it_is_no_weights(self, model, folder, tmp_path):
        edit = expunge.erase(model, Problem((Concept("airplane"),)), "sld")
        with pytest.raises(ExpungeError, match="a guided change compares predictions of the denoiser"):
            export(edit, "diffusers", folder, tmp_path / "x")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name in ("adavd", "semantic_surgery", "sld")
        for family in ("stable_diffusion", "sdxl", "sd3", "qwen_image")
        if name != "sld" or family != "qwen_image"
    ],
)
def test_applied_to_a_pipeline_it_draws_the_same(name, family, tmp_path):
    """expunge's own drawing, and diffusers' with the edit applied and read from its file."""
    pipe = PIPELINES[family]()
    model = loaded(pipe, family)
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),), ("ship",)), WEAK[name])
    probe = Probe.of("a photo of the airplane", 2, 3, num_inference_steps=3, guidance_scale=4.0)
    with model.using(edit):
        ours = model.draw(probe)
    plain = model.draw(probe)
    assert (ours - plain).abs().max() > 1e-4
    edit.save(tmp_path / "edit.safetensors")
    applied = Edit.load(tmp_path / "edit.safetensors").apply(pipe)
    theirs = drawn_by_diffusers(pipe, family, probe.prompts[0], probe.seeds, 3, 4.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    applied.remove()
    after = drawn_by_diffusers(pipe, family, probe.prompts[0], probe.seeds, 3, 4.0)
    torch.testing.assert_close(plain, after, rtol=0, atol=1e-4)


WEAK = {
    "adavd": AdaVD(slope=10.0, centre=0.8, top=1.0),
    "semantic_surgery": SemanticSurgery(centre=-0.5, toward="anchor"),
    "sld": SLD(safety_scale=50.0, threshold=0.1, warmup=0.0),
}
"""Values that change what tiny models with random weights draw."""
