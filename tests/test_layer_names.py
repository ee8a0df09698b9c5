"""What other programs call the layers of every family, against diffusers' converters."""

import pytest
import torch
from diffusers.loaders import single_file_utils

from conftest import tiny_pipeline
from expunge.base import registry
from expunge.families.flux import Flux
from expunge.families.sd3 import SD3
from expunge.families.sdxl import SDXL
from tiny import sdxl


def test_a_u_nets_names_are_those_of_diffusers_converter():
    for family, pipe in (
        (SDXL, sdxl()),
        (registry.get("families", "stable_diffusion"), tiny_pipeline()),
    ):
        config, state = pipe.unet.config, pipe.unet.state_dict()
        originals = {}
        for key, tensor in state.items():
            layer, _, parameter = key.rpartition(".")
            name = family.ldm_layer_name(layer, config)
            assert name is not None, key
            originals[f"model.diffusion_model.{name}.{parameter}"] = tensor
        assert len(originals) == len(state)
        back = single_file_utils.convert_ldm_unet_checkpoint(dict(originals), config)
        assert {key: id(tensor) for key, tensor in back.items()} == {k: id(t) for k, t in state.items()}
        told = family.infer_config(list(originals))
        assert told["layers_per_block"] == config.layers_per_block
        for key in state:
            layer = key.rpartition(".")[0]
            assert family.ldm_layer_name(layer, told) == family.ldm_layer_name(layer, config)


class Fabricating(dict):
    """A checkpoint that has whatever tensor it is asked for, and remembers which it gave."""

    def __init__(self, *names):
        super().__init__(dict.fromkeys(names))
        self.given = {}

    def __missing__(self, key):
        return self.pop(key)

    def __getitem__(self, key):
        return self.pop(key)

    def pop(self, key, *_):
        return self.given.setdefault(key, torch.zeros(21504, 1))


@pytest.mark.parametrize(
    ("family", "convert", "names", "prefixes"),
    [
        (Flux, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
         ("double_blocks.0.x", "double_blocks.1.x", "single_blocks.0.x", "guidance_in.x"), ()),
        (SD3, single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
         ("joint_blocks.0.x", "joint_blocks.1.x"), ()),
    ],
)  # fmt: skip
def test_a_transformers_names_are_those_of_diffusers_converter(family, convert, names, prefixes):
    checkpoint = Fabricating(*names)
    back = convert(checkpoint)
    named = {id(tensor): key for key, tensor in checkpoint.given.items()}
    whole = {key: named[id(tensor)] for key, tensor in back.items() if id(tensor) in named}
    seen = 0
    for key, original in whole.items():
        layer, _, parameter = key.rpartition(".")
        name = family.ldm_layer_name(layer, {})
        if name is not None:
            assert f"{name}.{parameter}" == original
            seen += 1
    assert seen >= 20
    for entry in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
        assert f"{entry}.weight" in whole
        assert family.kohya_layer_name(entry, {}).startswith("lora_unet_")
    # What is part of a larger layer there has no name of its own.
    assert family.ldm_layer_name("transformer_blocks.0.attn.to_q", {}) is None


def test_kohyas_names():
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    sd = registry.get("families", "stable_diffusion")
    assert (
        sd.kohya_layer_name(key, {})
        == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    )
    assert SDXL.kohya_layer_name(key, {}) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert SDXL.kohya_layer_name("add_embedding.linear_1", {}) == "lora_unet_label_emb_0_0"
    assert Flux.kohya_layer_name("context_embedder", {}) == "lora_unet_txt_in"
    assert (
        Flux.kohya_layer_name("time_text_embed.text_embedder.linear_1", {})
        == "lora_unet_vector_in_in_layer"
    )
    assert SD3.kohya_layer_name("context_embedder", {}) == "lora_unet_context_embedder"
