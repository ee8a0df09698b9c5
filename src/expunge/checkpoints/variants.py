"""Which weight files of a diffusers folder are read, and of which variant they are.

A component's weights may lie there several times: plain, and as variants (`.fp16`, `.non_ema`). The
libraries read one of them, whole or in shards, and so does everything here:

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
"""What a pipeline may have that nothing here asks."""

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What each library calls its weight files."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""How pickled weights end."""

READ = re.compile(
    r"(?:.*config|vocab|merges|tokenizer|added_tokens|special_tokens_map|spiece)\.(?:json|txt|model)"
)
"""The small files of tokenizers, schedulers and configurations that the libraries read."""


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """The components that a pipeline of this folder reads: their library and class, by their names.

    Raises:
        ExpungeError: its `model_index.json` cannot be read.
    """
    index = files.read_json(folder / "model_index.json")
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
        if not name.startswith(IDLE)
    }


def weight_files(part: Path, library: str = "") -> dict[str, tuple[Path, ...]]:
    """The weight files of a component's folder, by variant; "" is the plain ones.

    Files that neither library would read under any variant are left out. Where a variant is there both
    whole and in shards, diffusers reads the shards and transformers the whole file.

    Args:
        part: the component's folder.
        library: "diffusers" or "transformers"; by default whichever has named the files.

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
        # A shard's own name has a number in it, and an index says that it is read.
        if found := re.fullmatch(rf"(?:{stem})(?:\.([^.]+))?\.safetensors", path.name):
            if not re.search(r"-\d{5}-of-\d{5}$", found[1] or ""):
                whole[found[1] or ""] = (path,)
        elif found := re.fullmatch(
            rf"(?:{stem})\.safetensors(?:\.index(?:\.([^.]+))?|\.([^.]+)\.index)\.json", path.name
        ):
            sharded[found[1] or found[2] or ""] = _shards(path)
    return {**sharded, **whole} if library == "transformers" else {**whole, **sharded}


def _shards(index: Path) -> tuple[Path, ...]:
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


def chosen(there: Mapping[str, Any], variant: str | None, part: Path) -> str | None:
    """The variant that is read of those that are there: the one asked for, else the plain one, else the
    only one; None where there are no weights.

    Raises:
        ExpungeError: there are several, none of them plain, and none of them was asked for.
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
    """The variant that is read of every component of a diffusers folder that has weights.

    >>> from expunge.base import registry
    >>> sorted(read_variants(registry.HERE / "emoji" / "pipeline"))
    ['text_encoder', 'unet', 'vae']

    Args:
        folder: the diffusers folder.
        variant: the one to read where it is there; the plain weights by default.

    Raises:
        ExpungeError: no component has that variant, the weights of one are missing, pickled, or of
            several variants, or an index is broken.
    """
    found: dict[str, str] = {}
    known: set[str] = set()
    for name, (library, _) in components(folder).items():
        part = folder / name
        there = weight_files(part, library)
        known |= set(there) - {""}
        pick = chosen(there, variant, part)
        if pick is not None:
            found[name] = pick
        elif (part / "config.json").is_file():
            pickled = [path for path in sorted(part.iterdir()) if path.suffix.lower() in PICKLES]
            if pickled:
                raise ExpungeError(f"{pickled[0]} is {files.PICKLED}")
            raise ExpungeError(f"cannot load {folder}: its {name} has no weights in .safetensors")
    if variant and variant not in found.values():
        if not known:
            raise ExpungeError(f"{folder} has no variant {variant!r}, but plain weights alone")
        raise UnknownNameError("variant", variant, known)
    return found


def check_read(folder: str | Path, variant: str | None = None) -> None:
    """Check that every file of a diffusers folder that is read is there and whole.

    Only headers and lengths are read; what no library reads may be anything.

    Raises:
        ExpungeError: as `read_variants`; or a weight file is cut short, or one that is needed is a
            pointer of Git LFS.
    """
    folder = Path(folder)
    picked = read_variants(folder, variant)
    for name, (library, _) in components(folder).items():
        for path in weight_files(folder / name, library)[picked[name]] if name in picked else ():
            files.read_header(path)
        for path in sorted((folder / name).glob("*")):
            if READ.fullmatch(path.name) and not path.name.startswith("."):
                files.check_pointer(path)
