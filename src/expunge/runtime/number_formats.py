"""Which number formats the hardware multiplies faster than float32."""

from __future__ import annotations

import torch


def is_bfloat16_fast(device: torch.device | str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 numbers in hardware; without that it emulates them, slowly.

    Args:
        device: where the model is.

    Example:
        >>> is_bfloat16_fast("cpu") in (True, False)
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    # PyTorch asks the processor, and has no public name for the question.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    asked = (getattr(torch.cpu, name, None) for name in names)
    return kind == "cpu" and any(ask() for ask in asked if ask is not None)
