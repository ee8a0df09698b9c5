"""Weights with few bits: a condition under which models are run to save memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from expunge.attack import Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.model import Model
from expunge.runtime.context import RunContext


@dataclass(frozen=True)
class Quantise(Attack):
    """The edited denoiser's weights, rounded to a few levels for each output.

        W'_i = s_i round(W_i / s_i),     s_i = max |W_i| / (2^(bits − 1) − 1)

    W_i are the weights of output i of a linear or convolution layer, with the edit in them. What an edit
    adds as a hook, such as gates, stays as it is. An edit that moves weights by less than a level may
    be rounded away; that asks no attacker.

    Source: symmetric round-to-nearest as in Jacob et al., CVPR 2018, arXiv 1712.05877, with a scale for
    each output.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"bits": [8, 6, 4]}}
    smaller_is_stronger: ClassVar[bool] = True

    bits: int = bounded(8, at_least=2, at_most=16)
    """Bits of a weight, its sign among them."""

    @contextlib.contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        """Round the edited denoiser's weights while images are drawn.

        Args:
            model: the original.
            edit: what is attacked.
            run: not read: rounding leaves nothing to chance.
        """
        with model.using(edit):
            layers = [m for m in model.network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            kept = [(layer.weight, layer.weight.data) for layer in layers]
            try:
                for weight, values in kept:
                    weight.data = round_weights(values, self.bits)
                yield model
            finally:
                # Before the edit is removed: what lies beneath it must come back as it was.
                for weight, values in kept:
                    weight.data = values


def round_weights(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to 2^bits − 1 levels for each output.

    >>> import torch
    >>> round_weights(torch.tensor([[0.1, -0.6, 1.0], [2.0, 0.9, 0.0]]), 2)
    tensor([[ 0., -1.,  1.],
            [ 2.,  0.,  0.]])

    Args:
        weight: (out, …).
        bits: at least 2.
    """
    flat = weight.float().flatten(1)
    # A row of zeros has no scale; any will do.
    scale = (flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
    return (scale * (flat / scale).round()).view_as(weight).to(weight.dtype)
