"""Estimate the memory and the time of work with a model, before it is loaded or before it begins."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from expunge.base.files import format_bytes
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.frozen_base import FORMS, check_form, count_bytes
from expunge.checkpoints.load import choose_device
from expunge.checkpoints.loading import read_index
from expunge.checkpoints.pace import time_model
from expunge.checkpoints.pipelines import build_empty
from expunge.erasing.caption_gram import count_unread
from expunge.model import Model
from expunge.ops.frozen_linear import FrozenLinear
from expunge.problem import Concept
from expunge.runtime.cost import Cost

EFFICIENCY = 0.4
"""The share of a large matrix product's speed that a network reaches, about."""

CALL_SECONDS = 0.002
"""The seconds of a prediction that do not depend on the network's width, for each of a few images."""

SAVING_SECONDS, HASHED_PER_SECOND = 0.1, 5e8
"""The seconds it takes to write an edit, and the bytes that are hashed a second, about."""

TRIAL_UNITS = {"prompts": 20, "predictions": 40}
"""The cost of timing a model, in prompts and predictions."""

TEXT_PARTS = ("CLIP", "T5", "language model")
"""The parts that encode text."""

SINGLE_FILE_PREFIXES = {
    "model.diffusion_model.": "denoiser",
    "cond_stage_model.": "CLIP",
    "conditioner.": "CLIP",
    "text_encoders.clip": "CLIP",
    "text_encoders.t5": "T5",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
}
"""How tensors of a single file begin, and the part that they belong to."""


@dataclass(frozen=True)
class CostEstimate:
    """The memory and the time that work with a model takes."""

    parameters: Mapping[str, int]
    """The number of parameters of each part: denoiser, CLIP, T5, language model, autoencoder."""
    itemsize: int
    """The bytes of a parameter."""
    resident_parts: tuple[tuple[str, ...], ...]
    """The sets of parts that are on the device together, one after the other."""
    prompt_seconds: float
    """Seconds to encode a prompt."""
    prediction_seconds: float
    """Seconds of one prediction of the denoiser, for one image."""
    gradient_seconds: float | None = None
    """Seconds of one prediction with gradients; None for three times one without."""
    product_seconds: float = 0.0
    """Seconds of a product of two matrices as wide as the text embeddings, float64."""
    captions: int | None = None
    """The number of captions to encode for a prior; None where it is not known."""
    saving_seconds: float = 0.0
    """Seconds to hash the changed weights, twice, and to write the edit."""
    quantised_bytes: Mapping[str, int] = field(default_factory=dict)
    """The bytes of each part that is kept in few bits."""

    @property
    def memory(self) -> float:
        """The largest number of bytes of weights that are on the device together."""
        return max(sum(map(self.part_bytes, parts)) for parts in self.resident_parts)

    def part_bytes(self, part: str) -> int:
        """Return the bytes of a part's weights, 0 for a part that is not there."""
        return self.quantised_bytes.get(part, self.itemsize * self.parameters.get(part, 0))

    @property
    def unit_seconds(self) -> dict[str, float]:
        """Seconds of one prompt, prediction and gradient, by the names of `Cost`'s fields."""
        gradient = self.gradient_seconds
        return {
            "prompts": self.prompt_seconds,
            "predictions": self.prediction_seconds,
            # The backward pass takes about twice the forward pass.
            "gradients": 3 * self.prediction_seconds if gradient is None else gradient,
        }

    def count_units(self, cost: Cost) -> dict[str, float]:
        """Count the prompts, predictions and gradients of some work, a prior's captions included."""
        captions = count_unread(None, cost.captions) if self.captions is None else self.captions
        return {
            "prompts": cost.prompts + captions,
            "predictions": cost.predictions,
            "gradients": cost.gradients,
        }

    def overhead(self, cost: Cost) -> float:
        """Return the seconds outside of the model: equations, and saving."""
        return cost.products * self.product_seconds + self.saving_seconds

    def seconds(self, cost: Cost) -> float:
        """Return the seconds that some work takes, from the first prompt until it is saved."""
        each = self.unit_seconds
        units = self.count_units(cost)
        return self.overhead(cost) + sum(n * each[kind] for kind, n in units.items())

    def describe(self, cost: Cost | None) -> list[str]:
        """Describe the estimate in lines, the last of which says how long the work takes.

        Args:
            cost: the work; None where the method does not say how much it needs.
        """
        parts = ", ".join(f"{name} {format_bytes(self.part_bytes(name))}" for name in self.parameters)
        alone = "" if "denoiser" in self.parameters else ", the rest is left on the disk"
        turns = ", parts in turn" if len(self.resident_parts) > 1 else ""
        lines = [
            f"weights: {parts}{alone}",
            f"memory: {format_bytes(self.memory)} of weights on the device{turns}",
            f"a prompt takes about {_format_seconds(self.prompt_seconds)}"
            + ("" if alone else f", a prediction about {_format_seconds(self.prediction_seconds)}"),
        ]
        if cost is None:
            return [*lines, "this method does not say how much of them it needs"]
        counts = [
            f"{n} {what}"
            for n, what in zip(
                self.count_units(cost).values(),
                ("prompts", "predictions", "predictions with gradients"),
                strict=True,
            )
            if n
        ]
        total = _format_seconds(self.seconds(cost))
        return [*lines, f"in all {', '.join(counts)}: about {total}"]


