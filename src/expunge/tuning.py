"""Choose a method's strength on held-out prompts: as weak as erases enough.

The method's `strength_field` is tried from a large value, which erases little, to smaller ones. Each try
makes the edit and measures, in phrasings in which nothing is erased or retained, how far the concepts
moved toward their anchors (`erasing.moved_share`), and how far what stays moved: what is retained, and
general words. The stop rule, in this order:

1. the concept that moved least moved by `enough`: this try is taken, as the weakest that does;
2. what stays moved by more than `most_drift`: the try before it is taken;
3. `max_tries` are used up, or a smaller value moved that concept by less than `LEAST_GAIN`: the last.

It draws nothing, so it is for methods whose effect shows in what layers make of text.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from expunge.base import registry
from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.quiet import Progress, ignore_progress
from expunge.edit import Edit
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.moved_share import measure_drift
from expunge.erasing.prompt_templates import HELD_OUT
from expunge.erasure import as_model, erase
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem

FACTOR = 4.0
"""The value before over the next."""

LEAST_GAIN = 0.01
"""A stronger edit that moves the concept that moved least by no more than this is none."""

WORDS = 20
"""How many general words are watched beside what is retained."""


@dataclass(frozen=True)
class Try:
    """What one value came to."""

    value: float
    """Of the field."""
    moved: float
    """The share of the way to its anchor that the concept that moved least went."""
    drift: float
    """How far what stays moved, as a share of its norm."""


def autotune(
    model: Model | Any,
    problem: Problem,
    method: Method | str = "sluice",
    *,
    enough: float = 0.85,
    most_drift: float = 0.25,
    max_tries: int = 6,
    seed: int = 0,
    progress: Progress = ignore_progress,
    onto: Edit | None = None,
) -> Edit:
    """Find the weakest edit of a method that erases enough; its record's `tuned` holds the tries.

    It costs as many edits as there are tries, and a few short prompts for each.

    Args:
        model: the model to erase from, or a diffusers pipeline as it is.
        problem: what to erase and what to retain.
        method: a method with its fields set, or the name of one. Tries go from 16 times its field's
            value down.
        enough: the share of the way to its anchor that every concept has to go, above 0, at most 1.
        most_drift: how far what stays may move, as a share of its norm.
        max_tries: how many edits are made at most.
        seed: the seed of all random numbers.
        progress: called with what is done.
        onto: an earlier edit of the model that is built on.

    Raises:
        ExpungeError: the method has no such field or shows its effect elsewhere, or an argument is out
            of range.
    """
    named: Method = registry.get("methods", method)() if isinstance(method, str) else method
    name = registry.name_of("methods", type(named))
    field = named.strength_field
    if not field or named.measured_in != "text":
        known = [
            n
            for n in registry.list_names("methods")
            if (cls := registry.get("methods", n)).strength_field and cls().measured_in == "text"
        ]
        raise ExpungeError(
            f"autotune turns a strength that shows in what layers make of text, and {name} has none:"
            f" take one of {', '.join(known)}"
        )
    for what, value, most in (
        ("enough", enough, 1),
        ("most_drift", most_drift, 10),
        ("max_tries", max_tries, 99),
    ):
        if not 0 < value <= most:
            raise ExpungeError(f"{what} must be above 0 and at most {most}, not {value!r}")
    model = as_model(model)
    problem = problem.with_anchors(model.anchors)
    watched = _list_watched(model, problem, seed)
    value = getattr(named, field) * FACTOR**2
    tries: list[Try] = []
    best: Edit | None = None
    for done in range(max_tries):
        progress("choosing the strength", done, max_tries)
        edit = erase(
            model, problem, named.replace(**{field: value}), seed=seed, progress=progress, onto=onto
        )
        # A concept that is its anchor to the model has no way to go.
        moved = min(edit.record.moved.values(), default=1.0)
        tried = Try(value, round(moved, 3), round(measure_drift(model, edit.changes, watched), 4))
        gain = tried.moved - tries[-1].moved if tries else 1.0
        tries.append(tried)
        if best is not None and tried.drift > most_drift:
            break
        best = edit
        if tried.moved >= enough or gain < LEAST_GAIN:
            break
        value /= FACTOR
    progress("choosing the strength", max_tries, max_tries)
    if best is None:
        raise TypeError("there is at least one try")
    chosen = best.record.fields[field]
    taken = next(t for t in tries if t.value == chosen)
    if taken.moved < enough:
        warnings.warn(
            f"no {field} of {name} moved every concept by {100 * enough:g} % of the way: {chosen:g}"
            f" moved the least one by {100 * taken.moved:.0f} %, and what stays by"
            f" {100 * taken.drift:.1f} % of its norm",
            ExpungeWarning,
            stacklevel=2,
        )
    tuned = {
        "field": field,
        "chosen": chosen,
        "enough": enough,
        "most_drift": most_drift,
        "tries": [dataclasses.asdict(t) for t in tries],
    }
    return Edit(best.changes, dataclasses.replace(best.record, tuned=tuned))


def _list_watched(model: Model, problem: Problem, seed: int) -> list[str]:
    """List the prompts in which what stays is watched: held-out phrasings of names and general words."""
    template = HELD_OUT[problem.erase[0].kind][0]
    words = sample_words(model, problem.erase, WORDS, torch.Generator().manual_seed(seed))
    prompts = [template.format(name) for name in dict.fromkeys([*problem.retain, *words])]
    return [p for p in prompts if model.count_tokens(p) <= model.window] or [""]
