"""Hash a model, or the parameters of it that an edit changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from expunge.changes import Changes, encode_tensor, read_base_parameter
from expunge.model import Model

SETTINGS = ("num_inference_steps", "guidance_scale", "sample_size", "max_sequence_length", "autocast")
"""The attributes of a model that change its images, besides weights and configurations."""


def hash_model(model: Model) -> str:
    """Return the hash of a model's weights, configurations, tokenizers, scheduler and settings.

    Where the denoiser was left on the disk, only the layers through which text enters count, which are
    all that a method can read of it. It takes a second or two a GB.

    Args:
        model: the model, with all edits that are applied to it.
    """
    digest = hashlib.sha256()

    def add(*what: object) -> None:
        digest.update(json.dumps(what, sort_keys=True, default=str).encode())

    add(type(model).__name__, {name: str(getattr(model, name, None)) for name in SETTINGS})
    for name, part in sorted(model.pipe.components.items()):
        add(name, type(part).__name__, _plain(getattr(part, "config", None)))
        if isinstance(part, torch.nn.Module):
            for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                add(key, tuple(tensor.shape), str(tensor.dtype))
                if not tensor.is_meta:
                    digest.update(encode_tensor(tensor))
        elif hasattr(part, "get_vocab"):
            add(hash_tokenizer(part))
    if model.stored:
        for entry in (*model.text_entries(), *model.pooled_entries()):
            add(entry.layer)
            digest.update(encode_tensor(model.stored(entry.layer, "weight")))
    return digest.hexdigest()


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


def _plain(config: object) -> dict[str, str]:
    """Return a configuration without paths and versions, which do not change the model."""
    if config is None:
        return {}
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    dropped = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {key: str(v) for key, v in items if not key.startswith("_") and key not in dropped}


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
    return hash_base(lambda *place: read(*place).to(torch.bfloat16), places) == base


def list_places(changes: Changes) -> set[tuple[str, str]]:
    """Return the parameters that changes replace, each named by layer and parameter."""
    return {(layer, change.parameter) for change in changes for layer in change.layers}
