"""Save the finished parts of long work in a folder: one `.safetensors` file an entry."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import make_slug, read_header, replacing

Tensors = dict[str, torch.Tensor]
"""The tensors of an entry, by name."""


def copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors as a file would return them: on the CPU, without gradients, sharing nothing."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def make_stem(name: str) -> str:
    """Return a file name, without its ending, for any name: its ASCII letters and its hash.

    >>> make_stem("Côte d'Ivoire 🇨🇮")
    'c-te-d-ivoire-8cfcbc84914202fb'
    """
    legible = make_slug(name, 40)
    # A name from the command line may hold surrogates, which UTF-8 refuses otherwise.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{legible}-{digest}" if legible else digest


def save_entry(folder: Path, name: str, tensors: Tensors) -> None:
    """Save an entry, whole or not at all.

    Args:
        folder: the folder.
        name: the entry's name; it may hold any character.
        tensors: the entry's tensors.

    Raises:
        ExpungeError: the file cannot be written.
    """
    with replacing(folder / f"{make_stem(name)}.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"name": name}))


def load_entries(folder: Path, names: Iterable[str]) -> dict[str, Tensors]:
    """Return the entries among `names` that were saved, without broken ones, which raise a warning."""
    found = {}
    for name in names:
        file = folder / f"{make_stem(name)}.safetensors"
        if not file.exists():
            continue
        try:
            read_header(file)  # reports a file that was cut short, which safetensors may not
            found[name] = safetensors.torch.load(file.read_bytes())
        except (ExpungeError, safetensors.SafetensorError):
            warnings.warn(
                f"the saved file {file} of {name!r} is broken; it is computed again",
                ExpungeWarning,
                stacklevel=3,
            )
    return found
