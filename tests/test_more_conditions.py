"""Conditions that start from an image or lay something on the model: what each does, and bad input."""

import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import expunge
from conftest import weights
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.attacks.ddim_inversion import DDIMInversion, invert
from expunge.attacks.finetuning import Finetuning
from expunge.attacks.foreign_lora import ForeignLoRA
from expunge.attacks.image_to_image import ImageToImage
from expunge.attacks.inpainting import Inpainting
from expunge.attacks.quantisation import Quantisation
from expunge.attacks.second_edit import SecondEdit
from expunge.evaluation.attack_budgets import choose_ladders, read_ladder
from expunge.evaluation.suite import Suite
from expunge.methods.uce import UCE
from expunge.runtime.context import RunContext
from tiny import flux, sdxl

PROBE = Probe.of("a photo of the airplane", n=2, num_inference_steps=4, guidance_scale=1.0)
TABLE = {
    "version": 1,
    "score": "H_c",
    "templates": {"erased": ["a photo of the {}"]},
    "sizes": {"quick": {"erased": 2, "retained": 2}},
    "num_inference_steps": 2,
    "concepts": {"airplane": {}, "bird": {}},
}


@pytest.fixture
def edit(model, problem):
    return expunge.erase(model, problem, UCE(templates=("a photo of the {}",)))


@pytest.fixture
def nothing(edit):
    """What stands for the original: it keeps the record alone."""
    return dataclasses.replace(edit, changes=())


def latents_of(model, probe):
    text = model.encode(probe.prompts)
    how = {"num_inference_steps": 4, "guidance_scale": probe.guidance_scale}
    return text, model.denoise(text, probe.seeds, until=4, **how)[1]


@pytest.mark.parametrize("family", ["diffusion", "flow"])
class TestFromImages:
    @pytest.fixture
    def any_model(self, family, model):
        return model if family == "diffusion" else expunge.load(flux())

    @pytest.fixture
    def blank(self, any_model):
        """An edit of nothing: the images then come from the original alone."""
        problem = Problem((Concept("airplane", "sky"),))
        return dataclasses.replace(expunge.erase(any_model, problem, "uce"), changes=())

    @pytest.mark.parametrize("side", ["left", "bottom"])
    def test_what_is_given_stays_and_the_rest_is_drawn(self, any_model, blank, side):
        """Under another prompt: the given part is the image's, the rest is not."""
        attack = Inpainting(share=0.5, side=side)
        mask = attack.mask(8, 8)
        assert mask.sum() == 32
        assert mask[-1, 0] == 1
        _, clean = latents_of(any_model, PROBE)
        caught = []
        other = dataclasses.replace(PROBE, prompts=("a drawing of the ship",) * 2)
        with attack.apply(any_model, blank, RunContext()) as changed:
            decode = type(any_model).decode
            changed.decode = lambda latents: caught.append(latents) or decode(any_model, latents)
            own = latents_of(any_model, other)[1]
            changed.draw(other)
        given = mask.bool().expand_as(own)
        torch.testing.assert_close(caught[0][given], own[given])
        assert not torch.allclose(caught[0][~given], own[~given])
        assert caught[0].shape == clean.shape

    def test_an_image_inverts_to_the_noise_it_comes_from(self, any_model, blank, family):
        """Many small steps there and back end near the image; a random latent does not."""
        text, clean = latents_of(any_model, PROBE)
        with torch.no_grad():
            noise = invert(any_model, clean, text, 60)
        assert noise.isfinite().all()
        assert noise.shape == clean.shape
        with DDIMInversion(steps=60).apply(any_model, blank, RunContext()) as changed:
            far, near = (m.draw(dataclasses.replace(PROBE, num_inference_steps=60))
                         for m in (any_model, changed))  # fmt: skip
        image = any_model.draw(dataclasses.replace(PROBE, num_inference_steps=60))
        torch.testing.assert_close(far, image)
        other = any_model.draw(dataclasses.replace(PROBE, seeds=(7, 8), num_inference_steps=60))
        assert (near - image).square().mean() < 0.5 * (other - image).square().mean()

    def test_a_small_strength_keeps_more(self, any_model, blank):
        image = any_model.draw(PROBE)
        apart = []
        for strength in (0.25, 1.0):
            with ImageToImage(strength=strength).apply(any_model, blank, RunContext()) as changed:
                apart.append(float((changed.draw(PROBE) - image).square().mean()))
        assert apart[0] < apart[1] or apart[1] == pytest.approx(0, abs=1e-6)


