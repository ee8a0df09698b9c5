"""Tensors of a safetensors file, read one at a time, and copied with some of them changed.

A copy has the same names in the same order, the same dtypes and shapes; what does not change is copied
byte for byte. One changed tensor at a time is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expunge.errors import ExpungeError
from expunge.files import check_space, read_header, replacing

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

Change = Callable[[Tensor], Tensor]
"""What a tensor becomes; its dtype and shape stay."""


def read(path: str | Path, name: str) -> Tensor:
    """One tensor of a file, as it is stored.

    Raises:
        ExpungeError: the file is no whole safetensors file, has no such tensor, or the tensor holds a
            number that is none.
    """
    header = read_header(path)
    if name not in header:
        raise ExpungeError(f"{path} has no tensor {name}")
    with Path(path).open("rb") as file:
        return _finite(_read(file, header[name]), name, path)


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
    whole = {**header.pop("__metadata__", {}), **(metadata or {})}
    said = {name: text for name, text in whole.items() if text is not None}
    for name in changed:
        if name not in header:
            raise ExpungeError(f"{source} has no tensor {name}")
    check_space(Path(target).parent, Path(source).stat().st_size)
    places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    text = json.dumps({"__metadata__": said, **header} if said else header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    with Path(source).open("rb") as old, replacing(target) as temporary, temporary.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name, place in places:
            if name in changed:
                original = _read(old, place)
                new.write(_bytes(_finite(changed[name](_finite(original, name, source)), name, source)))
            else:
                _copy(old, new, place)


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
