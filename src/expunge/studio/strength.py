"""The strengths that the page offers: none of an edit at 0, as it was made at 1, more of it above."""

from __future__ import annotations

from expunge.base.errors import ExpungeError

STRONGEST = 2.0
"""Beyond that, images fall apart, and nobody learns anything."""


def check_strength(strength: float) -> None:
    """Check that a strength is one that the page offers.

    Raises:
        ExpungeError: it is not in 0 to `STRONGEST`.
    """
    if not 0 <= strength <= STRONGEST:
        raise ExpungeError(f"the strength must be 0 to {STRONGEST:g}, not {strength:g}")
