"""How a piece of work is run: its seed, where its progress goes, and how it is spread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
"""What a finished piece of work consists of."""

S = TypeVar("S")
T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""


def quiet(label: str, done: int, total: int) -> None:
    """The progress of a library: none."""


@dataclass(frozen=True)
class Run:
    """The surroundings of a `fit` or an attack.

    >>> Run(seed=3).map(str.upper, ["a", "b"])
    ['A', 'B']
    """

    seed: int = 0
    """The one number all random choices follow from."""
    progress: Progress = quiet
    """Told what is done."""

    def generator(self, *names: str) -> torch.Generator:
        """A generator of its own for each name, so that pieces can run in any order."""
        import torch

        digest = hashlib.sha256("\0".join((str(self.seed), *names)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def map(self, function: Callable[[S], T], items: Sequence[S], label: str = "") -> list[T]:
        """`[function(item) for item in items]`, telling progress as it goes."""
        results = []
        for done, item in enumerate(items):
            self.progress(label, done, len(items))
            results.append(function(item))
        self.progress(label, len(items), len(items))
        return results

    def pieces(
        self,
        function: Callable[[Sequence[str]], Mapping[str, Tensors]],
        names: Sequence[str],
        *,
        batch: int = 1,
        label: str = "",
    ) -> dict[str, Tensors]:
        """For every name its tensors, made by `function`, `batch` names at a time."""
        results: dict[str, Tensors] = {}
        for start in range(0, len(names), batch):
            self.progress(label, start, len(names))
            results |= function(names[start : start + batch])
        self.progress(label, len(names), len(names))
        return results
