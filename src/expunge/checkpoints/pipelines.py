"""Read a diffusers pipeline from a model's files, and check that it is whole."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expunge.base.errors import ExpungeError
from expunge.base.files import read_header, read_json
from expunge.base.modules import MAKING
from expunge.base.quiet import silence_libraries
from expunge.checkpoints import safetensors_io
from expunge.checkpoints.hub import is_unreachable
from expunge.checkpoints.loading import Source, find_family_of_file, is_hub_id, read_index
from expunge.checkpoints.variants import IDLE, find_weight_files, read_components, read_variants

if TYPE_CHECKING:
    from expunge.model import Model

SINGLE_FILE_PREFIXES: dict[str, tuple[str, ...]] = {
    "CLIPText": ("cond_stage_model.", "conditioner.", "text_encoders.clip_"),
    "T5Encoder": ("text_encoders.t5",),
    "AutoencoderKL": ("first_stage_model.", "vae."),
}
"""How the classes of components begin, and how their tensors begin in a single file."""


def read_pipeline(
    source: Source, dtype: torch.dtype, config: str | Path | None = None, **parts: Any
) -> Any:
    """Read a pipeline with diffusers, from safetensors alone and without its messages.

    Args:
        source: the model's files, on this machine.
        dtype: the dtype of its weights.
        config: for a single file: a diffusers folder or a hub id of a model built like it.
        parts: components to use in place of the source's; None leaves one out.

    Raises:
        ExpungeError: the pipeline cannot be read, is not whole, or its weights contain NaN or infinity.
    """
    import diffusers

    path = _require_path(source)
    try:
        with MAKING, silence_libraries():
            if source.is_file:
                family = find_family_of_file(path)
                if config is not None and _has_denoiser_alone(Path(config)):
                    return _read_around_denoiser(path, Path(config), family, dtype, parts)
                missing = _read_missing_parts(path, config, family, dtype)
                with _open_for_diffusers(path, dtype) as file:
                    pipe = getattr(diffusers, family.pipelines[0]).from_single_file(
                        str(file),
                        torch_dtype=dtype,
                        config=config and str(config),
                        **{**missing, **parts},
                    )
            else:
                # None keeps diffusers from reading a component: a safety checker is large and never run.
                idle = {part: None for part in read_index(path) if part.startswith(IDLE)}
                given = {**idle, **parts}
                given |= _read_variant_parts(source, dtype, leave=tuple(given))
                pipe = diffusers.DiffusionPipeline.from_pretrained(
                    path,
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    **given,
                )
    # Before the net below, which would put our own sentences into another.
    except ExpungeError:
        raise
    except Exception as error:  # diffusers, the hub and the files raise errors of any kind
        raise _explain_failure(source, config, error) from error
    if not source.is_file:
        check_whole(pipe, path, source.variant)
    check_finite(pipe.components, source.name)
    return pipe


def build_empty(folder: Path, part: str) -> Any:
    """Build a component of a diffusers folder from its configuration, on torch's meta device.

    Args:
        folder: the diffusers folder.
        part: the component's name.

    Raises:
        ExpungeError: the configuration cannot be read.
    """
    import diffusers
    import transformers

    library, name = read_index(folder)[part]
    config = read_json(folder / part / "config.json")
    try:
        with silence_libraries(), torch.device("meta"):
            if library == "diffusers":
                return getattr(diffusers, name).from_config(config)
            kind = getattr(transformers, name)
            return kind(kind.config_class.from_dict(config))
    except Exception as error:  # the libraries raise errors of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"cannot read the configuration of {folder / part}: {reason}") from error


def check_whole(pipe: Any, folder: Path, variant: str | None = None) -> None:
    """Check that all weights of the text encoders and the denoiser are in their files.

    The libraries fill in random numbers for missing tensors.

    Args:
        pipe: the pipeline that was read.
        folder: the diffusers folder it was read from.
        variant: the variant that was asked for.

    Raises:
        ExpungeError: a tensor is missing.
    """
    kinds, variants = read_components(folder), read_variants(folder, variant)
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module) or part == "vae" or part not in variants:
            continue
        paths = find_weight_files(folder / part, kinds[part][0])[variants[part]]
        there = {name for file in paths for name in read_header(file)}
        # A tensor shared by two layers is stored once, under one of its names.
        names: dict[int, list[str]] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        # Under the names of whichever version of transformers wrote the file.
        bare = {_strip_wrappers(name) for name in there}
        for one in names.values():
            if not any(name in there or _strip_wrappers(name) in bare for name in one):
                raise ExpungeError(f"{folder} is not whole: no file of its {part} has {one[0]}")


def check_finite(parts: Mapping[str, Any], name: str) -> None:
    """Check that no weight of a pipeline's components is NaN or infinity.

    Args:
        parts: the components by their names.
        name: the model's name, for messages.

    Raises:
        ExpungeError: one is.
    """
    for part, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, tensor in module.named_parameters():
            # The sum is much faster than `isfinite`; it may overflow though every weight is finite.
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(
                tensor.isfinite().all()
            ):
                raise ExpungeError(f"the weights of {name} contain NaN or infinity: {part}.{key}")


def _strip_wrappers(name: str) -> str:
    """Strip from a tensor's name the modules that versions of transformers put around its layers.

    Up to 5.5 CLIP was saved with its layers in `text_model`; models that read images, too, hold their
    language model as `model.language_model` and are saved as if it were `model`.
    """
    wrappers = ("model", "text_model", "language_model")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _has_denoiser_alone(config: Path) -> bool:
    """Whether single files of models like that of a folder hold a denoiser and never a text encoder.

    So it is with all whose text encoder is a language model or a T5 alone.
    """
    if not (config / "model_index.json").is_file():
        return False
    return not any(kind.startswith("CLIPText") for _, kind in read_components(config).values())


def _read_around_denoiser(
    path: Path, folder: Path, family: type[Model], dtype: torch.dtype, parts: Mapping[str, Any]
) -> Any:
    """Read a pipeline of a single file's denoiser and of a folder's other components.

    Raises:
        ExpungeError: the folder is of another family, or a file cannot be read.
    """
    import diffusers

    index = read_index(folder)
    if str(index["_class_name"]) not in family.pipelines:
        raise ExpungeError(f"{path} is of {family.__name__}, and {folder} of {index['_class_name']}")
    kind = getattr(diffusers, index[family.denoiser][1])
    with _open_for_diffusers(path, dtype) as file:
        denoiser = kind.from_single_file(
            str(file), config=str(folder), subfolder=family.denoiser, torch_dtype=dtype
        )
    check_finite({family.denoiser: denoiser}, path.stem)
    return read_pipeline(Source(folder.name, folder), dtype, **{family.denoiser: denoiser, **parts})


def _require_path(source: Source) -> Path:
    if source.path is None:
        raise TypeError(f"a source on this machine is expected, and {source.name} is one of the hub")
    return source.path


def _explain_failure(source: Source, config: str | Path | None, error: Exception) -> ExpungeError:
    """The error of a library as one sentence that says what to do."""
    if sys.flags.optimize > 1 and "docstring" in str(error):
        return ExpungeError(
            "Python's -OO leaves docstrings out, and transformers cannot be imported without them:"
            " start Python with -O"
        )
    if source.is_file and config is None and is_unreachable(error):
        return ExpungeError(
            f"a single file has no configuration, and the one for {source.path} is not on this"
            " machine; give --config (in the studio: Built like) a diffusers folder of a model built"
            " like it"
        )
    if "meta tensor" in str(error):  # a tensor that no file filled
        return ExpungeError(f"{source.path} is not whole: it lacks tensors of the model")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ExpungeError(f"cannot load {source.path}: {lines[0]}")


def _read_variant_parts(source: Source, dtype: torch.dtype, leave: tuple[str, ...]) -> dict[str, Any]:
    """The components of a folder whose weights are read from a variant.

    diffusers takes one `variant` for the whole pipeline, and finds it by the first letters of file
    names; here each component has its own.

    Raises:
        ExpungeError: a component has scaled weights, which the libraries read without their scales.
    """
    import diffusers
    import transformers

    folder = _require_path(source)
    kinds, found = read_components(folder), {}
    for part, variant in read_variants(folder, source.variant).items():
        if part in leave:
            continue
        library, name = kinds[part]
        for path in find_weight_files(folder / part, library)[variant]:
            if safetensors_io.find_scales(read_header(path)):
                raise ExpungeError(
                    f"{path} holds scaled eight-bit weights, which {library} reads without their"
                    " scales: give the model in another format"
                )
        if variant and library == "diffusers":
            found[part] = getattr(diffusers, name).from_pretrained(
                folder / part, variant=variant, torch_dtype=dtype, use_safetensors=True
            )
        elif variant and library == "transformers":
            # What diffusers calls `torch_dtype`, transformers calls `dtype`.
            found[part] = getattr(transformers, name).from_pretrained(
                folder / part, variant=variant, dtype=dtype, use_safetensors=True
            )
    return found


@contextmanager
def _open_for_diffusers(path: Path, dtype: torch.dtype) -> Iterator[Path]:
    """A single file as diffusers reads one: with a lower-case ending, and with unscaled weights.

    Raises:
        ExpungeError: the scales are of an unknown kind, or the disk is too full.
    """
    scaled = safetensors_io.find_scales(read_header(path))
    if not scaled and path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="expunge-") as place:
        file = Path(place) / f"{path.stem}.safetensors"
        if scaled:
            safetensors_io.unscale_file(path, file, dtype)
        else:
            # A link needs no disk; resolved, since a relative one would start from the temporary folder.
            file.symlink_to(path.resolve())
        yield file


def _read_missing_parts(
    path: Path, config: str | Path | None, family: type[Model], dtype: torch.dtype
) -> dict[str, Any]:
    """The text encoders and the autoencoder that a single file leaves out, from the folder `config`.

    Raises:
        ExpungeError: `config` is no folder of such a model, or lacks what the file leaves out.
    """
    import diffusers

    names = list(read_header(path))
    folder = Path(config or "")
    if config is None or not folder.is_dir():
        if config is not None and not is_hub_id(config):
            raise ExpungeError(f"there is no folder {config}")
        if not any(name.startswith(SINGLE_FILE_PREFIXES["CLIPText"]) for name in names):
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
        for beginning, prefixes in SINGLE_FILE_PREFIXES.items()
        if kind.startswith(beginning) and not any(name.startswith(prefixes) for name in names)
    ]
    if not left_out:
        return {}
    others = dict.fromkeys(part for part in kinds if part not in left_out)
    given = {**others, **_read_variant_parts(Source(folder.name, folder), dtype, leave=tuple(others))}
    pipe = getattr(diffusers, family.pipelines[0]).from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **given
    )
    check_whole(pipe, folder)
    return {part: pipe.components[part] for part in left_out}
