"""What a model is, in one hash: everything that can play a part in what a method makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from expunge.changes import Changes, encode_tensor, read_base_parameter
from expunge.model import Model

SETTINGS = ("num_inference_steps", "guidance_scale", "sample_size", "max_sequence_length", "autocast")
"""How a model draws, beside its weights and configurations."""


def hash_model(model: Model) -> str:
    """The hash of a model's weights, configurations, tokenizers, scheduler and settings.

    Parameters that were left on the disk count by what of them a method can ask: the layers through
    which text enters. It takes a second or two a GB.

    Args:
        model: the model as it stands, with whatever lies on it.
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
    """The hash of what a tokenizer makes of any text."""
    record: dict[str, Any] = {
        "vocab": tokenizer.get_vocab(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "settings": read_scalars(tokenizer, ("name_or_path", "vocab_file")),
        "length": tokenizer.model_max_length,
        "sides": [getattr(tokenizer, f"{part}_side", None) for part in ("padding", "truncation")],
    }
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        whole = json.loads(backend.to_str())
        # Every call sets these two anew.
        record["backend"] = {k: v for k, v in whole.items() if k not in ("truncation", "padding")}
    elif pieces := getattr(tokenizer, "sp_model", None):
        record["pieces"] = hashlib.sha256(pieces.serialized_model_proto()).hexdigest()
    elif ranks := getattr(tokenizer, "bpe_ranks", None):
        record["merges"] = sorted((rank, list(pair)) for pair, rank in ranks.items())
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def read_scalars(thing: object, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The single values among the attributes of an object, but for its private ones and some."""
    values = vars(thing).items()
    return {k: v for k, v in values if is_scalar(v) and not k.startswith("_") and k not in but}


def _plain(config: object) -> dict[str, str]:
    """A configuration without the names of files and versions."""
    if config is None:
        return {}
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    dropped = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {key: str(v) for key, v in items if not key.startswith("_") and key not in dropped}


ParameterReader = Callable[[str, str], torch.Tensor]
"""Gives a layer's parameter, by the names of both."""


def make_base_reader(model: Model | Any) -> ParameterReader:
    """Reads the parameters of a model or a pipeline, beneath whatever lies on them."""
    root = model.pipe if isinstance(model, Model) else model
    if isinstance(model, Model) and model.stored:
        return model.stored
    return lambda layer, parameter: read_base_parameter(root, layer, parameter)


def hash_base(read: ParameterReader, places: Iterable[tuple[str, str]]) -> str:
    """The hash of some parameters, named by layer and parameter, as rounded to float16.

    The rounding lets the half-precision variant of a model count as the model itself.
    """
    digest = hashlib.sha256()
    for layer, parameter in sorted(places):
        tensor = read(layer, parameter)
        digest.update(f"{layer}.{parameter}".encode() + encode_tensor(tensor.to(torch.float16)))
    return digest.hexdigest()


def is_same_base(read: ParameterReader, places: Iterable[tuple[str, str]], base: str) -> bool:
    """Whether a hash is that of some parameters, or of these in bfloat16, where edits are made, too."""
    places = tuple(places)
    if hash_base(read, places) == base:
        return True
    return hash_base(lambda *place: read(*place).to(torch.bfloat16), places) == base


def list_places(changes: Changes) -> set[tuple[str, str]]:
    """The parameters that changes take the place of."""
    return {(layer, change.parameter) for change in changes for layer in change.layers}
