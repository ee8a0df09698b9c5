"""The contract of an attack, or any other condition under which an erasure is judged.

An attack changes what the edited model is asked (`Attack.run`: a harder probe) or the model itself
(`Attack.apply`: weights rounded, trained further, with a LoRA on top). Judging draws the same prompts
and seeds without the attack and under it, and the *original* model under the same attack beside them:
an attack that ruins what the original draws shows nothing about an erasure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from expunge.base.errors import ExpungeError
from expunge.base.fields import check_fields
from expunge.edit import Edit
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext

Access = Literal["weights", "text encoder", "interface"]
"""What somebody must have: the model's weights, its text encoder, or an interface that draws."""


@dataclass(frozen=True)
class Attack:
    """A way to bring an erased concept back. One subclass a file in `attacks/`; fields are options.

    A subclass overrides `run`, which changes the probe, or `apply`, which changes the model, or both.

    Raises:
        TypeError: a subclass overrides neither.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The budgets of a suite that names none: for "" and for each further ladder, "NAME:LADDER", the
    attack's fields; one of them is a list, tried from its weakest value on. Without any, the attack is
    judged once, as its fields are."""
    smaller_is_stronger: ClassVar[bool] = False
    """Whether the largest value of a ladder is the weakest, as with bits of a weight."""
    access: ClassVar[Access] = "weights"
    """The least that somebody must have who does this; reports group conditions by it."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it needs that not every family has; `Model.missing_capabilities` says which lacks what."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields with another name in earlier versions: {old: new}; an old name is refused with the new."""

    def __post_init__(self) -> None:
        check_fields(self)
        if type(self).run is Attack.run and not self.changes_model:
            raise TypeError(f"the attack {type(self).__name__} must override run or apply")

    @property
    def changes_model(self) -> bool:
        """Whether images under the attack come from a changed model, not from a changed probe alone."""
        return type(self).apply is not Attack.apply

    @property
    def changes_nothing(self) -> bool:
        """Whether the budget is 0: then there is no attack, and nothing is shown."""
        return False

    @classmethod
    def require(cls, model: Model) -> None:
        """Check that a model can be put under this attack; an override calls it first.

        Raises:
            ExpungeError: its family lacks something; the message says what, and why.
        """
        # A reason and not a family's name: families are plug-ins, and no attack knows them all.
        for need in cls.needs:
            if need in model.missing_capabilities:
                raise ExpungeError(
                    f"it needs {need}, and {type(model).__name__} has none:"
                    f" {model.missing_capabilities[need]}"
                )

    def check_inputs(self, model: Model) -> None:
        """Check what the fields name, such as files, before anything is drawn.

        Raises:
            ExpungeError: a file is missing, or does not fit the model.
        """

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe made harder for the edited model: other prompts, or other encoded text.

        Args:
            model: the original; it is left as it was.
            edit: what is attacked. One without changes stands for the original: the positive control.
            probe: what is drawn without the attack; the answer has as many rows, in the same order.
            run: the seed that all random choices follow from, and the progress.
        """
        return probe

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        """Change the model while images are drawn; the context manager gives the model to draw with.

        By default that is the edited model. The images are cached under the attack's fields, the seed
        and the edit, so what is done here may depend on nothing else; it is opened once for all images,
        and not at all where they have been drawn before.

        Args:
            model: the original; it is as it was when the context is left.
            edit: what is attacked. One without changes stands for the original: the positive control.
            run: the seed that all random choices follow from, and the progress.
        """
        with model.using(edit):
            yield model
