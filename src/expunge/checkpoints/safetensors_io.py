"""Tensors of a safetensors file, read one at a time, and copied with some of them changed.

A copy has the same names in the same order, the same dtypes and shapes; what does not change is copied
byte for byte. One changed tensor at a time is in memory.

Scaled eight-bit weights are multiplied by their scale on reading and divided by it on writing: a
weight W is stored as round(W / s), and its scale s, one number or one for each row of W, beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.files import check_space, read_header, replacing

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
"""What the format calls its dtypes."""

CHUNK = 1 << 24
"""How many bytes are copied at a time."""

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
"""What a layer's scale is called beside its `weight`, by the programs that write them."""

UNREAD = ("scale_input", "input_scale", "comfy_quant")
"""What else lies beside a scaled weight: how to scale what the layer is given, and notes."""

MARK = "scaled_fp8"
"""The tensor that says that a file has scaled weights."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as a file has it, and its scale as it has it."""

    value: Tensor
    scale: Tensor | None = None


Change = Callable[[Tensor], Tensor | Stored]
"""What a tensor becomes, as float32 where it is scaled; its dtype and shape in the file stay."""


def scaled(header: Mapping[str, Any]) -> dict[str, str]:
    """The scaled weights of a file, by name, and what their scales are called.

    Raises:
        ExpungeError: weights are stored in a way that one scale a row cannot undo.
    """
    found = {}
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
            continue
        shape, rows = header[scales[0]]["shape"], place["shape"][0]
        by_row = prod(shape) == rows and rows in shape
        if not (prod(shape) == 1 or by_row) or f"{dot}weight_scale_2" in header:
            raise ExpungeError(
                f"{name} is scaled in blocks, and such weights are not read: give the model in 16 bits"
            )
        found[name] = scales[0]
    return found


def read(path: str | Path, name: str) -> Tensor:
    """One tensor of a file, as it is stored; of a scaled one what it stands for, in float32.

    Raises:
        ExpungeError: the file is no whole safetensors file, has no such tensor, or the tensor holds a
            number that is none.
    """
    one = stored(path, name)
    return one.value if one.scale is None else _unscaled(one.value, one.scale)


def stored(path: str | Path, name: str) -> Stored:
    """One tensor of a file, and its scale, as they are stored.

    Raises:
        ExpungeError: as `read`.
    """
    header = read_header(path)
    if name not in header:
        raise ExpungeError(f"{path} has no tensor {name}")
    scale = scaled(_of_layer(header, name)).get(name)
    with Path(path).open("rb") as file:
        value = _finite(_read(file, header[name]), name, path)
        return Stored(value, None if scale is None else _finite(_read(file, header[scale]), scale, path))


