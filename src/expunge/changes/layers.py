"""Find the layers of a pipeline by name, whatever has been wrapped around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""The wrappers that spread a network over several devices."""

FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""The projections that `fuse_qkv_projections()` merges into one layer, and calls no more."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the layer or network inside its wrappers.

    Wrappers are those of `torch.compile`, data parallelism, and peft, which loads LoRAs so. Names and
    weights are those of the inside: an edit made on a wrapped pipeline fits the bare one.
    """
    while True:
        inner = module._modules.get("_orig_mod")  # of torch.compile
        if inner is None:
            inner = module._modules.get("base_layer")  # of peft
        if inner is None and isinstance(module, PARALLEL):
            inner = module.module
        if inner is None and type(module).__module__.startswith("peft."):
            # `get_peft_model` puts a whole network into two wrappers, which hold it by these names.
            inner = module._modules.get("base_model") or module._modules.get("model")
        if inner is None:
            return module
        module = inner


def iterate_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of a network with its name, both as they are without wrappers."""

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)

    return walk(network, "")


def find_layer(root: Any, layer: str) -> nn.Module:
    """Return the module of a pipeline that has this name, without wrappers.

    Raises:
        ExpungeError: there is none.
    """
    return unwrap(find_layer_path(root, layer)[-1])


def find_layer_path(root: Any, layer: str) -> list[nn.Module]:
    """Return the modules of a pipeline on the way to a layer, each with its wrappers; the layer is last.

    Raises:
        ExpungeError: there is none.
    """
    component, _, inside = layer.partition(".")
    start = getattr(root, component, None)
    # Up to transformers 5.5 CLIP's layers lie in `text_model`, from 5.6 on they do not.
    for name in (inside, f"text_model.{inside}", inside.removeprefix("text_model.")):
        path: list[Any] = [start]
        for key in filter(None, name.split(".")):
            module = unwrap(path[-1])._modules.get(key) if path[-1] is not None else None
            path.append(module)
        if path[-1] is not None:
            return path
    raise ExpungeError(f"the edit does not fit: this model has no layer {layer}")


def check_in_use(root: Any, layer: str, *, hooked: bool = False) -> None:
    """Check that the pipeline calls a layer itself, so that its weight and its hooks take effect.

    Args:
        root: the pipeline.
        layer: the layer's name.
        hooked: whether the change is a hook.

    Raises:
        ExpungeError: the pipeline calls another layer in its place, or skips hooks.
    """
    path = find_layer_path(root, layer)
    if layer.rpartition(".")[2] in FUSED and len(path) > 1 and _is_fused(unwrap(path[-2])):
        raise ExpungeError(
            f"{layer} is fused with its neighbours and not called: undo it first, with"
            " unfuse_qkv_projections()"
        )
    if hooked and any(map(is_compiled, path)):
        raise ExpungeError(
            f"{layer} is compiled, and compiled code may skip what is hooked to a layer: use the"
            " pipeline without torch.compile"
        )


def _is_fused(attention: nn.Module) -> bool:
    """Whether an attention calls one fused projection in place of its own three."""
    if "Fused" in type(getattr(attention, "processor", None)).__name__:
        return True
    # The older attentions keep their mark when they are unfused, and change their processor.
    marked = getattr(attention, "fused_projections", False)
    return bool(marked) and hasattr(attention, "unfuse_projections")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs as code that `torch.compile` made."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def read_base_parameter(root: Any, layer: str, parameter: str) -> Tensor:
    """Return a layer's parameter as it is without any applied change.

    Args:
        root: the pipeline.
        layer: the layer's name.
        parameter: the parameter's name: "weight".

    Raises:
        ExpungeError: there is no such layer, or it has no such parameter.
    """
    tensor = getattr(find_layer(root, layer), parameter, None)
    if not isinstance(tensor, Tensor):
        raise ExpungeError(f"the edit does not fit: {layer} has no {parameter}")
    while hasattr(tensor, "expunge_base"):  # set by `Applied`; edits may be stacked
        tensor = tensor.expunge_base
    return tensor


def encode_tensor(tensor: Tensor) -> bytes:
    """Return what a tensor's hash is taken of: its dtype, its shape and its values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
