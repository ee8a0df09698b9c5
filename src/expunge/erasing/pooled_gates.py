"""Gates on the vector of a whole prompt, which some families read beside its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from expunge.changes import Gated, InputChange
from expunge.text import Text


def widened(gated: Gated, inputs: int) -> Gated:
    """Gates for a layer that is given something else behind the vector: SDXL's sizes.

    Args:
        gated: gates on the vector alone.
        inputs: the width of the layer's input, at least that of the vector.
    """
    more = inputs - gated.direction.shape[1]
    return dataclasses.replace(
        gated,
        direction=pad(gated.direction, (0, more)),
        up=pad(gated.up, (0, 0, 0, more)),
        down=pad(gated.down, (0, more)),
        toward=pad(gated.toward, (0, more)),
    )


def through(change: InputChange, vectors: Tensor, inputs: int) -> Tensor:
    """What a layer that is so wide is given in the place of vectors (n, d): (n, d)."""
    width = vectors.shape[-1]
    return change.change_input(pad(vectors, (0, inputs - width)))[..., :width]


def given(changes: Mapping[str, Gated], text: Text) -> Tensor | None:
    """The vectors of a text behind the gates that stand before the layers which read them.

    Args:
        changes: by layer. Every family has one such layer; the first of several counts.
        text: n rows.
    """
    if text.pooled is None or not changes:
        return text.pooled
    change = next(iter(changes.values()))
    return through(change, text.pooled, change.direction.shape[1])


def remainder(weight: Tensor, rows: Tensor, neutral: Tensor, gated: Gated | None) -> float:
    """How much of what parts a concept from its anchor is left: a share, as a layer sees it.

        (Σ ‖W (ẽ − a)‖² / Σ ‖W (e − a)‖²)^½,    1 where nothing is edited, 0 where nothing is left

    Args:
        weight: W, (out, d).
        rows: e, (n, d), vectors of the concept's prompts.
        neutral: a, (n, d), those of the same with the anchor.
        gated: the edit; None for none.
    """
    w = weight.double().T
    after = rows if gated is None else gated.change_input(rows)
    left, apart = (((x - neutral).double() @ w).square().sum() for x in (after, rows))
    return float((left / apart.clamp(min=1e-30)).sqrt())
