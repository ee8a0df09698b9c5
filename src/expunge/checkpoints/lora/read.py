"""Read LoRA files in any known naming, as changes of a pipeline's layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning, join_names
from expunge.base.files import read_header
from expunge.changes import LowRank, WeightChange, check_fit, find_layer
from expunge.checkpoints.loading import find_family
from expunge.checkpoints.lora.base_models import read_base_title
from expunge.checkpoints.lora.dora import Dora
from expunge.checkpoints.lora.keys import find_layers, shorten
from expunge.checkpoints.lora.metadata import AdapterMetadata
from expunge.checkpoints.lora.modules import Parts, group_modules, read_tensors

if TYPE_CHECKING:
    from expunge.model import Model


@dataclass(frozen=True)
class LoraInfo:
    """What a LoRA file says of itself."""

    base: str
    """The base model it is for; "" where it does not say."""
    rank: int
    """The largest rank."""
    layers: int
    """The number of layers."""
    others: tuple[str, ...] = ()
    """The tensors that are no LoRA of a layer, or whose naming is not known without the model."""


def read_lora_info(path: str | Path) -> LoraInfo:
    """Read a LoRA file's base model, rank and number of layers.

    Raises:
        ExpungeError: the file is no whole LoRA, or contains NaN or infinity.
    """
    header = read_header(path)
    modules, others = group_modules(read_tensors(path), path)
    ranks = [parts["down"].shape[0] for parts in modules.values()]
    base = read_base_title(header.get("__metadata__", {}))
    return LoraInfo(base, max(ranks, default=0), len(ranks), tuple(others))


def read_lora(
    path: str | Path, pipeline: type[Any], config: Mapping[str, Any], scale: float = 1.0
) -> tuple[WeightChange, ...]:
    """Read a LoRA file as changes of a pipeline's layers.

    The file's own scale is applied, whether it stands in `alpha` tensors or in the metadata
    (`lora_adapter_metadata`, as diffusers and PEFT write it, rsLoRA included). Tensors that belong to
    no layer's LoRA are left out with a warning.

    Args:
        path: the file.
        pipeline: the diffusers class that the LoRA was made for.
        config: the denoiser's configuration.
        scale: the LoRA's strength, a finite number.

    Raises:
        ExpungeError: the file is no whole LoRA of that class, contains NaN or infinity, or changes a
            layer twice; or the strength is not finite.
    """
    if not math.isfinite(scale):
        raise ExpungeError(f"the strength of a LoRA must be a finite number, not {scale} ({path})")
    header = read_header(path)
    raw = read_tensors(path)
    modules, others = group_modules(raw, path)
    # Other namings are left to diffusers, which knows many and may drop parts of them.
    if not modules and any("lora" in name for name in raw):
        raw, others = _convert_by_diffusers(raw, pipeline, config, path), []
        modules, _ = group_modules(raw, path)
    if not modules:
        if any("lora" in name or "hada_" in name or "lokr_" in name for name in others):
            shown = join_names([shorten(name) for name in others], 2)
            raise ExpungeError(f"{path} is not a LoRA that can be read: nothing here reads {shown}")
        raise ExpungeError(f"{path} is not a LoRA: none of its tensors is named like one")
    builder = _ChangeBuilder(
        find_family(pipeline.__name__),
        config,
        AdapterMetadata.parse(header.get("__metadata__", {}), path),
        scale,
        path,
    )
    changes: dict[str, WeightChange] = {}
    for stem, parts in modules.items():
        for change in builder.build(stem, parts):
            (layer,) = change.layers
            if layer in changes:
                raise ExpungeError(f"{path} is not one LoRA: it changes {layer} twice")
            changes[layer] = change
    if others:
        shown = join_names([shorten(name) for name in others], 2)
        warnings.warn(
            f"{path}: {len(others)} of {len(raw)} tensors left out, being no LoRA of a layer: {shown}",
            ExpungeWarning,
            stacklevel=3,
        )
    return tuple(changes.values())


def fuse_lora(path: str | Path, pipe: Any, scale: float = 1.0) -> None:
    """Fuse a LoRA into a pipeline's weights for good.

    Args:
        path: the LoRA's file.
        pipe: the diffusers pipeline; its weights are changed.
        scale: the LoRA's strength.

    Raises:
        ExpungeError: the file is no LoRA for this pipeline, or its weights would overflow.
    """
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    changes = read_lora(path, type(pipe), network.config, scale)
    try:
        check_fit(pipe, changes)
    except ExpungeError as error:
        reason, title = str(error).partition(": ")[2], read_lora_info(path).base
        base = f", but, as it says, for {title}" if title else ""
        raise ExpungeError(f"{path} is not a LoRA for this model{base}: {reason}") from None
    for change in changes:
        module: Any = find_layer(pipe, *change.layers)
        after = change.weight(module.weight.detach())
        # Checked before it is assigned: half precision overflows where the factors are finite.
        if not bool(after.isfinite().all()):
            raise ExpungeError(
                f"{path} at strength {scale:g} makes NaN or infinity of {change.layers[0]}"
            )
        module.weight.data = after


@dataclass(frozen=True)
class _ChangeBuilder:
    """Builds the changes of a LoRA's modules."""

    family: type[Model]
    config: Mapping[str, Any]
    metadata: AdapterMetadata
    strength: float
    path: str | Path

    def build(self, stem: str, parts: Parts) -> list[WeightChange]:
        """The changes of one module: one a layer, several where the file fuses layers."""
        up, down = parts["up"].flatten(1).float(), parts["down"].float()
        # Before flattening: a convolution's inputs are its channels, not channels times kernel.
        rank, inputs = down.shape[:2]
        down = self._include_middle(stem, parts, down).flatten(1)
        found = find_layers(stem, self.family, self.config)
        own = self._find_scale(stem, parts, found[0][0], rank)
        magnitude = parts.get("magnitude", parts.get("scale"))
        if magnitude is None and self.metadata.uses_dora(found[0][0].partition(".")[0]):
            self._refuse(f"it is a DoRA, and {shorten(stem)} has no magnitude")
        changes: list[WeightChange] = []
        for layer, pick in found:
            rows = up if pick is None else pick(up, inputs)
            if magnitude is None:
                # The scale goes into B, so that factors beyond half precision keep their size.
                changes.append(LowRank((layer,), self.strength * own * rows, down))
                continue
            of_rows = (
                "magnitude" in parts or magnitude.ndim < 2 or magnitude.numel() == magnitude.shape[0]
            )
            # LyCORIS stores (out, 1) for rows and (1, in) for columns, PEFT a vector of rows.
            norms = magnitude.flatten().float()
            if len(norms) != (len(up) if of_rows else inputs):
                self._refuse(f"{shorten(stem)} has {len(norms)} magnitudes")
            if pick is not None:
                if not of_rows:
                    raise ExpungeError(
                        f"{self.path}: {shorten(stem)} is a DoRA of a layer that is several here and"
                        " cannot be split"
                    )
                norms = pick(norms, inputs)
            changes.append(Dora((layer,), own * rows, down, norms, of_rows, self.strength))
        for change in changes:
            if not all(bool(tensor.isfinite().all()) for tensor in change.tensors.values()):
                raise ExpungeError(
                    f"{self.path} at strength {self.strength:g} makes NaN or infinity of {shorten(stem)}"
                )
        return changes

    def _include_middle(self, stem: str, parts: Parts, down: Tensor) -> Tensor:
        """D with LyCORIS's middle factor multiplied into it: Σ up · mid · down over two ranks."""
        if "mid" not in parts:
            return down
        mid, rank = parts["mid"].float(), down.shape[0]
        if mid.ndim < 2 or mid.shape[:2] != (rank, rank):
            self._refuse(f"{shorten(stem)} has a middle factor of another rank")
        return torch.einsum("rs...,si->ri...", mid, down.flatten(1))

    def _find_scale(self, stem: str, parts: Parts, layer: str, rank: int) -> float:
        """What multiplies the factors: alpha / rank where the file has alpha, else what metadata say."""
        if "alpha" not in parts:
            return self.metadata.find_scale(layer, rank)
        if parts["alpha"].numel() != 1:
            self._refuse(f"{shorten(stem)}.alpha is not a single number")
        return float(parts["alpha"]) / rank

    def _refuse(self, reason: str) -> None:
        raise ExpungeError(f"{self.path} is not a whole LoRA: {reason}")


def _convert_by_diffusers(
    raw: Mapping[str, Tensor], pipeline: type[Any], config: Mapping[str, Any], path: str | Path
) -> dict[str, Tensor]:
    """Convert a naming that is not known here, by diffusers' converters.

    Raises:
        ExpungeError: the converters do not know it either, or leave out a part of it.
    """
    denoiser = getattr(pipeline, "unet_name", None) or pipeline.transformer_name
    options = {"unet_config": SimpleNamespace(**config)} if denoiser == "unet" else {}
    try:
        found = pipeline.lora_state_dict(dict(raw), **options)
        state = found[0] if isinstance(found, tuple) else found
    except Exception:  # the converters raise errors of any kind, whose first line may say nothing
        shown = join_names([shorten(name) for name in raw], 2)
        raise ExpungeError(
            f"{path} is not a LoRA that can be read for {pipeline.__name__}: nothing reads {shown}"
        ) from None
    # Converters drop what they do not know without a word; fused layers may be split, but not shrink.
    if sum(t.numel() for t in state.values()) < sum(t.numel() for t in raw.values() if t.ndim):
        raise ExpungeError(f"{path} is not a LoRA that can be read whole for {pipeline.__name__}")
    return state
