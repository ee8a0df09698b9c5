"""Which weight files of a diffusers folder are read, and of which variant they are.

A component's weights may lie in its folder several times: plain, and as variants (`.fp16`, `.non_ema`).
diffusers and transformers read one of them, whole or in shards, and so does everything here:

    diffusion_pytorch_model.safetensors                       plain
    diffusion_pytorch_model.fp16.safetensors                  the variant fp16
    diffusion_pytorch_model.safetensors.index.fp16.json       its shards, by an index
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.base import files
from expunge.base.errors import ExpungeError, UnknownNameError

IDLE = ("safety_checker", "feature_extractor", "image_encoder")
"""How components are named that a pipeline may have and that are never run here."""

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library names its weight files."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""The endings of pickled weights."""

CONFIG_FILES = re.compile(
    r"(?:.*config|vocab|merges|tokenizer|added_tokens|special_tokens_map|spiece)\.(?:json|txt|model)"
)
"""The names of the tokenizers', schedulers' and configurations' small files that the libraries read."""


def read_components(folder: Path) -> dict[str, tuple[str, str]]:
    """Read which components a folder's pipeline has: library and class by the component's name.

    Raises:
        ExpungeError: its `model_index.json` cannot be read.
    """
    index = files.read_json(folder / "model_index.json")
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        # A component that is left out stands there as [null, null].
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
        if not name.startswith(IDLE)
    }


def find_weight_files(part: Path, library: str = "") -> dict[str, tuple[Path, ...]]:
    """Find the weight files of a component's folder by variant; "" is the plain one.

    Files that neither library would read under any variant are left out.

    Args:
        part: the component's folder.
        library: "diffusers" or "transformers"; by default files named by either.

    Raises:
        ExpungeError: an index cannot be read, or names a shard that is missing.
    """
    stem = STEMS.get(library) or "|".join(STEMS.values())
    whole: dict[str, tuple[Path, ...]] = {}
    sharded: dict[str, tuple[Path, ...]] = {}
    try:
        there = sorted(part.iterdir()) if part.is_dir() else []
    except OSError as error:
        raise ExpungeError(f"cannot read {part}: {error.strerror or error}") from error
    for path in there:
        if found := re.fullmatch(rf"(?:{stem})(?:\.([^.]+))?\.safetensors", path.name):
            # A shard is read only through its index, which names it.
            if not re.search(r"-\d{5}-of-\d{5}$", found[1] or ""):
                whole[found[1] or ""] = (path,)
        elif found := re.fullmatch(
            rf"(?:{stem})\.safetensors(?:\.index(?:\.([^.]+))?|\.([^.]+)\.index)\.json", path.name
        ):
            sharded[found[1] or found[2] or ""] = _read_shards(path)
    # Where a variant is there in both forms, diffusers reads the shards, transformers the whole file.
    return {**sharded, **whole} if library == "transformers" else {**whole, **sharded}


def choose_variant(there: Mapping[str, Any], variant: str | None, part: Path) -> str | None:
    """Choose the variant to read: the wanted one if it is there, else the plain one, else the only one.

    Args:
        there: the variants that a component has.
        variant: the wanted one.
        part: the component's folder, for messages.

    Returns:
        the variant; None where there are no weights.

    Raises:
        ExpungeError: there are several variants, none of them plain and none of them the wanted one.
    """
    if variant and variant in there:
        return variant
    if "" in there or not there:
        return "" if there else None
    if len(there) > 1:
        raise ExpungeError(
            f"{part} has the variants {' and '.join(sorted(there))} and no plain weights: say which"
            " with --variant"
        )
    return next(iter(there))


def read_variants(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Find the variant that is read of each component of a diffusers folder that has weights.

    >>> from expunge.base import registry
    >>> sorted(read_variants(registry.HERE / "emoji" / "pipeline"))
    ['text_encoder', 'unet', 'vae']

    Args:
        folder: the diffusers folder.
        variant: the variant to read where it is there; the plain weights by default.

    Raises:
        ExpungeError: no component has that variant; a component's weights are missing, pickled, or of
            several variants; or an index is broken.
    """
    found: dict[str, str] = {}
    known: set[str] = set()
    for name, (library, _) in read_components(folder).items():
        part = folder / name
        there = find_weight_files(part, library)
        known |= set(there) - {""}
        chosen = choose_variant(there, variant, part)
        if chosen is not None:
            found[name] = chosen
        elif (part / "config.json").is_file():
            pickled = [path for path in sorted(part.iterdir()) if path.suffix.lower() in PICKLES]
            if pickled:
                raise ExpungeError(f"{pickled[0]} is {files.PICKLED}")
            raise ExpungeError(f"cannot load {folder}: its {name} has no weights in .safetensors")
    # One component that has it is enough: the others may have plain weights alone.
    if variant and variant not in found.values():
        if not known:
            raise ExpungeError(f"{folder} has no variant {variant!r}, but plain weights alone")
        raise UnknownNameError("variant", variant, known)
    return found


def list_variants(folder: Path) -> list[str]:
    """List the variants of all components of a diffusers folder; "" is the plain one.

    Raises:
        ExpungeError: as `find_weight_files`.
    """
    parts = read_components(folder).items()
    return sorted({one for name, (of, _) in parts for one in find_weight_files(folder / name, of)})


def check_folder(folder: str | Path, variant: str | None = None) -> None:
    """Check that every file of a diffusers folder that is read is there and whole.

    Only headers and lengths are read; files that no library reads may be broken.

    Args:
        folder: the diffusers folder.
        variant: the variant to read where it is there.

    Raises:
        ExpungeError: as `read_variants`; or a weight file is cut short, or a file is a pointer of Git
            LFS.
    """
    folder = Path(folder)
    variants = read_variants(folder, variant)
    for name, (library, _) in read_components(folder).items():
        if name in variants:
            for path in find_weight_files(folder / name, library)[variants[name]]:
                files.read_header(path)
        for path in sorted((folder / name).glob("*")):
            if CONFIG_FILES.fullmatch(path.name) and not path.name.startswith("."):
                files.check_pointer(path)


def _read_shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names."""
    try:
        names = sorted(set(files.read_json(index)["weight_map"].values()))
        shards = tuple(index.parent / name for name in names)
    except (KeyError, AttributeError, TypeError) as error:
        raise ExpungeError(f"{index} is not an index of weight files") from error
    except ExpungeError as error:
        if "JSON" not in str(error):
            raise
        raise ExpungeError(f"{index} is not an index of weight files") from None
    for shard in shards:
        if not shard.is_file():
            raise ExpungeError(f"the weight file {shard} is missing")
    return shards
