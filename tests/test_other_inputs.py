"""Further inputs of kinds of fault that were mended: other names, wrappers and values."""

import json
import math
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Probe, Problem
from expunge.base import files
from expunge.base.image_files import read_image
from expunge.changes import find_layer
from expunge.checkpoints import safetensors_io
from expunge.checkpoints.export import export
from expunge.checkpoints.loading import is_hub_id
from expunge.checkpoints.lora import fuse_lora, read_lora_info
from expunge.checkpoints.lora.metadata import AdapterMetadata
from expunge.cli.concept_files import read_concepts
from expunge.cli.main import main
from expunge.evaluation.prompt_lists import PromptList
from expunge.problem import replace_whole
from expunge.runtime.schedulers import replace_scheduler

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship",))
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    expunge.erase(expunge.load(tiny_pipeline()), PROBLEM).save(path)
    return path


class TestVariants:
    """F1: the command line, too, puts back what was erased from another variant."""

    def test_undo_and_info_find_the_variant_themselves(self, folder, tmp_path, capsys):
        both = shutil.copytree(folder, tmp_path / "both")
        tiny_pipeline(seed=5).unet.save_pretrained(both / "unet", variant="ema")
        edit, out, back = tmp_path / "edit.safetensors", tmp_path / "out", tmp_path / "back"
        chosen = ["--model", str(both), "--variant", "ema"]
        assert main(["erase", "uce", "--concept", "airplane=sky", "-o", str(edit), *chosen]) == 0
        assert main(["info", str(edit), "--model", str(both)]) == 0
        assert "made from it (its variant ema)" in capsys.readouterr().out
        assert main(["export", str(edit), "--to", "diffusers", "-o", str(out), *chosen]) == 0
        assert main(["undo", str(out), "--original", str(both), "-o", str(back)]) == 0
        for name in ("", ".ema"):
            file = f"unet/diffusion_pytorch_model{name}.safetensors"
            again = load_file(back / file)
            assert all(torch.equal(t, again[key]) for key, t in load_file(both / file).items())


