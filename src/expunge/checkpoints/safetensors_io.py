"""Read tensors of a safetensors file one at a time, and copy a file with some of its tensors changed.

A copy has the same names in the same order, the same dtypes and shapes; tensors that do not change are
copied byte for byte. One changed tensor at a time is in memory.

Scaled eight-bit weights are multiplied by their scale when they are read, and divided by it when they
are written: a weight W is stored as round(W / s), with its scale s beside it, one number or one for each
row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.files import check_space, read_header, replacing
from expunge.ops.rounding import RoundingCost, round_stochastically

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""

CHUNK = 1 << 24
"""The number of bytes that are copied at a time."""

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
"""The names of a layer's scale beside its `weight`, in the programs that write them."""

IGNORED = ("scale_input", "input_scale", "comfy_quant")
"""What else lies beside a scaled weight: scales of the layer's input, and notes."""

MARK = "scaled_fp8"
"""The tensor that marks a file with scaled weights."""

SCALE_TOLERANCE = 1.03
"""How far a weight may outgrow the largest number of its format before its scale grows: half a step of
the format below that number, so that it is still rounded to it."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the file stores it."""

    value: Tensor
    scale: Tensor | None = None
    """Its scale, if it is scaled."""


TensorUpdate = Callable[[Tensor], Tensor | StoredTensor]
"""Returns a tensor's new value; it is given float32 where the tensor is scaled. The dtype and the shape
in the file stay."""


def find_scales(header: Mapping[str, Any]) -> dict[str, str]:
    """Find the scaled weights of a file, and the name of each one's scale.

    Raises:
        ExpungeError: weights are quantised in blocks or to integers, or have scales of an unknown name.
    """
    found = {}
    beside: dict[str, list[str]] = {}
    for name in header:
        beside.setdefault(_name_layer(name), []).append(name)
    for name, place in header.items():
        stem, _, last = name.rpartition(".")
        if name == "__metadata__" or last != "weight":
            continue
        dot = f"{stem}." * bool(stem)
        scales = [f"{dot}{scale}" for scale in SCALES if f"{dot}{scale}" in header]
        kind = place["dtype"]
        if kind not in DTYPES or not DTYPES[kind].is_floating_point:
            raise ExpungeError(
                f"{name} is quantised (stored as {kind}), and such weights are not read: give the model"
                " in 16 bits, or in eight-bit floating point"
            )
        if not scales:
            # Whatever else is called a scale, an eight-bit weight means nothing without it.
            others = [one for one in beside[stem] if kind.startswith("F8") and _is_other_scale(one)]
            if others:
                raise ExpungeError(
                    f"{name} has {others[0]} beside it, which is no scale that is known here"
                    f" (known: {', '.join(SCALES)}): give the model in 16 bits"
                )
            continue
        shape, rows = header[scales[0]]["shape"], place["shape"][0]
        stored = header[scales[0]]["dtype"]
        if stored not in DTYPES or not DTYPES[stored].is_floating_point:
            raise ExpungeError(
                f"{scales[0]} is stored as {stored}, and should be a floating-point number: give the"
                " model in 16 bits"
            )
        # Scales of blocks have more entries than rows, or a second level; a single row is of columns.
        by_row = shape[:1] == [rows] and prod(shape) == rows
        if not (prod(shape) == 1 or by_row) or f"{dot}weight_scale_2" in header:
            raise ExpungeError(
                f"{name} is scaled in blocks, and such weights are not read: give the model in 16 bits"
            )
        found[name] = scales[0]
    return found


