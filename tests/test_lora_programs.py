"""What other programs read of our LoRAs: their maps of names, after their published sources."""

import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import expunge
from edits import edited, low_rank
from expunge import ExpungeError
from expunge.base import registry
from expunge.changes import LowRank
from expunge.checkpoints import loading
from expunge.checkpoints.export import export
from expunge.checkpoints.lora import Lora, read_lora
from expunge.checkpoints.lora.base_models import describe_base, read_base_title
from expunge.checkpoints.lora.keys import find_layers, make_diffusers_stem
from expunge.checkpoints.lora.programs import (
    ALL,
    PROGRAMS,
    choose_form,
    describe_support,
    find_support,
    make_table,
)
from expunge.checkpoints.weight_changes import group_by_place
from expunge.families._lora import BaseModel, LoraNaming, split_equally
from expunge.families.flux import Flux
from expunge.families.sd3 import SD3
from expunge.families.sdxl import SDXL
from expunge.families.stable_diffusion import StableDiffusion
from expunge.model import Model
from tiny import PIPELINES

FAMILIES = {family.__name__: family for family in (StableDiffusion, SDXL, SD3, Flux)}


def standard_unet():
    """The layout of Stable Diffusion 1 and 2, with few channels: A1111 counts on two layers a block."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8, 8),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def weighted(network):
    """The layers with weights that a LoRA can hold."""
    return {
        name: module.weight
        for name, module in network.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim > 1
    }


# What the programs call the layers: counted block by block, as they build their networks.

RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
BESIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
          "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
          "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def first_codes_names(unet):
    """For each of diffusers' layers of a U-Net what the first code calls it."""
    blocks, found = {}, dict(BESIDE)
    place = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{place}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{place}.1"
            place += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    for part, name in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        blocks[f"mid_block.{part}"] = f"middle_block.{name}"
    place = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{place}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{place}.1"
            place += 1
        after = 1 + bool(getattr(block, "attentions", None))
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    for name in weighted(unet):
        for stem, original in blocks.items():
            if name == stem:
                found[name] = original
            elif name.startswith(stem + "."):
                inside = name.removeprefix(stem + ".")
                found[name] = f"{original}.{RESNET.get(inside, inside)}"
    return {name: found[name] for name in weighted(unet)}


SD3_NAMES = {
    "context_embedder": "context_embedder", "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "proj_out": "final_layer.linear",
}  # fmt: skip
FLUX_NAMES = {
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip


NEW_NAMES = {
    "Flux2": {"context_embedder": "txt_in"},
    "Chroma": {"context_embedder": "txt_in"},
    "ZImage": {"cap_embedder.1": "cap_embedder.1"},
    "QwenImage": {"txt_in": "txt_in"},
    "Wan": {f"blocks.{i}.attn2.to_{x}": f"blocks.{i}.cross_attn.{x}" for i in range(2) for x in "kv"},
    "PixArt": {},  # keys and values are one layer there
}
"""What ComfyUI's networks call the layers through which text enters, by diffusers' names."""

DIFFUSERS_NAMES = ("SD3", "Flux", "Flux2", "Chroma", "ZImage", "QwenImage", "PixArt")
"""The families whose layers it knows by diffusers' names, too."""


def comfyui(family, network, transformers=DIFFUSERS_NAMES):
    """ComfyUI's map: for each name that it knows, the layer it stands for, in diffusers' naming."""
    known = {}
    if family in ("StableDiffusion", "SDXL"):
        for name, original in first_codes_names(network).items():
            known[f"lora_unet_{original.replace('.', '_')}"] = name
            known[f"diffusion_model.{original}"] = name
            known[f"lora_unet_{name.replace('.', '_')}"] = name
            known[f"lycoris_{name.replace('.', '_')}"] = name
            for prefix in ("", "unet."):
                key = prefix + name.replace(".to_", ".processor.to_")
                known[key.removesuffix(".0") if key.endswith(".to_out.0") else key] = name
        return known
    names = {"SD3": SD3_NAMES, "Flux": FLUX_NAMES, **NEW_NAMES}[family]
    for name, original in names.items():
        known[f"lora_unet_{original.replace('.', '_')}"] = name
        known[f"diffusion_model.{original}"] = name
    if family in transformers:
        for name in weighted(network):
            known[f"transformer.{name}"] = name
            known[f"lora_transformer_{name.replace('.', '_')}"] = name
            known[f"lycoris_{name.replace('.', '_')}"] = name
    return known


COMFYUI_ENDS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)


