"""Edits of the text encoder: applied, saved, merged, exported, undone, and what is said of them."""

import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import expunge
from conftest import weights
from edits import PROBE, drawn, edited, single_in
from expunge import Concept, Edit, ExpungeError, Probe, Problem
from expunge.attacks.embedding import Embedding
from expunge.changes import Dense, LowRank, describe_text_encoders, find_layer, find_text_encoders
from expunge.checkpoints.export import export
from expunge.checkpoints.merge import merge
from expunge.checkpoints.undo import undo
from expunge.cli.main import main
from expunge.evaluation.image_source import Request, Source, encode_residual
from expunge.methods.uce import UCE
from expunge.runtime.context import RunContext
from tiny import PIPELINES, loaded

LAYER = "encoder.layers.0.self_attn.q_proj"
MLP = "encoder.layers.0.mlp.fc1"


def text_changes(pipe, *layers, rank=2):
    """A change of low rank for each of these layers of text encoders, large enough to be seen."""
    torch.manual_seed(3)
    found = []
    for layer in layers:
        out, inside = find_layer(pipe, layer).weight.shape
        found.append(LowRank((layer,), torch.randn(out, rank), torch.randn(rank, inside)))
    return found


@pytest.fixture
def model(folder):
    return expunge.load(folder)


@pytest.fixture
def edit(model):
    return edited(model, text_changes(model.pipe, f"text_encoder.{LAYER}", f"text_encoder.{MLP}"))


class TestApplied:
    def test_the_prompt_is_encoded_with_it_and_then_without(self, model, edit):
        before, images = weights(model.pipe), drawn(model)
        plain = model.encode(["airplane"]).embeddings
        with model.using(edit):
            assert not torch.allclose(model.encode(["airplane"]).embeddings, plain, atol=1e-3)
            assert (model.draw(PROBE) - images).abs().max() > 1e-3
        assert all(torch.equal(before[k], v) for k, v in weights(model.pipe).items())
        assert torch.equal(drawn(model), images)

    def test_on_a_pipeline_at_half_strength(self, model, edit):
        weight = find_layer(model.pipe, f"text_encoder.{LAYER}").weight.detach().clone()
        applied = edit.apply(model.pipe, strength=0.5)
        up, down = edit.changes[0].up, edit.changes[0].down
        after = find_layer(model.pipe, f"text_encoder.{LAYER}").weight.detach()
        torch.testing.assert_close(after, weight + 0.5 * up @ down)
        applied.remove()

    def test_saved_and_loaded(self, model, edit, tmp_path):
        edit.save(tmp_path / "edit.safetensors")
        read = Edit.load(tmp_path / "edit.safetensors")
        assert read.hash == edit.hash
        assert read.fits(model)
        assert torch.equal(drawn(model, read), drawn(model, edit))
        find_layer(model.pipe, f"text_encoder.{MLP}").weight.data.add_(0.1)
        assert not read.fits(model)


