"""Compare the names to erase with those that a model knows, where its `expunge.json` lists them.

    "names": {"object": ["airplane", …], "identity": ["Abrel Bolvane", …], "style": […], "explicit": […]}

A name told by one of its words is refused, for it would be several people's; a name of another kind is
given its own kind; a name that nobody has is warned of, with the nearest.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from expunge.base.errors import ExpungeError, ExpungeWarning, find_nearest, join_names
from expunge.problem import KINDS, Concept, Kind, Problem, normalize_name

Names = Mapping[str, Sequence[str]]
"""For each kind the names that a model knows."""

PROPER: tuple[Kind, ...] = ("identity", "style")
"""The kinds of which a name is somebody's own: what nobody has is doubtful."""

SHOWN = 6
"""How many names a message lists."""


def read_names(settings: Mapping[str, Any]) -> Names:
    """Return the names that a model's `expunge.json` lists, by kind; none where it lists none."""
    names = settings.get("names", {})
    return {kind: names[kind] for kind in KINDS if kind in names}


def match_names(problem: Problem, names: Names) -> Problem:
    """Return the problem with every concept of the kind that its name has in the model.

    Warns of each kind that is corrected.

    Raises:
        ExpungeError: a name is one word of several people's or artists' names; they are listed.
    """
    if not names:
        return problem
    kinds: dict[str, list[Kind]] = {}
    for kind, known in names.items():
        for name in known:
            kinds.setdefault(normalize_name(name), []).append(cast(Kind, kind))
    for concept in problem.erase:
        for name in concept.names:
            if normalize_name(name) not in kinds:
                _require_whole(name, names)
    return dataclasses.replace(problem, erase=tuple(_correct(c, kinds) for c in problem.erase))


def find_doubtful(problem: Problem, names: Names) -> dict[str, str]:
    """Return the names to erase that the model does not know, each with the nearest that it knows.

    A name of no person or artist may be any words, so that it counts only where one is near.
    """
    known = [name for some in names.values() for name in some]
    keys = {normalize_name(name): name for name in known}
    found = {}
    for concept in problem.erase if names else ():
        for name in concept.names:
            key = normalize_name(name)
            if key in keys:
                continue
            near = keys.get(find_nearest(key, keys, 0.8), "")
            if near or concept.kind in PROPER:
                found[name] = near
    return found


def warn_doubtful(doubtful: Mapping[str, str]) -> None:
    """Warn of names that the model does not know (`find_doubtful`)."""
    for name, near in doubtful.items():
        hint = f"did you mean {near!r}?" if near else "look whether it is spelled as you meant"
        warnings.warn(f"this model knows no {name!r}: {hint}", ExpungeWarning, stacklevel=1)


def _require_whole(name: str, names: Names) -> None:
    """Check that a name is no single word of names that the model knows.

    Raises:
        ExpungeError: it is.
    """
    word = normalize_name(name)
    meant = [
        one for kind in PROPER for one in names.get(kind, ()) if word in normalize_name(one).split()
    ]
    if len(meant) == 1:
        raise ExpungeError(f"{name!r} is a part of a name: did you mean {meant[0]!r}?")
    if meant:
        raise ExpungeError(
            f"{name!r} is a part of {len(meant)} names, so say which one is meant:"
            f" {join_names(meant, SHOWN)}"
        )


def _correct(concept: Concept, kinds: Mapping[str, Sequence[Kind]]) -> Concept:
    own = kinds.get(normalize_name(concept.name), ())
    if not own or concept.kind in own:
        return concept
    warnings.warn(
        f"{concept.name!r} is of the kind {own[0]} in this model, not {concept.kind}: it is erased as"
        f" {own[0]}",
        ExpungeWarning,
        stacklevel=1,
    )
    return dataclasses.replace(concept, kind=own[0])
