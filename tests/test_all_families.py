"""What some families have that others have not; what all keep is in `test_family_contract`."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

import expunge
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.base import registry
from expunge.checkpoints.lora.base_models import describe_base
from expunge.cli.main import main
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.families.flux import Flux
from quick import quick
from tiny import (
    PIPELINES,
    drawn_by_diffusers,
    flux,
    flux2,
    flux2_dev,
    loaded,
    pixart,
    qwen,
    sana,
    sd3,
    sdxl,
    spread,
    wan,
    z_image,
)

pytestmark = pytest.mark.filterwarnings("ignore:this model was distilled to draw without guidance")


def test_uce_moves_the_pooled_text_too():
    model = expunge.load(sdxl())
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    method = quick("uce", ridge=0.01, num_retain_words=5)
    _, pooled = expunge.erase(model, problem, method).changes
    assert pooled.layers == ("unet.add_embedding.linear_1",)
    told = [TEMPLATES["object"][0].format(word) for word in ("airplane", "sky")]
    text = model.encode([*told, "ship"])
    given = torch.cat([text.pooled, torch.randn(3, 48)], 1).double()
    airplane, _, ship = given @ pooled.matrix.double().T
    assert (airplane[:16] - given[1, :16]).norm() < 0.5 * (given[0, :16] - given[1, :16]).norm()
    assert (ship - given[2]).norm() < 0.2 * given[2, :16].norm()
    assert torch.equal(airplane[16:], given[0, 16:])


def test_sdxl_without_zeros_for_the_empty_prompt():
    pipe = sdxl(zeros=False)
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    theirs = drawn_by_diffusers(pipe, "sdxl", "ship", probe.seeds, 2, 4.0)
    torch.testing.assert_close(expunge.load(pipe).draw(probe), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pipe", [sd3(with_t5=False), sd3(use_dynamic_shifting=True)])
def test_sd3_without_t5_and_with_dynamic_shifting(pipe):
    model = expunge.load(pipe)
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    theirs = drawn_by_diffusers(pipe, "sd3", "ship", probe.seeds, 2, 4.0)
    torch.testing.assert_close(model.draw(probe), theirs, rtol=0, atol=2e-5)
    (_, clip_end), (_, t5_end) = model.encode(["ship"]).segments(0)
    assert clip_end == 2
    assert t5_end == 77 + (pipe.text_encoder_3 is not None)


def test_schnell_takes_no_guidance():
    model = expunge.load(flux(told=False))
    assert isinstance(model, Flux)
    assert model.window == 255
    one, other = (model.draw(Probe.of("ship", num_inference_steps=2, guidance_scale=g)) for g in (1, 5))
    assert torch.equal(one, other)


def test_dev_predicts_at_guidance_one():
    model = expunge.load(flux())
    text, latents = model.encode(["ship"]), torch.randn(1, 4, 8, 8)
    plain = model._guided(latents, torch.tensor(500), text, 1.0)
    assert torch.equal(model.predict(latents, 500, text), plain)
    assert not torch.equal(model._guided(latents, torch.tensor(500), text, 3.5), plain)


@pytest.mark.parametrize("make", [sd3, flux])
def test_joint_attention_is_no_cross_attention(make):
    model = expunge.load(make())
    with pytest.raises(ExpungeError, match="no cross-attention"):
        model.cross_attentions()


def sd35_medium():
    """Stable Diffusion 3.5 medium: a second attention of the picture to itself in its first blocks."""
    pipe = sd3()
    config = {**pipe.transformer.config, "dual_attention_layers": (0,)}
    pipe.transformer = SD3Transformer2DModel.from_config(config).eval()
    return pipe


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("sd3", sd35_medium),
        ("flux2", lambda: flux2(distilled=False)),
        ("flux2", flux2_dev),
        ("wan", lambda: wan(expand_timesteps=True)),
        ("pixart", lambda: pixart(alpha=True)),
    ],
    ids=["sd3.5-medium", "klein-base", "flux2-dev", "wan-ti2v", "pixart-alpha"],
)
def test_other_models_of_a_family_draw_what_their_pipelines_draw(family, make):
    pipe = make()
    model, more = loaded(pipe, family), {}
    if make is flux2_dev:  # its instruction is long, and its text encoder shallow
        model.max_sequence_length = more["max_sequence_length"] = 256
        model.layers = more["text_encoder_out_layers"] = (1, 2, 3)
    for guidance in (1.0, 4.0):
        probe = Probe.of("ship", 2, 3, num_inference_steps=2, guidance_scale=guidance)
        theirs = drawn_by_diffusers(pipe, family, "ship", probe.seeds, 2, guidance, **more)
        # A model that is told a guidance scale answers for another one differently.
        torch.testing.assert_close(model.draw(probe), theirs, rtol=0, atol=1e-4)
    problem = Problem((Concept("airplane", "sky"),))
    edit = expunge.erase(model, problem, quick("uce", num_retain_words=5))
    before = model.draw(Probe.of("airplane", num_inference_steps=2))
    with model.using(edit):
        assert not torch.equal(model.draw(Probe.of("airplane", num_inference_steps=2)), before)


def test_pixart_that_is_told_the_size():
    pipe = pixart(alpha=True)
    config = {**pipe.transformer.config, "use_additional_conditions": True}
    config |= {"num_attention_heads": 3, "cross_attention_dim": 24}
    pipe.transformer = PixArtTransformer2DModel.from_config(config).eval()
    model = loaded(pipe, "pixart")
    sizes = model._sizes(2)
    assert sizes["resolution"].tolist() == [[16, 16]] * 2
    assert sizes["aspect_ratio"].tolist() == [[1]] * 2
    assert model.draw(Probe.of("ship", num_inference_steps=1)).isfinite().all()


def test_wan_draws_a_clip_and_shows_its_middle():
    pipe = wan()
    model = loaded(pipe, "wan")
    model.num_frames = 5
    probe = Probe.of("ship", 1, 3, num_inference_steps=2, guidance_scale=4.0)
    pipe.set_progress_bar_config(disable=True)
    clip = pipe(
        prompt=["ship"], num_inference_steps=2, guidance_scale=4.0, num_frames=5, height=64, width=64,
        generator=[torch.Generator().manual_seed(3)], output_type="pt", max_sequence_length=32,
    ).frames  # fmt: skip
    assert clip.shape[1] == 5
    torch.testing.assert_close(model.draw(probe), clip[:, 2], rtol=0, atol=1e-4)
    assert model.encode_images(torch.rand(1, 3, 64, 64)).shape[1] == 4 * 2


def test_wan_of_two_transformers_is_refused():
    pipe = wan()
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(ExpungeError, match="a Wan 2.2 of two transformers.*one transformer"):
        expunge.load(pipe)


@pytest.mark.parametrize("make", [flux2, z_image])
def test_a_tokenizer_without_a_chat_template(make):
    pipe = make()
    pipe.tokenizer.chat_template = None
    with pytest.raises(ExpungeError, match="Qwen2Tokenizer, has no chat template.*original model"):
        expunge.load(pipe).encode(["ship"])


def test_a_chat_template_without_the_prompt():
    pipe = z_image()
    pipe.tokenizer.chat_template = "<|im_start|>user"
    with pytest.raises(ExpungeError, match="does not hold the prompt once"):
        expunge.load(pipe).encode(["ship"])
    pipe.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ExpungeError, match="chat template fails: no system"):
        expunge.load(pipe).encode(["ship"])


def test_a_text_encoder_with_too_few_layers():
    pipe = flux2()
    pipe.text_encoder = qwen(16, pipe.tokenizer, layers=3)
    with pytest.raises(ExpungeError, match="reads the hidden states 9, 18, 27.*which has 4"):
        expunge.load(pipe).encode(["ship"])


def test_guidance_of_a_distilled_model_is_answered():
    model = loaded(flux2(), "flux2")
    assert (model.guidance_scale, model.num_inference_steps) == (1.0, 4)
    plain = model.draw(Probe.of("ship", num_inference_steps=1))
    with pytest.warns(expunge.ExpungeWarning, match="without guidance.*4 changes nothing"):
        asked = model.draw(Probe.of("ship", num_inference_steps=1, guidance_scale=4.0))
    assert torch.equal(plain, asked)


def test_a_causal_encoder_tells_the_phrase_to_what_is_behind_it_alone():
    model = loaded(z_image(), "z_image")
    one, other = (model.encode([f"a {word} of art"]) for word in ("ship", "bird"))
    differs = (one.embeddings - other.embeddings)[0].abs().amax(-1) > 1e-6
    ((own, end),) = one.segments(0)
    first = int(one.content_mask[0].nonzero()[1])
    assert not differs[:first].any()
    assert differs[first:end].all()
    assert differs[end : int(one.read[0].sum())].all()
    assert own == slice(0, 64)


def test_the_negative_of_sana_has_no_instruction():
    model = loaded(sana(), "sana")
    nothing, empty = model.unconditional(2), model.encode([""])
    assert nothing.read.sum(1).tolist() == [1, 1]
    assert int(empty.read.sum()) == 2
    assert not torch.allclose(nothing.embeddings[0, 0], empty.embeddings[0, 1])


def first_names_of_z_image(state):
    """A Z-Image's transformer as its first code saves it: keys, queries and values in one layer."""
    found = {}
    for key, tensor in state.items():
        key = key.replace("all_final_layer.2-1.", "final_layer.").replace(
            "all_x_embedder.2-1.", "x_embedder."
        )
        key = key.replace(".attention.to_out.0.", ".attention.out.")
        key = key.replace(".attention.norm_", ".attention.").replace("attention.q.", "attention.q_norm.")
        found[key.replace("attention.k.", "attention.k_norm.")] = tensor
    for key in [key for key in found if ".attention.to_q.weight" in key]:
        parts = [found.pop(key.replace("to_q", f"to_{part}")) for part in "qkv"]
        found[key.replace("to_q", "qkv")] = torch.cat(parts)
    return found


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("z_image", first_names_of_z_image),
        ("qwen_image", lambda state: state),
    ],
)
def test_a_single_file_of_a_denoiser(family, named, tmp_path):
    pipe = PIPELINES[family]()
    pipe.save_pretrained(tmp_path / "config")
    torch.manual_seed(1)
    spread(pipe.transformer)  # the file's denoiser is not the folder's
    save_file(
        {f"model.diffusion_model.{k}" if family == "z_image" else k: v.contiguous()
         for k, v in named(pipe.transformer.state_dict()).items()},
        tmp_path / "other.safetensors",
    )  # fmt: skip
    with pytest.raises(ExpungeError, match="holds no text encoders; give --config"):
        expunge.load(tmp_path / "other.safetensors")
    read = expunge.load(tmp_path / "other.safetensors", config=tmp_path / "config")
    model = loaded(pipe, family)
    assert type(read) is type(model)
    theirs = pipe.transformer.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in read.pipe.transformer.state_dict().items())
    sdxl().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ExpungeError, match=f"is of {type(model).__name__}, and .* of StableDiff"):
        expunge.load(tmp_path / "other.safetensors", config=tmp_path / "sdxl")


