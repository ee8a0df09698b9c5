"""How other programs name a family's layers, and which of them read its LoRAs.

A family states these facts in its own class: `ldm_layers`, `ldm_fused_layers` and `lora_naming`. Nothing
outside its file lists families, so a new family is complete in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

ALL = "all"
"""A program reads every layer of a LoRA."""

STABILITY = "https://github.com/Stability-AI/generative-models"
BLACK_FOREST_LABS = "https://github.com/black-forest-labs/flux"
DIFFUSERS = "diffusers"
"""The implementations that ModelSpec's metadata may name."""

RowPick = Callable[[Tensor, int], Tensor]
"""Selects from a fused layer's rows those of one diffusers layer; the second argument is the number of
the layer's inputs."""

LayerRows = tuple[str, RowPick | None]
"""A diffusers layer, and how its rows are selected; None takes all rows as they are."""

FusedLayers = tuple[tuple[str, tuple[LayerRows, ...]], ...]
"""Regular expressions of the original code's fused layers, and the diffusers layers that each consists
of; `\\1` in a layer stands for the first group."""


@dataclass(frozen=True)
class BaseModel:
    """A base model as LoRA files name it, in the words of kohya's trainers and of ModelSpec."""

    title: str
    """What a sentence calls it: "SDXL"."""
    version: str
    """`ss_base_model_version`."""
    architecture: str
    """`modelspec.architecture`, without "/lora"."""
    implementation: str = DIFFUSERS
    """`modelspec.implementation`."""
    resolution: int = 1024
    """Height and width of its images in pixels, `modelspec.resolution`."""


@dataclass(frozen=True)
class LoraNaming:
    """What is known of a family's LoRAs outside of diffusers; by default diffusers alone reads them."""

    title: str = ""
    """What tables call the family: "SD 3, 3.5". A family without a title is left out of tables."""
    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    """The base models, by the variants that `Model.infer_variant` returns; "" is the usual one."""
    readers: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"lora": {"diffusers": ALL}}
    )
    """For each form ("lora" in diffusers' naming, "kohya") what each program reads of it: "all", or a
    phrase that says which part. A program that is not listed reads nothing."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Programs that cannot run the family at all, and the sentence that says so."""
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    """Pipeline components whose number differs from the trainers': trainers' name to diffusers' name."""
    text_keys: Mapping[str, str] = field(default_factory=dict)
    """The pipeline's text encoders of which programs read LoRAs, and how kohya's keys of each begin. Of
    a text encoder that is not here nobody reads any."""
    words: tuple[str, ...] = ()
    """Parts of layer names that contain underscores, beyond those in `checkpoints.lora.keys.WORDS`.
    kohya's naming writes dots as underscores; these parts keep theirs."""


def split_equally(stem: str, names: str) -> tuple[LayerRows, ...]:
    """Describe a fused layer that stacks several layers of equal height, as queries, keys and values.

    Args:
        stem: the part of the diffusers names that the layers have in common.
        names: their last parts, separated by blanks, in the order of the rows.
    """
    parts = names.split()
    return tuple((f"{stem}.{name}", partial(_pick_part, i, len(parts))) for i, name in enumerate(parts))


def split_single_block(stem: str, names: str) -> tuple[LayerRows, ...]:
    """Describe a fused layer of queries, keys and values, as high as the input is wide, and the rest.

    Args:
        stem: the part of the diffusers names that the layers have in common.
        names: their last parts, separated by blanks, in the order of the rows.
    """
    return tuple((f"{stem}.{name}", partial(_pick_single, i)) for i, name in enumerate(names.split()))


def swap_shift_and_scale(rows: Tensor, inputs: int) -> Tensor:
    """Exchange the halves: the original code puts shift before scale, diffusers scale before shift."""
    return torch.cat(rows.chunk(2)[::-1])


def _pick_part(i: int, n: int, rows: Tensor, inputs: int) -> Tensor:
    return rows.chunk(n)[i]


def _pick_single(i: int, rows: Tensor, inputs: int) -> Tensor:
    return rows.split([inputs, inputs, inputs, len(rows) - 3 * inputs])[i]
