"""Keep a pipeline's denoiser on the accelerator, and move other components there only while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn
from torch.utils._pytree import tree_leaves


class OffloadHook(ModelHook):
    """Before a component runs, move others to main memory and the component to its device.

    Nothing is moved away while gradients may have to flow back through it, that is while the component's
    inputs were computed with gradients.

    Args:
        device: where the component runs.
        others: the components to move away first.
    """

    def __init__(self, device: torch.device, others: Sequence[nn.Module]) -> None:
        self.execution_device = device
        self.others = others

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Move the components, and the inputs to the device.

        Args:
            module: the component that is about to run.
            args: its positional inputs.
            kwargs: its inputs by name.

        Returns:
            The inputs, on the device.
        """
        # Inputs may be nested: SDXL's `added_cond_kwargs` is a dict of tensors.
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if not any(x.grad_fn is not None for x in tensors):
            for other in self.others:
                self.move(other, torch.device("cpu"))
        self.move(module, self.execution_device)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    def move(self, part: nn.Module, device: torch.device) -> None:
        """Move a component to a device, unless it is there."""
        if next(part.parameters()).device != device:
            # Weights that are moved in inference mode become inference tensors, which cannot be trained.
            with torch.inference_mode(False):
                part.to(device)


def offload_idle_parts(
    pipe: Any, denoiser: str, device: torch.device, hook: type[OffloadHook] = OffloadHook
) -> None:
    """Put a pipeline's denoiser on a device, and move the other components there while they run.

    Text encoders share the device with one another, and so do the others.

    Args:
        pipe: the diffusers pipeline.
        denoiser: the name of its denoiser, which stays on the device.
        device: the accelerator.
        hook: the class of the hooks.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    staying = parts.pop(denoiser)
    staying.to(device)
    add_hook_to_module(staying, hook(device, [*parts.values()]))
    for name, part in parts.items():
        reads = name.startswith("text_encoder")
        others = [other for n, other in parts.items() if n.startswith("text_encoder") != reads]
        add_hook_to_module(part, hook(device, others))
