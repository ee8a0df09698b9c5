"""The contract of an attack: it turns a probe into one that brings an erased concept back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from expunge.base.fields import check_fields
from expunge.edit import Edit
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext


@dataclass(frozen=True)
class Attack(ABC):
    """An attack that brings an erased concept back. One subclass a file in `attacks/`; its fields are
    its options.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields with another name in earlier versions: {old: new}; an old name is refused with the new."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe that brings the concept back, and leave the model as it was.

        Args:
            model: the original model; apply the edit with `model.using(edit)`.
            edit: the edit to attack.
            probe: the prompts and seeds to start from.
            run: seed, progress and work folder.
        """
