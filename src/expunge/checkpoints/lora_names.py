"""What LoRA files call a model's layers, and which programs read which names.

Facts of other programs are written down here as data: the names that they know, the bases that
they tell apart, and what of a file they leave out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError

Role = Literal["down", "up", "mid", "alpha", "scale", "magnitude"]
"""What a tensor of a LoRA is to its layer; "scale" is LyCORIS's `dora_scale`, "magnitude" PEFT's."""

Pick = Callable[[Tensor, int], Tensor]
"""The rows of a larger layer's tensor that belong to one of ours; it is told the layer's inputs."""

ENDINGS: tuple[tuple[str, Role], ...] = (
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
"""How the names of a LoRA's tensors end, in all the namings there are; PEFT's may name the adapter."""

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
    " norm_added_k cap_embedder context_refiner noise_refiner feed_forward cross_attn kv_linear q_linear"
    " text_embedding time_projection patch_embedding double_stream_modulation_img"
    " double_stream_modulation_txt single_stream_modulation to_qkv_mlp_proj linear_in linear_out"
    " time_guidance_embed caption_projection y_proj t_block condition_embedder time_embedder time_proj"
    " adaln_single patch_embed all_x_embedder all_final_layer distilled_guidance_layer in_proj"
    " conv_inverted conv_depth conv_point inverted_conv depth_conv point_conv resolution_embedder"
    " aspect_ratio_embedder norm_final caption_norm attention_y_norm"
).split()
"""Parts of layers' names that have underscores of their own."""

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
"""How layers' names begin: of which component ("" the denoiser), and whether _ stands for dots."""

PEFT = ("base_model.model.", "base_model.")
"""What PEFT puts before a layer's name."""


def split(key: str) -> tuple[str, Role] | None:
    """A tensor's name as its layer's and its role; None where it is no part of a LoRA.

    >>> split("lora_unet_conv_in.lora_up.weight")
    ('lora_unet_conv_in', 'up')
    >>> split("unet.conv_in.lora_A.default.weight")
    ('unet.conv_in', 'down')
    """
    for ending, role in ENDINGS:
        if found := re.fullmatch(rf"(.+?)(?:{ending})", key):
            return found[1], role
    return None


def layers(
    stem: str, family: type[Any], config: Mapping[str, Any]
) -> tuple[tuple[str, Pick | None], ...]:
    """The layers of a pipeline that a LoRA file calls by a name, several where it means a larger one.

    Args:
        stem: a layer's name in any of the namings.
        family: the model's.
        config: its denoiser's configuration, or what of it is known.

    Returns:
        for each layer its name, and what takes its rows from those of the larger layer.
    """
    component, name = _located(stem, family.denoiser)
    if component != family.denoiser:
        if component == "text_encoder_3" and "FluxPipeline" in family.pipelines:
            component = "text_encoder_2"  # there T5 is the second, whatever a trainer counts
        return ((f"{component}.{name}", None),)
    name = name.replace(".processor.", ".")
    # FLUX.2's single blocks have one layer of that name, all others a list.
    if name.endswith(".to_out") and not name.startswith("single_transformer_blocks."):
        name += ".0"
    found = _inverse(name, family, config) or ((name, None),)
    return tuple((f"{component}.{layer}", pick) for layer, pick in found)


def dotted(name: str) -> str:
    """A name with underscores for dots, as it was.

    >>> dotted("down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0'
    """
    words = "|".join(sorted(WORDS, key=len, reverse=True))
    return ".".join(re.findall(rf"(?:{words}|[^_]+)(?=_|$)", name))


def _located(stem: str, denoiser: str) -> tuple[str, str]:
    """A layer's component and its name in it."""
    component, name = denoiser, stem
    for _ in range(2):  # PEFT's beginning stands before or behind the component's
        for prefix in PEFT:
            name = name.removeprefix(prefix)
        for prefix, of, joined in PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                component = of or denoiser
                if joined:
                    return component, dotted(name)
                break
    return component, name


