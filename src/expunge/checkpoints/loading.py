"""Where a model's files are, of what family they are, and a diffusers pipeline made of them."""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.base import files, registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import read_header, read_json
from expunge.base.quiet import silence_libraries
from expunge.checkpoints.hub import absent, fetch, offline
from expunge.checkpoints.variants import IDLE, check_read, components, read_variants, weight_files

if TYPE_CHECKING:
    import torch

HELD = {
    "CLIPText": ("cond_stage_model.", "conditioner.", "text_encoders.clip_"),
    "T5Encoder": ("text_encoders.t5",),
    "AutoencoderKL": ("first_stage_model.", "vae."),
}
"""What a component's class begins with, and what its tensors begin with in a single file."""

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".toml", ".txt", ".csv")
"""How files end, and models of the hub are not called."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """What to call it."""
    path: Path | None
    """A diffusers folder or a single file; None for a model of the hub."""
    variant: str | None = None
    """The variant of a folder's weights to read where it is there; else the plain ones."""

    @property
    def is_file(self) -> bool:
        return self.path is not None and self.path.is_file()


def find(model: str | Path, variant: str | None = None) -> Source:
    """The source that a name stands for: a shipped model, a diffusers folder, a single file, a hub id.

    Args:
        model: its name.
        variant: which of a folder's weights to read: "fp16", "non_ema"; by default the plain ones.

    Raises:
        ExpungeError: there is none, it has no such variant, or its weight files are pickled, missing, or
            cut short.
    """
    shipped = registry.list_names("models")
    path = registry.HERE / model / "pipeline" if str(model) in shipped else Path(model)
    if files.is_file(path):
        if variant:
            raise ExpungeError(f"{path} is a single file; only a folder has the variant {variant!r}")
        check_single_file(path)
        return Source(path.stem, path)
    if not files.is_dir(path):
        if on_hub(model):
            return Source(str(model), None, variant)
        if "/" in str(model) or path.suffix:
            raise ExpungeError(f"there is no file or folder {model}{_near(path)}")
        raise UnknownNameError("model", str(model), shipped)
    if not files.is_file(path / "model_index.json"):
        raise ExpungeError(f"{path} is not a diffusers folder: it has no model_index.json")
    check_read(path, variant)
    return Source(str(model) if str(model) in shipped else path.resolve().name, path, variant)


def _near(path: Path) -> str:
    """A question after what lies beside a path that is not there and is called nearly so."""
    try:
        beside = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def fetched(source: Source, *, weights: bool = True) -> Source:
    """The same, on this machine; `weights` as in `hub.fetch`.

    Raises:
        ExpungeError: it cannot be had, or its weight files are missing or cut short.
    """
    if source.path:
        return source
    with silence_libraries():
        folder = fetch(source.name, weights=weights, variant=source.variant)
    if weights:
        if lacking := _lacking(folder):
            # Some repositories hold half-precision weights and nothing else.
            with silence_libraries():
                folder = fetch(source.name, variant="*")
            lacking = _lacking(folder)
        if lacking:
            why = ", and HF_HUB_OFFLINE forbids to fetch it" if offline() else ""
            raise ExpungeError(f"the {lacking} of {source.name} is not here in .safetensors{why}")
        check_read(folder, source.variant)
    return replace(source, path=folder)


def _lacking(folder: Path) -> str:
    """The first component of a folder that should have weights there and has none; "" for none."""
    for name, (library, _) in components(folder).items():
        if (folder / name / "config.json").is_file() and not weight_files(folder / name, library):
            return name
    return ""


def on_hub(model: str | Path) -> bool:
    """Whether a name can be that of a model of the hub: OWNER/NAME, and no file's."""
    if not isinstance(model, str) or model.lower().endswith(ENDINGS) or len(model) > 96 + 1:
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) is not None


def check_single_file(path: Path) -> None:
    """Check that a file is a whole safetensors file that can be a model.

    Raises:
        ExpungeError: it is pickled, cut short, a LoRA, an edit, or a VAE.
    """
    header = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    if any("lora_" in name or ".lora" in name for name in names):
        raise ExpungeError(f"{path} is a LoRA, not a model; give its model, and --lora {path}")
    if "expunge" in header.get("__metadata__", {}):
        raise ExpungeError(f"{path} is an edit, not a model")
    of_vae = ("encoder.", "decoder.", "first_stage_model.", "vae.", "quant_conv.", "post_quant_conv.")
    if all(name.startswith(of_vae) for name in names):
        raise ExpungeError(f"{path} is a VAE, not a whole model")