class TestLoraFiles:
    """F2 to F4 and F22: what a LoRA file says in other words, or cannot mean."""

    def save(self, tmp_path, state=None, metadata=None, name="theirs"):
        torch.manual_seed(0)
        path = tmp_path / f"{name}.safetensors"
        if state is None:
            state = {f"unet.{LAYER}.lora_B.weight": torch.randn(8, 4)}
            state[f"unet.{LAYER}.lora_A.weight"] = torch.randn(4, 32)
        save_file(state, path, metadata)
        return path, state

    def moved(self, path):
        pipe = tiny_pipeline()
        weight = pipe.unet.get_submodule(LAYER).weight
        before = weight.detach().clone()
        fuse_lora(path, pipe)
        return weight.detach() - before

    def test_pefts_own_folder_has_its_scale_beside_it(self, tmp_path):
        path, state = self.save(tmp_path, name="adapter_model")
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        up, down = state.values()
        torch.testing.assert_close(self.moved(path), 4 * up @ down, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"unet.use_rslora": "false"}, "use_rslora .* is 'false', and should be true or false"),
            ({"unet.use_dora": 1}, "use_dora .* is 1, and should be true or false"),
            ({"unet.alpha_pattern": [["to_k", 2]]}, "alpha_pattern .* should be a table"),
            ({"unet.alpha_pattern": {"to_k": "2"}}, "'to_k' in alpha_pattern .* is '2'"),
        ],
    )
    def test_metadata_of_another_type(self, tmp_path, fields, message):
        common = {"unet.r": 4, "unet.lora_alpha": 8}
        path, _ = self.save(tmp_path, None, {"lora_adapter_metadata": json.dumps(common | fields)})
        with pytest.raises(ExpungeError, match=message):
            self.moved(path)

    def test_metadata_that_are_nested_too_deeply(self):
        with pytest.raises(ExpungeError, match="lora_adapter_metadata cannot be read"):
            AdapterMetadata.parse({"lora_adapter_metadata": DEEP}, "theirs.safetensors")

    def test_factors_of_no_rank_and_of_whole_numbers(self, tmp_path):
        for up, down, message in (
            (torch.zeros(8, 0), torch.zeros(0, 32), "has factors of rank 0"),
            (torch.ones(8, 2, dtype=torch.int8), torch.ones(2, 32), r"quantised \(stored as int8\)"),
        ):
            state = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
            path, _ = self.save(tmp_path, {**state, f"{KOHYA}.alpha": torch.tensor(2.0)})
            with pytest.raises(ExpungeError, match=message):
                self.moved(path)

    @pytest.mark.parametrize("ending", ["oft_blocks", "hada_w1_a", "lokr_w1", "diff", "boft_R"])
    def test_another_adapter_is_named_by_its_tensors(self, tmp_path, capsys, ending):
        path, _ = self.save(tmp_path, {f"{KOHYA}.{ending}": torch.rand(8, 8)})
        with pytest.raises(ExpungeError, match=rf"nothing reads lora_unet_.*{ending}$"):
            self.moved(path)
        assert main(["info", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "in a naming unknown here" in shown
        assert ending in shown
        assert "rank 0" not in shown

    def test_info_says_what_is_no_lora_of_a_layer(self, tmp_path):
        _, state = self.save(tmp_path)
        path, _ = self.save(tmp_path, {**state, f"{KOHYA}.diff_b": torch.rand(8)})
        info = read_lora_info(path)
        assert (info.layers, info.others) == (1, (f"{KOHYA}.diff_b",))

    def test_a_file_without_tensors(self, tmp_path, capsys):
        path, _ = self.save(tmp_path, {})
        assert main(["info", str(path)]) == 2
        assert "holds no tensors" in capsys.readouterr().err


class TestScales:
    """F7 and E1: scales by other names, of columns, and in another form."""

    SHAPE = (16, 16)

    def read(self, tmp_path, **beside):
        path = tmp_path / "scaled.safetensors"
        weight = torch.ones(self.SHAPE).to(torch.float8_e4m3fn)
        save_file({"layer.weight": weight, **{f"layer.{k}": t for k, t in beside.items()}}, path)
        return safetensors_io.read_tensor(path, "layer.weight")

    @pytest.mark.parametrize("name", ["scale", "weight.scale", "weight_scales", "fp8_scale", "_scale"])
    def test_a_scale_of_another_name_is_not_passed_over(self, tmp_path, name):
        with pytest.raises(ExpungeError, match=rf"weight has layer.{name} beside it.*scale_weight"):
            self.read(tmp_path, **{name: torch.tensor(0.5)})

    def test_scales_of_columns_are_not_those_of_rows(self, tmp_path):
        with pytest.raises(ExpungeError, match="scaled in blocks"):
            self.read(tmp_path, weight_scale=torch.rand(1, 16))
        scale = torch.rand(16, 1)
        assert torch.equal(self.read(tmp_path, weight_scale=scale), scale.expand(self.SHAPE))

    def test_a_scale_that_is_an_exponent(self, tmp_path):
        with pytest.raises(ExpungeError, match="layer.weight_scale is stored as U8"):
            self.read(tmp_path, weight_scale=torch.tensor(127, dtype=torch.uint8))

    def test_plain_eight_bit_weights_are_read(self, tmp_path):
        read = self.read(tmp_path, scale_input=torch.tensor(2.0), bias=torch.ones(16))
        assert torch.equal(read.float(), torch.ones(self.SHAPE))


class Peft(nn.Module):
    """A wrapper that PEFT's classes are told by: their module's name."""


Peft.__module__ = "peft.peft_model"


class TestWrappers:
    """F8: networks wrapped whole by PEFT, and layers in wrappers that nobody knows."""

    def test_a_network_that_peft_wraps_whole(self, edit):
        pipe = tiny_pipeline()
        inner, outer = Peft(), Peft()
        inner.model, outer.base_model = pipe.unet, inner
        layer = f"unet.{LAYER}"
        bare = find_layer(pipe, layer)
        pipe.unet = outer
        assert find_layer(pipe, layer) is bare
        before = bare.weight
        with Edit.load(edit).apply(pipe):
            assert bare.weight is not before

    def test_a_layer_in_a_wrapper_that_nobody_knows(self):
        pipe = tiny_pipeline()
        attention = pipe.unet.get_submodule(LAYER.removesuffix(".to_k"))
        attention.to_k = nn.Sequential(attention.to_k)
        with pytest.raises(ExpungeError, match=rf"{LAYER} has no weight"):
            expunge.erase(expunge.load(pipe), PROBLEM)

    def test_weights_that_are_only_stored_in_eight_bits(self, edit):
        pipe = tiny_pipeline()
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        with pytest.raises(ExpungeError, match="in a form of its own .float8_e4m3fn"):
            Edit.load(edit).apply(pipe)


class TestNumbers:
    """F9: what overflows, and records with numbers that are none."""

    def test_a_strength_beyond_the_weights_format(self, edit):
        pipe = tiny_pipeline()
        before = pipe.unet.get_submodule(LAYER).weight
        for strength in (1e300, 10**400):
            with pytest.raises(ExpungeError, match="strength"):
                Edit.load(edit).apply(pipe, strength)
            assert pipe.unet.get_submodule(LAYER).weight is before

    @pytest.mark.parametrize(
        ("field", "value"), [("seconds", math.nan), ("seed", math.inf), ("seed", "x"), ("seed", True)]
    )
    def test_a_record_with_numbers_that_are_none(self, edit, tmp_path, field, value):
        with safe_open(edit, "pt") as file:
            data = json.loads(file.metadata()["expunge"])
        data["record"][field] = value
        path = tmp_path / "changed.safetensors"
        save_file(load_file(edit), path, {"expunge": json.dumps(data)})
        with pytest.raises(ExpungeError, match="changed.safetensors is not a whole edit: its seed"):
            Edit.load(path)

    def test_a_guidance_that_is_not_finite_is_told_so(self):
        with pytest.raises(ExpungeError, match="at least 0 and finite, not inf"):
            Probe.of("a cat", guidance_scale=math.inf)


class TestLists:
    """F10 and F13: lists of prompts and of concepts."""

    def read(self, tmp_path, text, **options):
        path = tmp_path / "prompts.csv"
        path.write_text(text, encoding="utf-8")
        return PromptList(csv=str(path), concept="cat", **options).read_rows(tmp_path)

    def test_a_prompt_that_nobody_sees_is_empty(self, tmp_path):
        with pytest.raises(ExpungeError, match=r"row 1 \(line 2\): the prompt is empty"):
            self.read(tmp_path, "prompt,seed\n\u200b,4\n")
        with pytest.raises(ExpungeError, match="prompt 1 of a list of texts is empty"):
            PromptList(texts=("\u200b \ufeff",))

    def test_swapped_letters_lose_no_seeds(self, tmp_path):
        with pytest.raises(ExpungeError, match="has a column 'sede'; did you mean 'seed'"):
            self.read(tmp_path, "prompt,sede\na cat,4\n")

    @pytest.mark.parametrize(
        ("column", "option"), [("random_seed", "seed_column"), ("cfg_scale", "guidance_column")]
    )
    def test_seeds_of_another_name_are_said_to_be_left_out(self, tmp_path, column, option):
        with pytest.warns(ExpungeWarning, match=f"the column '{column}' is not read; {option}"):
            assert self.read(tmp_path, f"prompt,{column}\na cat,4\n") == [("a cat", None, None)]
        (row,) = self.read(tmp_path, f"prompt,{column}\na cat,4\n", **{option: column})
        assert 4 in row

    def test_a_column_without_a_name(self, tmp_path):
        with pytest.raises(ExpungeError, match="prompt_column must name"):
            self.read(tmp_path, "prompt\na cat\n", prompt_column="")

    def test_a_path_that_is_too_long(self, tmp_path):
        with pytest.raises(ExpungeError, match="too long"):
            PromptList(csv="a" * 300 + ".csv", concept="cat").read_rows(tmp_path)

    def test_only_line_ends_end_a_line(self, tmp_path):
        path = tmp_path / "concepts.txt"
        path.write_bytes("air\u2028plane=sky\r\ncat\x00|k\x0bitty\rdog\n".encode())
        concepts, _ = read_concepts(path)
        assert [concept.names for concept in concepts] == [
            ("air\u2028plane",), ("cat", "k\x0bitty"), ("dog",)
        ]  # fmt: skip


class TestDepth:
    """Files that are nested deeper than Python reads are refused as any that cannot be read."""

    @pytest.mark.parametrize("ending", [".toml", ".yaml"])
    def test_concepts(self, tmp_path, ending):
        path = tmp_path / f"concepts{ending}"
        path.write_text("retain = " * (ending == ".toml") + DEEP)
        with pytest.raises(ExpungeError, match="nested too deeply"):
            read_concepts(path)

    def test_json_and_headers(self, tmp_path):
        path = tmp_path / "deep.json"
        path.write_text(DEEP)
        with pytest.raises(ExpungeError, match="is not a JSON table"):
            files.read_json(path)
        path.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
        with pytest.raises(ExpungeError, match="is not a whole safetensors file"):
            files.read_header(path)

    def test_metadata_that_are_no_text(self, tmp_path):
        path = tmp_path / "numbers.safetensors"
        text = b'{"__metadata__": {"expunge": 5}}'
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ExpungeError, match="is not a whole safetensors file"):
            Edit.load(path)


class TestImages:
    """F9, F11, F12: what `draw` reads and writes."""

    def test_pixels_that_have_no_white_are_told_so(self, tmp_path):
        for name, array in (("float", np.full((4, 6), 0.5, np.float32)), ("wide", np.full((4, 6), -5))):
            path = tmp_path / f"{name}.tiff"
            Image.fromarray(array.astype(np.float32 if name == "float" else np.int32)).save(path)
            with pytest.raises(ExpungeError, match="of which none is white"):
                read_image(path)

    def test_an_image_of_nan_is_not_written_as_a_black_one(self, folder, tmp_path, capsys):
        out = tmp_path / "out.png"
        drawing = ["draw", "a cat", "--model", str(folder), "--steps", "1", "-o", str(out)]
        assert main([*drawing, "--guidance", "1e300"]) == 2
        assert "draws NaN in place of an image with the seed 0" in capsys.readouterr().err
        assert not out.exists()

    def test_drawing_needs_no_cache_whose_name_is_too_long(self, folder, tmp_path, monkeypatch):
        """F19."""
        monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / ("a" * 300)))
        out = tmp_path / "out.png"
        drawing = ["draw", "a cat", "--model", str(folder), "--steps", "1", "-o", str(out)]
        assert main(drawing) == 0
        assert out.is_file()

    def test_an_output_without_a_name(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["draw", "a cat", "--model", str(folder), "--steps", "1", "-o", ""]) == 2
        assert "-o is empty" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestNames:
    """F13: what is not seen, and what is typed for."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Jean\u2013Luc", "Jean-Luc"),
            ("\u201cCat\u201d", '"cat"'),
            ("Hawai\u02bbi", "Hawai'i"),
            ("cat\U000e0063\U000e0061", "cat"),
            ("ca\x00t", "cat"),
            ("cat\u2800", "cat"),
        ],
    )
    def test_one_name(self, one, other):
        with pytest.raises(ExpungeError, match="both erased and retained"):
            Problem((Concept(one, "sky"),), (other,))

    @pytest.mark.parametrize("name", ["\u3164", "\u2800\u200b", "\x00", "\U000e0041"])
    def test_a_name_that_nobody_sees(self, name):
        with pytest.raises(ExpungeError, match="needs a name"):
            Concept(name)

    def test_a_prompt_calls_for_a_name_in_another_spelling(self):
        problem = Problem((Concept("T\u00fcrkiye"), Concept("cat face")))
        assert problem.find_name("flag of Tu\u0308rkiye\u200b") == "T\u00fcrkiye"
        assert problem.find_name("a cat\n face") == "cat face"
        assert replace_whole("flag of Tu\u0308rkiye", "T\u00fcrkiye", "land") == "flag of land"


class TestPlaces:
    """F24, F25: pointers and mistyped endings."""

    def test_a_pointer_in_place_of_a_table(self, folder, tmp_path, capsys):
        there = shutil.copytree(folder, tmp_path / "pointer")
        (there / "model_index.json").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
        assert main(["info", str(there)]) == 2
        assert "git lfs pull" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["models/sd.safetensor", "models/sd.sft", "models/sd.safetensros"])
    def test_a_mistyped_ending_is_no_hub_id(self, name):
        assert not is_hub_id(name)
        assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1.5")


def test_a_sampler_that_takes_no_fewer_steps_names_more():
    pipe = tiny_pipeline()
    pipe.scheduler = replace_scheduler(pipe.scheduler, "PNDM", "tiny")
    with pytest.raises(ExpungeError, match="cannot take 1 step; 4 it can"):
        expunge.load(pipe).draw(Probe.of("a cat", num_inference_steps=1))


def test_a_sampler_that_needs_a_package_names_it(monkeypatch):
    def needs(*_, **__):
        raise ImportError("\nLMSDiscreteScheduler requires the scipy library but it was not found")

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "from_config", needs)
    with pytest.raises(ExpungeError, match="LMSDiscrete needs scipy: pip install scipy"):
        replace_scheduler(tiny_pipeline().scheduler, "LMSDiscrete", "tiny")


@pytest.mark.parametrize("scaled", [False, True])
def test_rounding_is_told_of_scaled_weights_too(edit, folder, tmp_path, scaled):
    """E2: what rounding to eight bits costs, whether the weights have scales or not."""
    there = shutil.copytree(folder, tmp_path / "eight")
    path = there / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for key in [key for key in state if ".attn2.to_" in key and key.endswith(".weight")]:
        scale = state[key].abs().max() / 448 if scaled else torch.tensor(1.0)
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        if scaled:
            state[f"{key.removesuffix('weight')}scale_weight"] = scale
    save_file(state, path, {"format": "pt"})
    with pytest.warns(ExpungeWarning, match="made from other weights"):
        done = export(Edit.load(edit), "diffusers", there, tmp_path / "out")
    (note,) = (note for note in done.notes if "Rounding" in note)
    assert note.startswith("Rounding to float8_e4m3fn keeps")
    shares = [float(share) / 100 for share in re.findall(r"([\d.]+)%", note)]
    assert shares[0] == pytest.approx(1, abs=0.1)  # stochastic rounding is right in the mean
    assert shares[1] > 0.05