def _inverse(
    name: str, family: type[Any], config: Mapping[str, Any]
) -> tuple[tuple[str, Pick | None], ...]:
    """The layers that the first code calls by this name; none where it knows no such name."""
    if family.denoiser == "unet":
        layer = _of_unet(name, config, _beside(family, "OUTSIDE"), _beside(family, "RESNET"))
        return ((layer, None),) if layer else ()
    joined: Joined = {"Flux": FLUX_JOINED, "Chroma": FLUX_JOINED, "SD3": SD3_JOINED}.get(
        family.__name__, ()
    ) or tuple(
        (pattern, tuple((f"{stem}.{x}", partial(_share, i, len(of))) for i, x in enumerate(of)))
        for pattern, stem, of in _beside(family, "JOINED")
    )
    for pattern, original in _beside(family, "ORIGINALS"):
        layer = _backwards(name, pattern, original)
        if layer is not None:
            return ((layer, None),)
    for pattern, parts in joined:
        if found := re.fullmatch(pattern, name):
            return tuple((found.expand(layer), pick) for layer, pick in parts)
    return ()


def _backwards(name: str, pattern: str, original: str) -> str | None:
    """What `pattern` matches, where its replacement `original` gives `name`."""
    number = r"(\d+)"
    wanted = re.escape(original).replace(r"\\1", number)
    if found := re.fullmatch(wanted, name):
        return pattern.replace(number, found[1] if found.groups() else "").replace("\\.", ".")
    return None


def _beside(family: type[Any], name: str) -> Any:
    """A table of names that stands in the file of a family, or of a class that it is built on."""
    modules = (sys.modules[cls.__module__] for cls in family.__mro__)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), ())


def _of_unet(
    name: str, config: Mapping[str, Any], outside: Mapping[str, str], inside_of: Mapping[str, str]
) -> str | None:
    for layer, original in outside.items():
        if name == original:
            return layer
    each = config.get("layers_per_block", 2)
    a_block = (each if isinstance(each, int) else each[0]) + 1
    resnet = {original: ours for ours, original in inside_of.items()}
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)|middle_block\.(\d+)\.(.+)", name)
    if not found:
        return None
    side, number, part, inside, middle, of_middle = found.groups()
    if middle is not None:
        if middle == "1":
            return f"mid_block.attentions.0.{of_middle}"
        return f"mid_block.resnets.{int(middle) // 2}.{resnet.get(of_middle, of_middle)}"
    block, i = divmod(int(number) - (side == "input"), a_block)
    way = "down" if side == "input" else "up"
    if inside in ("op", "conv"):
        return f"{way}_blocks.{block}.{way}samplers.0.conv"
    if part == "0":
        return f"{way}_blocks.{block}.resnets.{i}.{resnet.get(inside, inside)}"
    return f"{way}_blocks.{block}.attentions.{i}.{inside}"


def _third(i: int, rows: Tensor, _: int) -> Tensor:
    return rows.chunk(3)[i]


def _share(i: int, n: int, rows: Tensor, _: int) -> Tensor:
    return rows.chunk(n)[i]


def _swapped(rows: Tensor, _: int) -> Tensor:
    """The first code has shift before scale where diffusers has scale before shift."""
    return torch.cat(rows.chunk(2)[::-1])


def _of_single(i: int, rows: Tensor, inputs: int) -> Tensor:
    """Queries, keys, values, each as wide as the input, and the rest."""
    return rows.split([inputs, inputs, inputs, len(rows) - 3 * inputs])[i]


def _thirds(stem: str, names: str) -> tuple[tuple[str, Pick | None], ...]:
    return tuple((f"{stem}.{name}", partial(_third, i)) for i, name in enumerate(names.split()))


Joined = tuple[tuple[str, tuple[tuple[str, Pick | None], ...]], ...]

SD3_JOINED: Joined = (
    (r"joint_blocks\.(\d+)\.x_block\.attn\.qkv",
     _thirds(r"transformer_blocks.\1.attn", "to_q to_k to_v")),
    (r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv",
     _thirds(r"transformer_blocks.\1.attn2", "to_q to_k to_v")),
    (r"joint_blocks\.(\d+)\.context_block\.attn\.qkv",
     _thirds(r"transformer_blocks.\1.attn", "add_q_proj add_k_proj add_v_proj")),
    (r"final_layer\.adaLN_modulation\.1", (("norm_out.linear", _swapped),)),
    (r"x_embedder\.proj", (("pos_embed.proj", None),)),
)  # fmt: skip
"""What the first code of SD 3 holds in one layer, or in another order."""

