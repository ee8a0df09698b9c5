"""The strength of changes: how much of the way from before to after is gone."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError


def check_strength(strength: float) -> float:
    """Return a strength as a float.

    Args:
        strength: 0 changes nothing, 1 is the change as it was made, 2 goes twice as far.

    Raises:
        ExpungeError: it is no number, negative, or not finite.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise ExpungeError(f"strength must be a number, 0 or more, not {strength!r}")
    try:
        number = float(strength)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not 0 <= number < math.inf:
        raise ExpungeError(f"strength must be 0 (nothing changes) or more, not {number:g}")
    return number


def scale_difference(before: Tensor, after: Tensor, strength: float) -> Tensor:
    """Return before + strength · (after − before), in the dtype of `before`.

    Args:
        before: what was there, of any shape.
        after: what the change makes of it, of the same shape.
        strength: how much of the difference counts.
    """
    # At least float32: half precision would round the difference before it is added.
    wide = torch.promote_types(before.dtype, torch.float32)
    base = before.to(wide)
    return (base + strength * (after.to(wide) - base)).to(before.dtype)
