"""The contract of a method: hyper-parameters as dataclass fields, and `fit`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.fields import build, check_fields, flatten, groups, leaves, require_known
from expunge.changes import Changes
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class Method(ABC):
    """A method that erases concepts. One subclass a file in `methods/`; its fields are its options."""

    citation: ClassVar[str]
    """The paper: authors, title, year, and where to find it."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of field values; `about`, which is not a field, says in a line what the set is for."""

    needs: ClassVar[Mapping[str, str]] = {}
    """What each stage needs that not every family has: {stage: capability}, both plain texts.

    `Model.missing_capabilities` says which a family lacks, and why. A method without stages uses its
    own name as the stage."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that had another name in earlier versions: {old: new}.

    The records of old edits are read by it; on the command line and in TOML files the old name is
    refused with the new one."""

    absent: ClassVar[Mapping[str, str]] = {}
    """Fields of other methods that this one has not, with the reason: {field: a whole sentence}."""

    stronger: ClassVar[str] = ""
    """What to turn for an edit that erases more: "a smaller ridge". It is said of a weak edit."""

    strength_field: ClassVar[str] = ""
    """The field that `expunge.autotune` turns, of which a smaller value erases more; "" for none."""

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
        # Checked in `__new__`, for the dataclass's own `__init__` would raise a bare TypeError first.
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)

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
        """Whether the method, with these field values, uses the anchors."""
        return True

    @property
    def reads_retain(self) -> bool:
        """Whether the method, with these field values, reads what a problem retains."""
        return True

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        """Where it shows how far an edit, with these field values, moved a concept toward its anchor.

        In what the layers make of "text" through which it enters, in the denoiser's "predictions", or
        nowhere (""); see `erasing.moved_share`.
        """
        return ""

    def check_family(self, family: type[Model]) -> None:
        """Check that a family has what this method, with these field values, needs.

        Raises:
            ExpungeError: it lacks something; the message gives the reason and the stages that work.
        """
        # Only the stages that are switched on count: gates alone may work where refinement does not.
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
        """Return the method with a preset's field values, those in `overrides` taking precedence.

        Raises:
            ExpungeError: there is no such preset, or a value does not fit.
        """
        if name not in cls.presets:
            raise UnknownNameError("preset", name, cls.presets)
        values = {**cls.presets[name], **overrides}
        values.pop("about", None)
        return build(cls, values)

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost | None:
        """Estimate the cost of `fit`, for `--dry-run` and the remaining time; None if it is unknown.

        Args:
            problem: what to erase.
            num_inference_steps: the model's number of denoising steps.
        """
        return None

    @abstractmethod
    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        """Return the changes that solve the problem, and leave the model as it was, bit for bit.

        Args:
            model: the model to erase from.
            problem: what to erase; every anchor is chosen, and every name fits the model's window.
            run: seed, progress and work folder. Long work goes through `run.map_cached`, which saves it
                and spreads it over a cluster.
        """