def test_a_pipeline_of_a_class_that_is_not_known_names_the_nearest():
    class ZImageOmniPipeline:
        name_or_path = ""

    with pytest.raises(
        ExpungeError, match="no family knows .*; the nearest it knows is ZImagePipeline, of z_image"
    ):
        expunge.load(ZImageOmniPipeline())


def test_a_guidance_scale_that_changes_nothing_is_said_of_cached_images_too(tmp_path, capsys):
    flux2().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "expunge.json").write_text('{"sample_size": 8, "max_sequence_length": 64}')
    command = ["draw", "ship", "--model", str(tmp_path / "model"), "--steps", "1", "-o"]
    for name in ("first", "again"):
        assert main([*command, str(tmp_path / f"{name}.png"), "--guidance", "4"]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("the guidance_scale of 4 changes nothing") == 1
    assert main([*command, str(tmp_path / "none.png"), "--guidance", "1"]) == 0
    assert "guidance" not in capsys.readouterr().err


def test_a_folder_of_a_class_that_is_not_known_names_the_nearest(tmp_path):
    """Before diffusers fails in words of its own on parts that are not those of the class."""
    sana().save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("SanaPipeline", "SanaVideoPipeline"))
    with pytest.raises(ExpungeError, match="no family knows .*; the nearest it knows is SanaPipeline"):
        expunge.load(tmp_path / "model")


