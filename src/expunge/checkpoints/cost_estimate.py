"""What a command will take, before it takes it: memory, and roughly how long."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from expunge.base.files import size
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.load import working_device
from expunge.checkpoints.loading import empty, read_index
from expunge.checkpoints.pace import measured
from expunge.erasing.caption_gram import count_unread
from expunge.model import Model
from expunge.problem import Concept
from expunge.runtime.cost import Cost

EFFICIENCY = 0.4
"""The share of a large product's speed that a network reaches, about."""

CALL = 0.002
"""Seconds of a prediction that hang on the number of layers alone, for each of a few images."""

SAVING, HASHED = 0.1, 5e8
"""Seconds to write an edit, and bytes a second that are hashed, about."""

TRIED = {"prompts": 20, "predictions": 40}
"""How much of each a trial of a model costs, in units of its own."""

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
    """Seconds of one prediction of the denoiser, for one image."""
    gradient: float | None = None
    """Seconds of one with gradients; by default three times those without."""
    product: float = 0.0
    """Seconds of a product of two matrices as wide as the text embeddings, float64."""
    captions: int | None = None
    """How many captions have to be read for a prior, where that is known."""
    saving: float = 0.0
    """Seconds to hash what changes, twice, and to write it."""

    @property
    def memory(self) -> float:
        """Bytes of weights on the device, at most."""
        return self.itemsize * max(
            sum(self.parameters.get(part, 0) for part in parts) for parts in self.together
        )

    @property
    def foretold(self) -> dict[str, float]:
        """Seconds of each kind of work, by the names of `Work`'s fields."""
        gradient = 3 * self.prediction if self.gradient is None else self.gradient
        return {"prompts": self.prompt, "predictions": self.prediction, "gradients": gradient}

    def totals(self, work: Cost) -> dict[str, float]:
        """How much there is of each, a prior's captions among the prompts."""
        captions = count_unread(None, work.captions) if self.captions is None else self.captions
        return {
            "prompts": work.prompts + captions,
            "predictions": work.predictions,
            "gradients": work.gradients,
        }

    def beside(self, work: Cost) -> float:
        """Seconds for what is no work of the model: equations, and saving."""
        return work.products * self.product + self.saving

    def seconds(self, work: Cost) -> float:
        """How long some work takes, from the first prompt until it is saved."""
        each = self.foretold
        return self.beside(work) + sum(n * each[kind] for kind, n in self.totals(work).items())

    def lines(self, work: Cost | None) -> list[str]:
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
            for n, what in zip(
                self.totals(work).values(),
                ("prompts", "predictions", "predictions with gradients"),
                strict=True,
            )
            if n
        ]
        return [*lines, f"in all {', '.join(counts)}: about {_time(self.seconds(work))}"]


def estimate(
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


def estimate_model(
    model: Model,
    *,
    offload: bool = False,
    work: Cost | None = None,
    erased: Sequence[Concept] = (),
) -> Plan:
    """Plan work with a model in memory; the device is timed for a moment.

    Where the work takes much longer than that, the model itself is timed, on a few prompts and images.

    Args:
        model: the model.
        offload: as in `load`.
        work: what it will be asked.
        erased: whose words a vocabulary is read without.
    """
    parameters: Counter[str] = Counter()
    for name, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            there = (tensor.numel() for tensor in module.parameters() if not tensor.is_meta)
            parameters[_part(type(model), name, type(module).__name__)] += sum(there)
    found = +parameters  # without what has none
    made = _plan(found, type(model), model.network.config, str(model.device), model.dtype, offload)
    if work is None:
        return made
    entries = [model.weight(entry.layer) for entry in model.text_entries()]
    made = dataclasses.replace(
        made,
        captions=count_unread(model, work.captions, erased),
        saving=SAVING + 2 * sum(2 * w.numel() for w in entries) / HASHED,
        product=_product(entries[0].shape[1]),
    )
    trial = TRIED["prompts"] * made.prompt + TRIED["predictions"] * made.prediction
    if trial > 1 + 0.05 * made.seconds(work):
        return made
    times = measured(model)
    return dataclasses.replace(
        made,
        prompt=times["prompts"],
        prediction=times.get("predictions", made.prediction),
        gradient=times.get("gradients"),
    )


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
        2 * denoiser * _tokens(config) / speed + CALL,
        product=_product(_text_width(config)),
        saving=SAVING,
    )


def operations(model: Model) -> float:
    """Those of one prediction of a model's denoiser, for one image, about."""
    return 2.0 * sum(p.numel() for p in model.network.parameters()) * _tokens(model.network.config)


def _text_width(config: Mapping[str, Any]) -> int:
    """The width of the text embeddings that a denoiser takes."""
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim") or 768
    return int(max(width) if isinstance(width, (list, tuple)) else width)


def _product(width: int) -> float:
    """Seconds of a product of two square matrices of this width, float64, on the CPU."""
    a = torch.randn(256, 256, dtype=torch.float64)
    start = time.perf_counter()
    for _ in range(4):
        float((a @ a)[0, 0])
    return (time.perf_counter() - start) / 4 * (width / 256) ** 3


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
    """How often each parameter of a denoiser is used for an image, about.

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
