"""Weight changes of a model on the disk: grouped by parameter, and applied to its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Changes, LowRank, Right, WeightChange
from expunge.ops.rounding import RoundingCost, round_stochastically

Place = tuple[str, str]
"""A layer and one of its parameters: ("unet.conv_in", "bias")."""


def require_weights(changes: Changes) -> Sequence[WeightChange]:
    """Narrow changes to those that are static weights.

    Raises:
        ExpungeError: one of them depends on the layer's input.
    """
    found = [change for change in changes if isinstance(change, WeightChange)]
    if len(found) < len(changes):
        kinds = {change.kind for change in changes if not isinstance(change, WeightChange)}
        raise ExpungeError(
            f"{' and '.join(sorted(kinds))} changes are no weights: export the edit, which fits weights"
            " to them"
        )
    return found


def group_by_place(changes: Sequence[WeightChange]) -> dict[Place, list[WeightChange]]:
    """Group changes by the parameter they change, keeping their order."""
    found: dict[Place, list[WeightChange]] = {}
    for change in changes:
        for layer in change.layers:
            found.setdefault((layer, change.parameter), []).append(change)
    return found


def make_updates(
    changes: Mapping[Place, Sequence[WeightChange]], seed: str = "", cost: RoundingCost | None = None
) -> dict[Place, Callable[[Tensor], Tensor]]:
    """Make for each parameter the function that turns its tensor into the changed one, in its own dtype.

    Args:
        changes: the changes of each parameter, in order.
        seed: determines, with the parameter's name, the random rounding to eight bits.
        cost: adds up what rounding does to the changes.
    """

    def update(original: Tensor, place: Place, some: Sequence[WeightChange]) -> Tensor:
        # Eight-bit floats know no arithmetic, and sixteen bits would round after every change.
        wide = torch.float32 if original.dtype.itemsize == 1 else original.dtype
        value = original.to(torch.promote_types(wide, torch.float32))
        for change in some:
            value = change.weight(value)
        # Random numbers of each parameter's own, so that its bytes do not depend on the order of files.
        digest = hashlib.sha256(f"{seed}.{place[0]}.{place[1]}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        written = round_stochastically(value, original.dtype, draw)
        # Rounding to float32 is far below what any change does.
        if cost is not None and original.dtype.itemsize < 4:
            cost.add(original, value, written)
        return written

    return {place: partial(update, place=place, some=some) for place, some in changes.items()}


def compose_linear(changes: Sequence[WeightChange], inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compose linear changes into one: W becomes W R + B D.

    Args:
        changes: `Right` and `LowRank` changes of one weight, in order.
        inputs: the number of the layer's inputs.

    Returns:
        R, (inputs, inputs), B, (out, n), and D, (n, inputs), float64; B and D are empty without
        `LowRank` changes.
    """
    matrices = [change.matrix.double() for change in changes if isinstance(change, Right)]
    right = matrices[0] if matrices else torch.eye(inputs, dtype=torch.float64)
    for matrix in matrices[1:]:
        # (W R) R': what acts later stands on the right.
        right = right @ matrix
    return right, *compose_low_rank(changes, inputs)


def compose_low_rank(changes: Sequence[WeightChange], inputs: int) -> tuple[Tensor, Tensor]:
    """Compose B and D of `compose_linear` alone.

    Args:
        changes: `Right` and `LowRank` changes of one weight, in order.
        inputs: the number of the layer's inputs.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    for change in changes:
        if isinstance(change, Right):
            # (W + B D) M = W M + B (D M): a later factor acts on what was added before it.
            downs = [down @ change.matrix.double() for down in downs]
        elif isinstance(change, LowRank):
            ups.append(change.up.double())
            downs.append(change.down.double())
    if not ups:
        return torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, inputs, dtype=torch.float64)
    return torch.cat(ups, 1), torch.cat(downs)
