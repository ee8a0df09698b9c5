"""An edit at another strength: none of it at 0, as it was made at 1, more of it above."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Change, Changes, InputChange, OutputChange, WeightChange

STRONGEST = 2.0
"""Beyond that, images fall apart, and nobody learns anything."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What all scaled changes have in common: the change and how much of it."""

    kind: ClassVar[str] = "scaled"
    inner: Any = dataclasses.field(default=None, kw_only=True)
    strength: float = dataclasses.field(default=1.0, kw_only=True)

    def fits(self, shape: torch.Size) -> bool:
        return bool(self.inner.fits(shape))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.inner.tensors)

    def _between(self, before: Tensor, after: Tensor) -> Tensor:
        """before + strength · (after − before), in the format of `before`."""
        wide = torch.promote_types(before.dtype, torch.float32)
        return torch.lerp(before.to(wide), after.to(wide), self.strength).to(before.dtype)


@dataclass(frozen=True, eq=False)
class ScaledWeight(_Part, WeightChange):
    """W + s (change(W) − W)."""

    def weight(self, original: Tensor) -> Tensor:
        return self._between(original, self.inner.weight(original))


@dataclass(frozen=True, eq=False)
class ScaledInput(_Part, InputChange):
    """x + s (change(x) − x), for a gate on what a layer is given."""

    def change_input(self, x: Tensor) -> Tensor:
        return self._between(x, self.inner.change_input(x))


@dataclass(frozen=True, eq=False)
class ScaledOutput(_Part, OutputChange):
    """y + s (change(y) − y), for a gate on what a layer answers."""

    def output(self, given: Tensor, output: Tensor) -> Tensor:
        return self._between(output, self.inner.output(given, output))


def scaled(changes: Sequence[Change], strength: float) -> Changes:
    """Each of the changes at a strength; at 1 they are the very same.

    Args:
        changes: what an edit is made of.
        strength: 0 to `STRONGEST`.

    Raises:
        ExpungeError: the strength is out of that range.
    """
    if not 0 <= strength <= STRONGEST:
        raise ExpungeError(f"the strength must be 0 to {STRONGEST:g}, not {strength:g}")
    if strength == 1:
        return tuple(changes)
    if strength == 0:
        return ()
    return tuple(_scaled(change, strength) for change in changes)


def _scaled(change: Change, strength: float) -> Change:
    kinds: tuple[tuple[type[Change], type[Any]], ...] = (
        (WeightChange, ScaledWeight),
        (InputChange, ScaledInput),
        (OutputChange, ScaledOutput),
    )
    for kind, wrapper in kinds:
        if isinstance(change, kind):
            made: Change = wrapper(
                change.layers, parameter=change.parameter, inner=change, strength=strength
            )
            return made
    raise ExpungeError(f"a {change.kind} change has no strength")
