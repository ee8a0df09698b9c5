"""LoRA files: an edit's changes as factors, in diffusers' naming and in kohya's, and back.

A LoRA at strength s turns W into W + s · up · down. Each layer's alpha is its rank: nothing else scales
it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import safetensors.torch
import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning, listed
from expunge.base.files import check_space, read_header, replacing
from expunge.changes import Dense, LowRank, Right, WeightChange, check_fit, find
from expunge.checkpoints import loading, lora_names
from expunge.ops.low_rank import (
    balance,
    compress,
    draw_probes,
    factor_shared,
    measure_rounding_noise,
    truncate,
)

if TYPE_CHECKING:
    from expunge.checkpoints.text_moments import Seen

Place = tuple[str, str]
"""A layer and one of its parameters."""

Naming = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class Lost:
    """What of an edit factors of small rank leave out, as shares."""

    norm: float = 0.0
    """‖Δ − B D‖ / ‖Δ‖ over all layers."""
    erasure: float | None = None
    """Σ ‖(Δ − B D) e‖² / Σ ‖Δ e‖² over the erased prompts' tokens; None where they were not read."""
    drift: float | None = None
    """The same over captions and what is retained: how much of the edit's harm is lost with it."""


@dataclass(frozen=True, eq=False)
class Lora:
    """What an edit does to each layer, as factors of one rank."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """For each layer B, (out, rank), and D, (rank, in)."""
    shapes: Mapping[str, tuple[int, ...]]
    """Each layer's weight's shape."""
    rank: int
    lost: Lost
    left_out: tuple[Place, ...]
    """Changed parameters that a LoRA cannot hold: biases and norms."""

    @property
    def error(self) -> float:
        """‖Δ − B D‖ / ‖Δ‖ over all layers; 0 where the edit was of this rank."""
        return self.lost.norm

    @classmethod
    def of(
        cls,
        read: Callable[[str, str], Tensor],
        changes: Mapping[Place, Sequence[WeightChange]],
        *,
        rank: int | None = None,
        energy: float = 0.999,
        seen: Callable[[], Mapping[str, Seen]] = dict,
    ) -> Lora:
        """The changes of weights as factors: exact where they are low-rank, else the nearest ones.

        Nearest in what they do to text, where that is known of a layer, else in norm. Layers whose
        weights become W M with one M share the decomposition of M − I.

        Args:
            read: gives a parameter as it was, by the names of its layer and its own.
            changes: for each parameter its changes, in order.
            rank: at least 1; None for the smallest that keeps the energy.
            energy: the share of each layer's squared change to keep where no rank is given.
            seen: gives what layers are given of text; asked once, if anything must be truncated.

        Raises:
            ExpungeError: nothing that changes can be held.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        left_out: list[Place] = []
        cutter = _Cutter(rank, energy, seen)
        for (layer, parameter), some in changes.items():
            weight = read(layer, parameter)
            if parameter != "weight" or weight.ndim < 2:
                left_out.append((layer, parameter))
                continue
            shapes[layer] = tuple(weight.shape)
            found[layer] = balance(*cutter.factors(layer, weight, some))
        if not found:
            raise ExpungeError("a LoRA holds changes of weights, and this edit changes none")
        most = max(up.shape[1] for up, _ in found.values())
        padded = {layer: _padded(up, down, most) for layer, (up, down) in found.items()}
        return cls(padded, shapes, most, cutter.lost(), tuple(left_out))

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
            if naming == "diffusers" and layer.startswith("unet."):
                stem, join = lora_names.diffusers_stem(layer)
                tensors |= {f"{stem}{join}.down.weight": down, f"{stem}{join}.up.weight": up}
            elif naming == "diffusers":
                tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            else:
                name = kohya(layer)
                if name is None:
                    raise ExpungeError(f"kohya's naming has no name for {layer}; export to lora instead")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(self.rank))  # halves round it
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
        if not all(bool(tensor.float().isfinite().all()) for tensor in tensors.values()):
            format = str(dtype).removeprefix("torch.")
            raise ExpungeError(f"the changes are too large for {format}; write the LoRA in float32")
        if naming == "kohya":
            metadata = {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(self.rank),
                "ss_network_alpha": str(float(self.rank)),
                **metadata,
            }
        check_space(Path(path).parent, sum(t.numel() * t.element_size() for t in tensors.values()))
        with replacing(path) as temporary:
            temporary.write_bytes(_file(tensors, metadata))


