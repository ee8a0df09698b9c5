"""Gates on the vector of a whole prompt, which some families read beside its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from expunge.changes import Gated, InputChange
from expunge.text import Text


def pad_gates(gated: Gated, inputs: int) -> Gated:
    """Pad gates with zeros, for a layer whose input holds more than the vector: SDXL's sizes.

    Args:
        gated: gates on the vector alone.
        inputs: the width of the layer's input, at least that of the vector.
    """
    more = inputs - gated.direction.shape[1]
    # `pad` counts from the last dimension: the rows of `up` are its second pair.
    return dataclasses.replace(
        gated,
        direction=pad(gated.direction, (0, more)),
        up=pad(gated.up, (0, 0, 0, more)),
        down=pad(gated.down, (0, more)),
        toward=pad(gated.toward, (0, more)),
    )


def apply_to_vectors(change: InputChange, vectors: Tensor, inputs: int) -> Tensor:
    """Apply a change to vectors: what a layer is given in their place.

    Args:
        change: before the layer.
        vectors: (n, d).
        inputs: the width of the layer's input, at least d.

    Returns:
        (n, d)
    """
    width = vectors.shape[-1]
    # Zeros stand for what follows the vector: padded gates neither read it nor change it.
    return change.change_input(pad(vectors, (0, inputs - width)))[..., :width]


def apply_gates(changes: Mapping[str, Gated], text: Text) -> Tensor | None:
    """Apply gates to the vectors of a text, where the text has them.

    Args:
        changes: by the layer they stand before. Every family has one such layer; of several the first
            counts.
        text: n rows.
    """
    if text.pooled is None or not changes:
        return text.pooled
    change = next(iter(changes.values()))
    return apply_to_vectors(change, text.pooled, change.direction.shape[1])


def measure_remainder(weight: Tensor, rows: Tensor, neutral: Tensor, gated: Gated | None) -> float:
    """Measure the share of a concept's distance from its anchor that is left, as a layer sees it.

        (Σ ‖W (ẽ − a)‖² / Σ ‖W (e − a)‖²)^½,    1 where nothing is edited, 0 where nothing is left

    Args:
        weight: W, (out, d).
        rows: e, (n, d), vectors of the concept's prompts.
        neutral: a, (n, d), those of the same with the anchor.
        gated: the edit, or None.
    """
    w = weight.double().T
    after = rows if gated is None else gated.change_input(rows)
    left, apart = (((x - neutral).double() @ w).square().sum() for x in (after, rows))
    # Where concept and anchor are one vector nothing can be left: 0, not 0/0.
    return float((left / apart.clamp(min=1e-30)).sqrt())