FLUX_JOINED: Joined = (
    (r"double_blocks\.(\d+)\.img_attn\.qkv", _thirds(r"transformer_blocks.\1.attn", "to_q to_k to_v")),
    (r"double_blocks\.(\d+)\.txt_attn\.qkv",
     _thirds(r"transformer_blocks.\1.attn", "add_q_proj add_k_proj add_v_proj")),
    (r"single_blocks\.(\d+)\.linear1",
     tuple((rf"single_transformer_blocks.\1.{name}", partial(_of_single, i))
           for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))),
    (r"final_layer\.adaLN_modulation\.1", (("norm_out.linear", _swapped),)),
)  # fmt: skip
"""What FLUX.1's first code holds in one layer, or in another order."""


def diffusers_stem(layer: str) -> tuple[str, str]:
    """A layer in diffusers' naming as ComfyUI and Forge read it, too: the stem, and what joins the end.

    Of a U-Net these two know diffusers' older names alone, of a transformer the newer ones.

    >>> diffusers_stem("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    ('unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k', '_lora')
    >>> diffusers_stem("unet.conv_in")
    ('unet.conv_in', '.lora')
    """
    stem = layer.removesuffix(".0") if layer.endswith(".to_out.0") else layer
    stem, changed = re.subn(r"\.(to_(?:q|k|v|out))$", r".processor.\1", stem)
    return (stem, "_lora") if changed else (layer, ".lora")


# Which program reads what.

PROGRAMS = ("diffusers", "comfyui", "a1111", "forge", "sd-scripts")
"""The programs that are told apart."""

CALLED = {
    "diffusers": "diffusers", "comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge",
    "sd-scripts": "sd-scripts",
}  # fmt: skip
"""What they call themselves."""

ALL, NONE = "all", ""

READS: Mapping[tuple[str, str], tuple[str, str, str, str, str]] = {
    ("lora", "StableDiffusion"): (ALL, ALL, NONE, ALL, NONE),
    ("lora", "SDXL"): (ALL, ALL, NONE, ALL, NONE),
    ("lora", "SD3"): (ALL, ALL, NONE, NONE, NONE),
    ("lora", "Flux"): (ALL, ALL, NONE, ALL, NONE),
    ("kohya", "StableDiffusion"): (ALL, ALL, ALL, ALL, ALL),
    ("kohya", "SDXL"): (ALL, ALL, ALL, ALL, "all but the pooled text's layer"),
    ("kohya", "SD3"): (NONE, ALL, NONE, ALL, ALL),
    ("kohya", "Flux"): ("none of the layers through which text enters", ALL, NONE, ALL, ALL),
}
"""For each form of a LoRA and each family what every one of `PROGRAMS` reads of it."""


def reads(form: str, family: str, program: str) -> str:
    """What a program reads of a LoRA: "all", "" for nothing, or which part."""
    row = READS.get((form, family)) or _family(family).lora_readers.get(form, (NONE,) * len(PROGRAMS))
    return row[PROGRAMS.index(program)]


def _family(name: str) -> type[Any]:
    """A family by its class's name."""
    known = (registry.get("families", one) for one in registry.names("families"))
    return next(family for family in known if family.__name__ == name)


def loads_in(form: str, family: str) -> str:
    """In a sentence, which programs read a LoRA of this form, and which do not."""
    whole = [CALLED[p] for p in PROGRAMS if reads(form, family, p) == ALL]
    parts = [
        f"{CALLED[p]} reads {text}"
        for p in PROGRAMS
        if (text := reads(form, family, p)) not in (ALL, NONE)
    ]
    none = [CALLED[p] for p in PROGRAMS if reads(form, family, p) == NONE]
    text = f"Loads whole in {_and(whole)}" if whole else "Loads whole nowhere"
    return "; ".join([text, *parts, *([f"not in {_and(none)}"] if none else [])]) + "."


