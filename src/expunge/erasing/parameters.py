"""The parts of a denoiser that can be trained: parameters and layers, by the names of changes."""

from __future__ import annotations

from typing import Literal

from torch import nn

from expunge.base.errors import ExpungeError
from expunge.changes import iterate_layers
from expunge.model import Model
from expunge.ops.frozen_linear import FrozenLinear

Part = Literal["denoiser", "cross-attention", "text", "rest"]
"""The whole denoiser; the cross-attentions through which text enters; of these the layers that read it
alone; or all but the cross-attentions."""


def select_parameters(model: Model, part: Part | Literal["text-refiner"]) -> dict[str, nn.Parameter]:
    """Select the parameters of a part of the denoiser, by the names that changes use.

    Raises:
        ExpungeError: text does not enter this denoiser through attentions of its own.
    """
    entries = [entry.layer for entry in model.text_entries()]
    # Names of changes begin with the pipeline's component: unet, transformer.
    component = entries[0].partition(".")[0]
    found = {
        f"{component}.{layer}.{name}": parameter
        for layer, module in iterate_layers(getattr(model.pipe, component))
        for name, parameter in module.named_parameters(recurse=False)
        if not _is_read_ahead(model, layer)
    }
    if part == "text-refiner":
        if not model.text_refiner:
            raise ExpungeError(
                f"{type(model).__name__} has no layers that see text alone and no time, which"
                " 'text-refiner' is: leave train_on out"
            )
        begins = tuple(f"{component}.{name}" for name in model.text_refiner)
        return {k: p for k, p in found.items() if k.startswith(begins)}
    if part != "text":
        _require_trainable(model)
    if part == "denoiser":
        return found
    if part == "text":
        return {k: p for k, p in found.items() if k.rpartition(".")[0] in entries}
    # The attention that holds an entry: its queries and output belong to it, too.
    crossings = tuple({f"{entry.rpartition('.')[0]}." for entry in entries})
    if f"{component}." in crossings:
        raise ExpungeError(
            f"this model has no cross-attentions apart from the rest: train the denoiser, not {part!r}"
        )
    return {k: p for k, p in found.items() if k.startswith(crossings) == (part == "cross-attention")}


BLOCKS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
"""The blocks of a U-Net in which the released code trains its changes, by diffusers' names."""

Layers = Literal["text", "blocks", "all"]
"""Where low-rank changes are trained: where text enters; in a U-Net's transformer, residual and sampler
blocks, so without its time embedding and its first and last convolution; or in all layers."""


def select_layers(model: Model, which: Layers) -> tuple[str, ...]:
    """Select the linear layers and convolutions of a part of the denoiser.

    Raises:
        ExpungeError: it has no such blocks.
    """
    entries = tuple(entry.layer for entry in model.text_entries())
    if which == "text":
        return entries
    _require_trainable(model)
    component = entries[0].partition(".")[0]
    modules = dict(iterate_layers(getattr(model.pipe, component)))
    blocks = tuple(f"{k}." for k, m in modules.items() if type(m).__name__ in BLOCKS)
    if which == "blocks" and not blocks:
        raise ExpungeError(
            "this model's denoiser has no transformer, residual and sampler blocks of a U-Net: train"
            " layers 'text' or 'all'"
        )
    return tuple(
        f"{component}.{k}"
        for k, m in modules.items()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and (which == "all" or k.startswith(blocks))
        # A convolution of each channel for itself has no low rank.
        if getattr(m, "groups", 1) == 1 and not _is_read_ahead(model, k)
    )


def _require_trainable(model: Model) -> None:
    """Check that the denoiser is in memory as it was made.

    Raises:
        ExpungeError: it is kept in few bits.
    """
    forms = {module.form for module in model.network.modules() if isinstance(module, FrozenLinear)}
    if forms:
        raise ExpungeError(
            f"the denoiser is kept in {forms.pop()}, where only the layers that text enters through, or"
            " a text refiner, can be trained: train these, or load it without quantise"
        )


def _is_read_ahead(model: Model, layer: str) -> bool:
    """Tell whether a layer is part of `Model.encode`: a prediction has no gradient there."""
    return any(layer == name or layer.startswith(f"{name}.") for name in model.read_ahead)
