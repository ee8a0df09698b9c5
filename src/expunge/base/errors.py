"""User-facing errors and warnings. Each message says what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class ExpungeError(ValueError):
    """An error that the user can correct; its message is one sentence."""


class ExpungeWarning(UserWarning):
    """A warning: the call works, but perhaps not as the user expects."""


def join_names(names: Sequence[str], most: int) -> str:
    """Return the first `most` names, separated by commas, and how many more there are.

    >>> join_names(["cat", "dog", "ship"], 3), join_names(["cat", "dog", "ship"], 1)
    ('cat, dog, ship', 'cat and 2 more')
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def find_nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the known name spelled most like one, best one with its letters in another order.

    >>> find_nearest("hrose", ["house", "horse"]), find_nearest("x", ["house"])
    ('horse', '')

    Args:
        name: the name that was given.
        known: the names to choose from.
        cutoff: the least similarity, from 0 to 1, as `difflib` measures it.

    Returns:
        The nearest name; "" where none is similar enough.
    """
    found = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=5, cutoff=cutoff)
    # Swapped letters are the commonest slip, which the similarity alone ranks too low.
    swapped = [one for one in found if sorted(one) == sorted(name)]
    return next(iter([*swapped, *found]), "")


class UnknownNameError(ExpungeError):
    """A name that does not exist; its message gives the nearest one that does, or all of them.

    >>> str(UnknownNameError("method", "ucee", ["uce", "mace"]))
    "there is no method 'ucee'; did you mean 'uce'?"

    Args:
        kind: what is named: "method".
        name: the name that was given.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.arguments: tuple[str, str, tuple[str, ...]] = kind, name, tuple(sorted(known))
        known = self.arguments[2]
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"there is no {kind} {name!r}; {hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments, as Ray does on the way back from a worker."""
        return UnknownNameError, self.arguments