@dataclass(frozen=True, eq=False)
class Decomposed(WeightChange):
    """DoRA: W + s (m ⊙ V / ‖V‖ − W) with V = W + up · down, norms of its rows or of its inputs.

    PEFT and LyCORIS train it so. It is laid on weights alone and never kept in an edit.
    """

    kind: ClassVar[str] = "dora"
    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in), or (rank, in · kernel height · kernel width)"""
    magnitude: Tensor
    """m, (out,) for norms of rows, (in,) for norms of what belongs to an input."""
    of_rows: bool = True
    """Whose norms: the rows' or the inputs'."""
    strength: float = 1.0
    """s, how far from W to the trained weight."""

    def fits(self, shape: torch.Size) -> bool:
        rows, columns = shape[0], shape[1:].numel()
        norms = shape[0] if self.of_rows else shape[1]
        return (self.up.shape[0], self.down.shape[1], len(self.magnitude)) == (rows, columns, norms)

    def weight(self, original: Tensor) -> Tensor:
        wide = torch.promote_types(original.dtype, torch.float32)
        up, down, magnitude = (t.to(original.device, wide) for t in (self.up, self.down, self.magnitude))
        given = original.to(wide)
        moved = given + (up @ down).reshape(given.shape)
        side = 0 if self.of_rows else 1
        norms = moved.transpose(0, side).flatten(1).norm(dim=1).clamp_min(torch.finfo(wide).tiny)
        shape = [1] * moved.ndim
        shape[side] = -1
        trained = moved * (magnitude / norms).reshape(shape)
        return (given + self.strength * (trained - given)).to(original.dtype)


def read(
    path: str | Path, pipeline: type[Any], config: Mapping[str, Any], scale: float = 1.0
) -> tuple[WeightChange, ...]:
    """A LoRA file, in any naming that is known, as changes of a pipeline's layers.

    Its own scale is kept, whether it stands in the file (`alpha`) or in its metadata
    (`lora_adapter_metadata`, as diffusers and PEFT write it, rsLoRA too). What is no LoRA of a layer is
    left out with a warning.

    Args:
        path: the file.
        pipeline: the diffusers class that it was made for.
        config: its denoiser's configuration.
        scale: the LoRA's strength.

    Raises:
        ExpungeError: the file is not a whole LoRA of that class, holds numbers that are none, or names
            two LoRAs; or the strength is no finite number.
    """
    if not math.isfinite(scale):
        raise ExpungeError(f"the strength of a LoRA must be a finite number, not {scale} ({path})")
    header = read_header(path)
    raw = _loaded(path)
    modules, others = _modules(raw, path)
    if not modules and any("lora" in name for name in raw):
        raw, others = _in_diffusers_names(raw, pipeline, config, path), []
        modules, _ = _modules(raw, path)
    if not modules:
        if any("lora" in name or "hada_" in name or "lokr_" in name for name in others):
            shown = listed([_short(name) for name in others], 2)
            raise ExpungeError(f"{path} is not a LoRA that can be read: nothing here reads {shown}")
        raise ExpungeError(f"{path} is not a LoRA: no tensor of it is named so")
    family = loading.family_of(pipeline.__name__)
    scales = _Scales.of(header.get("__metadata__", {}), path)
    changes: dict[str, WeightChange] = {}
    for stem, parts in modules.items():
        for change in _changes(stem, parts, family, config, scales, scale, path):
            (layer,) = change.layers
            if layer in changes:
                raise ExpungeError(f"{path} is not one LoRA: it changes {layer} twice")
            changes[layer] = change
    if others:
        shown = listed([_short(name) for name in others], 2)
        warnings.warn(
            f"{path}: {len(others)} of {len(raw)} tensors left out, being no LoRA of a layer: {shown}",
            ExpungeWarning,
            stacklevel=3,
        )
    return tuple(changes.values())


@dataclass(frozen=True)
class About:
    """What a LoRA file says of itself."""

    base: str
    """Which model it is for; "" where it does not say."""
    rank: int
    """The largest."""
    layers: int


def about(path: str | Path) -> About:
    """What a LoRA file says of itself.

    Raises:
        ExpungeError: it is no whole LoRA, or holds numbers that are none.
    """
    header = read_header(path)
    modules, _ = _modules(_loaded(path), path)
    ranks = [parts["down"].shape[0] for parts in modules.values()]
    return About(
        lora_names.base_named(header.get("__metadata__", {})), max(ranks, default=0), len(ranks)
    )


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
        after = change.weight(module.weight.detach())
        if not bool(after.isfinite().all()):
            raise ExpungeError(
                f"{path} at strength {scale:g} makes numbers of {change.layers[0]} that are none"
            )
        module.weight.data = after


def _loaded(path: str | Path) -> dict[str, Tensor]:
    """A LoRA file's tensors.

    Raises:
        ExpungeError: one holds numbers that are none, or a type of number that torch has not.
    """
    try:
        raw = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ExpungeError(f"{path} is not a whole safetensors file: {error}") from None
    for name, tensor in raw.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ExpungeError(f"{path} holds numbers that are none (nan or infinite): {_short(name)}")
    return raw


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:40]}…{name[-36:]}"


Parts = dict[lora_names.Role, Tensor]


def _modules(raw: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Parts], list[str]]:
    """The parts of every layer, by what the file calls it, and the tensors that are no such parts.

    Raises:
        ExpungeError: a layer has half of a LoRA, two of them, or factors of different ranks.
    """
    found: dict[str, Parts] = {}
    others = []
    for name, tensor in raw.items():
        split = lora_names.split(name)
        if split is None:
            others.append(name)
            continue
        stem, role = split
        parts = found.setdefault(stem, {})
        if role in parts:
            raise ExpungeError(f"{path} is not one LoRA: {_short(stem)} has two parts {role!r}")
        parts[role] = tensor
    for stem, parts in found.items():
        if "up" in parts and "down" in parts:
            if parts["up"].ndim < 2 or parts["down"].ndim < 2:
                raise ExpungeError(
                    f"{path} is not a whole LoRA: factors of {_short(stem)} are no matrices"
                )
            inner, outer = parts["up"].flatten(1).shape[1], parts["down"].shape[0]
            if inner != outer:
                raise ExpungeError(
                    f"{path} is not a whole LoRA: {_short(stem)} has factors of ranks {inner} and"
                    f" {outer}"
                )
        elif "up" in parts or "down" in parts:
            there, missing = ("up", "down") if "up" in parts else ("down", "up")
            raise ExpungeError(
                f"{path} is not a whole LoRA: {_short(stem)} has {there} and no {missing}"
            )
    # What belongs to another kind of adapter (LoHa and the like) is no LoRA, its alpha neither.
    alien = {
        key.rpartition(".hada_")[0] or key.rpartition(".lokr_")[0] or key.rpartition(".")[0]
        for key in others
    }
    for stem in [stem for stem, parts in found.items() if "up" not in parts]:
        if stem not in alien:
            part = next(iter(found[stem]))
            raise ExpungeError(
                f"{path} is not a whole LoRA: {_short(stem)}.{part} belongs to no factors"
            )
        others += [name for name in raw if (split := lora_names.split(name)) and split[0] == stem]
        del found[stem]
    return found, others


@dataclass(frozen=True)
class _Scales:
    """What diffusers wrote of PEFT's configuration beside a LoRA."""

    fields: Mapping[str, Any]
    path: str | Path

    @classmethod
    def of(cls, metadata: Mapping[str, str], path: str | Path) -> _Scales:
        try:
            fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ExpungeError(f"{path}: its lora_adapter_metadata cannot be read")
        return cls(fields, path)

    def field(self, component: str, name: str) -> Any:
        """A field of a component's configuration, or of the only one there is."""
        return self.fields.get(f"{component}.{name}", self.fields.get(name))

    def decomposed(self, component: str) -> bool:
        return bool(self.field(component, "use_dora"))

    def scale(self, layer: str, rank: int) -> float:
        """What multiplies the factors of a layer."""
        component, _, inside = layer.partition(".")
        alpha = self._number(component, "alpha_pattern", "lora_alpha", inside)
        if alpha is None:
            return 1.0
        declared = self._number(component, "rank_pattern", "r", inside)
        if declared is not None and declared != rank:
            raise ExpungeError(
                f"{self.path}: its metadata say rank {declared:g} of {_short(layer)}, which has {rank}"
            )
        return alpha / (rank**0.5 if self.field(component, "use_rslora") else rank)

    def _number(self, component: str, pattern: str, name: str, inside: str) -> float | None:
        """A layer's own value where a pattern names it, as PEFT looks it up; else that of all."""
        patterns = self.field(component, pattern)
        value = self.field(component, name)
        if isinstance(patterns, dict):
            for key, own in patterns.items():
                try:
                    matches = re.fullmatch(rf"(.*\.)?({key})", inside)
                except re.error:
                    raise ExpungeError(
                        f"{self.path}: {pattern} of its metadata has no pattern {key!r}"
                    ) from None
                if matches:
                    value = own
                    break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ExpungeError(
                f"{self.path}: {name} of its metadata is {value!r}, and should be a number"
            )
        return float(value)


