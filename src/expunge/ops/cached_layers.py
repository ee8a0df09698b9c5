"""Cache the outputs of layers that are given the same input at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn


class CachedLayer(nn.Module):
    """A layer that returns its last output, hooks included, while it is given the very same tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.given: Tensor | None = None
        self.output: Tensor | None = None

    def forward(self, given: Tensor) -> Tensor:
        # Identity, not equality: comparing would cost more than some layers do.
        if self.output is None or given is not self.given:
            self.given, self.output = given, self.layer(given)
        return self.output


@contextlib.contextmanager
def cache_outputs(places: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Cache layers' outputs for the length of a block, in which no weight may change.

    While sampling the prompt is constant, so keys and values are computed once per batch.

    Args:
        places: for each layer the module that holds it, and its name there.
    """
    layers = [getattr(parent, name) for parent, name in places]
    try:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = CachedLayer(layer)
        yield
    finally:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = layer
