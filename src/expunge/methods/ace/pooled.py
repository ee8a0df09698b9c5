"""ACE on the vector of a whole prompt, where a model reads one beside the tokens."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

from expunge.base.errors import ExpungeWarning, join_names
from expunge.changes import Gated
from expunge.erasing import pooled_gates
from expunge.erasing.gate_backgrounds import GateBackgrounds
from expunge.erasing.gate_tokens import GateTokens
from expunge.methods.ace.closed_form import solve_gates
from expunge.methods.ace.settings import ACESettings
from expunge.model import Model

REMAINDER = 0.3
"""The share of a concept that may be left in the vector of a whole prompt without a word."""


def gate_vectors(
    settings: ACESettings,
    model: Model,
    vectors: Mapping[str, GateTokens],
    backgrounds: Mapping[str, GateBackgrounds],
) -> dict[str, Gated]:
    """Solve for the gates on vectors of whole prompts, and warn of what they leave of a concept.

    Args:
        settings: how gates are fitted, and whether vectors are edited at all.
        model: whose layers read the vectors.
        vectors: of each concept's prompts.
        backgrounds: what each concept's gates stay closed on.

    Returns:
        The change of each layer that reads the vector, by the layer's name.
    """
    changes: dict[str, Gated] = {}
    for entry in model.pooled_entries() if vectors else ():
        weight = model.weight(entry.layer)
        groups, left = {}, {}
        for name, group in vectors.items():
            ground = backgrounds[name].vectors
            if ground is None:
                raise TypeError("a background of vectors is expected where a concept has vectors")
            # A vector that lies in what is retained stays as it is.
            # Measured on retained prompts alone: general ones may hold the concept's name.
            apart = ground.reach(ground.direction(group.rows), ground.retained) <= settings.max_overlap
            if settings.pooled and group.differs and apart:
                groups[name] = [group]
        width = next(iter(vectors.values())).rows.shape[1]
        narrow: Gated | None = None
        if groups:
            found = {name: g for name in groups if (g := backgrounds[name].vectors) is not None}
            # A vector is one token before one layer: there are no phrases or layers to tell apart.
            plain = dataclasses.replace(
                settings, stages=("gate",), reduction="shared", gate_on="end", directions="concept"
            )
            # What the layer is given behind the vector, such as SDXL's sizes, is no part of the concept.
            (made,) = solve_gates(plain, groups, found, {entry.layer: weight[:, :width]})
            if not isinstance(made, Gated):
                raise TypeError(f"a Gated change is expected, not a {type(made).__name__}")
            narrow = made
            changes[entry.layer] = pooled_gates.pad_gates(made, weight.shape[1])
        for name, group in vectors.items():
            if group.differs:
                left[name] = pooled_gates.measure_remainder(
                    weight[:, :width], group.rows, group.neutral, narrow
                )
        warned = [
            f"{100 * share:.0f} % of what parts {name!r} from its anchor"
            for name, share in left.items()
            if share > REMAINDER
        ]
        if warned:
            warnings.warn(
                f"the vector of the whole prompt keeps {join_names(warned, 3)}",
                ExpungeWarning,
                stacklevel=4,
            )
    return changes