def _changes(
    stem: str,
    parts: Parts,
    family: type[Any],
    config: Mapping[str, Any],
    scales: _Scales,
    strength: float,
    path: str | Path,
) -> list[WeightChange]:
    """What one module of a LoRA file does to a pipeline's layers."""
    up, down = parts["up"].flatten(1).float(), parts["down"].float()
    rank = down.shape[0]
    inputs = down.shape[1]
    if "mid" in parts:  # LyCORIS's convolutions: Σ up · mid · down over two ranks
        mid = parts["mid"].float()
        if mid.ndim < 2 or mid.shape[:2] != (rank, rank):
            raise ExpungeError(
                f"{path} is not a whole LoRA: {_short(stem)} has a middle of another rank"
            )
        down = torch.einsum("rs...,si->ri...", mid, down.flatten(1))
    down = down.flatten(1)
    found = lora_names.layers(stem, family, config)
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ExpungeError(f"{path} is not a whole LoRA: {_short(stem)}.alpha is no number")
        own = float(parts["alpha"]) / rank
    else:
        own = scales.scale(found[0][0], rank)
    magnitude = parts.get("magnitude", parts.get("scale"))
    if magnitude is None and scales.decomposed(found[0][0].partition(".")[0]):
        raise ExpungeError(
            f"{path} is not a whole LoRA: it is a DoRA, and {_short(stem)} has no magnitude"
        )
    # The strength goes with the numbers; in halves, large factors keep their place.
    changes: list[WeightChange] = []
    for layer, pick in found:
        rows = up if pick is None else pick(up, inputs)
        if magnitude is None:
            changes.append(LowRank((layer,), strength * own * rows, down))
            continue
        of_rows = "magnitude" in parts or magnitude.ndim < 2 or magnitude.numel() == magnitude.shape[0]
        norms = magnitude.flatten().float()
        if len(norms) != (len(up) if of_rows else inputs):
            raise ExpungeError(f"{path} is not a whole LoRA: {_short(stem)} has {len(norms)} magnitudes")
        if pick is not None:
            if not of_rows:
                raise ExpungeError(
                    f"{path}: {_short(stem)} is a DoRA of a layer that is several here and cannot be"
                    " split"
                )
            norms = pick(norms, inputs)
        changes.append(Decomposed((layer,), own * rows, down, norms, of_rows, strength))
    for change in changes:
        if not all(bool(tensor.isfinite().all()) for tensor in change.tensors.values()):
            raise ExpungeError(
                f"{path} at strength {strength:g} makes numbers that are none: {_short(stem)}"
            )
    return changes