def form_for(program: str, family: str, has_names: bool) -> str:
    """The form of a LoRA that a program reads whole.

    Args:
        program: one of `PROGRAMS`, diffusers left out.
        family: the model family's name.
        has_names: whether kohya's naming has a name for every layer that changes.

    Raises:
        ExpungeError: it reads none; says what else there is.
    """
    if (program, family) == ("a1111", "Flux"):
        raise ExpungeError("A1111 does not draw with FLUX.1 at all; Forge and ComfyUI do")
    forms = ("kohya", "lora") if has_names else ("lora",)
    for form in forms:
        if reads(form, family, program) == ALL:
            return form
    for form in forms:
        if reads(form, family, program):
            return form
    raise ExpungeError(
        f"{CALLED[program]} reads no LoRA of this edit for {family}: export a single file"
        " (--to safetensors) or, for diffusers, --to diffusers"
    )


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# Which base a LoRA is for.


def base_of(family: str, variant: str = "") -> dict[str, str]:
    """What a LoRA file says of its base, in the words of kohya's trainers and of ModelSpec.

    A1111 and Forge hide LoRAs that say nothing of it, or show them beside the wrong base.

    Args:
        family: the model family's name.
        variant: "2" or "2-v" of Stable Diffusion (predicting the noise, or v), "m", "5-medium" or
            "5-large" of SD 3, "dev" or "schnell" of FLUX.1.

    >>> base_of("StableDiffusion", "2")["ss_v2"]
    'True'
    """
    if own := _family(family).lora_base:
        return {
            "ss_base_model_version": own["version"],
            "ss_v2": "False",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{own['architecture']}/lora",
            "modelspec.implementation": own["implementation"],
            "modelspec.resolution": own.get("resolution", "1024x1024"),
        }
    version, architecture, implementation, side = {
        ("StableDiffusion", "2"): ("sd_v2", "stable-diffusion-v2-512", DIFFUSERS, 512),
        ("StableDiffusion", "2-v"): ("sd_v2_v", "stable-diffusion-v2-768-v", DIFFUSERS, 768),
        ("Flux", "schnell"): ("flux1", "flux-1-schnell", FLUX, 1024),
    }.get((family, variant)) or {
        "StableDiffusion": ("sd_v1", "stable-diffusion-v1", DIFFUSERS, 512),
        "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", STABILITY, 1024),
        "SD3": ("sd3", f"stable-diffusion-3-{variant or 'm'}", DIFFUSERS, 1024),
        "Flux": ("flux1", "flux-1-dev", FLUX, 1024),
    }[family]
    return {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{side}x{side}",
    }


STABILITY = "https://github.com/Stability-AI/generative-models"
FLUX = "https://github.com/black-forest-labs/flux"
DIFFUSERS = "diffusers"

BASES = {
    "stable-diffusion-v1": "Stable Diffusion 1.x",
    "stable-diffusion-v2-512": "Stable Diffusion 2.x",
    "stable-diffusion-v2-768-v": "Stable Diffusion 2.x, predicting v",
    "stable-diffusion-xl-v1-base": "SDXL",
    "stable-diffusion-3": "SD 3",
    "flux-1-dev": "FLUX.1-dev",
    "flux-1-schnell": "FLUX.1-schnell",
}
"""What the architectures are called in a sentence."""


def base_named(metadata: Mapping[str, str]) -> str:
    """For which base a LoRA's metadata says that it is; "" where they say nothing of it."""
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    for name, text in BASES.items():
        if architecture == name or (name == "stable-diffusion-3" and architecture.startswith(name)):
            return text
    version = metadata.get("ss_base_model_version", "")
    for name in registry.names("families"):
        own = registry.declared("families", name, "lora_base")
        if own and (architecture == own["architecture"] or version == own["version"]):
            return own["name"]
    versions = {"sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX.1", "sd_v2": "Stable Diffusion 2.x"}
    for start, text in versions.items():
        if version.startswith(start):
            return text
    if metadata.get("ss_v2") == "True":
        return "Stable Diffusion 2.x"
    return "Stable Diffusion 1.x" if version or metadata.get("ss_v2") == "False" else architecture


def table() -> str:
    """Which program reads which form of a LoRA, in Markdown."""
    names = {"StableDiffusion": "SD 1.x, 2.x", "SDXL": "SDXL", "SD3": "SD 3, 3.5", "Flux": "FLUX.1"}
    heads = ["family", "`--to`", *(CALLED[program] for program in PROGRAMS)]
    rows = [heads, ["---"] * len(heads)]
    for family, name in names.items():
        for form in ("lora", "kohya"):
            cells = [text or "–" for text in READS[form, family]]
            rows.append([name, f"`{form}`", *("yes" if cell == ALL else cell for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