def _of_layer(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a header that is of one tensor's layer."""
    stem = name.rpartition(".")[0]
    beside = [f"{stem}." * bool(stem) + scale for scale in (*SCALES, "weight_scale_2")]
    return {key: header[key] for key in (name, *beside) if key in header}


def check_numbers(path: str | Path) -> None:
    """Read a file tensor by tensor.

    Raises:
        ExpungeError: as `read`, for any of its tensors.
    """
    header = read_header(path)
    with Path(path).open("rb") as file:
        for name, place in header.items():
            if name != "__metadata__":
                _finite(_read(file, place), name, path)


def copy(
    source: str | Path,
    target: str | Path,
    changed: Mapping[str, Change],
    metadata: Mapping[str, str | None] | None = None,
) -> None:
    """Write `source` to `target` with some tensors changed; `target` is whole or stays as it was.

    Args:
        source, target: two files; never the same.
        changed: what becomes of the tensors of these names.
        metadata: what is said beside what the file's own metadata says; None takes an entry away.

    Raises:
        ExpungeError: `source` is no whole safetensors file, a tensor is missing or holds a number that
            is none, the disk is too full, or `target` cannot be written.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ExpungeError(f"{source} is read from and never written to; choose another output")
    header = read_header(source)
    said = {**header.pop("__metadata__", {}), **(metadata or {})}
    said = {key: text for key, text in said.items() if text is not None}
    for name in changed:
        if name not in header:
            raise ExpungeError(f"{source} has no tensor {name}")
    scales = {name: scaled(_of_layer(header, name)).get(name) for name in changed}
    check_space(Path(target).parent, Path(source).stat().st_size)
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    start, late = _head(said, header), dict[str, Tensor]()
    with Path(source).open("rb") as old, replacing(target) as temporary, temporary.open("wb") as new:
        new.write(start)
        for name, place in places:
            if name not in changed:
                _copy(old, new, place)
                continue
            original = _finite(_read(old, place), name, source)
            at = scales[name]
            scale = None if at is None else _finite(_read(old, header[at]), at, source)
            became = changed[name](original if scale is None else _unscaled(original, scale))
            one = _as_stored(became, original.dtype, scale, f"{name} of {source}")
            new.write(_bytes(_finite(one.value, name, source)))
            if at is not None and one.scale is not None and one.scale is not scale:
                late[at] = one.scale
        for at, scale in late.items():
            # It may stand before its weight, which had to be known first.
            new.seek(len(start) + header[at]["data_offsets"][0])
            new.write(_bytes(_finite(scale, at, source)))


def unscale(source: str | Path, target: str | Path, dtype: torch.dtype) -> None:
    """Write `source` to `target` with its scaled weights as numbers of `dtype`, and no scales.

    Raises:
        ExpungeError: the scales are of a kind that is not known, or `target` cannot be written.
    """
    header = read_header(source)
    said = header.pop("__metadata__", {})
    scales = scaled(header)
    left_out = {MARK, *scales.values()}
    left_out |= {f"{name.removesuffix('weight')}{other}" for name in scales for other in UNREAD}
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
        new.write(_head(said, new_header))
        for name in new_header:
            if name in scales:
                value, scale = _read(old, header[name]), _read(old, header[scales[name]])
                new.write(_bytes(_unscaled(value, scale).to(dtype)))
            else:
                _copy(old, new, header[name])


def rounded(value: Tensor, dtype: torch.dtype, seed: str) -> Tensor:
    """Numbers in an eight-bit format, rounded up or down at random so that their mean is kept.

    To the nearest, a change smaller than half the distance between two numbers of the format would be
    rounded away; so, the sum over a row keeps it. What the format has stays as it is; what lies beyond
    its largest number becomes that.

    Args:
        value: any shape.
        dtype: an eight-bit floating-point format.
        seed: what all random choices follow from.
    """
    most = torch.finfo(dtype).max
    wide = value.double().clamp(-most, most)
    nearest = wide.to(dtype)
    rest = wide - nearest.double()
    bits = nearest.view(torch.uint8)
    # A number's bits count up with its size, and the first of them is its sign.
    outward = (rest > 0) == ((bits & 0x80) == 0)
    smallest = torch.where(rest > 0, 0x01, 0x81).to(torch.uint8)
    one = torch.ones_like(bits)
    other = torch.where((bits & 0x7F) == 0, smallest, torch.where(outward, bits + one, bits - one))
    gap = (other.view(dtype).double() - nearest.double()).abs()
    share = torch.where(rest == 0, 0, rest.abs() / gap)
    share = share.masked_fill(share < 1e-5, 0)  # what float32 made of a number of the format
    state = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    )
    up = torch.rand(share.shape, generator=state, dtype=torch.float64) < share
    return torch.where(up, other, bits).view(dtype)


def _as_stored(became: Tensor | Stored, dtype: torch.dtype, scale: Tensor | None, what: str) -> Stored:
    """What a tensor became, as a file stores it that has this dtype and this scale for it."""
    if isinstance(became, Stored):
        scales = [None if s is None else (s.shape, s.dtype) for s in (became.scale, scale)]
        if became.value.dtype == dtype and scales[0] == scales[1]:
            return became  # to the bit
        value, own = became.value, became.scale
        became = value if own is None else _unscaled(value, own)
    if not bool(became.float().isfinite().all()):
        raise ExpungeError(f"the tensor {what} would hold numbers that are none (nan or infinite)")
    return Stored(became.to(dtype)) if scale is None else _scaled(became, scale, dtype, what)


def _unscaled(value: Tensor, scale: Tensor) -> Tensor:
    """What a scaled weight stands for, in float32."""
    return value.float() * _by_row(scale, value)


def _scaled(value: Tensor, scale: Tensor, dtype: torch.dtype, name: str) -> Stored:
    """A weight as a scaled one; the scale grows where the weight has outgrown it."""
    if dtype.itemsize > 1:
        return Stored((value.double() / _by_row(scale, value).double()).to(dtype), scale)
    most, wide = torch.finfo(dtype).max, value.double()
    size = wide.abs().flatten(1).amax(1) if scale.numel() > 1 else wide.abs().amax()
    # What rounds to the largest number needs no larger scale.
    needed = (size / most).reshape(scale.shape)
    grown = torch.where(needed > 1.03 * scale.double(), needed.to(scale.dtype), scale)
    return Stored(rounded(wide / _by_row(grown, value).double(), dtype, name), grown)


def _by_row(scale: Tensor, value: Tensor) -> Tensor:
    """A scale so that it can be multiplied onto its weight, in float32."""
    return (
        scale.float().reshape(-1, *(1 for _ in value.shape[1:]))
        if scale.numel() > 1
        else scale.float().reshape(())
    )


def _head(said: Mapping[str, str], header: Mapping[str, Any]) -> bytes:
    """The first bytes of a file: the length of its header, and the header."""
    text = json.dumps({"__metadata__": said, **header} if said else header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _read(file: BinaryIO, place: Mapping[str, Any]) -> Tensor:
    """The tensor that lies at a place of a file, its header's length read from the file itself."""
    if place["dtype"] not in DTYPES:
        raise ExpungeError(f"tensors of the type {place['dtype']} cannot be changed")
    file.seek(_start(file) + place["data_offsets"][0])
    data = bytearray(file.read(place["data_offsets"][1] - place["data_offsets"][0]))
    dtype = DTYPES[place["dtype"]]
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(place["shape"])


def _copy(old: BinaryIO, new: BinaryIO, place: Mapping[str, Any]) -> None:
    """Copy a tensor's bytes."""
    first, last = place["data_offsets"]
    old.seek(_start(old) + first)
    while first < last:
        part = old.read(min(CHUNK, last - first))
        new.write(part)
        first += len(part)


def _start(file: BinaryIO) -> int:
    """Where the data of a file begins."""
    file.seek(0)
    return 8 + int.from_bytes(file.read(8), "little")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _finite(tensor: Tensor, name: str, source: str | Path) -> Tensor:
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise ExpungeError(
            f"the tensor {name} of {source} holds numbers that are none (nan or infinite)"
        )
    return tensor
