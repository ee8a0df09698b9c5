"""What every change answers, and the ways in which one may act on a layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError


# Without `eq`: comparing tensors gives tensors, and a change must be hashable.
@dataclass(frozen=True, eq=False)
class Change(ABC):
    """What some layers do differently. The fields that are tensors are what a file stores as tensors."""

    kind: ClassVar[str]
    """The name of the kind, as files spell it."""
    layers: tuple[str, ...]
    """The names of the layers it belongs to."""
    parameter: str = field(default="weight", kw_only=True)
    """The name of the layers' parameter that it replaces."""

    @abstractmethod
    def fits(self, shape: torch.Size) -> bool:
        """Whether it can be applied to a layer whose parameter has this shape."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        # Not `asdict`, which would copy every tensor.
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def spec(self) -> dict[str, Any]:
        """The other fields and the kind, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        return {"kind": self.kind, **plain}

    @property
    def label(self) -> str:
        """What `summarize` calls it."""
        return self.kind


class WeightChange(Change):
    """A change that is a static weight: it can be saved with the pipeline."""

    @abstractmethod
    def weight(self, original: Tensor) -> Tensor:
        """Return the weight that replaces `original`: same shape, dtype and device."""


class HookedChange(Change):
    """A change that depends on a layer's input, and so runs as a forward hook."""

    unfittable: ClassVar[str] = ""
    """Why no static weights are fitted to it: the end of a sentence that begins with "a … change". ""
    where `fit_static_weights` fits some."""

    def weight(self, original: Tensor) -> Tensor:
        """Refuse: no static weight does the same.

        Raises:
            ExpungeError: always; it names the way out.
        """
        raise ExpungeError(
            f"a {self.kind} change is switched by the token it meets, so no weight can hold it;"
            " `expunge.checkpoints.linearize.fit_static_weights` fits the nearest weights to it"
        )


class InputChange(HookedChange):
    """A change of what a layer receives."""

    @abstractmethod
    def change_input(self, x: Tensor) -> Tensor:
        """Return what replaces the input x, (…, tokens, in): same shape and dtype."""


class OutputChange(HookedChange):
    """A change of what a layer returns."""

    @abstractmethod
    def change_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return what replaces `output`, (…, tokens, out), the layer's output for the input x."""


class PredictionChange(HookedChange):
    """A change of what the denoiser predicts. Its layers are those that read what it has of text."""

    @abstractmethod
    def make_hook(self, strength: float) -> Callable[..., Any]:
        """Return a forward hook of the denoiser, with keyword arguments, for one application.

        Args:
            strength: how much of the difference that it makes counts.
        """