def _in_diffusers_names(
    raw: Mapping[str, Tensor], pipeline: type[Any], config: Mapping[str, Any], path: str | Path
) -> dict[str, Tensor]:
    """A naming that is not known here, by diffusers' converters.

    Raises:
        ExpungeError: they know it neither, or leave out a part of it.
    """
    denoiser = getattr(pipeline, "unet_name", None) or pipeline.transformer_name
    options = {"unet_config": SimpleNamespace(**config)} if denoiser == "unet" else {}
    try:
        found = pipeline.lora_state_dict(dict(raw), **options)
        state = found[0] if isinstance(found, tuple) else found
    except Exception as error:  # whatever the converters come up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ExpungeError(f"{path} is not a LoRA for {pipeline.__name__}: {reason}") from None
    # What went in comes out, in however many layers: nothing of it may be left behind.
    if sum(t.numel() for t in state.values()) < sum(t.numel() for t in raw.values() if t.ndim):
        raise ExpungeError(f"{path} is not a LoRA that can be read whole for {pipeline.__name__}")
    return state


def composed(changes: Sequence[WeightChange], inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """R, B and D such that changes make of W the weight W R + B D."""
    matrices = [change.matrix.double() for change in changes if isinstance(change, Right)]
    right = matrices[0] if matrices else torch.eye(inputs, dtype=torch.float64)
    for matrix in matrices[1:]:
        right = right @ matrix
    return right, *_added(changes, inputs)


def _added(changes: Sequence[WeightChange], inputs: int) -> tuple[Tensor, Tensor]:
    """B and D of `composed`."""
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for change in changes:
        if isinstance(change, Right):
            downs = [down @ change.matrix.double() for down in downs]
        elif isinstance(change, LowRank):
            ups.append(change.up.double())
            downs.append(change.down.double())
    if not ups:
        return torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, inputs, dtype=torch.float64)
    return torch.cat(ups, 1), torch.cat(downs)


