"""Load a model: a shipped one, a folder, a file, a hub id, or a pipeline in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from expunge.base.errors import ExpungeError
from expunge.base.quiet import silence_libraries
from expunge.checkpoints import loading
from expunge.checkpoints.lora import fuse
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
) -> Model:
    """Load a model.

    >>> model = load("emoji")  # doctest: +SKIP

    Args:
        model: the name of a shipped model ("emoji"), a diffusers folder, a single `.safetensors` file,
            a hub id ("owner/name"), or a diffusers pipeline in memory.
        dtype: the number format of the weights.
        device: where to put it; "auto" is the accelerator if there is one, else the CPU.
        config: for a single file: a diffusers folder or a hub id of a model built like it; by default
            what the hub has for its kind.
        lora: LoRA files to fuse into the weights, and their strengths.
        offload: keep on an accelerator only the part that is at work. Without it, the denoiser stays
            there, and text encoders and autoencoder come for their work and leave.
        gradient_checkpointing: compute twice what gradients need, instead of keeping it.
        attention_slicing: attend in slices: less memory, more time; it pays for images of more than
            a million pixels, or where PyTorch has no attention of its own that saves memory.
        variant: the variant of a folder's weights to read where it is there ("fp16", "non_ema"); by
            default the plain ones, or the only ones.

    Raises:
        ExpungeError: no such model, a family that is not known, weights missing, broken, or not
            numbers, or no accelerator to offload from.
    """
    if not isinstance(model, (str, Path)):
        if lora:
            raise ExpungeError(
                "a pipeline in memory is taken as it is: lay LoRAs on it with"
                " expunge.checkpoints.lora.fuse"
            )
        name = Path(getattr(model, "name_or_path", None) or "").name
        return loading.family_of(type(model).__name__)(model, name=name)
    found, device = loading.find(model, variant), working_device(device, offload)
    found = loading.fetched(found)
    pipe = loading.read_pipeline(found, dtype, config)
    family = loading.family_of(type(pipe).__name__)
    for file, scale in lora:
        fuse(file, pipe, scale)
    with silence_libraries():  # they tell of half precision on a CPU
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        elif device == "cpu":
            pipe.to(device)
        else:
            from expunge.checkpoints.offload import offload_idle_parts  # slow to import

            offload_idle_parts(pipe, family.denoiser, torch.empty(0, device=device).device)
    if gradient_checkpointing:
        getattr(pipe, family.denoiser).enable_gradient_checkpointing()
    if attention_slicing:
        pipe.enable_attention_slicing()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # The layout that convolutions are fastest in.
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return family(pipe, name=found.name, settings=loading.settings(found))


def working_device(name: str, offload: bool = False) -> str:
    """The device of a name; of "auto", the accelerator if there is one, else the CPU.

    Raises:
        ExpungeError: this machine has none of that name, or none to offload from.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if offload and name == "cpu":
        raise ExpungeError("there is no accelerator to offload from: leave offload out")
    try:
        torch.empty(1, device=name).cpu()
    except Exception as error:  # each kind of device has its own
        raise ExpungeError(
            f"this machine has no device {name!r}; give auto or cpu, or cuda, cuda:1 or mps where it is"
        ) from error
    return name
