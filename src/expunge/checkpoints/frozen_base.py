"""A denoiser that is not trained, kept in 8 or 4 bits: what does not fit in memory otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from torch import nn

from expunge.base.errors import UnknownNameError
from expunge.changes import iterate_layers
from expunge.model import Model
from expunge.ops.frozen_linear import FrozenLinear, Int8Linear, NF4Linear

FORMS: dict[str, type[FrozenLinear]] = {kind.form: kind for kind in (Int8Linear, NF4Linear)}
"""The forms that a frozen base can be kept in."""


def check_form(form: str) -> None:
    """Check that a base can be kept in a form; "" is as it is.

    Raises:
        UnknownNameError: it cannot.
    """
    if form and form not in FORMS:
        raise UnknownNameError("form to quantise to", form, FORMS)


def quantise_frozen(model: Model, form: str) -> None:
    """Keep the linear layers of a denoiser in few bits, each with its weight gone before the next.

    What edits change stays as it is: the layers through which text enters, those that `encode` applies,
    and a text refiner. All else can no longer be trained, and edits of it no longer be applied.

    Args:
        model: is changed.
        form: one of `FORMS`.
    """
    # Listed first: the network changes under the loop.
    for name, module in list(_list_frozen(model)):
        parent, _, own = name.rpartition(".")
        setattr(model.network.get_submodule(parent), own, FORMS[form](module))


def count_bytes(family: type[Model], network: nn.Module, form: str, itemsize: int) -> int:
    """Count the bytes of a denoiser's weights once `quantise_frozen` has been at it.

    Args:
        family: the model's family.
        network: the denoiser; it may have no memory.
        form: one of `FORMS`.
        itemsize: the bytes of a number that is kept as it is.
    """
    # Which layers are kept follows from the denoiser alone: the rest of a model need not be there.
    model = object.__new__(family)
    model.pipe = SimpleNamespace(**{family.denoiser: network})
    rounded = [module.weight for _, module in _list_frozen(model)]
    whole = sum(p.numel() for p in network.parameters()) - sum(w.numel() for w in rounded)
    return itemsize * whole + sum(FORMS[form].count_bytes(*w.shape) for w in rounded)


def _list_frozen(model: Model) -> Iterator[tuple[str, nn.Linear]]:
    """List the linear layers of a denoiser that no edit of text entries or a refiner changes."""
    entries = (*model.text_entries(), *model.pooled_entries())
    kept = {entry.layer.partition(".")[2] for entry in entries}
    begins = (*model.text_refiner, *(f"{name}." for name in model.read_ahead))
    for name, module in iterate_layers(model.network):
        if type(module) is not nn.Linear or name in kept or name in model.read_ahead:
            continue
        if not (begins and name.startswith(begins)):
            yield name, module