def test_ace_fortifies_where_the_padding_is_not_read():
    """What the denoiser never reads opens no gate."""
    model = loaded(sana(), "sana")
    model.num_inference_steps = 2
    method = quick("ace", stages=("gate", "fortify"), fortify_steps=1, num_retain_words=12)
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), method)
    assert any(change.kind == "dense" for change in edit.changes)


def test_a_lora_of_another_family_and_a_gguf_file(tmp_path):
    z_image().save_pretrained(tmp_path / "tiny")
    factors = {"transformer.context_embedder.lora_A.weight": torch.ones(1, 8),
               "transformer.context_embedder.lora_B.weight": torch.ones(8, 1)}  # fmt: skip
    save_file(factors, tmp_path / "x.safetensors", describe_base(registry.get("families", "flux2")))
    with pytest.raises(
        ExpungeError, match="not a LoRA for this model, but, as it says, for FLUX.2: .*no layer"
    ):
        expunge.load(tmp_path / "tiny", lora=[(tmp_path / "x.safetensors", 1.0)])
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(
        ExpungeError, match="is a GGUF file.*: give the model as .safetensors or a diffusers"
    ):
        expunge.load(tmp_path / "model.gguf", config=tmp_path / "tiny")


def test_the_page_of_families_shows_the_matrix_and_its_reasons():
    page = (Path(__file__).parents[1] / "docs" / "reference" / "families.md").read_text("utf-8")
    shown = page.partition("<!-- matrix -->\n")[2].partition("<!-- end of matrix -->")[0]
    matrix, reasons = (
        [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in part.splitlines()]
        for part in shown.strip().split("\n\n")
    )
    (_, *methods), *rows = registry.tabulate_coverage()
    assert matrix[0][1:] == [row[0] for row in rows]
    assert [line[0] for line in matrix[2:]] == methods
    for i, line in enumerate(matrix[2:], 1):
        assert line[1:] == [row[i] for row in rows]
    said = {
        (stage, family.strip("`")): (need, why)
        for stage, need, families, why in reasons[2:]
        for family in families.split("`, `")
    }
    wanted = {}
    for method in methods:
        for stage, need in registry.read_declared("methods", method, "needs").items():
            for family, *_ in rows:
                lacks = registry.read_declared("families", family, "missing_capabilities")
                if need in lacks:
                    wanted[stage, family] = (need, lacks[need])
    assert said == wanted
