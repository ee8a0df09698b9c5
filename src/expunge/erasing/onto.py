"""Erase onto an edit: what new concepts may be, and what holds while they are solved.

A later erasure is solved on the edited model. Whatever the earlier edit erases is retained then, where
the edit sends it: with W the edited weights, a method's retained term ‖W' e − W e‖² keeps each earlier
concept e at its anchor. So is what the earlier edit retains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from expunge.base.errors import ExpungeError
from expunge.changes import HookedChange
from expunge.edit import Edit
from expunge.problem import Problem, normalize_name


def add_constraints(problem: Problem, edit: Edit) -> Problem:
    """Return the problem to solve on an edited model: the earlier edit's concepts are retained, too.

    Args:
        problem: the new concepts, and what is to be retained with them.
        edit: the earlier edit.

    Raises:
        ExpungeError: the problem contradicts the earlier one, or the edit is not of static weights.
    """
    if any(isinstance(change, HookedChange) for change in edit.changes):
        raise ExpungeError(
            f"the edit ({edit.record.method}) has gates, which are no weights to solve a later erasure"
            " on: make the new edit by itself and merge both"
        )
    check_consistent(problem, edit.record.problem)
    earlier = edit.record.problem
    erased = [name for concept in earlier.erase for name in concept.names]
    return dataclasses.replace(problem, retain=_unique([*problem.retain, *earlier.retain, *erased]))


def check_consistent(problem: Problem, earlier: Problem) -> None:
    """Check that a problem does not ask for what an earlier one rules out.

    Raises:
        ExpungeError: it erases what was retained or is erased already, retains what was erased, or
            turns a concept into one that was erased.
    """
    retained = {normalize_name(text) for text in earlier.retain}
    erased = {normalize_name(name) for concept in earlier.erase for name in concept.names}
    for concept in problem.erase:
        for name in concept.names:
            if normalize_name(name) in retained:
                raise ExpungeError(
                    f"{name!r} cannot be erased onto this edit, which retains it: erase something else,"
                    " or make the edit anew without retaining it"
                )
            if normalize_name(name) in erased:
                raise ExpungeError(f"{name!r} is erased by this edit already")
        if concept.anchor and normalize_name(concept.anchor) in erased:
            raise ExpungeError(
                f"{concept.name!r} cannot become {concept.anchor!r}, which this edit erases: name"
                " another anchor"
            )
    for text in problem.retain:
        if normalize_name(text) in erased:
            raise ExpungeError(f"{text!r} cannot be retained onto this edit, which erases it")


def join_problem(problem: Problem, earlier: Problem) -> Problem:
    """Return the problem that both together solve, the earlier concepts first."""
    retain = _unique([*earlier.retain, *problem.retain])
    return Problem((*earlier.erase, *problem.erase), retain)


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    """Leave out later spellings of the same text."""
    # Read backwards, so that of a text's spellings the first stays, where the last one stood.
    return tuple({normalize_name(text): text for text in reversed(texts)}.values())[::-1]
