"""Hashes of models: what an edit is made from, and what images are drawn with.

Three hashes, for three purposes; all read the weights through `weights_hash`:

    of_model      a work folder: unfinished work goes on with the same model only
    model_hash    the image cache: everything that images hang on, but for the sampler
    base_hash     a record: the parameters that an edit takes the place of, rounded to float16
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Changes, base_parameter, content
from expunge.model import Model

SETTINGS = ("num_inference_steps", "guidance_scale", "sample_size", "max_sequence_length", "autocast")
"""How a model draws, beside its weights and configurations."""


def of_model(model: Model) -> str:
    """Return the hash of a model's weights, configurations, tokenizers, scheduler and settings.

    Parameters that were left on the disk count by what of them a method can ask: the layers through
    which text enters. It takes a second or two a GB.

    Args:
        model: the model as it stands, with the edits that are applied to it.
    """
    digest = hashlib.sha256()

    def add(*what: object) -> None:
        digest.update(json.dumps(what, sort_keys=True, default=str).encode())

    add(type(model).__name__, {name: str(getattr(model, name, None)) for name in SETTINGS})
    for name, part in sorted(model.pipe.components.items()):
        add(name, type(part).__name__, _config(getattr(part, "config", None)))
        if hasattr(part, "get_vocab"):
            add(of_tokenizer(part))
    add(weights_hash(model))
    if model.stored:
        for entry in (*model.text_entries(), *model.pooled_entries()):
            add(entry.layer)
            digest.update(content(model.stored(entry.layer, "weight")))
    return digest.hexdigest()


def model_hash(model: Model) -> str:
    """Return the hash of all that a model's images hang on, but for the sampler.

    That is: weights, configurations, tokenizers, and what was set on its parts (FreeU's factors, LoRAs
    that are switched on).

    Raises:
        ExpungeError: an edit is applied to it; the hash would not be the original's.
    """
    parts = sorted(_parts(model))
    if any(hasattr(tensor, "beneath") for _, tensor in _tensors(model)):
        raise ExpungeError("an edit lies on this model; take it off and give it along instead")
    others = sorted(
        (name, of_tokenizer(part))
        for name, part in model.pipe.components.items()
        if hasattr(part, "get_vocab")
    )
    settings = {
        "weights": weights_hash(model),
        "family": type(model).__name__,
        "model": scalars(model, ("name", "num_inference_steps", "guidance_scale", "sample_size")),
        "pipe": {k: v for k, v in scalars(model.pipe).items() if v is not None},
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


def weights_hash(model: Model) -> str:
    """Return the hash of the names and values of all parameters and buffers of a model.

    They are read once, and again when one was replaced or written to: under a second a GB. Those that
    were left on the disk count by their name, dtype and shape.
    """
    tensors = list(_tensors(model))
    state = [(key, id(tensor), _version(tensor)) for key, tensor in tensors]
    known, seen = model.__dict__.get("_hash"), model.__dict__.get("_hashed")
    # Weights that were sent to the disk meanwhile cannot be read, nor written to.
    if known is None or (seen != state and not any(tensor.is_meta for _, tensor in tensors)):
        digest = hashlib.sha256()
        for key, tensor in tensors:
            values = (
                f"{tensor.dtype}{tuple(tensor.shape)}".encode() if tensor.is_meta else content(tensor)
            )
            digest.update(key.encode() + values)
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
    """What was set on the modules of a part, which no configuration tells: FreeU's factors, tiles of the
    autoencoder, the paddings of convolutions, LoRAs that are switched on and their strengths."""
    # How they compute, or where they were read, says nothing of what.
    but = ("training", "gradient_checkpointing", "name_or_path", "is_parallelizable", "model_parallel")
    found: list[Any] = []
    for name, module in part.named_modules():
        values = scalars(module, but)
        lora = {
            key: getattr(module, key)
            for key in ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
            if hasattr(module, "lora_A") and hasattr(module, key)
        }
        if values or lora:
            found.append([name, values, {key: str(value) for key, value in lora.items()}])
    return found


def of_tokenizer(tokenizer: Any) -> str:
    """Return the hash of what a tokenizer makes of any text."""
    record: dict[str, Any] = {
        "vocab": tokenizer.get_vocab(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "settings": scalars(tokenizer, ("name_or_path", "vocab_file")),
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
    """Whether a value is a single one, as JSON holds it."""
    return value is None or isinstance(value, (bool, int, float, str))


def scalars(thing: object, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the single values among the attributes of an object.

    Args:
        thing: the object; its private attributes are passed over.
        but: further attributes to pass over.
    """
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
    kept = {k: v for k, v in sorted(items) if not k.startswith("_") and k not in dropped}
    return {k: str(list(v) if isinstance(v, tuple) else v) for k, v in kept.items()}


Read = Callable[[str, str], torch.Tensor]
"""Gives a layer's parameter, by the names of both."""


def base(model: Model | Any) -> Read:
    """Reads the parameters of a model or a pipeline, beneath whatever lies on them."""
    root = model.pipe if isinstance(model, Model) else model
    if isinstance(model, Model) and model.stored:
        return model.stored
    return lambda layer, parameter: base_parameter(root, layer, parameter)


def base_hash(read: Read, places: Iterable[tuple[str, str]]) -> str:
    """The hash of some parameters, named by layer and parameter, as rounded to float16.

    The rounding lets the half-precision variant of a model count as the model itself.
    """
    digest = hashlib.sha256()
    for layer, parameter in sorted(places):
        tensor = read(layer, parameter)
        digest.update(f"{layer}.{parameter}".encode() + content(tensor.to(torch.float16)))
    return digest.hexdigest()


def same_base(read: Read, places: Iterable[tuple[str, str]], base: str) -> bool:
    """Whether a hash is that of some parameters, or of these in bfloat16, where edits are made, too."""
    places = tuple(places)
    if base_hash(read, places) == base:
        return True
    return base_hash(lambda *place: read(*place).to(torch.bfloat16), places) == base


def places(changes: Changes) -> set[tuple[str, str]]:
    """The parameters that changes take the place of."""
    return {(layer, change.parameter) for change in changes for layer in change.layers}