def read_index(folder: Path) -> dict[str, Any]:
    """What a diffusers folder consists of: its `model_index.json`.

    Raises:
        ExpungeError: it has none, or it cannot be read.
    """
    index = read_json(folder / "model_index.json")
    if "_class_name" not in index:
        raise ExpungeError(f"{folder / 'model_index.json'} does not say which pipeline it is of")
    return index


def family_of(pipeline: str) -> type[Any]:
    """The family that a diffusers class belongs to.

    Raises:
        ExpungeError: none does.
    """
    known = registry.load_all("families")
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
    known = registry.load_all("families")
    for family in known.values():
        if kind in family.single_files and any(family.single_file_key in tensor for tensor in meta):
            return family
    raise ExpungeError(f"{path} is a checkpoint of no family that is known; known: {', '.join(known)}")


def settings(source: Source) -> dict[str, Any]:
    """What `expunge.json` says beside the model: how to draw with it, its anchors, what was erased."""
    file = source.path / "expunge.json" if source.path else None
    return read_json(file) if file is not None and file.is_file() else {}


def read_pipeline(
    source: Source, dtype: torch.dtype, config: str | Path | None = None, **parts: Any
) -> Any:
    """Read a pipeline with diffusers, quietly, weights from safetensors only.

    Args:
        source: where it is, on this machine.
        dtype: the number format of its weights.
        config: for a single file: a diffusers folder or a hub id of a model built like it.
        parts: components to use in place of the source's; None leaves one out.

    Raises:
        ExpungeError: it cannot be read.
    """
    import diffusers

    if source.path is None:
        raise TypeError(f"a source on this machine is expected, and {source.name} is one of the hub")
    try:
        with silence_libraries():
            if source.is_file:
                family = family_of_file(source.path)
                beside = _beside(source.path, config, family, dtype)
                with _as_diffusers_reads(source.path, dtype) as file:
                    pipe = getattr(diffusers, family.pipelines[0]).from_single_file(
                        str(file),
                        torch_dtype=dtype,
                        config=config and str(config),
                        **{**beside, **parts},
                    )
            else:
                idle = {part: None for part in read_index(source.path) if part.startswith(IDLE)}
                given = {**idle, **parts}
                given |= _variants(source, dtype, leave=tuple(given))
                pipe = diffusers.DiffusionPipeline.from_pretrained(
                    source.path,
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    **given,
                )
    except ExpungeError:
        raise
    except Exception as error:  # whatever diffusers, the hub and the files come up with
        if sys.flags.optimize > 1 and "docstring" in str(error):
            raise ExpungeError(
                "Python's -OO leaves docstrings out, and transformers cannot be imported without them:"
                " start Python with -O"
            ) from error
        if source.is_file and config is None and absent(error):
            raise ExpungeError(
                f"a single file has no configuration, and the one for {source.path} is not on this"
                " machine; give --config a diffusers folder of a model built like it"
            ) from error
        if "meta tensor" in str(error):  # what was never filled
            raise ExpungeError(f"{source.path} is not whole: it lacks tensors of the model") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExpungeError(f"cannot load {source.path}: {lines[0]}") from error
    if not source.is_file:
        check_whole(pipe, source.path, source.variant)
    check_numbers(pipe.components, source.name)
    return pipe


def _variants(source: Source, dtype: torch.dtype, leave: tuple[str, ...]) -> dict[str, Any]:
    """The components of a folder whose weights to read are not the plain ones.

    A pipeline's own `variant` goes by what files in a component's folder begin with, and is one for all
    components; this one is each component's own.

    Raises:
        ExpungeError: a component holds scaled weights, which the libraries read without their scales.
    """
    import diffusers
    import transformers

    from expunge.checkpoints import safetensors_io  # which imports torch

    folder = source.path
    if folder is None:
        raise TypeError(f"a source on this machine is expected, and {source.name} is one of the hub")
    kinds, found = components(folder), {}
    for part, variant in read_variants(folder, source.variant).items():
        if part in leave:
            continue
        library, name = kinds[part]
        for path in weight_files(folder / part, library)[variant]:
            if safetensors_io.scaled(read_header(path)):
                raise ExpungeError(
                    f"{path} holds scaled eight-bit weights, which {library} reads without their"
                    " scales: give the model in another format"
                )
        if variant and library == "diffusers":
            found[part] = getattr(diffusers, name).from_pretrained(
                folder / part, variant=variant, torch_dtype=dtype, use_safetensors=True
            )
        elif variant and library == "transformers":
            found[part] = getattr(transformers, name).from_pretrained(
                folder / part, variant=variant, dtype=dtype, use_safetensors=True
            )
    return found


