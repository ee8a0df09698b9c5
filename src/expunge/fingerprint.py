"""Hashes of models: what an edit is made from, and what images are drawn with.

Three hashes, for three purposes; all read the weights through `hash_weights`:

    hash_model         a work folder: unfinished work goes on with the same model only
    hash_for_images    the image cache: everything that images hang on, but for the sampler
    hash_base          a record: the parameters that an edit takes the place of, rounded to float16
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Changes, encode_tensor, read_base_parameter
from expunge.model import Model

SETTINGS = ("num_inference_steps", "guidance_scale", "sample_size", "max_sequence_length", "autocast")
"""The attributes of a model that change its images, besides weights and configurations."""

OF_SOME = ("layers", "num_frames")
"""The same, of models that have such a setting."""


def hash_model(model: Model) -> str:
    """Return the hash of a model's weights, configurations, tokenizers, scheduler and settings.

    Where the denoiser was left on the disk, only the layers through which text enters count, which are
    all that a method can read of it. It takes a second or two a GB.

    Args:
        model: the model, with all edits that are applied to it.
    """
    digest = hashlib.sha256()

    # JSON marks where one value ends, so that two lists of values never hash alike by running together.
    def add(*what: object) -> None:
        digest.update(json.dumps(what, sort_keys=True, default=str).encode())

    settings = {name: str(getattr(model, name, None)) for name in SETTINGS}
    settings |= {name: str(getattr(model, name)) for name in OF_SOME if hasattr(model, name)}
    add(type(model).__name__, settings)
    for name, part in sorted(model.pipe.components.items()):
        add(name, type(part).__name__, _config(getattr(part, "config", None)))
        if hasattr(part, "get_vocab"):
            add(hash_tokenizer(part))
    add(hash_weights(model))
    if model.stored:
        # The denoiser's own parameters are meta tensors without values.
        for entry in (*model.text_entries(), *model.pooled_entries()):
            add(entry.layer)
            digest.update(encode_tensor(model.stored(entry.layer, "weight")))
    return digest.hexdigest()


def hash_for_images(model: Model) -> str:
    """Return the hash of all that a model's images hang on, but for the sampler.

    That is: weights, configurations, tokenizers, and what was set on its parts (FreeU's factors, LoRAs
    that are switched on).

    Raises:
        ExpungeError: an edit is applied to it; the hash would not be the original's.
    """
    parts = sorted(_parts(model))
    if any(hasattr(tensor, "expunge_base") for _, tensor in _tensors(model)):
        raise ExpungeError("an edit lies on this model; take it off and give it along instead")
    others = sorted(
        (name, hash_tokenizer(part))
        for name, part in model.pipe.components.items()
        if hasattr(part, "get_vocab")
    )
    settings = {
        "weights": hash_weights(model),
        "family": type(model).__name__,
        "model": read_scalars(model, ("name", "num_inference_steps", "guidance_scale", "sample_size")),
        "pipe": {k: v for k, v in read_scalars(model.pipe).items() if v is not None},
        "config": {
            key: value
            for key, value in model.pipe.config.items()
            if not key.startswith("_") and key != "requires_safety_checker" and is_scalar(value)
        },
        "parts": [
            (name, config_as_read(getattr(part, "config", {})), _switches(part)) for name, part in parts
        ],
        "tokenizers": others,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def hash_weights(model: Model) -> str:
    """Return the hash of the names and values of all parameters and buffers of a model.

    They are read once, and again when one was replaced or written to: under a second a GB. Those that
    were left on the disk count by their name, dtype and shape.
    """
    tensors = list(_tensors(model))
    # In-place writes raise a tensor's version, and replacing it changes its identity: no data is read.
    state = [(key, id(tensor), _version(tensor)) for key, tensor in tensors]
    known, seen = model.__dict__.get("_hash"), model.__dict__.get("_hashed")
    # Weights that were sent to the disk meanwhile cannot be read, nor written to.
    if known is None or (seen != state and not any(tensor.is_meta for _, tensor in tensors)):
        digest = hashlib.sha256()
        for key, tensor in tensors:
            shape = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
            digest.update(key.encode() + (shape if tensor.is_meta else encode_tensor(tensor)))
        known = model.__dict__["_hash"] = digest.hexdigest()
        model.__dict__["_hashed"] = state
    return str(known)


def _parts(model: Model) -> Iterator[tuple[str, torch.nn.Module]]:
    """The pipeline's networks, with their names."""
    for name, part in model.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            yield name, part


