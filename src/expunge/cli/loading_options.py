"""The options that say how a model is loaded, shared by all commands that load one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError
from expunge.checkpoints import loading

if TYPE_CHECKING:
    import torch

    from expunge.checkpoints.cost_estimate import CostEstimate
    from expunge.model import Model
    from expunge.problem import Concept
    from expunge.runtime.cost import Cost

DTYPES = ("float32", "float16", "bfloat16")
"""The names of the dtypes that weights may have."""


@dataclass(frozen=True)
class LoadingOptions:
    """How the model is loaded."""

    dtype: str = "float32"
    """The dtype of the weights: float32, float16 or bfloat16."""
    device: str = "auto"
    """The device: auto, cpu, cuda, cuda:1 or mps."""
    offload: bool = False
    """Keep every idle part of the model on the CPU; by default the denoiser stays on the GPU."""
    config: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """For a single file: a diffusers folder of a model of the same architecture."""
    variant: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The variant of the folder's weights to read: fp16, non_ema; by default those without a name."""
    lora: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="FILE[=STRENGTH]", help_behavior_hint="")
    ] = ()
    """A LoRA to fuse into the weights first."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    attention_slicing: bool = False
    """Compute attention in slices: less memory, more time."""
    quantise: str = ""
    """int8 or nf4 keeps the denoiser's linear layers in 8 or 4.5 bits, but for those through which text
    enters: a half or a quarter of bfloat16's memory, for methods that train these alone."""
    dry_run: bool = False
    """Print the memory and time that the command would take, and do nothing."""

    def print_estimate(self, name: str, cost: Callable[[int], Cost | None]) -> None:
        """Print memory and time for `--dry-run`, without loading any weights.

        Args:
            name: the model's name or path.
            cost: returns the cost of the command, given the model's number of denoising steps.
        """
        from expunge.checkpoints.checkpoint import Checkpoint
        from expunge.checkpoints.cost_estimate import estimate

        checkpoint = Checkpoint.find(name, weights=False, variant=self.variant)
        settings = loading.read_settings(loading.Source(name, checkpoint.path))
        needed = cost(int(settings.get("num_inference_steps", 50)))
        text_alone = self._needs_text_alone(needed, checkpoint.is_file)
        plan = estimate(
            checkpoint,
            read_dtype(self.dtype),
            self.device,
            offload=self.offload,
            text_alone=text_alone,
            quantise=self.quantise,
        )
        print(f"{checkpoint.name}, {checkpoint.family.__name__}")
        for line in plan.describe(needed):
            print(line)

    def announce_estimate(
        self, model: Model, cost: Cost | None, erased: Sequence[Concept] = ()
    ) -> CostEstimate:
        """Print one line before the work: the memory and the time that it will take.

        Args:
            model: the loaded model.
            cost: what the work asks of the model; None if that is unknown.
            erased: the concepts to erase.

        Returns:
            The estimate.
        """
        from expunge.checkpoints.cost_estimate import estimate_model

        plan = estimate_model(model, offload=self.offload, work=cost, erased=erased)
        _, memory, _, time = plan.describe(cost)
        print(f"{memory}; {time}", flush=True)
        return plan

    def load(self, name: str, cost: Cost | None = None) -> Model:
        """Load a model; only its text encoders where the work needs nothing else.

        Args:
            name: a shipped model, a diffusers folder, a single file, or a hub id.
            cost: what the work asks of the model; None loads all of it.
        """
        from expunge.checkpoints.frozen_base import check_form

        # Here, too: the text encoders alone are loaded without it, and a wrong name would go unseen.
        check_form(self.quantise)
        source = loading.find_source(name, self.variant)
        if self._needs_text_alone(cost, source.is_file):
            from expunge.checkpoints.checkpoint import Checkpoint

            checkpoint = Checkpoint.find(name, variant=self.variant)
            return checkpoint.load_text_model(read_dtype(self.dtype), self.device)
        from expunge.checkpoints.load import load

        return load(
            name,
            dtype=read_dtype(self.dtype),
            device=self.device,
            config=self.config,
            lora=parse_loras(self.lora),
            offload=self.offload,
            gradient_checkpointing=self.gradient_checkpointing,
            attention_slicing=self.attention_slicing,
            variant=self.variant,
            quantise=self.quantise,
        )

    def _needs_text_alone(self, cost: Cost | None, is_file: bool) -> bool:
        """Whether the text encoders are enough.

        A single file is always read whole, and a LoRA and offloading need the whole model.
        """
        return bool(cost and cost.text_only) and not (is_file or self.lora or self.offload)


def read_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name.

    Raises:
        ExpungeError: the name is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise UnknownNameError("number format", name, DTYPES)
    import torch

    return getattr(torch, name)


def read_autocast(name: str | None) -> torch.dtype | None:
    """Return the dtype to draw in under autocast; None for none.

    Args:
        name: float16, bfloat16, or "auto": bfloat16 where the hardware multiplies it, else none.

    Raises:
        ExpungeError: the name is none of these.
    """
    if name is not None and name not in (known := ("auto", *DTYPES[1:])):
        raise UnknownNameError("number format to draw in", name, known)
    if name is None:
        return None
    from expunge.checkpoints.load import choose_device
    from expunge.runtime.number_formats import is_bfloat16_fast

    fast = is_bfloat16_fast(device := choose_device("auto"))
    if name == "auto":
        return read_dtype("bfloat16") if fast else None
    if name == "bfloat16" and device == "cpu" and not fast:
        warnings.warn(
            "this processor has no bfloat16 and draws slower in it than in float32;"
            " --autocast auto draws in what is faster",
            ExpungeWarning,
            stacklevel=2,
        )
    return read_dtype(name)


def parse_loras(loras: Sequence[str]) -> list[tuple[str, float]]:
    """Read FILE or FILE=STRENGTH; a file's own name may contain an equals sign.

    Returns:
        The file and the strength of each.

    Raises:
        ExpungeError: a strength is not a finite number.
    """
    found = []
    for text in loras:
        file, equals, strength = text.rpartition("=")
        if not equals or Path(text).is_file() or text.lower().endswith(".safetensors"):
            found.append((text, 1.0))
            continue
        try:
            number = float(strength)
        except ValueError:
            raise ExpungeError(f"a LoRA is given as FILE or FILE=STRENGTH, not {text!r}") from None
        if not math.isfinite(number):
            raise ExpungeError(
                f"the strength of a LoRA must be a finite number, not {strength} (in {text!r})"
            )
        found.append((file, number))
    return found
