"""The contract of an attack: it turns a probe into a harder one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from expunge.base.fields import check
from expunge.edit import Edit
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext


@dataclass(frozen=True)
class Attack(ABC):
    """A way to bring an erased concept back. One subclass a file in `attacks/`."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that had another name in earlier versions: {old: new}; an old one is answered with the
    new."""

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """The probe made harder for the edited model. The model is left as it was."""