def as_comfyui(state, known):
    """What each layer is moved by, and the tensors that nothing reads."""
    moved, used = {}, set()
    for key, name in known.items():
        alpha = state.get(f"{key}.alpha")
        used |= {f"{key}.alpha"} & state.keys()
        for up, down in COMFYUI_ENDS:
            if key + up in state:
                b, a = state[key + up].flatten(1), state[key + down].flatten(1)
                moved[name] = (1.0 if alpha is None else float(alpha) / len(a)) * (b @ a)
                used |= {key + up, key + down}
                break
    return moved, set(state) - used


def as_forge(state, family, network):
    """Forge has ComfyUI's map, but for the transformer of SD 3."""
    return as_comfyui(state, comfyui(family, network, transformers=("Flux",)))


NEW = [
    (family, form)
    for family in (registry.get("families", name) for name in registry.list_names("families"))
    for form in ("lora", "kohya")
    if family.__name__ not in FAMILIES and form in family.lora_naming.readers
]
NEW_IDS = [f"{family.__name__}-{form}" for family, form in NEW]


@pytest.mark.parametrize(("family", "form"), NEW, ids=NEW_IDS)
def test_comfyui_reads_what_a_family_says(written, family, form):
    _, network, files, deltas = written[family.__name__]
    state = load_file(files[form])
    if family.__name__ not in NEW_NAMES:  # ComfyUI has no such model
        assert not find_support(form, family, "comfyui")
        return
    moved, unread = as_comfyui(state, comfyui(family.__name__, network))
    if find_support(form, family, "comfyui"):
        assert (set(moved), unread) == (set(deltas), set())
        for name, delta in moved.items():
            torch.testing.assert_close(delta, deltas[name], rtol=1e-4, atol=1e-5)
    else:
        assert not moved


@pytest.mark.parametrize(("family", "form"), NEW, ids=NEW_IDS)
def test_diffusers_takes_a_file_for_what_a_family_says(written, family, form):
    """Its own reader of files, before PEFT is asked."""
    pipe, _, files, deltas = written[family.__name__]
    said = find_support(form, family, "diffusers")
    if not hasattr(pipe, "lora_state_dict"):
        assert not said
        return
    if said != ALL:
        return  # the rest is FLUX.1's
    state = pipe.lora_state_dict(load_file(files[form]))
    found = state[0] if isinstance(state, tuple) else state
    moved = {
        key.removeprefix("transformer.").removesuffix(".lora_B.weight"): up
        @ found[key.replace(".lora_B.", ".lora_A.")]
        for key, up in found.items()
        if key.endswith(".lora_B.weight")
    }
    assert len(found) == 2 * len(moved)
    assert moved.keys() == deltas.keys()
    for name, delta in moved.items():
        torch.testing.assert_close(delta, deltas[name], rtol=1e-4, atol=1e-5)


EVERY = [*((family, form) for family in FAMILIES.values() for form in ("lora", "kohya")), *NEW]


@pytest.mark.parametrize(("family", "form"), EVERY, ids=[f"{f.__name__}-{form}" for f, form in EVERY])
def test_a_lora_is_read_back_and_halved(written, family, form):
    """In both namings, for every family: strength 0.5 is half, 2 is twice."""
    assert {family for family, _ in EVERY} == set(registry.load_all("families").values())
    pipe, network, files, deltas = written[family.__name__]
    for strength in (1.0, 0.5, 2.0):
        found = read_lora(files[form], type(pipe), network.config, strength)
        assert {c.layers[0].partition(".")[2] for c in found} == deltas.keys()
        for change in found:
            delta = strength * deltas[change.layers[0].partition(".")[2]]
            torch.testing.assert_close(change.up @ change.down, delta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "form"), NEW, ids=NEW_IDS)
