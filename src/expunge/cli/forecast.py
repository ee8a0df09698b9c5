"""`expunge forecast`: what an erasure would move besides its concepts, before anything is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from expunge.base import registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.shipped import DEFAULT_MODEL
from expunge.checkpoints import loading
from expunge.cli import concept_files
from expunge.cli.known_names import match_names, read_names
from expunge.cli.loading_options import LoadingOptions
from expunge.cli.spelling import announce_anchors, warn_unknown_words
from expunge.cli.terminal import show_progress

if TYPE_CHECKING:
    from expunge.evaluation.forecast import Forecast
    from expunge.problem import Problem

SHOWN = 12
"""Names of each role that are printed."""

ROLES = {
    "retained": "to be retained",
    "neighbour": "known to this model's suites",
    "word": "other words",
}
"""Each role in words."""


@dataclass(frozen=True)
class ForecastOptions:
    """Forecast how far other names would move with an erasure; nothing is changed or written."""

    concept: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="NAME[=ANCHOR]", help_behavior_hint="")
    ] = ()
    """A concept and what it becomes, as for erase."""
    concepts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file of concepts, as for erase."""
    kind: str = "object"
    """The kind of concepts that name none: object, identity, style or explicit."""
    retain: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="PROMPT", help_behavior_hint="")
    ] = ()
    """A prompt whose images must stay as they are."""
    method: str = "uce"
    """What would erase; for one that trains, the closed form of uce is solved in its place."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A named set of the method's options."""
    words: int = 300
    """How many of the tokenizer's words to ask, the most frequent first."""
    model: str = DEFAULT_MODEL
    """A shipped model, a diffusers folder, a single .safetensors file, or a hub id."""
    seed: int = 0
    """The seed of all random numbers."""
    loading: LoadingOptions = dataclasses.field(default_factory=LoadingOptions)


def run_forecast(options: ForecastOptions) -> None:
    """Run `expunge forecast`."""
    problem = concept_files.read_problem(options.concept, options.concepts, options.kind, options.retain)
    if options.method not in (known := registry.list_names("methods")):
        raise UnknownNameError("method", options.method, known)
    if options.words < 0:
        raise ExpungeError(f"words must be at least 0, not {options.words}")
    source = loading.find_source(options.model, options.loading.variant)
    problem = match_names(problem, read_names(loading.read_settings(source)))
    from expunge.evaluation.forecast import forecast

    cls = registry.get("methods", options.method)
    method = cls() if options.preset is None else cls.preset(options.preset)
    if options.loading.dry_run:
        options.loading.print_estimate(options.model, lambda steps: method.estimate_cost(problem, steps))
        return
    model = options.loading.load(options.model, method.estimate_cost(problem, 1))
    warn_unknown_words(model, problem)
    announce_anchors(model, problem)
    with show_progress() as progress:
        found = forecast(
            model,
            problem,
            method,
            neighbours=list_neighbours(model.name, problem),
            words=options.words,
            seed=options.seed,
            progress=progress,
        )
    print(describe(found, options.method))


def list_neighbours(model: str, problem: Problem) -> list[str]:
    """List what the suites of a model ask for: each concept, and of erased ones every synonym.

    Args:
        model: the model's name.
        problem: what is erased.
    """
    from expunge.evaluation.suite import Suite

    suites = [Suite.read(name) for name in registry.list_names("suites")]
    own = [suite for suite in suites if suite.model == model]
    erased = [suite.find_concept(name) for suite in own for c in problem.erase for name in c.names]
    synonyms = [word for concept in erased if concept for word in concept.synonyms]
    return list(dict.fromkeys([*synonyms, *(c.words for suite in own for c in suite.concepts)]))


def describe(found: Forecast, method: str) -> str:
    """Return a forecast as text: for each role the names that move furthest.

    Args:
        found: the forecast.
        method: the method that was asked for.
    """
    lines = ["How far names move where text enters, in per cent of the erased names' own move:"]
    if not found.exact:
        lines.append(f"({method} trains: this is the closed form of {found.method} in its place)")
    for role, title in ROLES.items():
        moves = found.of(role)
        if moves:
            lines += ["", f"{title}, the furthest first"]
            lines += [f"  {100 * move.share:5.1f}  {move.name}" for move in moves[:SHOWN]]
            if len(moves) > SHOWN:
                lines.append(f"         and {len(moves) - SHOWN} more that move less")
    return "\n".join(lines)
