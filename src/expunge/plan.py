"""What a command will take, before it takes it: memory, and roughly how long."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from expunge.checkpoint import Checkpoint
from expunge.files import size
from expunge.method import Work
from expunge.model import Model, working_device
from expunge.source import empty, read_index

EFFICIENCY = 0.4
"""The share of a large product's speed that a network reaches, about."""

TEXT = ("CLIP", "T5")
"""The parts that read."""

PARTS = {
    "model.diffusion_model.": "denoiser",
    "cond_stage_model.": "CLIP",
    "conditioner.": "CLIP",
    "text_encoders.clip": "CLIP",
    "text_encoders.t5": "T5",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
}
"""What tensors of a single file begin with, and what they belong to."""


@dataclass(frozen=True)
class Plan:
    """Memory and time of some work with a model."""

    parameters: Mapping[str, int]
    """How many numbers each part of the model has: denoiser, CLIP, T5, autoencoder."""
    itemsize: int
    """The bytes of each."""
    together: tuple[tuple[str, ...], ...]
    """The parts that are on the device together, one set for each time of the work."""
    prompt: float
    """Seconds to read a prompt."""
    prediction: float
    """Seconds of one prediction of the denoiser, for one picture."""

    @property
    def memory(self) -> float:
        """Bytes of weights on the device, at most."""
        return self.itemsize * max(
            sum(self.parameters.get(part, 0) for part in parts) for parts in self.together
        )

    def seconds(self, work: Work) -> float:
        """How long some work takes; a gradient costs two predictions more."""
        return work.prompts * self.prompt + (work.predictions + 3 * work.gradients) * self.prediction

    def lines(self, work: Work | None) -> list[str]:
        """The plan in words; the last line says how long."""
        parts = ", ".join(f"{name} {size(n * self.itemsize)}" for name, n in self.parameters.items())
        alone = "" if "denoiser" in self.parameters else ", the rest is left on the disk"
        turns = ", parts in turn" if len(self.together) > 1 else ""
        lines = [
            f"weights: {parts}{alone}",
            f"memory: {size(self.memory)} of weights on the device{turns}",
            f"a prompt takes about {_time(self.prompt)}"
            + ("" if alone else f", a prediction about {_time(self.prediction)}"),
        ]
        if work is None:
            return [*lines, "this method does not say how much of them it needs"]
        counts = [
            f"{n} {what}"
            for n, what in ((work.prompts, "prompts"), (work.predictions, "predictions"),
                            (work.gradients, "predictions with gradients"))
            if n
        ]  # fmt: skip
        return [*lines, f"in all {', '.join(counts)}: about {_time(self.seconds(work))}"]


def plan(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str = "auto",
    *,
    offload: bool = False,
    text_alone: bool = False,
) -> Plan:
    """Plan work with a model on the disk; the device is timed for a moment.

    Of a single file the header is read, of a folder the configurations.

    Args:
        checkpoint: the model.
        dtype: the number format of its weights.
        device, offload: as in `load`.
        text_alone: whether its text encoders are all that is read.
    """
    parameters: Counter[str] = Counter()
    if checkpoint.is_file:
        for name, entry in checkpoint.headers[checkpoint.path].items():
            if name != "__metadata__":
                part = next((PARTS[start] for start in PARTS if name.startswith(start)), "denoiser")
                parameters[part] += prod(entry["shape"])
    else:
        for name, kind in read_index(checkpoint.path).items():
            part = _part(checkpoint.family, name, kind[-1] or "") if isinstance(kind, list) else ""
            if part and (part in TEXT or not text_alone):
                module = empty(checkpoint.path, name)
                parameters[part] += sum(tensor.numel() for tensor in module.parameters())
    device = working_device(device, offload)
    return _plan(parameters, checkpoint.family, checkpoint.config, device, dtype, offload)


def plan_of(model: Model, *, offload: bool = False) -> Plan:
    """Plan work with a model in memory; the device is timed for a moment."""
    parameters: Counter[str] = Counter()
    for name, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            there = (tensor.numel() for tensor in module.parameters() if not tensor.is_meta)
            parameters[_part(type(model), name, type(module).__name__)] += sum(there)
    found = +parameters  # without what has none
    return _plan(found, type(model), model.network.config, str(model.device), model.dtype, offload)


def _plan(
    parameters: Mapping[str, int],
    family: type[Model],
    config: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    offload: bool,
) -> Plan:
    speed = EFFICIENCY * _speed(device, dtype)
    clip, t5, denoiser = (parameters.get(part, 0) for part in (*TEXT, "denoiser"))
    return Plan(
        parameters,
        dtype.itemsize,
        together(device, offload),
        2 * (77 * clip + family.most_tokens * t5) / speed,
        2 * denoiser * _tokens(config) / speed,
    )


def together(device: str, offload: bool) -> tuple[tuple[str, ...], ...]:
    """The parts that are on a device together, one set for each time of the work."""
    if offload:
        return ("denoiser",), TEXT, ("autoencoder",)
    if device == "cpu":
        return (("denoiser", *TEXT, "autoencoder"),)
    return ("denoiser", *TEXT), ("denoiser", "autoencoder")


def _part(family: type[Model], name: str, kind: str) -> str:
    """What a component of this name and class belongs to; "" where it holds no weights that are read."""
    if name.startswith("text_encoder") and kind:
        return "T5" if kind.startswith("T5") else "CLIP"
    return {family.denoiser: "denoiser", "vae": "autoencoder"}.get(name, "")


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