@dataclass(eq=False)
class _Group:
    """What layers share that are given the same and are multiplied by the same matrices."""

    right: Tensor
    """R, of all its right factors."""
    up: Tensor
    """P, (d, n), and Q, (n, d), with R − I ≈ P Q."""
    down: Tensor
    moments: Tensor
    """Q S Qᵀ"""


@dataclass(eq=False)
class _Cutter:
    """Cuts layers' changes to small rank, and counts what is lost."""

    rank: int | None
    energy: float
    ask: Callable[[], Mapping[str, Seen]]
    groups: dict[tuple[Any, ...], _Group] = field(default_factory=dict)
    probes: dict[tuple[Any, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0] * 6)
    """‖(Δ − B D) Z‖² and ‖Δ Z‖² for the plain norm, the erased and the kept."""
    complete: bool = True
    """Whether text was known of every layer that was cut."""
    whole: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """The layers whose factors are exact."""
    wide: dict[tuple[Any, ...], Seen] = field(default_factory=dict)

    @cached_property
    def seen(self) -> Mapping[str, Seen]:
        return self.ask()

    def factors(
        self, layer: str, weight: Tensor, changes: Sequence[WeightChange]
    ) -> tuple[Tensor, Tensor]:
        """B and D of one layer."""
        low = [change for change in changes if isinstance(change, LowRank)]
        if len(low) == len(changes) and (
            self.rank is None or self.rank >= sum(change.up.shape[1] for change in low)
        ):
            up = torch.cat([change.up.double() for change in low], 1)
            down = torch.cat([change.down.double() for change in low])
            self.whole.append((layer, up, down))
            return up, down
        linear = weight.ndim == 2 and all(isinstance(change, (Right, LowRank)) for change in changes)
        if linear:
            return self._of_matrix(layer, weight, changes)
        original = weight.double()
        after = original
        for change in changes:
            after = change.weight(after)
        delta = (after - original).flatten(1)
        metric = self._metric(layer, delta.shape[1])
        dense = [change.value for change in changes if isinstance(change, Dense)]
        floor = measure_rounding_noise(original.flatten(1), metric, _unit(dense[-1])) if dense else 0.0
        up, down = truncate(delta, self.rank, self.energy, metric, floor)
        self._count(layer, delta.shape[1], lambda z: delta @ z, (up, down))
        return up, down

    def _of_matrix(
        self, layer: str, weight: Tensor, changes: Sequence[WeightChange]
    ) -> tuple[Tensor, Tensor]:
        """Of W R + B D, by what is shared of R and by small matrices alone."""
        inputs = weight.shape[1]
        metric = self._metric(layer, inputs)
        rights = [change for change in changes if isinstance(change, Right)]
        group = self._group(layer, rights, inputs, metric)
        own = _added(changes, inputs) if len(rights) < len(changes) else None
        w = weight.to(_worker(weight))
        up, down, moments = (w @ group.up.to(w)).double(), group.down, group.moments
        if own:
            own_up, own_down = own
            seen = own_down if metric is None else own_down @ metric
            mixed = seen @ group.down.T
            moments = torch.cat([
                torch.cat([moments, mixed.T], 1), torch.cat([mixed, seen @ own_down.T], 1),
            ])  # fmt: skip
            up, down = torch.cat([up, own_up], 1), torch.cat([down, own_down])
        up, down = compress(up, down, moments, self.rank, self.energy)

        def whole(z: Tensor) -> Tensor:
            answer = w @ self._moved(group, z).to(w)
            if own:
                answer = answer + (own[0] @ (own[1] @ z)).to(answer)
            return answer

        self._count(layer, inputs, whole, (up, down))
        return up, down

    def _moved(self, group: _Group, z: Tensor) -> Tensor:
        """(R − I) Z, once for all layers."""
        key = ("moved", id(group), id(z))
        if key not in self.probes:
            self.probes[key] = (group.right @ z - z,)
        return self.probes[key][0]

    def _group(self, layer: str, rights: Sequence[Right], inputs: int, metric: Tensor | None) -> _Group:
        key = (*map(id, rights), inputs, id(self.seen.get(layer)))
        if key not in self.groups:
            right, _, _ = composed(rights, inputs)
            unit = max((_unit(change.matrix) for change in rights), default=0.0)
            most = None if self.rank is None else max(4 * self.rank, 64)
            if rights:
                up, down = factor_shared(right, most, self.energy, metric, unit)
            else:
                up, down = right[:, :0], right[:0]
            seen = down if metric is None else down @ metric
            self.groups[key] = _Group(right, up, down, seen @ down.T)
        return self.groups[key]

    def _metric(self, layer: str, inputs: int) -> Tensor | None:
        seen = self._seen(layer, inputs)
        return seen.metric if seen else None

    def _seen(self, layer: str, inputs: int) -> Seen | None:
        found = self.seen.get(layer)
        if found is None:
            return None
        key = ("seen", id(found), inputs)
        if key not in self.wide:
            self.wide[key] = found.widened(inputs)
        return self.wide[key]

    def _count(
        self,
        layer: str,
        inputs: int,
        change: Callable[[Tensor], Tensor],
        factors: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Add up what one layer loses; nothing where its factors are exact."""
        seen = self._seen(layer, inputs)
        if seen is None and factors:
            self.complete = False
        key = (id(seen), inputs)
        if key not in self.probes:
            draw = torch.Generator().manual_seed(0)
            moments = (None, seen.erased, seen.kept) if seen else (None,)
            self.probes[key] = tuple(draw_probes(each, inputs, draw) for each in moments)
        for i, z in enumerate(self.probes[key]):
            wanted = change(z).double()
            self.sums[2 * i + 1] += float(wanted.square().sum())
            if factors:
                up, down = factors
                self.sums[2 * i] += float((wanted - up @ (down @ z)).square().sum())

    def lost(self) -> Lost:
        """What all layers together lose; call it once, at the end."""
        if not self.groups and not self.probes:  # all of it is exact
            return Lost()
        for layer, up, down in self.whole:
            self._count(layer, down.shape[1], partial(_product, up, down), None)
        missed, total = self.sums[0::2], self.sums[1::2]
        shares = [m / t if t else 0.0 for m, t in zip(missed, total, strict=True)]
        known = self.complete and total[1] > 0
        return Lost(shares[0] ** 0.5, *(shares[1:] if known else (None, None)))


def _product(up: Tensor, down: Tensor, z: Tensor) -> Tensor:
    return up @ (down @ z)


def _unit(kept: Tensor) -> float:
    """Half the distance of 1 to the next number of a tensor's format."""
    return torch.finfo(kept.dtype).eps / 2


def _worker(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: large ones in single precision."""
    return torch.float64 if weight.numel() <= 1 << 16 else torch.float32


def _file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same content, and the hash of its tensors in it."""
    data = safetensors.torch.save(dict(tensors))
    length = 8 + int.from_bytes(data[:8], "little")
    said = {**metadata, "modelspec.hash_sha256": f"0x{hashlib.sha256(data[length:]).hexdigest()}"}
    header = {"__metadata__": dict(sorted(said.items())), **json.loads(data[8:length])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[length:]


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with rows of zeros: one rank for all layers, as every reader takes it."""
    more = rank - up.shape[1]
    return (
        torch.cat([up, up.new_zeros(up.shape[0], more)], 1),
        torch.cat([down, down.new_zeros(more, down.shape[1])]),
    )
