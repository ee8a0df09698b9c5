"""The contract of a method: hyper-parameters as fields, and `fit`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from expunge.changes import Changes
from expunge.errors import unknown
from expunge.fields import build, check
from expunge.model import Model
from expunge.problem import Problem
from expunge.run import Run


@dataclass(frozen=True)
class Method(ABC):
    """A way to erase concepts. One subclass a file in `methods/`; its fields are its options."""

    citation: ClassVar[str]
    """The paper: authors, title, year, where to find it."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Field values that belong together, by name; `about`, no field, says in a line what for."""

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The method with a preset's values, but for those given beside.

        Raises:
            ExpungeError: no such preset, or a value that does not fit.
        """
        if name not in cls.presets:
            raise unknown("preset", name, cls.presets)
        values = {**cls.presets[name], **overrides}
        values.pop("about", None)
        return build(cls, values)

    @abstractmethod
    def fit(self, model: Model, problem: Problem, run: Run) -> Changes:
        """The changes that solve the problem. The model is left as it was, bit for bit.

        Every anchor of the problem has been chosen, and every name fits the model's window.
        What takes long goes through `run.pieces`, which keeps and spreads it.
        """
