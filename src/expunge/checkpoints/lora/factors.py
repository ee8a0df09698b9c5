"""An edit's changes as a LoRA file, in diffusers' naming or in kohya's.

A LoRA at strength s turns W into W + s · up · down. Each layer's alpha is its rank, so that nothing else
scales the product.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import safetensors.torch
import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.files import check_space, replacing
from expunge.changes import WeightChange
from expunge.checkpoints.lora.keys import make_diffusers_stem
from expunge.checkpoints.lora.truncate import TruncationLoss, Truncator
from expunge.checkpoints.weight_changes import Place
from expunge.ops.low_rank import balance

if TYPE_CHECKING:
    from expunge.checkpoints.text_moments import TextMoments

Naming = Literal["diffusers", "kohya"]
"""Whose names the tensors of a file have."""


@dataclass(frozen=True, eq=False)
class Lora:
    """An edit's change of each layer as factors, all of one rank."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """For each layer B, (out, rank), and D, (rank, in · kernel size), float64."""
    shapes: Mapping[str, tuple[int, ...]]
    """For each layer the shape of its weight."""
    rank: int
    """The rank of all factors."""
    loss: TruncationLoss
    """What of the edit is lost by truncation."""
    left_out: tuple[Place, ...]
    """Changed parameters that a LoRA cannot hold: biases and norms."""

    @property
    def error(self) -> float:
        """‖Δ − B D‖ / ‖Δ‖ over all layers; 0 where nothing was truncated."""
        return self.loss.norm

    @classmethod
    def from_changes(
        cls,
        read: Callable[[str, str], Tensor],
        changes: Mapping[Place, Sequence[WeightChange]],
        *,
        rank: int | None = None,
        energy: float = 0.999,
        read_moments: Callable[[], Mapping[str, TextMoments]] = dict,
    ) -> Lora:
        """Factorise changes of weights: exactly where they are low-rank, else by truncation.

        Truncated factors are nearest in what they do to text, where the second moment of a layer's
        input is known, else nearest in norm. Layers whose weights become W M with one M share the
        decomposition of M − I.

        Args:
            read: returns a parameter before the edit, by the names of its layer and its own.
            changes: for each parameter its changes, in order.
            rank: the rank of truncated factors, at least 1; None for the smallest that keeps the
                energy.
            energy: the share of each layer's squared change to keep where no rank is given, above 0 and
                at most 1.
            read_moments: returns the second moments of the layers' input; called once, if anything is
                truncated.

        Raises:
            ExpungeError: no change can be held by a LoRA.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        left_out: list[Place] = []
        truncator = Truncator(rank, energy, read_moments)
        for (layer, parameter), some in changes.items():
            weight = read(layer, parameter)
            if parameter != "weight" or weight.ndim < 2:
                left_out.append((layer, parameter))
                continue
            shapes[layer] = tuple(weight.shape)
            # Half precision keeps most of factors of equal size.
            found[layer] = balance(*truncator.truncate(layer, weight, some))
        if not found:
            raise ExpungeError("a LoRA holds changes of weights, and this edit changes none")
        most = max(up.shape[1] for up, _ in found.values())
        padded = {layer: _pad(up, down, most) for layer, (up, down) in found.items()}
        return cls(padded, shapes, most, truncator.compute_loss(), tuple(left_out))

    def make_tensors(
        self, naming: Naming, name_by_kohya: Callable[[str], str | None], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Make the tensors of the file.

        Args:
            naming: whose names they have.
            name_by_kohya: returns a layer's name in kohya's naming; None where there is none.
            dtype: their dtype; alpha is always float32.

        Raises:
            ExpungeError: kohya's naming has no name for a layer.
        """
        tensors: dict[str, Tensor] = {}
        for layer, (up, down) in self.factors.items():
            kernel = self.shapes[layer][2:]
            up = up.reshape(*up.shape, *(1 for _ in kernel)).to(dtype).contiguous()
            down = down.reshape(down.shape[0], self.shapes[layer][1], *kernel).to(dtype).contiguous()
            # Of transformers, the programs know PEFT's newer endings instead.
            if naming == "diffusers" and layer.startswith("unet."):
                stem, join = make_diffusers_stem(layer)
                tensors |= {f"{stem}{join}.down.weight": down, f"{stem}{join}.up.weight": up}
            elif naming == "diffusers" and layer.startswith("text_encoder"):
                tensors |= self._name_text_factors(layer, down, up)
            elif naming == "diffusers":
                tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            else:
                name = name_by_kohya(layer)
                if name is None:
                    raise ExpungeError(f"kohya's naming has no name for {layer}; export to lora instead")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                # Half precision would round a large alpha.
                tensors[f"{name}.alpha"] = torch.tensor(float(self.rank))
        return tensors

    def _name_text_factors(self, layer: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """Name the factors of a text encoder's layer as diffusers does, beside a U-Net's or others'.

        Args:
            layer: the layer's name, with the component before it.
            down: (rank, in)
            up: (out, rank)
        """
        component, _, inside = layer.partition(".")
        stem = f"{component}.text_model.{inside.removeprefix('text_model.')}"
        # Both are read everywhere; a file keeps to one of diffusers' two generations of names.
        if any(name.startswith("unet.") for name in self.factors) or self._is_text_alone:
            return {
                f"{stem}.lora_linear_layer.down.weight": down,
                f"{stem}.lora_linear_layer.up.weight": up,
            }
        return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}

    @property
    def _is_text_alone(self) -> bool:
        """Whether every layer is a text encoder's."""
        return all(name.startswith("text_encoder") for name in self.factors)

    def save(
        self,
        path: str | Path,
        naming: Naming,
        name_by_kohya: Callable[[str], str | None],
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the file.

        Args:
            path: the file; it is whole or stays as it was.
            naming: whose names the tensors have.
            name_by_kohya: returns a layer's name in kohya's naming; None where there is none.
            dtype: the dtype of the factors.
            metadata: further entries of the file's metadata.

        Raises:
            ExpungeError: the file cannot be written, the factors overflow the dtype, or a layer has no
                name in kohya's naming.
        """
        tensors = self.make_tensors(naming, name_by_kohya, dtype)
        if not all(bool(tensor.float().isfinite().all()) for tensor in tensors.values()):
            format = str(dtype).removeprefix("torch.")
            raise ExpungeError(f"the changes are too large for {format}; write the LoRA in float32")
        # Trainers that go on from a LoRA read its shape here.
        if naming == "kohya":
            metadata = {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(self.rank),
                "ss_network_alpha": str(float(self.rank)),
                **metadata,
            }
        check_space(Path(path).parent, sum(t.numel() * t.element_size() for t in tensors.values()))
        with replacing(path) as temporary:
            temporary.write_bytes(_serialise(tensors, metadata))


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, equal for equal content, with the hash of its tensors in it."""
    data = safetensors.torch.save(dict(tensors))
    length = 8 + int.from_bytes(data[:8], "little")
    entries = {**metadata, "modelspec.hash_sha256": f"0x{hashlib.sha256(data[length:]).hexdigest()}"}
    header = {"__metadata__": dict(sorted(entries.items())), **json.loads(data[8:length])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want the data at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[length:]


def _pad(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product at a larger rank: `ss_network_dim` states one rank for all layers."""
    more = rank - up.shape[1]
    return (
        torch.cat([up, up.new_zeros(up.shape[0], more)], 1),
        torch.cat([down, down.new_zeros(more, down.shape[1])]),
    )