class TestSaid:
    def test_what_is_undone_by_swapping(self, model, edit):
        assert find_text_encoders(edit.changes) == ("text_encoder",)
        said = describe_text_encoders(edit.changes)
        assert said.startswith("all of it is in text_encoder, and is undone by swapping the encoder")
        mixed = [*edit.changes, *text_changes(model.pipe, model.text_entries()[0].layer)]
        assert describe_text_encoders(mixed).startswith("a part is in text_encoder")
        assert describe_text_encoders(mixed[-1:]) == ""
        assert "swapping the encoder" in edit._repr_html_()

    def test_info_says_it(self, model, edit, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        edit.save(tmp_path / "edit.safetensors")
        assert main(["info", str(tmp_path / "edit.safetensors")]) == 0
        assert "undone by swapping the encoder" in capsys.readouterr().out


class TestExported:
    def test_to_a_diffusers_folder_and_undone(self, model, edit, folder, tmp_path):
        done = export(edit, "diffusers", folder, tmp_path / "out")
        assert any("undone by swapping the encoder" in note for note in done.notes)
        assert "undone by swapping the encoder" in (tmp_path / "out" / "README.md").read_text("utf8")
        there = expunge.load(tmp_path / "out")
        with model.using(edit):
            wanted = model.encode(["airplane"]).embeddings
        torch.testing.assert_close(there.encode(["airplane"]).embeddings, wanted, rtol=1e-4, atol=1e-4)
        for given in ({"original": folder}, {"edit": edit}):
            undo(tmp_path / "out", tmp_path / str(len(given)) / next(iter(given)), **given)
            back = expunge.load(tmp_path / str(len(given)) / next(iter(given)))
            ours, theirs = (find_layer(m.pipe, f"text_encoder.{LAYER}").weight for m in (back, model))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if "original" in given else 1e-5)

    def test_swapping_the_encoder_undoes_it(self, model, edit, folder, tmp_path):
        export(edit, "diffusers", folder, tmp_path / "out")
        there = expunge.load(tmp_path / "out")
        there.pipe.register_modules(text_encoder=model.pipe.text_encoder)
        assert torch.equal(there.draw(PROBE), drawn(model))

    @pytest.mark.parametrize(
        ("form", "stem"),
        [
            ("lora", f"text_encoder.text_model.{LAYER}.lora_linear_layer.up.weight"),
            ("kohya", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"),
        ],
    )
    def test_to_a_lora_with_text_keys(self, model, edit, folder, tmp_path, form, stem):
        path = tmp_path / "x.safetensors"
        done = export(edit, form, folder, path, dtype=torch.float32)
        assert stem in load_file(path)
        assert any("undone by swapping the encoder" in note for note in done.notes)
        again = expunge.load(folder, lora=[(path, 1.0)])
        with model.using(edit):
            wanted = find_layer(model.pipe, f"text_encoder.{LAYER}").weight.detach().clone()
        ours = find_layer(again.pipe, f"text_encoder.{LAYER}").weight.detach()
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)

    def test_diffusers_knows_the_keys(self, model, edit, folder, tmp_path):
        """Its own converter finds the text encoder's layers in both namings."""
        mixed = edited(model, [*edit.changes, *text_changes(model.pipe, model.text_entries()[0].layer)])
        for form in ("lora", "kohya"):
            export(mixed, form, folder, tmp_path / f"{form}.safetensors", dtype=torch.float32)
            state, *_ = StableDiffusionPipeline.lora_state_dict(str(tmp_path / f"{form}.safetensors"))
            # It calls the query of kohya's files `to_q_lora`, as its older text encoders did.
            stem = "text_encoder.text_model.encoder.layers.0.self_attn."
            found = sorted(key.removeprefix(stem) for key in state if key.startswith(stem))
            query = {"lora": "q_proj.lora_linear_layer", "kohya": "to_q_lora"}[form]
            assert found == [f"{query}.down.weight", f"{query}.up.weight"]

    def test_both_encoders_of_sdxl(self, tmp_path):
        pipe = PIPELINES["sdxl"]()
        pipe.save_pretrained(tmp_path / "tiny")
        model = loaded(tmp_path / "tiny", "sdxl")
        layers = (f"text_encoder.{LAYER}", f"text_encoder_2.text_model.{LAYER}")
        edit = edited(model, text_changes(model.pipe, *layers))
        path = tmp_path / "x.safetensors"
        export(edit, "comfyui", tmp_path / "tiny", path, dtype=torch.float32)
        stem = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
        assert {f"lora_te1_{stem}", f"lora_te2_{stem}"} <= set(load_file(path))
        state, *_ = StableDiffusionXLPipeline.lora_state_dict(str(path))
        assert {key.partition(".")[0] for key in state} == {"text_encoder", "text_encoder_2"}
        assert "text_encoder and text_encoder_2" in describe_text_encoders(edit.changes)

    @pytest.mark.parametrize("to", ["lora", "kohya", "comfyui"])
    @pytest.mark.parametrize(
        ("family", "layer", "says"),
        [
            ("flux", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "Flux's text_encoder_2"),
            ("sana", "text_encoder.layers.0.self_attn.q_proj", "Sana's text_encoder,"),
            ("stable_diffusion", "text_encoder.embeddings.token_embedding", "the layer text_enc"),
        ],
    )
    def test_an_encoder_of_which_nobody_reads_loras(self, tmp_path, family, layer, says, to):
        pipe = PIPELINES[family]()
        pipe.save_pretrained(tmp_path / "tiny")
        model = loaded(tmp_path / "tiny", family)
        edit = edited(model, text_changes(model.pipe, layer))
        with pytest.raises(ExpungeError, match=f"no program reads a LoRA of {says}.*--to diffusers"):
            export(edit, to, tmp_path / "tiny", tmp_path / "x.safetensors")
        assert not (tmp_path / "x.safetensors").exists()

    def test_a_single_file_has_no_place_for_it(self, edit, tmp_path):
        path = single_in(tmp_path / "one.safetensors", torch.float32)
        with pytest.raises(ExpungeError, match="no place of its own in a single file; export to a diff"):
            export(edit, "safetensors", path, tmp_path / "x.safetensors")


class TestMerged:
    def test_beside_an_edit_of_the_denoiser(self, model, edit):
        other = expunge.erase(model, Problem((Concept("bird", "sky"),)), UCE(num_retain_words=2))
        both = merge(model, [edit, other])
        assert torch.equal(drawn(model, both), drawn(model, edit, other))
        assert describe_text_encoders(both.changes).startswith("a part is in text_encoder")

    def test_two_that_change_one_layer_are_refused(self, model, edit):
        value = torch.zeros(find_layer(model.pipe, f"text_encoder.{LAYER}").weight.shape)
        other = edited(model, [Dense((f"text_encoder.{LAYER}",), value)])
        with pytest.raises(ExpungeError, match="none through which text enters .text_encoder"):
            merge(model, [edit, other])


class TestJudged:
    def test_what_is_left_in_the_end_tokens_is_the_edited_encoders(self, model, edit):
        request = Request("airplane", 0, 2, 3.0, stand_in="ship")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Source(model, (edit,)).draw([request])
        with model.using(edit):
            text = encode_residual(model, ["airplane"], "ship")
            wanted = model.draw(Probe(("airplane",), (0,), 2, 3.0, text))
        assert torch.equal(found, wanted)

    def test_an_attack_begins_at_what_the_edited_encoder_says(self, model, edit):
        attack = Embedding(radius=1e-6, steps=1, restarts=1)
        probe = attack.run(model, edit, PROBE, RunContext(0))
        with model.using(edit):
            wanted = model.encode(PROBE.prompts).embeddings
        torch.testing.assert_close(probe.text.embeddings, wanted, rtol=1e-4, atol=1e-4)
