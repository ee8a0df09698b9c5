"""Parts of a pipeline that take turns on an accelerator, beside the denoiser, which stays there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn
from torch.utils._pytree import tree_leaves


class OffloadHook(ModelHook):
    """Before a part works, others leave its device for main memory, and it comes.

    None leaves while gradients may have to flow back through it: while what the part is given has been
    computed with them.
    """

    def __init__(self, device: torch.device, others: Sequence[nn.Module]) -> None:
        self.execution_device = device
        self.others = others

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if not any(x.grad_fn is not None for x in given):
            for other in self.others:
                self.move(other, torch.device("cpu"))
        self.move(module, self.execution_device)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    def move(self, part: nn.Module, device: torch.device) -> None:
        """Move a part, unless it is there."""
        if next(part.parameters()).device != device:
            with torch.inference_mode(False):  # weights made in there could not be trained with later
                part.to(device)


def offload_idle_parts(
    pipe: Any, denoiser: str, device: torch.device, turn: type[OffloadHook] = OffloadHook
) -> None:
    """Put a pipeline's denoiser on a device; text encoders and autoencoder come there for their work,
    and leave when another's begins."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    staying = parts.pop(denoiser)
    staying.to(device)
    add_hook_to_module(staying, turn(device, [*parts.values()]))
    for name, part in parts.items():
        reads = name.startswith("text_encoder")
        others = [other for n, other in parts.items() if n.startswith("text_encoder") != reads]
        add_hook_to_module(part, turn(device, others))
