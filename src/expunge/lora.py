"""LoRA files: an edit's changes as factors, in diffusers' naming and in kohya's, and back.

A LoRA at strength s turns W into W + s · up · down. Each layer's alpha is its rank: nothing else scales
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from expunge.changes import LowRank, WeightChange, check_fit, find
from expunge.errors import ExpungeError
from expunge.files import check_space, read_header, replacing
from expunge.ops.low_rank import balanced, truncated

Place = tuple[str, str]
"""A layer and one of its parameters."""

Naming = Literal["diffusers", "kohya"]


@dataclass(frozen=True, eq=False)
class Lora:
    """What an edit does to each layer, as factors of one rank."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """For each layer B, (out, rank), and D, (rank, in)."""
    shapes: Mapping[str, tuple[int, ...]]
    """Each layer's weight's shape."""
    rank: int
    error: float
    """‖Δ − B D‖ / ‖Δ‖ over all layers; 0 where the edit was of this rank."""
    left_out: tuple[Place, ...]
    """Changed parameters that a LoRA cannot hold: biases and norms."""

    @classmethod
    def of(
        cls,
        read: Callable[[str, str], Tensor],
        changes: Mapping[Place, Sequence[WeightChange]],
        *,
        rank: int | None = None,
        energy: float = 0.999,
    ) -> Lora:
        """The changes of weights as factors: exact where they are low-rank, else the nearest ones.

        Args:
            read: gives a parameter as it was, by the names of its layer and its own.
            changes: for each parameter its changes, in order.
            rank: at least 1; None for the smallest that keeps the energy.
            energy: the share of each ‖Δ‖² to keep where no rank is given.

        Raises:
            ExpungeError: nothing that changes can be held.
        """
        found, shapes, left_out = {}, {}, []
        lost = total = 0.0
        for (layer, parameter), some in changes.items():
            weight = read(layer, parameter)
            if parameter != "weight" or weight.ndim < 2:
                left_out.append((layer, parameter))
                continue
            shapes[layer] = tuple(weight.shape)
            up, down, missed, square = _factors(weight, some, rank, energy)
            found[layer] = balanced(up, down)
            lost, total = lost + missed, total + square
        if not found:
            raise ExpungeError("a LoRA holds changes of weights, and this edit changes none")
        most = max(up.shape[1] for up, _ in found.values())
        padded = {layer: _padded(up, down, most) for layer, (up, down) in found.items()}
        error = (lost / total) ** 0.5 if total else 0.0
        return cls(padded, shapes, most, error, tuple(left_out))

    def tensors(
        self, naming: Naming, kohya: Callable[[str], str | None], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The file's tensors.

        Args:
            naming: whose.
            kohya: gives a layer's name in kohya's naming; None where there is none.
            dtype: their number format.

        Raises:
            ExpungeError: kohya's naming has no name for a layer.
        """
        tensors: dict[str, Tensor] = {}
        for layer, (up, down) in self.factors.items():
            kernel = self.shapes[layer][2:]
            up = up.reshape(*up.shape, *(1 for _ in kernel)).to(dtype).contiguous()
            down = down.reshape(down.shape[0], self.shapes[layer][1], *kernel).to(dtype).contiguous()
            if naming == "diffusers":
                tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            else:
                name = kohya(layer)
                if name is None:
                    raise ExpungeError(f"kohya's naming has no name for {layer}; export to lora instead")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(self.rank), dtype=dtype)
        return tensors

    def save(
        self,
        path: str | Path,
        naming: Naming,
        kohya: Callable[[str], str | None],
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the file.

        Raises:
            ExpungeError: it cannot be written, or a layer has no name in kohya's naming.
        """
        tensors = self.tensors(naming, kohya, dtype)
        if naming == "kohya":
            metadata = {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(self.rank),
                "ss_network_alpha": str(float(self.rank)),
                **metadata,
            }
        check_space(Path(path).parent, sum(t.numel() * t.element_size() for t in tensors.values()))
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, dict(metadata)))


def read(
    path: str | Path, pipeline: type[Any], config: Mapping[str, Any], scale: float = 1.0
) -> tuple[LowRank, ...]:
    """A LoRA file, in any naming that diffusers reads, as changes of a pipeline's layers.

    Args:
        path: the file.
        pipeline: the diffusers class that it was made for.
        config: its denoiser's configuration.
        scale: the LoRA's strength.

    Raises:
        ExpungeError: the file is not a whole LoRA of that class.
    """
    header = read_header(path)
    if not any("lora" in name for name in header):
        raise ExpungeError(f"{path} is not a LoRA: no tensor of it is named so")
    raw = safetensors.torch.load_file(path)
    for name in [name for name in raw if name.endswith(".alpha")]:
        stem = name.removesuffix("alpha")
        own = [f"{stem}{part}.weight" for part in ("lora_down", "lora_A", "lora.down")]
        found = [key for key in own if key in raw]
        if not found:
            raise ExpungeError(f"{path} is not a whole LoRA: {name} belongs to no factors")
        # What alpha scales is done here, so that no converter need be asked about it.
        rank = raw[found[0]].shape[0]
        raw[found[0]] = raw[found[0]].float() * float(raw[name]) / rank
        raw[name] = torch.tensor(float(rank))
    try:
        factors = _in_diffusers_names(raw, pipeline, config)
    except Exception as error:  # whatever the converters come up with
        raise ExpungeError(f"{path} is not a LoRA for {pipeline.__name__}: {error}") from error
    changes = []
    for name, factor in factors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            up = factors[f"{layer}.lora_B.weight"].flatten(1).float()
            changes.append(LowRank((layer,), scale * up, factor.flatten(1).float()))
    return tuple(changes)


def fuse(path: str | Path, pipe: Any, scale: float = 1.0) -> None:
    """Lay a LoRA on a pipeline's weights for good.

    Raises:
        ExpungeError: it is not a LoRA for this pipeline.
    """
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    changes = read(path, type(pipe), network.config, scale)
    try:
        check_fit(pipe, changes)
    except ExpungeError as error:
        reason = str(error).partition(": ")[2]
        raise ExpungeError(f"{path} is not a LoRA for this model: {reason}") from None
    for change in changes:
        module: Any = find(pipe, *change.layers)
        module.weight.data = change.weight(module.weight.detach())


def _in_diffusers_names(
    raw: dict[str, Tensor], pipeline: type[Any], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`LAYER.lora_A.weight` and `LAYER.lora_B.weight`, the layers named as changes name them."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    denoiser = getattr(pipeline, "unet_name", None) or pipeline.transformer_name
    options = {"unet_config": SimpleNamespace(**config)} if denoiser == "unet" else {}
    found = pipeline.lora_state_dict(raw, **options)
    state = found[0] if isinstance(found, tuple) else found
    # Some converters leave out which part of the pipeline a layer is in: then it is the denoiser's.
    known = (f"{denoiser}.", "text_encoder")
    state = {k if k.startswith(known) else f"{denoiser}.{k}": tensor for k, tensor in state.items()}
    factors: dict[str, Tensor] = {}
    for part in sorted({key.partition(".")[0] for key in state}):
        own = {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}
        if not all("lora_A" in key or "lora_B" in key for key in own):
            convert = convert_unet_state_dict_to_peft if part == denoiser else convert_state_dict_to_peft
            own = convert(own)
        factors |= {f"{part}.{key}": tensor for key, tensor in own.items()}
    return factors


def _factors(
    weight: Tensor, changes: Sequence[WeightChange], rank: int | None, energy: float
) -> tuple[Tensor, Tensor, float, float]:
    """B and D of one layer, what of ‖Δ‖² they miss, and ‖Δ‖²."""
    low = [change for change in changes if isinstance(change, LowRank)]
    if len(low) == len(changes) and (rank is None or rank >= sum(c.up.shape[1] for c in low)):
        up = torch.cat([change.up.double() for change in low], 1)
        down = torch.cat([change.down.double() for change in low])
        return up, down, 0.0, float((up @ down).square().sum())
    original = weight.double()
    after = original
    for change in changes:
        after = change.weight(after)
    return truncated((after - original).flatten(1), rank, energy)


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with rows of zeros: one rank for all layers, as every reader takes it."""
    more = rank - up.shape[1]
    return (
        torch.cat([up, up.new_zeros(up.shape[0], more)], 1),
        torch.cat([down, down.new_zeros(more, down.shape[1])]),
    )