class TestImagesOfAFolder:
    def test_they_are_what_is_started_from(self, model, nothing, tmp_path):
        given = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
        Image.fromarray((given * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
        plain, own = (Inpainting(share=0.5, images=x) for x in ("", str(tmp_path)))
        drawn = []
        for attack in (plain, own):
            attack.check_inputs(model)
            with attack.apply(model, nothing, RunContext()) as changed:
                drawn.append(changed.draw(PROBE))
        assert not torch.allclose(*drawn)

    @pytest.mark.parametrize("attack", [ImageToImage, Inpainting, DDIMInversion])
    def test_another_size_is_said_before_anything_is_drawn(self, model, attack, tmp_path):
        Image.new("RGB", (24, 20)).save(tmp_path / "large.png")
        suite = Suite.from_table(TABLE, "told")
        with pytest.raises(ExpungeError, match=r"large\.png.* 24 × 20 pixels; this model draws 16 × 16"):
            choose_ladders(suite, [attack(images=str(tmp_path))], model)
        with pytest.raises(ExpungeError, match="there is no folder"):
            choose_ladders(suite, [attack(images=str(tmp_path / "none"))], model)


class TestForeignLoRA:
    def test_its_strength_counts_and_the_model_is_as_before(self, model, edit):
        before = weights(model.pipe)
        with model.using(edit):
            plain = model.draw(PROBE)
        apart = []
        for strength in (0.5, 1.0):
            attack = ForeignLoRA(strength=strength, max_train_steps=3, num_images=2, learning_rate=1e-2)
            with attack.apply(model, edit, RunContext()) as changed:
                apart.append(float((changed.draw(PROBE) - plain).square().mean()))
        assert 0 < apart[0] < apart[1]
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())

    def test_a_file_is_laid_on_the_edited_model(self, model, edit, tmp_path):
        layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        shape = model.weight(f"unet.{layer}").shape
        up, down = torch.ones(shape[0], 1), torch.ones(1, shape[1])
        save_file(
            {f"unet.{layer}.lora_B.weight": up, f"unet.{layer}.lora_A.weight": down},
            tmp_path / "own.safetensors",
        )
        attack = ForeignLoRA(strength=0.5, file=str(tmp_path / "own.safetensors"))
        attack.check_inputs(model)
        with model.using(edit):
            without = model.weight(f"unet.{layer}").clone()
        with attack.apply(model, edit, RunContext()):
            torch.testing.assert_close(model.weight(f"unet.{layer}"), without + 0.5)

    def test_another_bases_is_said_before_anything_is_drawn(self, model, tmp_path):
        other, layer = expunge.load(sdxl()), "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        shape = other.weight(f"unet.{layer}").shape
        save_file(
            {
                f"unet.{layer}.lora_B.weight": torch.ones(shape[0], 1),
                f"unet.{layer}.lora_A.weight": torch.ones(1, shape[1]),
            },
            tmp_path / "xl.safetensors",
        )
        suite = Suite.from_table(TABLE, "told")
        attack = ForeignLoRA(file=str(tmp_path / "xl.safetensors"))
        with pytest.raises(ExpungeError, match=r"xl\.safetensors does not fit this model, StableDiffu"):
            choose_ladders(suite, [attack], model)


class TestSecondEdit:
    @pytest.mark.parametrize("how", ["stacked", "merged"])
    def test_both_are_in_force(self, model, edit, how):
        attack, run = SecondEdit(how=how, num_words=1), RunContext()
        other = attack.make_edit(model, edit, run)
        (concept,) = other.record.problem.erase
        kept = {c.name for c in edit.record.problem.erase} | set(edit.record.problem.retain)
        assert concept.name not in kept
        layer = edit.changes[0].layers[0]
        weights_of = []
        for edits in ([edit], [other]):
            with model.using(*edits):
                weights_of.append(model.weight(layer).clone())
        with attack.apply(model, edit, run):
            both = model.weight(layer).clone()
        assert not any(torch.allclose(both, one) for one in weights_of)

    def test_of_the_original_it_is_the_second_alone(self, model, nothing):
        attack, run = SecondEdit(how="merged", num_words=1), RunContext()
        with model.using(attack.make_edit(model, nothing, run)):
            alone = model.draw(PROBE)
        with attack.apply(model, nothing, run) as changed:
            torch.testing.assert_close(changed.draw(PROBE), alone)

    def test_one_of_another_base_is_said_before_anything_is_drawn(self, model, edit, tmp_path):
        tuned = dataclasses.replace(edit, record=dataclasses.replace(edit.record, base="another"))
        tuned.save(tmp_path / "tuned.safetensors")
        with pytest.raises(ExpungeError, match=r"tuned\.safetensors was made from other weights"):
            choose_ladders(
                Suite.from_table(TABLE, "told"),
                [SecondEdit(file=str(tmp_path / "tuned.safetensors"))],
                model,
            )


class TestFinetuningALoRA:
    def test_a_lora_changes_matrices_alone_and_by_its_rank(self, model, edit):
        attack = Finetuning(rank=2, max_train_steps=3, num_images=2, batch_size=2, learning_rate=1e-2)
        with model.using(edit):
            before = weights(model.pipe)
        with attack.apply(model, edit, RunContext()):
            after = weights(model.pipe)
        changed = {k: after[k] - before[k] for k in before if not torch.equal(before[k], after[k])}
        assert changed
        assert all("attn2" in key and value.ndim == 2 for key, value in changed.items())
        for value in changed.values():
            assert torch.linalg.matrix_rank(value, rtol=1e-3) <= 2


class TestBadInput:
    def test_a_budget_of_0(self):
        for name, field in (
            ("token_search", "queries"), ("encoder_search", "queries"), ("query_search", "queries"),
            ("ddim_inversion", "steps"), ("inpainting", "share"), ("foreign_lora", "strength"),
        ):  # fmt: skip
            suite = Suite.from_table({**TABLE, "attacks": {name: {field: [0, 5]}}}, "told")
            with pytest.raises(ExpungeError, match=f"{field} 0 changes nothing|{field} must be"):
                read_ladder(suite, name)

    def test_bits_that_there_are_not(self):
        """Rounding is simulated, so that no hardware lacks a format; one that is none is named."""
        with pytest.raises(ExpungeError, match="format must be .*int8.*nf4.*, not 'int3'"):
            Quantisation(format="int3")

    def test_what_the_family_lacks(self):
        suite = Suite.from_table(TABLE, "told")
        with pytest.raises(ExpungeError, match="foreign_lora cannot be made on this model: it needs"):
            choose_ladders(suite, ["foreign_lora"], expunge.load(flux()))


class TestKindsOfPrompts:
    def test_every_concept_is_asked_for_in_every_kind(self):
        suite = Suite.read("prompt-kinds")
        kinds = {one.kind for one in suite.prompts}
        assert kinds >= {"short", "long", "negated", "description", "misspelt", "language"}
        for name in [c.name for c in suite.concepts if any(p.concept == c.name for p in suite.prompts)]:
            cells = [cell for cell in suite.cells([name]) if cell.kind]
            assert {cell.kind for cell in cells} == kinds
            for cell in cells:
                # A description that said the name would be no description.
                if cell.kind in ("description", "language"):
                    assert name not in cell.prompt.lower().split()

    def test_each_kind_has_its_share_and_its_control(self, model, edit, tmp_path):
        from expunge.evaluation.evaluate import evaluate
        from expunge.evaluation.image_cache import Cache
        from test_attacks import Bright

        @dataclasses.dataclass(frozen=True)
        class Reads(Bright):
            """Sees a concept wherever the tokenizer can read the prompt."""

            def measure(self, images, prompts, references=None):
                return torch.tensor([[float(model.knows(prompt))] for prompt in prompts])

        lists = [
            {"role": "synonyms", "concept": "airplane", "kind": "short", "texts": ["airplane"]},
            {"role": "synonyms", "concept": "airplane", "kind": "language", "texts": ["飞机"]},
        ]
        table = {**TABLE, "prompts": lists, "sizes": {"quick": {"erased": 2, "each": 2}}}
        suite, cache = Suite.from_table(table, "told"), Cache(tmp_path / "cache")
        report = evaluate(
            model, [edit], [suite], judge=Reads(0.5), roles=("erased", "synonyms"), cache=cache
        )
        (case,) = report.cases
        kinds = case.rows[1].kinds
        assert (kinds["short"]["seen"].value, kinds["short"]["original"].value) == (1, 1)
        # A language that the tokenizer has no sign of: the original cannot, so that nothing is said.
        assert kinds["language"]["original"].value == 0
        assert kinds["language"]["seen"].n == 0
        assert ("synonyms", "飞机", 0.0) in case.left_out
        report.save(tmp_path / "report")
        assert "Asked for in other ways" in (tmp_path / "report" / "index.html").read_text()
