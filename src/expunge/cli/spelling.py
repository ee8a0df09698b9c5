"""Warn of names that may be misspelt: words that the model's tokenizer has no token for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from expunge.base import registry
from expunge.base.errors import ExpungeWarning, find_nearest, join_names

if TYPE_CHECKING:
    from expunge.model import Model
    from expunge.problem import Problem


def warn_unknown_words(model: Model, problem: Problem, but: Container[str] = ()) -> None:
    """Warn of words in the names to erase that the tokenizer has no token for.

    A retained prompt may name anybody, so its words count only where one of the model's is spelled
    nearly the same.

    Args:
        model: the model.
        problem: what is erased and retained.
        but: names that have been warned of already.
    """
    names = [name for concept in problem.erase for name in concept.names if name not in but]
    names += [
        text for text in problem.retain if any(map(model.find_near_word, model.find_unknown_words(text)))
    ]
    if strange := describe_unknown_words(model, names):
        warnings.warn(
            f"this model's tokenizer has no token for {strange}:"
            " look whether it is spelled as you meant",
            ExpungeWarning,
            stacklevel=1,
        )


def announce_anchors(model: Model, problem: Problem) -> None:
    """Print the anchors that the model chose, and warn of given ones that its tokenizer cannot read."""
    for concept, chosen in zip(problem.erase, problem.with_anchors(model.anchors).erase, strict=True):
        if concept.anchor is None:
            print(f"{chosen.name!r} becomes {chosen.anchor!r}: the anchor of its kind, {chosen.kind}")
        if concept.anchor and (strange := describe_unknown_words(model, [concept.anchor])):
            warnings.warn(
                f"this model's tokenizer has no token for {strange} in the anchor {concept.anchor!r}:"
                f" is it what {concept.name!r} should become?",
                ExpungeWarning,
                stacklevel=1,
            )


def describe_unknown_words(model: Model, names: Sequence[str]) -> str:
    """Return the words of some names that the tokenizer has no token for, each with the nearest known.

    A name that a suite of the model asks for is spelled as it is meant, and is left out.
    """
    if not any(map(model.find_unknown_words, names)):
        return ""
    in_suites = list_suite_names(model.name)
    nearest: dict[str, str] = {}
    for name in names:
        near = find_nearest_name(name, in_suites)
        if near.casefold() == name.casefold():
            continue
        for word in model.find_unknown_words(name):
            nearest.setdefault(word, near or model.find_near_word(word))
    return join_names(
        [repr(word) + f" (near: {near!r})" * bool(near) for word, near in nearest.items()], 3
    )


def find_nearest_name(name: str, names: Sequence[str]) -> str:
    """Return the name spelled most like one, its article left out; "" where none is near."""
    bare = re.sub(r"^(an?|the) ", "", name.casefold())
    known = {one.casefold(): one for one in names}
    return known.get(find_nearest(bare, known, 0.8), "")


def list_suite_names(model: str) -> list[str]:
    """Return the names and synonyms of all concepts in the suites of a model."""
    from expunge.evaluation.suite import Suite

    suites = [Suite.read(name) for name in registry.list_names("suites")]
    concepts = [one for suite in suites if suite.model == model for one in suite.concepts]
    return [name for one in concepts for name in (*one.names, *one.synonyms)]
