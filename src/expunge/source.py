"""Where a model's files are, of what family they are, and a diffusers pipeline made of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import registry
from expunge.errors import ExpungeError, unknown
from expunge.files import check_weights, read_header
from expunge.hub import absent, refused

if TYPE_CHECKING:
    import torch

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
"""Endings of files that can run a stranger's code when they are read."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """What to call it."""
    path: Path | None
    """A diffusers folder or a single file; None for a model of the hub."""

    @property
    def is_file(self) -> bool:
        return self.path is not None and self.path.is_file()


def find(model: str | Path) -> Source:
    """The source that a name stands for: a shipped model, a diffusers folder, a single file, a hub id.

    Raises:
        ExpungeError: there is none, or its weight files are pickled, missing, or cut short.
    """
    shipped = registry.names("models")
    path = registry.HERE / model / "pipeline" if str(model) in shipped else Path(model)
    if path.is_file():
        check_single_file(path)
        return Source(path.stem, path)
    if not path.is_dir():
        if isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/", "~")):
            return Source(model, None)
        raise unknown("model", str(model), shipped)
    if not (path / "model_index.json").is_file():
        raise ExpungeError(f"{path} is not a diffusers folder: it has no model_index.json")
    check_weights(path)
    return Source(str(model) if str(model) in shipped else path.resolve().name, path)


def check_single_file(path: Path) -> None:
    """Check that a file is a whole safetensors file that can be a model.

    Raises:
        ExpungeError: it is pickled, cut short, a LoRA, an edit, or a VAE.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix in PICKLED or start.startswith((b"PK\3\4", b"\x80\2")):
        raise ExpungeError(f"{path} is pickled, and reading it could run a stranger's code;"
                           " convert it to .safetensors first")  # fmt: skip
    header = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    if any("lora_" in name or ".lora" in name for name in names):
        raise ExpungeError(f"{path} is a LoRA, not a model; give its model, and --lora {path}")
    if "expunge" in header.get("__metadata__", {}):
        raise ExpungeError(f"{path} is an edit, not a model")
    of_vae = ("encoder.", "decoder.", "first_stage_model.", "vae.", "quant_conv.", "post_quant_conv.")
    if all(name.startswith(of_vae) for name in names):
        raise ExpungeError(f"{path} is a VAE, not a whole model")


def family_of(pipeline: str) -> type[Any]:
    """The family that a diffusers class belongs to.

    Raises:
        ExpungeError: none does.
    """
    known = {name: registry.get("families", name) for name in registry.names("families")}
    for family in known.values():
        if pipeline in family.pipelines:
            return family
    raise ExpungeError(f"no family knows the pipeline {pipeline}; known: {', '.join(known)}")


def family_of_file(path: Path) -> type[Any]:
    """The family of a single-file checkpoint, by what its tensors are called.

    Raises:
        ExpungeError: none is known.
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
    known = registry.names("families")
    for name in known:
        family = registry.get("families", name)
        if kind in family.single_files and any(family.mark in tensor for tensor in meta):
            return family
    raise ExpungeError(f"{path} is a checkpoint of no family that is known; known: {', '.join(known)}")


def settings(source: Source) -> dict[str, Any]:
    """What `expunge.json` says beside the model: how to draw with it, its anchors, what was erased."""
    file = source.path / "expunge.json" if source.path else None
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError):
        raise ExpungeError(f"{file} is not a JSON table") from None


def read_pipeline(
    source: Source, dtype: torch.dtype, config: str | Path | None = None, **parts: Any
) -> Any:
    """Read a pipeline with diffusers, quietly, weights from safetensors only.

    Args:
        source: where it is.
        dtype: the number format of its weights.
        config: for a single file: a diffusers folder or a hub id of a model built like it.
        parts: components to use in place of the source's; None leaves one out.

    Raises:
        ExpungeError: it cannot be read.
    """
    import diffusers

    try:
        with _quietly():
            if source.is_file:
                assert source.path is not None
                family = family_of_file(source.path)
                pipeline = getattr(diffusers, family.pipelines[0])
                return pipeline.from_single_file(
                    str(source.path), torch_dtype=dtype, config=config and str(config), **parts
                )
            return diffusers.DiffusionPipeline.from_pretrained(
                source.path or source.name,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=source.path is not None,
                **parts,
            )
    except ExpungeError:
        raise
    except Exception as error:  # whatever diffusers, the hub and the files come up with
        if source.path is None:
            raise refused(source.name, error) from error
        if source.is_file and config is None and absent(error):
            raise ExpungeError(
                f"a single file has no configuration, and the one for {source.path} is not on this"
                " machine; give --config a diffusers folder of a model built like it"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExpungeError(f"cannot load {source.path}: {lines[0]}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence diffusers and transformers for the length of a block."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def check_numbers(parts: Mapping[str, Any], name: str) -> None:
    """Check that every weight is a number.

    Raises:
        ExpungeError: one is nan or infinite.
    """
    import torch

    for part, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, tensor in module.named_parameters():
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(
                tensor.isfinite().all()
            ):
                raise ExpungeError(f"the weights of {name} hold numbers that are none: {part}.{key}")
