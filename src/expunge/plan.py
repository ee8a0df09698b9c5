"""What a command will take, before it takes it: memory, and roughly how long."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from expunge.checkpoint import Checkpoint
from expunge.files import size
from expunge.method import Work
from expunge.model import Model, working_device

EFFICIENCY = 0.4
"""The share of a large product's speed that a network reaches, about."""

PARTS = {
    "model.diffusion_model.": "denoiser",
    "cond_stage_model.": "text encoders",
    "conditioner.": "text encoders",
    "text_encoders.": "text encoders",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
}
"""What tensors of a single file begin with, and what they belong to."""


@dataclass(frozen=True)
class Plan:
    """Memory and time of some work with a model."""

    parameters: Mapping[str, int]
    """How many numbers each part of the model has: denoiser, text encoders, autoencoder."""
    itemsize: int
    """The bytes of each."""
    offload: bool
    prompt: float
    """Seconds to read a prompt."""
    prediction: float
    """Seconds of one prediction of the denoiser, for one picture."""

    @property
    def memory(self) -> float:
        """Bytes of weights on the device: all of them, or the largest part at a time."""
        sizes = [n * self.itemsize for n in self.parameters.values()]
        return max(sizes) if self.offload else sum(sizes)

    def seconds(self, work: Work) -> float:
        """How long some work takes; a gradient costs two predictions more."""
        return work.prompts * self.prompt + (work.predictions + 3 * work.gradients) * self.prediction

    def lines(self, work: Work | None) -> list[str]:
        """The plan in words; the last line says how long."""
        parts = ", ".join(f"{name} {size(n * self.itemsize)}" for name, n in self.parameters.items())
        lines = [
            f"weights: {parts}",
            f"memory: {size(self.memory)} of weights on the device"
            + (", the largest part at a time" if self.offload else ""),
            f"a prompt takes about {_time(self.prompt)}, a prediction about {_time(self.prediction)}",
        ]
        if work is None:
            return [*lines, "this method does not say how much of them it needs"]
        counts = [
            f"{n} {what}"
            for n, what in ((work.prompts, "prompts"), (work.predictions, "predictions"),
                            (work.gradients, "predictions with gradients"))
            if n
        ]  # fmt: skip
        return [*lines, f"in all {', '.join(counts)}: at least {_time(self.seconds(work))}"]


def plan(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str = "auto", *, offload: bool = False
) -> Plan:
    """Plan work with a model on the disk: headers are read, and the device is timed for a moment."""
    parameters: dict[str, int] = {}
    for path, header in checkpoint.headers.items():
        for name, entry in header.items():
            if name != "__metadata__":
                part = _part(checkpoint, path.parent.name, name)
                parameters[part] = parameters.get(part, 0) + prod(entry["shape"])
    return _plan(parameters, checkpoint.config, working_device(device), dtype, offload)


def plan_of(model: Model, *, offload: bool = False) -> Plan:
    """Plan work with a model in memory; the device is timed for a moment."""
    parameters: dict[str, int] = {}
    for component, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            part = _part_of(type(model), component)
            count = sum(tensor.numel() for tensor in module.parameters() if not tensor.is_meta)
            parameters[part] = parameters.get(part, 0) + count
    return _plan(parameters, model.network.config, str(model.device), model.dtype, offload)


def _plan(
    parameters: Mapping[str, int],
    config: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    offload: bool,
) -> Plan:
    speed = EFFICIENCY * _speed(device, dtype)
    text, denoiser = parameters.get("text encoders", 0), parameters.get("denoiser", 0)
    return Plan(
        parameters,
        dtype.itemsize,
        offload,
        2 * text * 77 / speed,
        2 * denoiser * _tokens(config) / speed,
    )


def _part(checkpoint: Checkpoint, component: str, name: str) -> str:
    """What a tensor belongs to."""
    if checkpoint.is_file:
        return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "denoiser")
    return _part_of(checkpoint.family, component)


def _part_of(family: type[Model], component: str) -> str:
    """What a component belongs to."""
    if component == family.denoiser:
        return "denoiser"
    return "text encoders" if component.startswith("text_encoder") else "autoencoder"


def _tokens(config: Mapping[str, Any]) -> float:
    """How often each parameter of a denoiser is used for a picture, about.

    Once a token of a transformer. A U-Net halves its latents on the way; a ninth of them comes near.
    """
    joint = "joint_attention_dim" in config
    sides = config.get("sample_size") or (128 if joint else 64)
    side = sides if isinstance(sides, int) else max(sides)
    return (side // 2) ** 2 + 400 if joint else side**2 / 9


def _speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large product."""
    a = torch.randn(768, 768, device=device).to(torch.float32 if device == "cpu" else dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return float(2 * 768**3 / best)


def _time(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{1000 * seconds:.0f} ms"
