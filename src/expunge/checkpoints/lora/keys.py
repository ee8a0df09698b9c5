"""Names of LoRA tensors: which layer a key belongs to, and what part of the LoRA it is.

A key consists of a prefix (the component and the trainer), the layer's name with dots or underscores,
and an ending (the part). The family's class states what the original code calls its layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from expunge.base.errors import ExpungeError
from expunge.checkpoints.lora.programs import get_naming

if TYPE_CHECKING:
    from expunge.families._lora import LayerRows
    from expunge.model import Model

Part = Literal["down", "up", "mid", "alpha", "scale", "magnitude"]
"""What a tensor of a LoRA is to its layer; "scale" is LyCORIS's `dora_scale`, "magnitude" PEFT's."""

ENDINGS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"\.lora_A(?:\.[^.]+)?\.weight|\.lora_A", "down"),
    (r"\.lora_B(?:\.[^.]+)?\.weight|\.lora_B", "up"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "scale"),
    (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", "magnitude"),
)
"""Regular expressions of how keys end in every naming, and the part that each ending means. PEFT may put
an adapter's name into the ending."""

WORDS = (
    "down_blocks mid_block up_blocks transformer_blocks single_transformer_blocks to_q to_k to_v to_out"
    " to_add_out add_q_proj add_k_proj add_v_proj proj_in proj_out proj_mlp conv_in conv_out"
    " conv_norm_out conv_shortcut time_emb_proj time_embedding add_embedding class_embedding linear_1"
    " linear_2 ff_context norm1_context norm2_context norm_out context_embedder x_embedder t_embedder"
    " y_embedder time_text_embed text_embedder timestep_embedder guidance_embedder pos_embed"
    " input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed"
    " label_emb joint_blocks x_block context_block adaLN_modulation final_layer double_blocks"
    " single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod txt_in img_in time_in vector_in"
    " guidance_in in_layer out_layer text_model self_attn q_proj k_proj v_proj out_proj text_projection"
    " token_embedding layer_norm wi_0 wi_1 relative_attention_bias ln_q ln_k norm_q norm_k norm_added_q"
    " norm_added_k"
).split()
"""Parts of layer names that contain underscores. A family adds its own in `lora_naming.words`."""

PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("lora_unet_", "", True),
    ("lora_transformer_", "", True),
    ("lycoris_", "", True),
    ("lora_te1_", "text_encoder", True),
    ("lora_te2_", "text_encoder_2", True),
    ("lora_te3_", "text_encoder_3", True),
    ("lora_te_", "text_encoder", True),
    ("model.diffusion_model.", "", False),
    ("diffusion_model.", "", False),
    ("unet.", "", False),
    ("transformer.", "", False),
    ("text_encoder.", "text_encoder", False),
    ("text_encoder_2.", "text_encoder_2", False),
    ("text_encoder_3.", "text_encoder_3", False),
)
"""How keys begin: the prefix, the pipeline's component ("" is the denoiser), and whether the rest of the
name has underscores in place of dots."""

PEFT_PREFIXES = ("base_model.model.", "base_model.")
"""What PEFT writes before a layer's name."""


def split_key(key: str) -> tuple[str, Part] | None:
    """Split a tensor's name into its layer's stem and its part; None where it is no part of a LoRA.

    >>> split_key("lora_unet_conv_in.lora_up.weight")
    ('lora_unet_conv_in', 'up')
    >>> split_key("unet.conv_in.lora_A.default.weight")
    ('unet.conv_in', 'down')
    """
    for ending, part in ENDINGS:
        if found := re.fullmatch(rf"(.+?)(?:{ending})", key):
            return found[1], part
    return None


