"""The contract of a method: hyper-parameters as fields, and `fit`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from expunge.base.errors import ExpungeError, unknown
from expunge.base.fields import build, check, flatten, groups, leaves, require_known
from expunge.changes import Changes
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class Method(ABC):
    """A way to erase concepts. One subclass a file in `methods/`; its fields are its options."""

    citation: ClassVar[str]
    """The paper: authors, title, year, where to find it."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Field values that belong together, by name; `about`, no field, says in a line what for."""

    needs: ClassVar[Mapping[str, str]] = {}
    """What each stage needs of a family that not every family has, as literal texts. A family's
    `missing_capabilities` says why it has not. A method without stages names itself."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that had another name in earlier versions: {old: new}. Records of old edits are read with
    them; on the command line and in TOML the old name is answered with the new one."""

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Answer a field that is not there with where it is, the name it has now, or the nearest one.

        Raises:
            ExpungeError: there is no such field.
        """
        for group, kind in groups(cls).items():
            for name in fields.keys() & {field.name for field in leaves(kind)}:
                raise ExpungeError(
                    f"{cls.__name__}'s field {name!r} is one of its {group}:"
                    f" {cls.__name__}({group}={kind.__name__}({name}=…)), or {cls.__name__}.of({name}=…)"
                )
        names = [*(field.name for field in dataclasses.fields(cls)), *(f.name for f in leaves(cls))]
        require_known(cls, fields, names)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make the method from the values of its fields, those of its groups among the others.

        Raises:
            ExpungeError: there is no such field, or a value does not fit.
        """
        return build(cls, values)

    def replace(self, **values: Any) -> Self:
        """Make the same method with other values of some fields, those of its groups among the others.

        Raises:
            ExpungeError: there is no such field, or a value does not fit.
        """
        return build(type(self), {**flatten(self), **values})

    @property
    def reads_anchor(self) -> bool:
        """Whether it matters to this method, as its fields are, what a concept becomes."""
        return True

    @property
    def reads_retain(self) -> bool:
        """Whether this method, as its fields are, reads what a problem retains."""
        return True

    def check_family(self, family: type[Model]) -> None:
        """Check that models of a family have what this method needs, as its fields are.

        Raises:
            ExpungeError: it has not; the reason, and what of the method is left.
        """
        stages = getattr(self, "stages", tuple(self.needs))
        for stage in stages:
            need = self.needs.get(stage, "")
            if need in family.missing_capabilities:
                rest = [one for one in stages if self.needs.get(one) not in family.missing_capabilities]
                way = f"; left are the stages {', '.join(rest)}" if rest else ""
                raise ExpungeError(
                    f"{type(self).__name__}'s {stage} needs {need}, and {family.__name__} has none:"
                    f" {family.missing_capabilities[need]}{way}"
                )

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

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost | None:
        """How much this method will ask of a model, about; None if it does not say.

        Args:
            problem: what to erase.
            num_inference_steps: the model's own.
        """
        return None

    @abstractmethod
    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        """The changes that solve the problem. The model is left as it was, bit for bit.

        Every anchor of the problem has been chosen, and every name fits the model's window.
        What takes long goes through `run.pieces`, which keeps and spreads it.
        """