def read_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a file in its dtype; a scaled one multiplied by its scale, in float32.

    Raises:
        ExpungeError: the file is no whole safetensors file, has no such tensor, or the tensor contains
            NaN or infinity.
    """
    one = read_stored(path, name)
    return one.value if one.scale is None else _unscale(one.value, one.scale)


def read_stored(path: str | Path, name: str) -> StoredTensor:
    """Read one tensor of a file and its scale, as they are stored.

    Raises:
        ExpungeError: as `read_tensor`.
    """
    header = read_header(path)
    if name not in header:
        raise ExpungeError(f"{path} has no tensor {name}")
    scale = find_scales(_select_layer(header, name)).get(name)
    with Path(path).open("rb") as file:
        value = _read_finite(file, header, name, path)
        return StoredTensor(value, None if scale is None else _read_finite(file, header, scale, path))


def check_file(path: str | Path) -> None:
    """Check that no tensor of a file contains NaN or infinity, reading one at a time.

    Raises:
        ExpungeError: one does, or the file is no whole safetensors file.
    """
    header = read_header(path)
    with Path(path).open("rb") as file:
        for name in header:
            if name != "__metadata__":
                _read_finite(file, header, name, path)


def copy_file(
    source: str | Path,
    target: str | Path,
    updates: Mapping[str, TensorUpdate],
    metadata: Mapping[str, str | None] | None = None,
    cost: RoundingCost | None = None,
) -> None:
    """Copy a file with some tensors changed; `target` is whole or stays as it was.

    Args:
        source: the file to read.
        target: the file to write, another one.
        updates: the new values of tensors, by their names.
        metadata: entries to add to the file's metadata; None removes an entry.
        cost: what the rounding of scaled tensors is added to; an update rounds all others itself.

    Raises:
        ExpungeError: `source` is no whole safetensors file, a tensor is missing or contains NaN or
            infinity, the disk is too full, or `target` cannot be written.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ExpungeError(f"{source} is read from and never written to; choose another output")
    header = read_header(source)
    entries = {**header.pop("__metadata__", {}), **(metadata or {})}
    entries = {key: text for key, text in entries.items() if text is not None}
    for name in updates:
        if name not in header:
            raise ExpungeError(f"{source} has no tensor {name}")
    # Of the changed layers alone: elsewhere any kind of scale is copied as it is.
    scales = {name: find_scales(_select_layer(header, name)).get(name) for name in updates}
    check_space(Path(target).parent, Path(source).stat().st_size)
    # In the order of the data, which need not be the header's: the new file is written in one go.
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    start, new_scales = _make_head(entries, header), dict[str, Tensor]()
    with Path(source).open("rb") as old, replacing(target) as temporary, temporary.open("wb") as new:
        new.write(start)
        for name, place in places:
            if name not in updates:
                _copy_tensor(old, new, place)
                continue
            original = _read_finite(old, header, name, source)
            at = scales[name]
            scale = None if at is None else _read_finite(old, header, at, source)
            before = original if scale is None else _unscale(original, scale)
            updated = updates[name](before)
            one = _store(updated, original.dtype, scale, name, source)
            if cost is not None and one.scale is not None and isinstance(updated, Tensor):
                cost.add(before, updated, _unscale(one.value, one.scale), original.dtype)
            new.write(_to_bytes(_check_finite(one.value, name, source)))
            if at is not None and one.scale is not None and one.scale is not scale:
                new_scales[at] = one.scale
        for at, scale in new_scales.items():
            # A scale may stand before its weight, which had to be changed first.
            new.seek(len(start) + header[at]["data_offsets"][0])
            new.write(_to_bytes(_check_finite(scale, at, source)))


def unscale_file(source: str | Path, target: str | Path, dtype: torch.dtype) -> None:
    """Copy a file with its scaled weights multiplied by their scales, and without the scales.

    Args:
        source: the file to read.
        target: the file to write.
        dtype: the dtype of the unscaled weights.

    Raises:
        ExpungeError: the scales are of an unknown kind, or `target` cannot be written.
    """
    header = read_header(source)
    entries = header.pop("__metadata__", {})
    scales = find_scales(header)
    left_out = {MARK, *scales.values()}
    left_out |= {f"{name.removesuffix('weight')}{other}" for name in scales for other in IGNORED}
    kinds = {kind: name for name, kind in DTYPES.items()}
    new_header: dict[str, Any] = {}
    end = 0
    for name, place in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if name in left_out or name.endswith(f".{MARK}"):
            continue
        size = place["data_offsets"][1] - place["data_offsets"][0]
        if name in scales:
            place, size = {**place, "dtype": kinds[dtype]}, prod(place["shape"]) * dtype.itemsize
        new_header[name] = {**place, "data_offsets": [end, end + size]}
        end += size
    check_space(Path(target).parent, end)
    with Path(source).open("rb") as old, replacing(target) as temporary, temporary.open("wb") as new:
        new.write(_make_head(entries, new_header))
        for name in new_header:
            if name in scales:
                value, scale = _read(old, header[name]), _read(old, header[scales[name]])
                new.write(_to_bytes(_unscale(value, scale).to(dtype)))
            else:
                _copy_tensor(old, new, header[name])


