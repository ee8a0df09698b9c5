"""Layers that are asked the same thing at every step answer once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn


class Once(nn.Module):
    """A layer that keeps its last answer, hooks included, while it is given the very same tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.given: Tensor | None = None
        self.answer: Tensor | None = None

    def forward(self, given: Tensor) -> Tensor:
        if self.answer is None or given is not self.given:
            self.given, self.answer = given, self.layer(given)
        return self.answer


@contextlib.contextmanager
def cache_outputs(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let some layers answer once for the length of a block in which no weight changes.

    Args:
        places: for each layer the module that holds it, and its name there.
    """
    layers = [getattr(parent, name) for parent, name in places]
    try:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = Once(layer)
        yield
    finally:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = layer
