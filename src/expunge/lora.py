"""LoRA files: an edit's changes as factors, in diffusers' naming and in kohya's, and back.

A LoRA at strength s turns W into W + s · up · down. Each layer's alpha is its rank: nothing else scales
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from expunge.changes import LowRank, WeightChange, check_fit
from expunge.checkpoint import Checkpoint, Place
from expunge.errors import ExpungeError
from expunge.files import check_space, read_header, replacing
from expunge.ops.low_rank import balanced, truncated

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
        checkpoint: Checkpoint,
        changes: Mapping[Place, Sequence[WeightChange]],
        *,
        rank: int | None = None,
        energy: float = 0.999,
    ) -> Lora:
        """The changes of weights as factors: exact where they are low-rank, else the nearest ones.

        Args:
            checkpoint: what the changes are of.
            changes: for each parameter its changes, in order.
            rank: at least 1; None for the smallest that keeps the energy.
            energy: the share of each ‖Δ‖² to keep where no rank is given.

        Raises:
            ExpungeError: nothing that changes can be held, or rank or energy are out of range.
        """
        if rank is not None and rank < 1:
            raise ExpungeError(f"the rank of a LoRA must be at least 1, not {rank}")
        if not 0 < energy <= 1:
            raise ExpungeError(f"the energy to keep must be above 0 and at most 1, not {energy:g}")
        found, shapes, left_out = {}, {}, []
        lost = total = 0.0
        for (layer, parameter), some in changes.items():
            weight = checkpoint.read(layer, parameter)
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

    def tensors(self, checkpoint: Checkpoint, naming: Naming, dtype: torch.dtype) -> dict[str, Tensor]:
        """The file's tensors.

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
                name = _kohya(checkpoint, layer)
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(self.rank), dtype=dtype)
        return tensors

    def save(
        self,
        path: str | Path,
        checkpoint: Checkpoint,
        naming: Naming,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the file.

        Raises:
            ExpungeError: it cannot be written, or a layer has no name in kohya's naming.
        """
        tensors = self.tensors(checkpoint, naming, dtype)
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


def read(path: str | Path, pipe: Any, scale: float = 1.0) -> tuple[LowRank, ...]:
    """A LoRA file, in any naming that diffusers reads, as changes of a pipeline's layers.

    Args:
        path: the file.
        pipe: a diffusers pipeline of the family that it was made for.
        scale: its strength.

    Raises:
        ExpungeError: the file is not a LoRA of the pipeline's family.
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
        factors = _in_diffusers_names(raw, pipe)
    except Exception as error:  # whatever the converters come up with
        raise ExpungeError(f"{path} is not a LoRA for {type(pipe).__name__}: {error}") from error
    changes = []
    for name, factor in factors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            up = factors[f"{layer}.lora_B.weight"].flatten(1).float()
            changes.append(LowRank((layer,), scale * up, factor.flatten(1).float()))
    try:
        check_fit(pipe, changes)
    except ExpungeError as error:
        raise ExpungeError(
            f"{path} is not a LoRA for this model: {str(error).partition(': ')[2]}"
        ) from None
    return tuple(changes)


def _in_diffusers_names(raw: dict[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    """`LAYER.lora_A.weight` and `LAYER.lora_B.weight`, the layers named as changes name them."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    options = {"unet_config": pipe.unet.config} if denoiser == "unet" else {}
    found = type(pipe).lora_state_dict(raw, **options)
    state = found[0] if isinstance(found, tuple) else found
    if not all(key.startswith((denoiser, "text_encoder")) for key in state):
        state = {f"{denoiser}.{key}": tensor for key, tensor in state.items()}
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


def _kohya(checkpoint: Checkpoint, layer: str) -> str:
    component, _, inside = layer.partition(".")
    name = None
    if component == checkpoint.family.denoiser:
        name = checkpoint.family.kohya(inside, checkpoint.config)
    if name is None:
        raise ExpungeError(
            f"kohya's naming has no name for {layer}; export to lora, in diffusers' naming"
        )
    return name
