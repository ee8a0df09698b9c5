"""The tensors of a LoRA file, grouped by the layer they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.checkpoints.lora.keys import Part, shorten, split_key

Parts = dict[Part, Tensor]
"""The tensors of one layer's LoRA."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a LoRA file.

    Raises:
        ExpungeError: the file is broken, a tensor has a dtype that torch does not know, or one contains
            NaN or infinity.
    """
    try:
        raw = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ExpungeError(f"{path} is not a whole safetensors file: {error}") from None
    for name, tensor in raw.items():
        # Widened first: torch has no `isfinite` for some floats of eight bits.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ExpungeError(f"{path} contains NaN or infinity: {shorten(name)}")
    return raw


def group_modules(raw: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Parts], list[str]]:
    """Group a LoRA's tensors by layer.

    Args:
        raw: the tensors by their keys.
        path: the file, for messages.

    Returns:
        the parts of each layer by its stem in the file, and the keys that are no part of a LoRA.

    Raises:
        ExpungeError: a layer has half of a LoRA, two of them, or factors of different ranks.
    """
    found: dict[str, Parts] = {}
    others = []
    for name, tensor in raw.items():
        split = split_key(name)
        if split is None:
            others.append(name)
            continue
        stem, part = split
        parts = found.setdefault(stem, {})
        if part in parts:
            raise ExpungeError(f"{path} is not one LoRA: {shorten(stem)} has two parts {part!r}")
        parts[part] = tensor
    for stem, parts in found.items():
        _check_factors(stem, parts, path)
    # Tensors of other adapters (LoHa, LoKr) are left out, and with them their alpha, which has the same
    # key as a LoRA's.
    alien = {
        key.rpartition(".hada_")[0] or key.rpartition(".lokr_")[0] or key.rpartition(".")[0]
        for key in others
    }
    for stem in [stem for stem, parts in found.items() if "up" not in parts]:
        if stem not in alien:
            part = next(iter(found[stem]))
            raise ExpungeError(
                f"{path} is not a whole LoRA: {shorten(stem)}.{part} belongs to no factors"
            )
        others += [name for name in raw if (split := split_key(name)) and split[0] == stem]
        del found[stem]
    return found, others


def _check_factors(stem: str, parts: Parts, path: str | Path) -> None:
    """Check that a layer has both factors or none, of one rank.

    Raises:
        ExpungeError: it has not, or they are quantised.
    """
    if "up" in parts and "down" in parts:
        if parts["up"].ndim < 2 or parts["down"].ndim < 2:
            raise ExpungeError(
                f"{path} is not a whole LoRA: the factors of {shorten(stem)} are no matrices"
            )
        for tensor in (parts["up"], parts["down"]):
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ExpungeError(
                    f"{path}: the factors of {shorten(stem)} are quantised (stored as {kind}), and such"
                    " are not read: give the LoRA in floating point"
                )
        # A convolution's factors have a kernel behind the rank.
        inner, outer = parts["up"].flatten(1).shape[1], parts["down"].shape[0]
        if inner != outer:
            raise ExpungeError(
                f"{path} is not a whole LoRA: {shorten(stem)} has factors of ranks {inner} and {outer}"
            )
        if not inner:
            raise ExpungeError(f"{path} is not a whole LoRA: {shorten(stem)} has factors of rank 0")
    elif "up" in parts or "down" in parts:
        there, missing = ("up", "down") if "up" in parts else ("down", "up")
        raise ExpungeError(f"{path} is not a whole LoRA: {shorten(stem)} has {there} and no {missing}")
