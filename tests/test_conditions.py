"""What each condition does: quantisation, fine-tuning, an image as the start, other words."""

import dataclasses

import pytest
import torch

import expunge
from conftest import weights
from expunge import Concept, Probe, Problem
from expunge.attacks.finetuning import PROMPT, Finetuning
from expunge.attacks.image_to_image import ImageToImage
from expunge.attacks.quantisation import Quantisation
from expunge.attacks.wording import Wording
from expunge.evaluation.attack_budgets import read_ladder
from expunge.evaluation.suite import Suite
from expunge.ops.quantisation import normal_levels, quantise_int8, quantise_nf4
from expunge.ops.training_target import compute_training_target
from expunge.runtime.context import RunContext
from test_attacks import TABLE

PROBE = Probe.of("a photo of the airplane", n=2, num_inference_steps=4)
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def edit(model):
    return expunge.erase(model, Problem((Concept("airplane", "sky"),), ("ship",)), "uce")


class TestQuantisation:
    def test_int8_is_off_by_half_a_step_at_most(self):
        weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0))
        found = quantise_int8(weight)
        step = weight.flatten(1).abs().amax(1) / 127
        off = (found - weight).flatten(1).abs().amax(1)
        assert bool((off <= step / 2 + 1e-6).all())
        assert len((found[0] / step[0]).round().unique()) <= 255
        assert torch.equal(quantise_int8(torch.zeros(2, 3)), torch.zeros(2, 3))

    def test_nf4s_levels_are_quantiles(self):
        """Sixteen levels; of the positive ones each has the same mass of a normal up to the edge."""
        levels = normal_levels()
        assert len(levels) == 16
        edge = 1 - (1 / 32 + 1 / 30) / 2
        scale = torch.special.ndtri(torch.tensor(edge, dtype=torch.float64))
        mass = torch.special.ndtr(levels[7:].double() * scale)
        torch.testing.assert_close(
            mass.diff(), torch.full((8,), (edge - 0.5) / 8).double(), rtol=1e-5, atol=1e-6
        )

    def test_nf4_against_the_nearest_of_all_levels(self):
        weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
        found = quantise_nf4(weight).flatten()
        flat = weight.flatten()
        for start in range(0, len(flat), 64):
            block = flat[start : start + 64]
            levels = normal_levels() * block.abs().max()
            nearest = levels[(block[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(found[start : start + 64], nearest)

    def test_merged_rounds_the_edit_and_beside_does_not(self, model, edit):
        original = model.weight(LAYER).clone()
        (change,) = edit.changes
        layer = model.network.get_submodule(LAYER.removeprefix("unet."))
        with Quantisation("nf4", "merged").apply(model, edit, RunContext()):
            assert torch.equal(layer.weight, quantise_nf4(change.weight(original)))
        with Quantisation("nf4", "beside").apply(model, edit, RunContext()):
            assert torch.equal(layer.weight, change.weight(quantise_nf4(original)))
        assert torch.equal(layer.weight, original)


class TestFinetuning:
    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
    def test_the_target_is_what_a_perfect_denoiser_predicts(self, kind):
        """From z and the target, x and ε are found again, by the samplers' own equations."""
        g = torch.Generator().manual_seed(0)
        x, noise = (torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
        level = torch.tensor([-1.0, 2.0], dtype=torch.float64)
        target = compute_training_target(kind, x, noise, level)
        signal = level.sigmoid()[:, None, None, None]
        if kind == "flow_prediction":
            sigma = torch.rand(2, 1, 1, 1, generator=g, dtype=torch.float64)
            z = (1 - sigma) * x + sigma * noise
            torch.testing.assert_close(z - sigma * target, x)
            return
        z = signal.sqrt() * x + (1 - signal).sqrt() * noise
        found = {
            "epsilon": lambda: (z - (1 - signal).sqrt() * target) / signal.sqrt(),
            "v_prediction": lambda: signal.sqrt() * z - (1 - signal).sqrt() * target,
            "sample": lambda: target,
        }[kind]()
        torch.testing.assert_close(found, x)

    def test_others_are_never_the_concept(self, model, edit):
        attack = Finetuning(num_images=200)
        captions, latents = dataclasses.replace(attack, num_images=3).draw_training_images(
            model, edit, RunContext()
        )
        assert len(captions) == len(latents) == 3
        assert not any("airplane" in caption for caption in captions)
        concept = dataclasses.replace(attack, on="concept", num_images=2)
        captions, _ = concept.draw_training_images(model, edit, RunContext())
        assert captions == [PROMPT.format("airplane")] * 2

    def test_more_steps_fit_the_images_better(self, model, edit):
        """The loss on the training images, with fixed noise, falls with the steps."""
        losses = []
        for steps in (0, 60):
            attack = Finetuning(
                on="concept", num_images=2, batch_size=4, max_train_steps=steps, learning_rate=1e-2
            )
            captions, latents = attack.draw_training_images(model, edit, RunContext())
            with attack.apply(model, edit, RunContext()), torch.no_grad():
                t = torch.tensor([200, 600])
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
                target = compute_training_target("epsilon", latents, noise, model.log_snr()[t])
                z = model.add_noise(latents, noise, t)
                found = model.predict(z, t, model.encode(captions))
                losses.append(float((found - target).square().mean()))
        assert losses[1] < 0.98 * losses[0]

    def test_after_a_fine_tune_the_edit_is_applied_to_its_weights(self, model, edit):
        attack = Finetuning(
            edit="after", num_images=2, batch_size=2, max_train_steps=2, learning_rate=1e-2
        )
        layer = model.network.get_submodule(LAYER.removeprefix("unet."))
        (change,) = edit.changes
        original, before = layer.weight.detach().clone(), weights(model.pipe)
        nothing = dataclasses.replace(edit, changes=())
        with attack.apply(model, nothing, RunContext()):
            tuned = layer.weight.detach().clone()
        assert not torch.equal(tuned, original)
        with attack.apply(model, edit, RunContext()):
            torch.testing.assert_close(layer.weight.detach(), change.weight(tuned))
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())


class TestImageToImage:
    def test_a_small_strength_stays_with_the_image(self, model, edit):
        """The smaller the strength, the nearer to what the original drew."""
        with torch.no_grad():
            original = model.draw(PROBE)
        off = []
        for strength in (0.25, 0.5, 1.0):
            with ImageToImage(strength).apply(model, edit, RunContext()) as other:
                off.append(float((other.draw(PROBE) - original).abs().mean()))
        assert off[0] < off[1] < off[2]

    def test_the_weakest_comes_first(self):
        suite = Suite.from_table(TABLE, "told")
        rungs = list(read_ladder(suite, "image_to_image").rungs)
        assert rungs == ["strength 0.9", "strength 0.7", "strength 0.5", "strength 0.3"]

    def test_batches_change_nothing(self, model, edit):
        with ImageToImage(0.5).apply(model, edit, RunContext()) as other:
            one, both = other.draw(PROBE, batch_size=1), other.draw(PROBE, batch_size=2)
        torch.testing.assert_close(one, both, atol=1e-5, rtol=0)


class TestWording:
    def reword(self, model, edit, kind, prompt="a photo of the airplane", **fields):
        probe = Probe.of(prompt, 1)
        return Wording(kind, **fields).run(model, edit, probe, RunContext()).prompts[0]

    def test_the_words(self, model, edit):
        assert self.reword(model, edit, "repeated") == "a photo of the airplane, airplane, airplane"
        assert self.reword(model, edit, "negated") == "a photo of the no airplane"
        assert self.reword(model, edit, "misspelt") == "a photo of the airlpane"
        assert self.reword(model, edit, "upper") == "A PHOTO OF THE AIRPLANE"
        assert self.reword(model, edit, "synonym") == "a photo of the airplane"
        assert self.reword(model, edit, "synonym", synonyms=("jet",)) == "a photo of the jet"
        assert self.reword(model, edit, "prefix").endswith(": a photo of the airplane")
        assert self.reword(model, edit, "suffix").startswith("a photo of the airplane, ")

    def test_long_fills_the_window_and_no_more(self, model, edit):
        long = self.reword(model, edit, "long")
        assert long.startswith("a photo of the airplane, ")
        assert model.count_tokens(long) <= model.window
        assert model.count_tokens(long + " and quiet") > model.window - 12

    def test_a_prompt_without_the_name_keeps_its_words(self, model, edit):
        assert self.reword(model, edit, "repeated", "airplanes") == "airplanes"
        assert self.reword(model, edit, "misspelt", "a ship") == "a ship"