def estimate(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str = "auto",
    *,
    offload: bool = False,
    text_alone: bool = False,
    quantise: str = "",
) -> CostEstimate:
    """Estimate the cost of work with a model on the disk; the device is timed for a moment.

    Only a single file's header, or a folder's configurations, are read.

    Args:
        checkpoint: the model.
        dtype: the dtype of its weights.
        device: where it will run, as in `load`.
        offload: whether idle parts leave the device, as in `load`.
        text_alone: whether only its text encoders are loaded.
        quantise: the form that the denoiser is kept in, as in `load`.
    """
    check_form(quantise)
    quantised: dict[str, int] = {}
    parameters: Counter[str] = Counter()
    if checkpoint.is_file:
        for name, entry in checkpoint.headers[checkpoint.path].items():
            if name != "__metadata__":
                starts = (part for start, part in SINGLE_FILE_PREFIXES.items() if name.startswith(start))
                part = next(starts, "denoiser")
                parameters[part] += prod(entry["shape"])
                if quantise and part == "denoiser":
                    # By its names in the file it is not known which layers stay: nearly none do.
                    form = FORMS[quantise] if len(entry["shape"]) == 2 else None
                    size = dtype.itemsize * prod(entry["shape"])
                    size = form.count_bytes(*entry["shape"]) if form else size
                    quantised[part] = quantised.get(part, 0) + size
    else:
        for name, kind in read_index(checkpoint.path).items():
            part = _find_part(checkpoint.family, name, kind[-1] or "") if isinstance(kind, list) else ""
            if part and (part in TEXT_PARTS or not text_alone):
                module = build_empty(checkpoint.path, name)
                parameters[part] += sum(tensor.numel() for tensor in module.parameters())
                if quantise and part == "denoiser":
                    quantised[part] = count_bytes(checkpoint.family, module, quantise, dtype.itemsize)
    device = choose_device(device, offload)
    made = _estimate(parameters, checkpoint.family, checkpoint.config, device, dtype, offload)
    return dataclasses.replace(made, quantised_bytes=quantised)


def estimate_model(
    model: Model,
    *,
    offload: bool = False,
    work: Cost | None = None,
    erased: Sequence[Concept] = (),
) -> CostEstimate:
    """Estimate the cost of work with a model in memory; the device is timed for a moment.

    Where the work takes much longer than that, the model itself is timed, on a few prompts and images.

    Args:
        model: the model.
        offload: whether idle parts leave the device, as in `load`.
        work: what the method will ask of the model; None where it does not say.
        erased: the concepts whose words are left out where a prior reads the vocabulary.
    """
    quantised: dict[str, int] = {}
    parameters: Counter[str] = Counter()
    for name, module in model.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            # A denoiser left on the disk stands on the meta device and takes no memory.
            there = [tensor for tensor in module.parameters() if not tensor.is_meta]
            frozen = [m for m in module.modules() if isinstance(m, FrozenLinear)]
            part = _find_part(type(model), name, type(module).__name__)
            parameters[part] += sum(t.numel() for t in there)
            parameters[part] += sum(m.in_features * m.out_features for m in frozen)
            if frozen:
                quantised[part] = sum(t.numel() * t.element_size() for t in there)
                quantised[part] += sum(m.count_bytes(m.out_features, m.in_features) for m in frozen)
    loaded = +parameters  # unary plus drops the parts without parameters
    device = str(model.device)
    made = _estimate(loaded, type(model), model.network.config, device, model.dtype, offload)
    made = dataclasses.replace(made, quantised_bytes=quantised)
    if work is None:
        return made
    entries = [model.weight(entry.layer) for entry in model.text_entries()]
    made = dataclasses.replace(
        made,
        captions=count_unread(model, work.captions, erased),
        saving_seconds=SAVING_SECONDS + 2 * sum(2 * w.numel() for w in entries) / HASHED_PER_SECOND,
        product_seconds=_time_product(entries[0].shape[1]),
    )
    each = made.unit_seconds
    trial = sum(n * each[kind] for kind, n in TRIAL_UNITS.items())
    # A trial may take a second, or a twentieth of the work.
    if trial > 1 + 0.05 * made.seconds(work):
        return made
    times = time_model(model)
    return dataclasses.replace(
        made,
        prompt_seconds=times["prompts"],
        prediction_seconds=times.get("predictions", made.prediction_seconds),
        gradient_seconds=times.get("gradients"),
    )


