"""The kinds of change an edit is made of, and how they are applied to a pipeline.

A change belongs to named layers and says what their parameter or their output becomes. A layer's
name is the pipeline's component and the module's path in it: `unet.mid_block.attentions.0.…attn2.to_k`.
A change that is a static weight is applied by exchanging the parameter; one that depends on the
token that a layer receives runs as a forward hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from expunge.changes.applied import Applied, check_fit, require_finite
from expunge.changes.contract import (
    Change,
    HookedChange,
    InputChange,
    OutputChange,
    PredictionChange,
    WeightChange,
)
from expunge.changes.gated import Damped, Gated, TokenGates
from expunge.changes.guided import Guided
from expunge.changes.layers import (
    PARALLEL,
    check_in_use,
    encode_tensor,
    find_layer,
    find_layer_path,
    is_compiled,
    iterate_layers,
    read_base_parameter,
    unwrap,
)
from expunge.changes.projected import Projected
from expunge.changes.strength import check_strength
from expunge.changes.subtracted import Subtracted
from expunge.changes.weights import Dense, LowRank, Right, Sparse

__all__ = [
    "KINDS",
    "PARALLEL",
    "Applied",
    "Change",
    "Changes",
    "Damped",
    "Dense",
    "Gated",
    "Guided",
    "HookedChange",
    "InputChange",
    "LowRank",
    "OutputChange",
    "PredictionChange",
    "Projected",
    "Right",
    "Sparse",
    "Subtracted",
    "TokenGates",
    "WeightChange",
    "build_change",
    "check_fit",
    "check_in_use",
    "check_strength",
    "describe_text_encoders",
    "encode_tensor",
    "find_layer",
    "find_layer_path",
    "find_text_encoders",
    "is_compiled",
    "iterate_layers",
    "read_base_parameter",
    "require_finite",
    "summarize",
    "unwrap",
]

Changes = Sequence[Change]
"""What a method returns: changes, applied in order."""

KINDS: dict[str, type[Change]] = {
    c.kind: c for c in (Right, LowRank, Sparse, Dense, Gated, Damped, Projected, Subtracted, Guided)
}
"""The kinds of change that a file may hold, by the name it has there."""


def build_change(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    """Return the change that `Change.spec` and `Change.tensors` were taken from."""
    plain = {name: value for name, value in spec.items() if name != "kind"}
    # JSON has no tuples, and a change must be hashable.
    return KINDS[spec["kind"]](**{**plain, "layers": tuple(plain["layers"]), **tensors})


def find_text_encoders(changes: Changes) -> tuple[str, ...]:
    """Find the pipeline's text encoders that changes change: ("text_encoder",)."""
    parts = {layer.partition(".")[0] for change in changes for layer in change.layers}
    return tuple(sorted(part for part in parts if part.startswith("text_encoder")))


def describe_text_encoders(changes: Changes) -> str:
    """Say how much of some changes is undone by swapping the text encoder; "" where none is.

    >>> describe_text_encoders([])
    ''
    """
    parts = find_text_encoders(changes)
    if not parts:
        return ""
    whole = all(layer.startswith(parts) for change in changes for layer in change.layers)
    all_of_it, encoder = "all of it" if whole else "a part", "encoder" + "s" * (len(parts) > 1)
    return (
        f"{all_of_it} is in {' and '.join(parts)}, and is undone by swapping the {encoder}: a program"
        " that brings its own draws without it"
    )


def summarize(changes: Changes) -> str:
    """Return in words what kinds there are: "right on 22 layers, low-rank on 4 layers"."""
    counts: Counter[str] = Counter()
    for change in changes:
        counts[change.label] += len(change.layers)
    return ", ".join(f"{kind} on {n} layer{'s' * (n > 1)}" for kind, n in counts.items())
