"""What goes wrong by the caller's hand: one sentence that says what, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ExpungeError(ValueError):
    """Something the caller can put right; its message is one clear sentence."""


class ExpungeWarning(UserWarning):
    """Something that works, but perhaps not as the caller expects."""


def listed(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are.

    >>> listed(["cat", "dog", "ship"], 3), listed(["cat", "dog", "ship"], 1)
    ('cat, dog, ship', 'cat and 2 more')
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The name that is spelled most like one, "" where none is; of several, one that swaps its letters.

    >>> nearest("hrose", ["house", "horse"]), nearest("x", ["house"])
    ('horse', '')
    """
    found = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=5, cutoff=cutoff)
    swapped = [one for one in found if sorted(one) == sorted(name)]
    return next(iter([*swapped, *found]), "")


def unknown(kind: str, name: str, known: Iterable[str]) -> ExpungeError:
    """The error for a name that is not there, with the nearest one that is.

    >>> str(unknown("method", "ucee", ["uce", "mace"]))
    "there is no method 'ucee'; did you mean 'uce'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if near:
        return ExpungeError(f"there is no {kind} {name!r}; did you mean {near[0]!r}?")
    return ExpungeError(f"there is no {kind} {name!r}; known: {', '.join(known) or 'none'}")
