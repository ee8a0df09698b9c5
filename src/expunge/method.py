"""The contract of a method: hyper-parameters as fields, and `fit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from expunge.changes import Changes
from expunge.fields import check
from expunge.model import Model
from expunge.problem import Problem
from expunge.run import Run


@dataclass(frozen=True)
class Method(ABC):
    """A way to erase concepts. One subclass a file in `methods/`; its fields are its options."""

    citation: ClassVar[str]
    """The paper: authors, title, year, where to find it."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Sets of field values, by name."""

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def fit(self, model: Model, problem: Problem, run: Run) -> Changes:
        """The changes that solve the problem. The model is left as it was, bit for bit.

        Every anchor of the problem has been chosen, and every name fits the model's window.
        """