def find_layers(stem: str, family: type[Model], config: Mapping[str, Any]) -> tuple[LayerRows, ...]:
    """Find the pipeline's layers that a LoRA file calls by a name; several for a fused layer.

    Args:
        stem: a layer's name in any naming, as `split_key` returns it.
        family: the model's family.
        config: the denoiser's configuration, or what is known of it.

    Returns:
        for each layer its name, with the component before it, and a function that selects its rows from
        those of the fused layer; None for all rows.
    """
    component, name = _split_component(stem, family)
    if component != family.denoiser:
        component = get_naming(family).text_encoders.get(component, component)
        return ((f"{component}.{name}", None),)
    # diffusers' older names: attention processors, and the output projection without its number.
    name = name.replace(".processor.", ".")
    # FLUX.2's single blocks have one layer of that name, all others a list.
    if name.endswith(".to_out") and not name.startswith("single_transformer_blocks."):
        name += ".0"
    # What the original code does not call so is taken for diffusers' own name.
    found = family.find_ldm_layers(name, config) or ((name, None),)
    return tuple((f"{component}.{layer}", pick) for layer, pick in found)


def restore_dots(name: str, words: tuple[str, ...] = ()) -> str:
    """Restore the dots of a name that was written with underscores in their place.

    >>> restore_dots("down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0'
    """
    # Longest first, so that "transformer_blocks" is not found inside "single_transformer_blocks".
    known = "|".join(sorted((*WORDS, *words), key=len, reverse=True))
    return ".".join(re.findall(rf"(?:{known}|[^_]+)(?=_|$)", name))


def make_diffusers_stem(layer: str) -> tuple[str, str]:
    """Name a U-Net's layer so that diffusers, ComfyUI and Forge all read it.

    ComfyUI and Forge know only diffusers' older names of a U-Net, with attention processors.

    Args:
        layer: the layer's name, with the component before it.

    Returns:
        the stem of its keys, and the text between the stem and ".up.weight" or ".down.weight".

    >>> make_diffusers_stem("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    ('unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k', '_lora')
    >>> make_diffusers_stem("unet.conv_in")
    ('unet.conv_in', '.lora')
    """
    stem = layer.removesuffix(".0") if layer.endswith(".to_out.0") else layer
    stem, changed = re.subn(r"\.(to_(?:q|k|v|out))$", r".processor.\1", stem)
    return (stem, "_lora") if changed else (layer, ".lora")


TEXT_LAYER = r"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12]))"
"""A regular expression of the layers of a CLIP that programs read LoRAs of."""


def name_text_layer(layer: str, family: type[Model], form: Literal["diffusers", "kohya"]) -> str | None:
    """Name a text encoder's layer in a LoRA; None where programs read no LoRA of it.

    The file calls CLIP's tower `text_model`, as programs do, whatever transformers calls it here.

    Args:
        layer: the layer's name, with the component before it.
        family: the model's family.
        form: whose naming.
    """
    component, _, inside = layer.partition(".")
    prefix = get_naming(family).text_keys.get(component)
    found = re.fullmatch(TEXT_LAYER, inside)
    if prefix is None or found is None:
        return None
    name = f"text_model.{found[1]}"
    return f"{component}.{name}" if form == "diffusers" else prefix + name.replace(".", "_")


def require_text_keys(layers: Sequence[str], family: type[Model], form: str) -> None:
    """Check that programs read LoRAs of the text encoders' layers that an edit changes.

    Args:
        layers: the layers whose weights change.
        family: the model's family.
        form: the form or program that was asked for.

    Raises:
        ExpungeError: of one they read none; the message says what to export instead.
    """
    for layer in layers:
        if layer.startswith("text_encoder") and name_text_layer(layer, family, "diffusers") is None:
            component = layer.partition(".")[0]
            known = component in get_naming(family).text_keys
            what = f"the layer {layer}" if known else f"{family.__name__}'s {component}"
            raise ExpungeError(
                f"no program reads a LoRA of {what}, which this edit changes, so {form} cannot hold it:"
                " export it to a diffusers folder (--to diffusers)"
            )


def _split_component(stem: str, family: type[Model]) -> tuple[str, str]:
    """The component of a layer, and the layer's name inside it."""
    component, name = family.denoiser, stem
    for _ in range(2):  # PEFT's prefix may stand before or behind the component's
        for prefix in PEFT_PREFIXES:
            name = name.removeprefix(prefix)
        for prefix, of, joined in PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                component = of or family.denoiser
                if joined:
                    return component, restore_dots(name, get_naming(family).words)
                break
    return component, name


def shorten(name: str) -> str:
    """Shorten a tensor's name for a message, keeping its beginning and its end."""
    return name if len(name) <= 80 else f"{name[:40]}…{name[-36:]}"
