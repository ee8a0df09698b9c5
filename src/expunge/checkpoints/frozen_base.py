"""A denoiser that is not trained, kept in 8 bits: what does not fit in memory otherwise."""

from __future__ import annotations

from torch import nn

from expunge.base.errors import UnknownNameError
from expunge.changes import iterate_layers
from expunge.model import Model
from expunge.ops.int8_linear import Int8Linear

FORMS = ("int8",)
"""The forms that a frozen base can be kept in."""


def check_form(form: str) -> None:
    """Check that a base can be kept in a form; "" is as it is.

    Raises:
        UnknownNameError: it cannot.
    """
    if form and form not in FORMS:
        raise UnknownNameError("form to quantise to", form, FORMS)


def quantise_frozen(model: Model) -> None:
    """Keep the linear layers of a model's denoiser in 8 bits, each with its weight gone before the next.

    What edits change stays as it is: the layers through which text enters, those that `encode` applies,
    and a text refiner. All else can no longer be trained, and edits of it no longer be applied.

    Args:
        model: is changed.
    """
    entries = (*model.text_entries(), *model.pooled_entries())
    kept = {entry.layer.partition(".")[2] for entry in entries}
    begins = (*model.text_refiner, *(f"{name}." for name in model.read_ahead))
    # Listed first: the network changes under the loop.
    for name, module in list(iterate_layers(model.network)):
        if type(module) is not nn.Linear or name in kept or name in model.read_ahead:
            continue
        if begins and name.startswith(begins):
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.network.get_submodule(parent), own, Int8Linear(module))