def _select_layer(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries of a header that belong to one tensor: its own and its scales'."""
    layer = _name_layer(name)
    return {
        key: entry
        for key, entry in header.items()
        if key == name or (_name_layer(key) == layer and not key.endswith(".weight"))
    }


def _name_layer(name: str) -> str:
    """The layer of a tensor: "a.b" for `a.b.weight`, `a.b.scale` and `a.b.weight.scale`."""
    layer, _, last = name.rpartition(".")
    return layer if last == "weight" else re.sub(r"(^|\.)weight$", "", layer)


def _is_other_scale(name: str) -> bool:
    """Whether a tensor is called a scale, and by no name that is known here."""
    last = name.rpartition(".")[2]
    return "scale" in last and last not in (*SCALES, *IGNORED, MARK)


def _store(
    updated: Tensor | StoredTensor,
    dtype: torch.dtype,
    scale: Tensor | None,
    name: str,
    path: str | Path,
) -> StoredTensor:
    """A new value as the file stores it, with the dtype and the kind of scale it had."""
    if isinstance(updated, StoredTensor):
        scales = [None if s is None else (s.shape, s.dtype) for s in (updated.scale, scale)]
        if updated.value.dtype == dtype and scales[0] == scales[1]:
            return updated  # stored alike: copied bit for bit, without unscaling and rounding
        value, own = updated.value, updated.scale
        updated = value if own is None else _unscale(value, own)
    if not bool(updated.float().isfinite().all()):
        raise ExpungeError(f"the tensor {name} of {path} would contain NaN or infinity")
    return StoredTensor(updated.to(dtype)) if scale is None else _rescale(updated, scale, dtype, name)


def _unscale(value: Tensor, scale: Tensor) -> Tensor:
    """The weight that a scaled one stands for, in float32."""
    return value.float() * _spread(scale, value)


def _rescale(value: Tensor, scale: Tensor, dtype: torch.dtype, name: str) -> StoredTensor:
    """A weight divided by its scale and rounded; the scale grows where the weight has outgrown it."""
    if dtype.itemsize > 1:
        # 16 bits reach far beyond any weight, so that the scale need not grow.
        return StoredTensor((value.double() / _spread(scale, value).double()).to(dtype), scale)
    most, wide = torch.finfo(dtype).max, value.double()
    size = wide.abs().flatten(1).amax(1) if scale.numel() > 1 else wide.abs().amax()
    needed = (size / most).reshape(scale.shape)
    grown = torch.where(needed > SCALE_TOLERANCE * scale.double(), needed.to(scale.dtype), scale)
    # Seeded by the tensor's name alone: equal exports have equal bytes, wherever the file lies.
    digest = hashlib.sha256(name.encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return StoredTensor(round_stochastically(wide / _spread(grown, value).double(), dtype, draw), grown)


def _spread(scale: Tensor, value: Tensor) -> Tensor:
    """A scale in float32 and in a shape that broadcasts over its weight's rows."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    return scale.float().reshape(-1, *(1 for _ in value.shape[1:]))


def _make_head(metadata: Mapping[str, str], header: Mapping[str, Any]) -> bytes:
    """The first bytes of a file: the length of its header, and the header."""
    text = json.dumps({"__metadata__": metadata, **header} if metadata else header).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want the data at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _read_finite(file: BinaryIO, header: Mapping[str, Any], name: str, path: str | Path) -> Tensor:
    return _check_finite(_read(file, header[name]), name, path)


def _read(file: BinaryIO, place: Mapping[str, Any]) -> Tensor:
    """The tensor of a header's entry."""
    if place["dtype"] not in DTYPES:
        raise ExpungeError(f"tensors of the type {place['dtype']} cannot be changed")
    file.seek(_find_data(file) + place["data_offsets"][0])
    data = bytearray(file.read(place["data_offsets"][1] - place["data_offsets"][0]))
    dtype = DTYPES[place["dtype"]]
    # frombuffer takes no empty buffer, and safetensors may hold tensors without entries.
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(place["shape"])


def _copy_tensor(old: BinaryIO, new: BinaryIO, place: Mapping[str, Any]) -> None:
    """Copy a tensor's bytes."""
    first, last = place["data_offsets"]
    old.seek(_find_data(old) + first)
    while first < last:
        part = old.read(min(CHUNK, last - first))
        new.write(part)
        first += len(part)


def _find_data(file: BinaryIO) -> int:
    """The position in a file where its tensors begin."""
    file.seek(0)
    return 8 + int.from_bytes(file.read(8), "little")


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_finite(tensor: Tensor, name: str, path: str | Path) -> Tensor:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise ExpungeError(f"the tensor {name} of {path} contains NaN or infinity")
    return tensor
