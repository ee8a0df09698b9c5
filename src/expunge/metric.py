"""The contract of a metric: it turns pictures into a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from expunge.probe import Probe


@dataclass(frozen=True)
class Score:
    """A mean and the number of pictures behind it."""

    value: float
    n: int


class Metric(ABC):
    """Something to measure on pictures. One subclass a file in `metrics/`."""

    higher_is_better: ClassVar[bool]

    @abstractmethod
    def update(self, pictures: Tensor, probe: Probe, reference: Tensor | None = None) -> None:
        """Take in pictures (n, 3, height, width) in [0, 1], drawn for `probe`.

        `reference` holds what the original model drew for the same probe.
        """

    @abstractmethod
    def compute(self) -> Score:
        """The score of everything taken in so far."""