def test_a_new_familys_lora_says_its_base(family, form):
    said = describe_base(family)
    assert read_base_title(said) == family.lora_naming.bases[""].title
    assert said["modelspec.architecture"].endswith("/lora")
    assert describe_support(form, family).startswith("Loads whole in ")


def as_a1111(state, family, network):
    """A1111's: everything up to the first dot is the layer, in kohya's naming or the first code's."""
    if family in ("SD3", "Flux"):
        # On SD 3 it splits names at the last two dots, and an alpha has one: it stops. It has no FLUX.1.
        return {}, set(state)
    originals = {v.replace(".", "_"): k for k, v in first_codes_names(network).items()}
    parts = {}
    for key, tensor in state.items():
        stem, _, part = key.partition(".")
        name = stem.removeprefix("lora_unet_")
        if found := re.match(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
            way, i, kind, j, rest = found.groups()
            place = int(i) * 3 + int(j) + (way == "down")
            rest = {k: v.replace(".", "_") for k, v in RESNET.items()}.get(rest, rest)
            side = "input" if way == "down" else "output"
            name = f"{side}_blocks_{place}_{int(kind == 'attentions')}_{rest}"
        elif found := re.match(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
            kind, i, rest = found.groups()
            rest = {k: v.replace(".", "_") for k, v in RESNET.items()}.get(rest, rest)
            name = f"middle_block_{1 if kind == 'attentions' else int(i) * 2}_{rest}"
        if stem.startswith("lora_unet_") and name in originals:
            parts.setdefault(originals[name], {})[part] = (key, tensor)
    moved = {
        name: float(p["alpha"][1]) / len(p["lora_down.weight"][1])
        * (p["lora_up.weight"][1].flatten(1) @ p["lora_down.weight"][1].flatten(1))
        for name, p in parts.items()
    }  # fmt: skip
    return moved, set(state) - {key for p in parts.values() for key, _ in p.values()}


def as_sd_scripts(state, family, network):
    """sd-scripts': kohya's naming, of a U-Net what lies in its transformers, alpha demanded."""
    if family in ("StableDiffusion", "SDXL"):
        names = {
            f"lora_unet_{(n if family == 'StableDiffusion' else o).replace('.', '_')}": n
            for n, o in first_codes_names(network).items()
            if ".attentions." in n
        }
    else:
        table = SD3_NAMES if family == "SD3" else FLUX_NAMES
        names = {f"lora_unet_{original.replace('.', '_')}": name for name, original in table.items()}
    there = {key: name for key, name in names.items() if f"{key}.alpha" in state}
    return as_comfyui(state, there)


AS = {
    "comfyui": lambda state, family, network: as_comfyui(state, comfyui(family, network)),
    "forge": as_forge,
    "a1111": as_a1111,
    "sd-scripts": as_sd_scripts,
}


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """For each family its network, and a LoRA of its text's layers in both forms, with what it moves."""
    made = {}
    for name, make in PIPELINES.items():
        pipe = make()
        family = loading.find_family(type(pipe).__name__)
        model = expunge.load(pipe)
        network = standard_unet() if name == "stable_diffusion" else network_of(pipe)
        pipe.register_modules(**{family.denoiser: network})
        changes = low_rank(model)
        lora = Lora.from_changes(
            lambda layer, _, model=model: model.weight(layer), group_by_place(changes)
        )
        files = {}
        named = all(
            family.kohya_layer_name(c.layers[0].partition(".")[2], network.config) for c in changes
        )
        for form in ("lora", "kohya") if named else ("lora",):
            files[form] = tmp_path_factory.mktemp(name) / f"{form}.safetensors"
            naming = "kohya" if form == "kohya" else "diffusers"
            lora.save(
                files[form], naming,
                lambda x, f=family, n=network: f.kohya_layer_name(x.partition(".")[2], n.config),
                torch.float32, {},
            )  # fmt: skip
        deltas = {c.layers[0].partition(".")[2]: c.up @ c.down for c in changes}
        made[family.__name__] = (pipe, network, files, deltas)
    return made


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("family", ["StableDiffusion", "SDXL", "SD3", "Flux"])
@pytest.mark.parametrize("program", list(AS))
def test_the_table_is_what_the_programs_maps_say(written, form, family, program):
    _, network, files, deltas = written[family]
    state = load_file(files[form])
    moved, unread = AS[program](state, family, network)
    for name, delta in moved.items():
        torch.testing.assert_close(delta, deltas[name], rtol=1e-4, atol=1e-5)
    said = find_support(form, FAMILIES[family], program)
    if said == ALL:
        assert (len(moved), unread) == (len(deltas), set())
    elif said == "":
        assert not moved
        assert unread == set(state)
    else:
        assert 0 < len(moved) < len(deltas)
        assert (family, set(deltas) - set(moved)) == ("SDXL", {"add_embedding.linear_1"})


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("family", ["StableDiffusion", "SDXL", "SD3", "Flux"])
def test_every_form_of_every_family_is_read_back(written, form, family):
    pipe, network, files, deltas = written[family]
    found = {
        c.layers[0].partition(".")[2]: c for c in read_lora(files[form], type(pipe), network.config)
    }
    assert found.keys() == deltas.keys()
    for name, change in found.items():
        torch.testing.assert_close(change.up @ change.down, deltas[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("family", ["StableDiffusion", "SDXL", "SD3", "Flux"])
def test_diffusers_reads_what_the_table_says(written, form, family):
    pytest.importorskip("peft")
    pipe, network, files, deltas = written[family]
    said = find_support(form, FAMILIES[family], "diffusers")
    pipe.load_lora_weights(str(files[form])) if said else None
    loaded = {key.partition(".lora_A")[0] for key, _ in network.named_parameters() if ".lora_A" in key}
    if said:
        pipe.unload_lora_weights()
    assert loaded == (set(deltas) if said == ALL else set())


@pytest.mark.parametrize("name", list(PIPELINES))
def test_every_layer_is_found_again_in_every_naming(name):
    pipe = PIPELINES[name]()
    network, family = network_of(pipe), loading.find_family(type(pipe).__name__)
    seen = 0
    for layer in weighted(network):
        whole = f"{family.denoiser}.{layer}"
        original = family.ldm_layer_name(layer, network.config)
        stems = {whole, f"base_model.model.{layer}", f"{family.denoiser}.base_model.model.{layer}",
                 f"lora_unet_{layer.replace('.', '_')}", f"lycoris_{layer.replace('.', '_')}",
                 make_diffusers_stem(whole)[0]}  # fmt: skip
        if original:
            stems |= {f"diffusion_model.{original}", f"lora_unet_{original.replace('.', '_')}", original}
        for stem in stems:
            assert find_layers(stem, family, network.config) == ((whole, None),), stem
            seen += 1
    assert seen > 100


def test_layers_that_are_one_in_the_first_code_are_split(tmp_path):
    torch.manual_seed(0)
    pipe = PIPELINES["flux"]()
    width, rank = 32, 3
    hidden = len(pipe.transformer.single_transformer_blocks[0].proj_mlp.weight)
    state = {}
    for stem, rows in (("double_blocks_0_img_attn_qkv", 3 * width),
                       ("single_blocks_0_linear1", 3 * width + hidden),
                       ("final_layer_adaLN_modulation_1", 2 * width)):  # fmt: skip
        state[f"lora_unet_{stem}.lora_up.weight"] = torch.randn(rows, rank)
        state[f"lora_unet_{stem}.lora_down.weight"] = torch.randn(rank, width)
        state[f"lora_unet_{stem}.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "x.safetensors")
    found = {c.layers[0]: c.up @ c.down for c in read_lora(tmp_path / "x.safetensors", type(pipe), {})}

    def product(stem):
        return (
            2 * state[f"lora_unet_{stem}.lora_up.weight"] @ state[f"lora_unet_{stem}.lora_down.weight"]
        )

    double, single = product("double_blocks_0_img_attn_qkv"), product("single_blocks_0_linear1")
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(i * width, (i + 1) * width)
        torch.testing.assert_close(found[f"transformer.transformer_blocks.0.attn.{name}"], double[rows])
        torch.testing.assert_close(
            found[f"transformer.single_transformer_blocks.0.attn.{name}"], single[rows]
        )
    mlp = found["transformer.single_transformer_blocks.0.proj_mlp"]
    torch.testing.assert_close(mlp, single[3 * width :])
    last = product("final_layer_adaLN_modulation_1")
    torch.testing.assert_close(
        found["transformer.norm_out.linear"], torch.cat([last[width:], last[:width]])
    )
    for change in read_lora(tmp_path / "x.safetensors", type(pipe), {}):
        layer = pipe.transformer.get_submodule(change.layers[0].partition(".")[2])
        assert change.fits(layer.weight.shape)


@pytest.mark.parametrize(
    ("program", "name", "form"),
    [("comfyui", "stable_diffusion", "kohya"), ("comfyui", "sd3", "kohya"), ("comfyui", "flux", "kohya"),
     ("a1111", "sdxl", "kohya"), ("forge", "flux", "kohya"), ("sd-scripts", "sdxl", "kohya")],
)  # fmt: skip
def test_a_program_gets_the_form_that_it_reads(program, name, form, tmp_path):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / "model")
    model = expunge.load(pipe)
    done = export(
        edited(model, low_rank(model)), program, tmp_path / "model", tmp_path / "x.safetensors"
    )
    assert done.form == form
    assert describe_support(form, type(model)) in done.notes[-1]
    assert PROGRAMS[program] in done.notes[-1]


def test_a_layer_without_a_name_of_kohyas_goes_to_comfyui_in_diffusers_naming(tmp_path):
    pipe = PIPELINES["sd3"]()
    pipe.save_pretrained(tmp_path / "model")
    model = expunge.load(pipe)
    change = LowRank(
        ("transformer.transformer_blocks.0.attn.to_q",), torch.ones(32, 1), torch.ones(1, 32)
    )
    edit = edited(model, [change])
    done = export(edit, "comfyui", tmp_path / "model", tmp_path / "x.safetensors")
    assert done.form == "lora"
    moved, unread = as_comfyui(load_file(done.path), comfyui("SD3", pipe.transformer))
    assert (list(moved), unread) == (["transformer_blocks.0.attn.to_q"], set())
    with pytest.raises(
        ExpungeError, match="Forge reads no LoRA of this edit for SD3: export a single file"
    ):
        export(edit, "forge", tmp_path / "model", tmp_path / "y.safetensors")


def test_what_no_program_reads_is_refused():
    with pytest.raises(
        ExpungeError, match="A1111 reads no LoRA of this edit for SD3: export a single file"
    ):
        choose_form("a1111", SD3, True)
    with pytest.raises(ExpungeError, match="A1111 does not run FLUX.1 at all"):
        choose_form("a1111", Flux, True)


def test_the_page_has_the_table():
    from pathlib import Path

    page = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
    assert make_table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "variant", "version", "second", "architecture", "named"),
    [
        ("StableDiffusion", "", "sd_v1", "False", "stable-diffusion-v1/lora", "Stable Diffusion 1.x"),
        ("StableDiffusion", "2", "sd_v2", "True", "stable-diffusion-v2-512/lora",
         "Stable Diffusion 2.x"),
        ("StableDiffusion", "2-v", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora",
         "Stable Diffusion 2.x, predicting v"),
        ("SDXL", "", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "SDXL"),
        ("SD3", "m", "sd3", "False", "stable-diffusion-3-m/lora", "SD 3"),
        ("Flux", "dev", "flux1", "False", "flux-1-dev/lora", "FLUX.1-dev"),
        ("Flux", "schnell", "flux1", "False", "flux-1-schnell/lora", "FLUX.1-schnell"),
    ],
)  # fmt: skip
def test_a_lora_says_for_which_base_it_is(family, variant, version, second, architecture, named):
    said = describe_base(FAMILIES[family], variant)
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, second)
    assert said["modelspec.architecture"] == architecture
    assert read_base_title(said) == named


class Newcomer(StableDiffusion):
    """A family of another package: everything that names its layers stands in its own class."""

    denoiser = "transformer"
    ldm_layers = ((r"blocks\.(\d+)\.attn\.out", r"layers.\1.self_attn.wo"),)
    ldm_fused_layers = ((r"layers\.(\d+)\.self_attn\.wqkv", split_equally(r"blocks.\1.attn", "q k v")),)
    lora_naming = LoraNaming(
        title="Newcomer",
        bases={"": BaseModel("Newcomer 1", "new1", "newcomer-1")},
        readers={"kohya": {"comfyui": ALL}},
        unsupported={"a1111": "A1111 does not run Newcomer at all"},
        words=("self_attn",),
    )
    ldm_layer_name: Any = classmethod(Model.ldm_layer_name.__func__)  # type: ignore[attr-defined]
    find_ldm_layers: Any = classmethod(Model.find_ldm_layers.__func__)  # type: ignore[attr-defined]
    kohya_layer_name: Any = classmethod(Model.kohya_layer_name.__func__)  # type: ignore[attr-defined]


def test_a_family_says_all_that_is_to_say_in_its_own_class(monkeypatch):
    assert Newcomer.kohya_layer_name("blocks.3.attn.out", {}) == "lora_unet_layers_3_self_attn_wo"
    ((layer, pick),) = find_layers("lora_unet_layers_3_self_attn_wo", Newcomer, {})
    assert (layer, pick) == ("transformer.blocks.3.attn.out", None)
    found = find_layers("diffusion_model.layers.1.self_attn.wqkv", Newcomer, {})
    assert [layer for layer, _ in found] == [f"transformer.blocks.1.attn.{x}" for x in "qkv"]
    rows = torch.arange(6.0)[:, None]
    assert [pick(rows, 2).flatten().tolist() for _, pick in found] == [[0, 1], [2, 3], [4, 5]]
    assert describe_support("kohya", Newcomer).startswith("Loads whole in ComfyUI; not in diffusers")
    assert choose_form("comfyui", Newcomer, True) == "kohya"
    with pytest.raises(ExpungeError, match="A1111 does not run Newcomer at all"):
        choose_form("a1111", Newcomer, True)
    with pytest.raises(ExpungeError, match="ComfyUI reads no LoRA of this edit for Newcomer"):
        choose_form("comfyui", Newcomer, False)
    assert describe_base(Newcomer)["modelspec.architecture"] == "newcomer-1/lora"
    monkeypatch.setattr(registry, "list_names", lambda kind: ("newcomer",))
    monkeypatch.setattr(registry, "get", lambda kind, name: Newcomer)
    assert read_base_title(describe_base(Newcomer)) == "Newcomer 1"
    assert "| Newcomer | `kohya` | – | yes | – | – | – |" in make_table()


def test_a_family_that_says_nothing_is_read_by_diffusers_alone():
    class Silent(StableDiffusion):
        lora_naming = None

    assert describe_base(Silent) == {}
    assert find_support("lora", Silent, "diffusers") == ALL
    assert find_support("kohya", Silent, "comfyui") == ""
    with pytest.raises(ExpungeError, match="Forge reads no LoRA of this edit for Silent"):
        choose_form("forge", Silent, True)
