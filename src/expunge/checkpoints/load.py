"""Load a model: a shipped one, a folder, a file, a hub id, or a pipeline in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expunge.base.errors import ExpungeError
from expunge.base.quiet import silence_libraries
from expunge.checkpoints.frozen_base import check_form, quantise_frozen
from expunge.checkpoints.loading import (
    fetch_source,
    find_family,
    find_source,
    read_index,
    read_settings,
)
from expunge.checkpoints.lora import fuse_lora
from expunge.checkpoints.pipelines import read_pipeline
from expunge.model import Model


def load(
    model: str | Path | Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    config: str | Path | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    offload: bool = False,
    gradient_checkpointing: bool = False,
    attention_slicing: bool = False,
    variant: str | None = None,
    quantise: str = "",
) -> Model:
    """Load a model.

    >>> model = load("miniature")  # doctest: +SKIP

    Args:
        model: the name of a shipped model ("miniature"), a diffusers folder, a `.safetensors` file,
            a hub id ("owner/name"), or a diffusers pipeline in memory.
        dtype: the dtype of the weights.
        device: where the model runs; "auto" is the accelerator if there is one, else the CPU.
        config: for a single file: a diffusers folder or a hub id of a model built like it; by default
            what the hub has for its kind.
        lora: LoRA files to fuse into the weights, and their strengths.
        offload: keep on the accelerator only the component that is running. Without it, the denoiser
            stays there, and text encoders and autoencoder are moved there while they run.
        gradient_checkpointing: compute activations again for the backward pass instead of keeping
            them: less memory, more time.
        attention_slicing: compute attention in slices: less memory, more time. It pays for images of
            more than a million pixels, or where PyTorch has no memory-efficient attention.
        variant: the variant of a folder's weights to read where it is there ("fp16", "non_ema"); by
            default the plain ones, or the only ones.
        quantise: "int8" or "nf4" keeps the denoiser's linear layers in 8 or 4.5 bits, but for those
            through which text enters: about a half or a quarter of bfloat16's memory, for methods that
            train these alone. While it is read, it takes its whole size in main memory.

    Raises:
        ExpungeError: there is no such model, its family is not known, weights are missing, broken, or
            contain NaN or infinity, or there is no accelerator to offload from.
    """
    check_form(quantise)
    if not isinstance(model, (str, Path)):
        if quantise:
            raise ExpungeError("a pipeline in memory is taken as it is: leave quantise out")
        if lora:
            raise ExpungeError(
                "a pipeline in memory is taken as it is: fuse LoRAs into it with"
                " expunge.checkpoints.lora.fuse_lora"
            )
        name = Path(getattr(model, "name_or_path", None) or "").name
        return find_family(type(model).__name__)(model, name=name)
    source, device = find_source(model, variant), choose_device(device, offload)
    source = fetch_source(source)
    if not source.is_file and source.path is not None:
        # First: of a class that no family knows, diffusers would fail in words of its own.
        find_family(read_index(source.path)["_class_name"])
    pipe = read_pipeline(source, dtype, config)
    family = find_family(type(pipe).__name__)
    for file, scale in lora:
        fuse_lora(file, pipe, scale)
    if quantise:
        quantise_frozen(family(pipe), quantise)  # before the denoiser is moved to where it may not fit
    with silence_libraries():  # diffusers warns of half precision on a CPU
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        elif device == "cpu":
            pipe.to(device)
        else:
            from expunge.checkpoints.offload import offload_idle_parts  # accelerate is slow to import

            offload_idle_parts(pipe, family.denoiser, torch.empty(0, device=device).device)
    if gradient_checkpointing:
        getattr(pipe, family.denoiser).enable_gradient_checkpointing()
    if attention_slicing:
        pipe.enable_attention_slicing()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and all(p.ndim < 5 for p in part.parameters()):
            # Convolutions are fastest in this layout; those over time have another.
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return family(pipe, name=source.name, settings=read_settings(source))


def choose_device(name: str, offload: bool = False) -> str:
    """Choose the device by its name; "auto" is the accelerator if there is one, else the CPU.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1", "mps".
        offload: whether the model will be offloaded from it.

    Raises:
        ExpungeError: this machine has no such device, or no accelerator to offload from.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if offload and name == "cpu":
        raise ExpungeError("there is no accelerator to offload from: leave offload out")
    try:
        torch.empty(1, device=name).cpu()
    except Exception as error:  # each kind of device raises its own
        raise ExpungeError(
            f"this machine has no device {name!r}; give auto or cpu, or cuda, cuda:1 or mps where it is"
        ) from error
    return name