@contextmanager
def _as_diffusers_reads(path: Path, dtype: torch.dtype) -> Iterator[Path]:
    """A single file as diffusers reads one: its ending in small letters, and its weights unscaled.

    Raises:
        ExpungeError: the scales are of a kind that is not known, or the disk is too full.
    """
    from expunge.checkpoints import safetensors_io  # which imports torch

    scaled = safetensors_io.scaled(read_header(path))
    if not scaled and path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="expunge-") as place:
        file = Path(place) / f"{path.stem}.safetensors"
        if scaled:
            safetensors_io.unscale(path, file, dtype)
        else:
            file.symlink_to(path.resolve())
        yield file


def _beside(
    path: Path, config: str | Path | None, family: type[Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The text encoders and the autoencoder that a single file leaves out, from the folder `config`.

    Raises:
        ExpungeError: `config` is no folder of such a model, or has not what the file leaves out.
    """
    import diffusers

    names = list(read_header(path))
    folder = Path(config or "")
    if config is None or not folder.is_dir():
        if config is not None and not on_hub(config):
            raise ExpungeError(f"there is no folder {config}")
        if not any(name.startswith(HELD["CLIPText"]) for name in names):
            raise ExpungeError(
                f"{path} holds no text encoders; give --config a diffusers folder of a model built like"
                " it that has them"
            )
        return {}
    index = read_index(folder)
    if str(index["_class_name"]) not in family.pipelines:
        raise ExpungeError(f"{path} is of {family.__name__}, and {folder} of {index['_class_name']}")
    kinds = {name: str(value[1]) for name, value in index.items() if isinstance(value, list)}
    left_out = [
        part
        for part, kind in kinds.items()
        for beginning, prefixes in HELD.items()
        if kind.startswith(beginning) and not any(name.startswith(prefixes) for name in names)
    ]
    if not left_out:
        return {}
    others = dict.fromkeys(part for part in kinds if part not in left_out)
    given = {**others, **_variants(Source(folder.name, folder), dtype, leave=tuple(others))}
    pipe = getattr(diffusers, family.pipelines[0]).from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **given
    )
    check_whole(pipe, folder)
    return {part: pipe.components[part] for part in left_out}


def empty(folder: Path, part: str) -> Any:
    """A component of a diffusers folder by its configuration alone: its tensors take no memory.

    Raises:
        ExpungeError: the configuration cannot be read.
    """
    import diffusers
    import torch
    import transformers

    library, name = read_index(folder)[part]
    config = read_json(folder / part / "config.json")
    try:
        with silence_libraries(), torch.device("meta"):
            if library == "diffusers":
                return getattr(diffusers, name).from_config(config)
            kind = getattr(transformers, name)
            return kind(kind.config_class.from_dict(config))
    except Exception as error:  # whatever the libraries come up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"cannot read the configuration of {folder / part}: {reason}") from error


def check_whole(pipe: Any, folder: Path, variant: str | None = None) -> None:
    """Check that the text encoders and the denoiser were all in their files.

    Loaders fill in random numbers for what is missing.

    Raises:
        ExpungeError: some of one was not.
    """
    import torch

    kinds, picked = components(folder), read_variants(folder, variant)
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module) or part == "vae" or part not in picked:
            continue
        read = weight_files(folder / part, kinds[part][0])[picked[part]]
        there = {name for file in read for name in read_header(file)}
        names: dict[int, list[str]] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        for one in names.values():
            # Up to transformers 5.5 CLIP was saved with its layers in `text_model`.
            if not any(name in there or f"text_model.{name}" in there for name in one):
                raise ExpungeError(f"{folder} is not whole: no file of its {part} has {one[0]}")


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