def _tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, with its name; parts in the order of their names."""
    for name, part in sorted(_parts(model)):
        for key, tensor in (*part.named_parameters(), *part.named_buffers()):
            yield f"{name}.{key}", tensor


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def _switches(part: torch.nn.Module) -> list[Any]:
    """Return what was set on the modules of a part, and which no configuration tells.

    That is: FreeU's factors, tiles of the autoencoder, the paddings of convolutions, LoRAs that are
    switched on and their strengths.
    """
    # How they compute, or where they were read, says nothing of what.
    but = ("training", "gradient_checkpointing", "name_or_path", "is_parallelizable", "model_parallel")
    found: list[Any] = []
    for name, module in part.named_modules():
        values = read_scalars(module, but)
        lora = {
            key: getattr(module, key)
            for key in ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
            if hasattr(module, "lora_A") and hasattr(module, key)
        }
        if values or lora:
            found.append([name, values, {key: str(value) for key, value in lora.items()}])
    return found


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the hash of everything that determines a tokenizer's output."""
    record: dict[str, Any] = {
        "vocab": tokenizer.get_vocab(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "settings": read_scalars(tokenizer, ("name_or_path", "vocab_file")),
        "length": tokenizer.model_max_length,
        "sides": [getattr(tokenizer, f"{part}_side", None) for part in ("padding", "truncation")],
    }
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        whole = json.loads(backend.to_str())
        # Every call of the tokenizer sets these two anew.
        record["backend"] = {k: v for k, v in whole.items() if k not in ("truncation", "padding")}
    elif pieces := getattr(tokenizer, "sp_model", None):
        record["pieces"] = hashlib.sha256(pieces.serialized_model_proto()).hexdigest()
    elif ranks := getattr(tokenizer, "bpe_ranks", None):
        record["merges"] = sorted((rank, list(pair)) for pair, rank in ranks.items())
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def is_scalar(value: object) -> bool:
    """Whether a value is None, a truth value, a number or a text."""
    return value is None or isinstance(value, (bool, int, float, str))


def read_scalars(thing: object, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the public attributes of an object that are scalars, without those in `but`."""
    values = vars(thing).items()
    return {k: v for k, v in values if is_scalar(v) and not k.startswith("_") and k not in but}


DROPPED = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a configuration that say nothing of what a part computes."""


def _config(config: object) -> dict[str, str]:
    """A configuration without the names of files and versions."""
    if config is None:
        return {}
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    return {key: str(v) for key, v in items if not key.startswith("_") and key not in DROPPED}


def config_as_read(config: object) -> dict[str, str]:
    """A configuration as it is once read from its file: without names and versions, tuples as lists."""
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    dropped = (*DROPPED, "model_type")
    # JSON has no tuples: a configuration in memory and the same one read from disk must hash alike.
    kept = {k: v for k, v in sorted(items) if not k.startswith("_") and k not in dropped}
    return {k: str(list(v) if isinstance(v, tuple) else v) for k, v in kept.items()}


ParameterReader = Callable[[str, str], torch.Tensor]
"""Returns a parameter, by the names of its layer and itself."""


def make_base_reader(model: Model | Any) -> ParameterReader:
    """Return a function that reads the parameters of a model or a pipeline without any applied edit."""
    root = model.pipe if isinstance(model, Model) else model
    if isinstance(model, Model) and model.stored:
        return model.stored
    return lambda layer, parameter: read_base_parameter(root, layer, parameter)


def hash_base(read: ParameterReader, places: Iterable[tuple[str, str]]) -> str:
    """Return the hash of some parameters, each named by layer and parameter, rounded to float16.

    By the rounding, the half-precision variant of a model has the same hash as the model itself.
    """
    digest = hashlib.sha256()
    # Sorted: the order of a set differs from process to process.
    for layer, parameter in sorted(places):
        tensor = read(layer, parameter)
        digest.update(f"{layer}.{parameter}".encode() + encode_tensor(tensor.to(torch.float16)))
    return digest.hexdigest()


def is_same_base(read: ParameterReader, places: Iterable[tuple[str, str]], base: str) -> bool:
    """Whether a hash is that of some parameters, or of their bfloat16 copies.

    Args:
        read: reads a parameter.
        places: the parameters, each named by layer and parameter.
        base: the hash to compare with.
    """
    places = tuple(places)
    if hash_base(read, places) == base:
        return True
    # The edit may be of a bfloat16 copy, which rounding to float16 does not lead to.
    return hash_base(lambda *place: read(*place).to(torch.bfloat16), places) == base


def list_places(changes: Changes) -> set[tuple[str, str]]:
    """Return the parameters that changes replace, each named by layer and parameter."""
    return {(layer, change.parameter) for change in changes for layer in change.layers}