def count_operations(model: Model) -> float:
    """Count the operations of one prediction of a model's denoiser, for one image, about."""
    frozen = (m for m in model.network.modules() if isinstance(m, FrozenLinear))
    parameters = sum(p.numel() for p in model.network.parameters())
    parameters += sum(m.in_features * m.out_features for m in frozen)
    return 2.0 * parameters * _count_uses(model.network.config, type(model))


def list_resident_parts(device: str, offload: bool) -> tuple[tuple[str, ...], ...]:
    """List the sets of parts that are on a device together, one after the other.

    Args:
        device: the device's name.
        offload: whether idle parts leave it.
    """
    if offload:
        return ("denoiser",), TEXT_PARTS, ("autoencoder",)
    if device == "cpu":
        return (("denoiser", *TEXT_PARTS, "autoencoder"),)
    return ("denoiser", *TEXT_PARTS), ("denoiser", "autoencoder")


def _estimate(
    parameters: Mapping[str, int],
    family: type[Model],
    config: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    offload: bool,
) -> CostEstimate:
    """The estimate from the number of parameters and the device's speed."""
    speed = EFFICIENCY * _time_device(device, dtype)
    clip, t5, language, denoiser = (parameters.get(part, 0) for part in (*TEXT_PARTS, "denoiser"))
    return CostEstimate(
        parameters,
        dtype.itemsize,
        list_resident_parts(device, offload),
        # Two operations a parameter and token: a product and a sum. CLIP's prompts have 77 tokens.
        2 * (77 * clip + family.most_tokens * (t5 + language)) / speed,
        2 * denoiser * _count_uses(config, family) / speed + CALL_SECONDS,
        product_seconds=_time_product(_find_text_width(config)),
        saving_seconds=SAVING_SECONDS,
    )


def _find_text_width(config: Mapping[str, Any]) -> int:
    """The width of the text embeddings that a denoiser takes."""
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim") or 768
    return int(max(width) if isinstance(width, (list, tuple)) else width)


def _find_part(family: type[Model], name: str, kind: str) -> str:
    """The part of a component with this name and class; "" where it has no weights that are read."""
    if name.startswith("text_encoder") and kind:
        return "CLIP" if kind.startswith("CLIP") else "T5" if "T5" in kind else "language model"
    return {family.denoiser: "denoiser", "vae": "autoencoder"}.get(name, "")


def _count_uses(config: Mapping[str, Any], family: type[Model]) -> float:
    """How often each parameter of a denoiser is used for an image, about."""
    transformer = family.denoiser == "transformer"
    sides = config.get("sample_size") or (128 if transformer else 64)
    side = sides if isinstance(sides, int) else max(sides)
    if not transformer:
        # A U-Net halves its latents on the way down; a ninth of them comes near its mean.
        return side**2 / 9
    # A transformer uses each once for each patch, and for some 400 text tokens where these join the
    # image. A configuration that states the size of latents states that of patches, too.
    patch = config.get("patch_size", 2) if config.get("sample_size") else 2
    joint = "cross-attention" in family.missing_capabilities
    return (side // patch) ** 2 + 400 * joint


def _time_product(width: int) -> float:
    """Seconds of a product of two square matrices of this width, float64, on the CPU."""
    a = torch.randn(256, 256, dtype=torch.float64)
    start = time.perf_counter()
    for _ in range(4):
        float((a @ a)[0, 0])
    # A small product is timed, and scaled up: its work grows with the cube of the width.
    return (time.perf_counter() - start) / 4 * (width / 256) ** 3


def _time_device(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large product, the best of four."""
    # CPUs emulate half precision, so that its speed there says nothing.
    a = torch.randn(768, 768, device=device).to(torch.float32 if device == "cpu" else dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for an accelerator to finish
        best = min(best, time.perf_counter() - start)
    return float(2 * 768**3 / best)


def _format_seconds(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{1000 * seconds:.0f} ms"
