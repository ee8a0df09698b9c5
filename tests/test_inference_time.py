"""Methods that act while an image is drawn: what their changes compute, and where they cannot go."""

import pytest
import torch

import expunge
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.changes import Projected, Subtracted
from expunge.changes.presence import measure_cosine
from expunge.checkpoints.export import export
from expunge.methods.adavd import AdaVD, find_targets
from expunge.methods.semantic_surgery import SemanticSurgery
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
        method = SemanticSurgery(presence="fitted", general=40)
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


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name in ("adavd", "semantic_surgery")
        for family in ("stable_diffusion", "sdxl", "sd3", "qwen_image")
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
}
"""Values that change what tiny models with random weights draw."""
