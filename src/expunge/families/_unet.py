"""What the families with a U-Net share: cross-attention, and noise that keeps the variance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.changes import check_in_use, iterate_layers
from expunge.families._latent import LatentModel
from expunge.families._lora import LayerRows
from expunge.families._noise import Diffusion
from expunge.ops.attention import CrossAttention
from expunge.text import TextEntry


class UNetModel(Diffusion, LatentModel):
    """A U-Net that text enters through the key and value projections of every cross-attention.

    They see the same token embeddings in every layer, image and step.
    """

    denoiser = "unet"
    single_file_key = "input_blocks.0.0.weight"

    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        found: list[tuple[str, Any]] = [
            (name, module) for name, module in iterate_layers(self.network) if name.endswith("attn2")
        ]
        for name, _ in found:
            check_in_use(self.pipe, f"unet.{name}.to_k", hooked=True)
        return tuple(
            CrossAttention(module.to_q, module.to_k, module.heads, module.scale) for _, module in found
        )

    def text_entries(self) -> tuple[TextEntry, ...]:
        return tuple(
            TextEntry(f"unet.{name}", "key" if name.endswith("to_k") else "value")
            for name, _ in iterate_layers(self.network)
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        )

    @classmethod
    def ldm_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        if layer in OUTSIDE:
            return OUTSIDE[layer]
        found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)(?:\.(.+))?", layer)
        if found is None:
            return None
        side, block, kind, place, inside = found.groups()
        if kind == "resnets":
            inside = RESNET.get(inside, inside)
        number, a_block = int(block or 0), config.get("layers_per_block", 2) + 1
        i = number * a_block + int(place)
        part = {"resnets": 0, "attentions": 1}.get(kind)
        if side == "mid":
            # middle_block is resnet, attention, resnet: 0, 1 and 2.
            return f"middle_block.{2 * int(place) if part == 0 else 1}.{inside}"
        # A level has `layers_per_block` input blocks and one that downsamples: hence `a_block`'s + 1.
        if kind == "downsamplers":
            return f"input_blocks.{(number + 1) * a_block}.0.op"
        if kind == "upsamplers":
            # The upsampler shares the block of the level's last layer, behind its attention if any.
            attends = "CrossAttn" in str((config.get("up_block_types") or UP)[number])
            return f"output_blocks.{(number + 1) * a_block - 1}.{1 + attends}.conv"
        return f"{'input' if side == 'down' else 'output'}_blocks.{i + (side == 'down')}.{part}.{inside}"

    @classmethod
    def find_ldm_layers(cls, name: str, config: Mapping[str, Any]) -> tuple[LayerRows, ...]:
        for layer, original in OUTSIDE.items():
            if name == original:
                return ((layer, None),)
        found = _find_in_blocks(name, config)
        return ((found, None),) if found else ()

    @classmethod
    def infer_config(cls, tensors: Sequence[str]) -> Mapping[str, Any]:
        blocks = {found[1] for name in tensors if (found := re.search(r"output_blocks\.(\d+)\.", name))}
        # Each level but the last ends in one downsampling convolution.
        levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
        attending = {
            found[1] for n in tensors if (found := re.search(r"output_blocks\.(\d+)\.1\.norm", n))
        }
        a_block = len(blocks) // levels
        # A level's first block tells of the whole level whether it attends.
        up = [f"{'CrossAttn' * (str(i * a_block) in attending)}UpBlock2D" for i in range(levels)]
        return {"layers_per_block": a_block - 1, "up_block_types": up}


def _find_in_blocks(name: str, config: Mapping[str, Any]) -> str | None:
    """The diffusers layer of a block that the original code calls `name`; None where it has no such."""
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)|middle_block\.(\d+)\.(.+)", name)
    if not found:
        return None
    each = config.get("layers_per_block", 2)
    a_block = (each if isinstance(each, int) else each[0]) + 1
    resnet = {original: ours for ours, original in RESNET.items()}
    side, number, part, inside, middle, of_middle = found.groups()
    if middle is not None:
        if middle == "1":
            return f"mid_block.attentions.0.{of_middle}"
        return f"mid_block.resnets.{int(middle) // 2}.{resnet.get(of_middle, of_middle)}"
    # The input blocks are counted from the first convolution, which is their number 0.
    block, i = divmod(int(number) - (side == "input"), a_block)
    way = "down" if side == "input" else "up"
    if inside in ("op", "conv"):
        return f"{way}_blocks.{block}.{way}samplers.0.conv"
    if part == "0":
        return f"{way}_blocks.{block}.resnets.{i}.{resnet.get(inside, inside)}"
    return f"{way}_blocks.{block}.attentions.{i}.{inside}"


OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""What single files in the original (LDM) layout call the layers outside the blocks."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""What they call the layers of a residual block."""

UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
"""The upward blocks where a configuration does not name them: those of Stable Diffusion 1 and 2."""
