"""Find a model's files and its family: a shipped model, a folder, a single file, or one of the hub.

Nothing here imports torch before a single file's family is asked for.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import read_header, read_json
from expunge.base.quiet import silence_libraries
from expunge.base.shipped import list_shipped
from expunge.checkpoints.hub import download, is_offline
from expunge.checkpoints.variants import check_folder, find_weight_files, read_components

if TYPE_CHECKING:
    from expunge.model import Model

FILE_ENDINGS = (
    ".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".toml", ".txt", ".csv",
)  # fmt: skip
"""The endings of files, which no hub id has."""

VAE_PREFIXES = ("encoder.", "decoder.", "first_stage_model.", "vae.", "quant_conv.", "post_quant_conv.")
"""How the tensors of an autoencoder begin."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    name: str
    """The model's name."""
    path: Path | None
    """A diffusers folder or a single file; None for a model of the hub."""
    variant: str | None = None
    """The variant of a folder's weights to read where it is there; else the plain ones."""

    @property
    def is_file(self) -> bool:
        """Whether the model is a single file."""
        return self.path is not None and self.path.is_file()


def find_source(model: str | Path, variant: str | None = None) -> Source:
    """Find the files of a model by its name.

    Args:
        model: the name of a shipped model, a diffusers folder, a single file, or a hub id.
        variant: the variant of a folder's weights to read ("fp16", "non_ema"); by default the plain
            ones.

    Raises:
        ExpungeError: there is no such model, it has no such variant, or its weight files are pickled,
            missing, or cut short.
    """
    shipped = registry.list_names("models")
    path = registry.HERE / model / "pipeline" if str(model) in shipped else Path(model)
    if files.is_file(path):
        if variant:
            raise ExpungeError(f"{path} is a single file; only a folder has the variant {variant!r}")
        check_single_file(path)
        return Source(path.stem, path)
    if not files.is_dir(path):
        if is_hub_id(model):
            return Source(str(model), None, variant)
        # What looks like a path is answered as one, and not with the names of shipped models.
        if "/" in str(model) or path.suffix:
            raise ExpungeError(f"there is no file or folder {model}{_suggest(path)}")
        if str(model) in list_shipped():
            raise ExpungeError(
                f"the weights of the model {str(model)!r} are not in this package but in a clone of its"
                f" repository: name the folder there (FOLDER/pipeline), or take {' or '.join(shipped)}"
            )
        raise UnknownNameError("model", str(model), shipped)
    if not files.is_file(path / "model_index.json"):
        raise ExpungeError(f"{path} is not a diffusers folder: it has no model_index.json")
    check_folder(path, variant)
    return Source(str(model) if str(model) in shipped else path.resolve().name, path, variant)


def fetch_source(source: Source, *, weights: bool = True) -> Source:
    """Download a model of the hub where it is not on this machine, and return its source here.

    Args:
        source: the model.
        weights: whether to download its weights; otherwise only its configurations.

    Raises:
        ExpungeError: it cannot be downloaded, or its weight files are missing or cut short.
    """
    if source.path:
        return source
    with silence_libraries():
        folder = download(source.name, weights=weights, variant=source.variant)
    if weights:
        if missing := _find_missing_component(folder):
            # Some repositories hold half-precision weights and nothing else.
            with silence_libraries():
                folder = download(source.name, variant="*")
            missing = _find_missing_component(folder)
        if missing:
            why = ", and HF_HUB_OFFLINE forbids to download it" if is_offline() else ""
            raise ExpungeError(f"the {missing} of {source.name} is not here in .safetensors{why}")
        check_folder(folder, source.variant)
    return replace(source, path=folder)


def is_hub_id(model: str | Path) -> bool:
    """Return whether a name can be a model of the hub: OWNER/NAME, without a file's ending."""
    # The hub allows 96 characters for the name, and one for the slash.
    if not isinstance(model, str) or model.lower().endswith(FILE_ENDINGS) or len(model) > 96 + 1:
        return False
    # A mistyped ending is still one; hub ids end in a version at most, such as "-v1.5".
    if difflib.get_close_matches(Path(model).suffix.lower(), FILE_ENDINGS, n=1, cutoff=0.8):
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) is not None


def check_single_file(path: Path) -> None:
    """Check by its header that a file is a whole safetensors file and can be a model.

    Raises:
        ExpungeError: it is pickled, cut short, a LoRA, an edit, or a VAE.
    """
    if path.suffix.lower() == ".gguf":
        raise ExpungeError(
            f"{path} is a GGUF file, whose weights are quantised, and such are not read: give the model"
            " as .safetensors or a diffusers folder, and load the edit's LoRA on the GGUF file"
        )
    header = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        raise ExpungeError(f"{path} holds no tensors")
    if any("lora_" in name or ".lora" in name for name in names):
        raise ExpungeError(f"{path} is a LoRA, not a model; give its model, and --lora {path}")
    if "expunge" in header.get("__metadata__", {}):
        raise ExpungeError(f"{path} is an edit, not a model")
    if all(name.startswith(VAE_PREFIXES) for name in names):
        raise ExpungeError(f"{path} is a VAE, not a whole model")


def read_index(folder: Path) -> dict[str, Any]:
    """Read a diffusers folder's `model_index.json`.

    Raises:
        ExpungeError: it cannot be read, or does not say which pipeline it is of.
    """
    index = read_json(folder / "model_index.json")
    if "_class_name" not in index:
        raise ExpungeError(f"{folder / 'model_index.json'} does not say which pipeline it is of")
    return index


def read_settings(source: Source) -> dict[str, Any]:
    """Read the `expunge.json` beside a model: how it is drawn with, its anchors, what was erased."""
    # Beside a single file there is none: the path is then no folder, and no such file is found.
    file = source.path / "expunge.json" if source.path else None
    return read_json(file) if file is not None and file.is_file() else {}


def find_family(pipeline: str) -> type[Model]:
    """Find the family of a diffusers pipeline class.

    Raises:
        ExpungeError: no family knows the class.
    """
    known = registry.load_all("families")
    for family in known.values():
        if pipeline in family.pipelines:
            return family
    of = {name: family for family, kind in known.items() for name in kind.pipelines}
    near = difflib.get_close_matches(pipeline, of, n=1, cutoff=0.6)
    hint = f"; the nearest it knows is {near[0]}, of {of[near[0]]}" if near else ""
    raise ExpungeError(
        f"no family knows the pipeline {pipeline}{hint}; known families: {', '.join(known)}"
    )


def find_family_of_file(path: Path) -> type[Model]:
    """Find the family of a single file by the names of its tensors.

    Raises:
        ExpungeError: no family knows them.
    """
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    header = read_header(path)
    meta = {
        name: torch.empty(entry["shape"], device="meta")
        for name, entry in header.items()
        if name != "__metadata__"
    }
    kind = infer_diffusers_model_type(meta)
    known = registry.load_all("families")
    for family in known.values():
        # diffusers calls several families "v1", so that the kind alone does not decide.
        if kind in family.single_files and any(family.single_file_key in tensor for tensor in meta):
            return family
    raise ExpungeError(f"{path} is a checkpoint of no family that is known; known: {', '.join(known)}")


def _suggest(path: Path) -> str:
    """A question after a file beside a missing one that is named almost like it; "" for none."""
    try:
        beside = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _find_missing_component(folder: Path) -> str:
    """The first component of a folder that has a configuration and no weights; "" for none."""
    for name, (library, _) in read_components(folder).items():
        if (folder / name / "config.json").is_file() and not find_weight_files(folder / name, library):
            return name
    return ""
