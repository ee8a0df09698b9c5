"""Unlearn concepts: a diffusers pipeline in, the same pipeline without them out."""

from __future__ import annotations

import copy as copying
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import Applied, Changes
from expunge.erasure import as_model, erase
from expunge.method import Method
from expunge.problem import Concept, Kind, Problem


def unlearn(
    pipe: Any,
    concept: str | Concept | Sequence[str | Concept],
    method: Method | str = "uce",
    *,
    anchor: str | None = None,
    retain: str | Sequence[str] = (),
    kind: Kind = "object",
    copy: bool = False,
    seed: int = 0,
    progress: Progress = ignore_progress,
    **fields: Any,
) -> Any:
    """Erase concepts from a diffusers pipeline for good, and return it.

    >>> pipe = DiffusionPipeline.from_pretrained(…)        # doctest: +SKIP
    >>> pipe = unlearn(pipe, "airplane", anchor="sky")     # doctest: +SKIP
    >>> pipe("an airplane over the sea").images[0].show()  # doctest: +SKIP

    `save_pretrained` then saves static weights with the pipeline, and leaves out gates (ACE), which are
    hooks. To keep the edit as a file, to take it off again, or to apply it at another strength, use
    `erase` and `Edit.apply`.

    Args:
        pipe: the pipeline. Of a model, its pipeline is taken.
        concept: what to erase: a name, a `Concept`, or several of them.
        method: the method with its fields set, or its name.
        anchor: what the named concepts become; "" is the empty prompt, None lets the model choose.
        retain: prompts or names whose images must stay as they are.
        kind: what kind of thing the named concepts are: object, identity, style or explicit.
        copy: leave the pipeline as it is and return another, which has its own weights where the edit
            changes them (the denoiser, as a rule) and shares all other parts.
        seed: the seed of all random numbers.
        progress: called with what is done.
        fields: fields of the method: `stages=("gate",)`.

    Returns:
        The pipeline, or its copy.

    Raises:
        ExpungeError: nothing is to be erased, an argument does not fit, the family is not known, or the
            pipeline cannot be copied. The pipeline is then as it was.
    """
    problem = _make_problem(concept, anchor, retain, kind)
    model = as_model(pipe)
    own = model.pipe
    if copy:
        _check_copyable(own)
    if isinstance(method, str):
        method = cast(type[Method], registry.get("methods", method)).of(**fields)
    elif fields and isinstance(method, Method):
        method = method.replace(**fields)
    edit = erase(model, problem, method, seed=seed, progress=progress)
    if copy:
        own = _copy_changed(own, model.denoiser, edit.changes)
    # Not `Edit.apply`: the edit was made from these very weights, which a copy no longer tells.
    Applied(own, edit.changes).keep()
    return own


def _make_problem(
    concept: str | Concept | Sequence[str | Concept],
    anchor: str | None,
    retain: str | Sequence[str],
    kind: Kind,
) -> Problem:
    """Return the problem that the arguments of `unlearn` state.

    Raises:
        ExpungeError: one does not fit.
    """
    several = [concept] if isinstance(concept, (str, Concept)) else concept
    if not isinstance(several, Sequence) or not all(isinstance(one, (str, Concept)) for one in several):
        raise ExpungeError(f"concept must be a name, a Concept, or a list of them, not {concept!r}")
    if anchor is not None and (own := next((c for c in several if isinstance(c, Concept)), None)):
        raise ExpungeError(
            f"anchor is for concepts given by name; give {own.name!r} its own:"
            f" Concept({own.name!r}, anchor={anchor!r})"
        )
    made = (one if isinstance(one, Concept) else Concept(one, anchor, kind) for one in several)
    return Problem(tuple(made), (retain,) if isinstance(retain, str) else tuple(retain))


def _check_copyable(pipe: Any) -> None:
    """Check that parts of a pipeline can be copied without what moves them between devices.

    Raises:
        ExpungeError: its parts are offloaded, or spread over several devices.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    # accelerate's hooks hold the original's modules: a copy would move those to the device, not itself.
    moved = next(
        (name for name, p in parts.items() if any(hasattr(m, "_hf_hook") for m in p.modules())), ""
    )
    if moved or getattr(pipe, "hf_device_map", None):
        raise ExpungeError(
            f"a pipeline whose parts are offloaded ({moved or 'by its device map'}) cannot be copied:"
            " change it in place, with copy=False, or unlearn before it is offloaded"
        )


def _copy_changed(pipe: Any, denoiser: str, changes: Changes) -> Any:
    """Return a pipeline that shares all but the denoiser and what else changes, which are its own."""
    touched = {denoiser, *(layer.partition(".")[0] for change in changes for layer in change.layers)}
    copied = copying.copy(pipe)
    for name in sorted(touched):
        setattr(copied, name, copying.deepcopy(getattr(pipe, name)))
    return copied
