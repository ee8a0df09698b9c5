"""How a piece of work is run: its seed, where its progress goes, what is kept, how it is spread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.base.quiet import Progress, ignore_progress
from expunge.runtime import ray_backend, store
from expunge.runtime.store import Tensors

CHECKPOINTS = "checkpoints"
"""The folder in the work folder for the state of unfinished work."""


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a `fit` or an attack.

    >>> def double(names):
    ...     return {name: {"x": torch.tensor(2 * int(name))} for name in names}
    >>> Run(seed=3).pieces(double, ["1", "2"])
    {'1': {'x': tensor(2)}, '2': {'x': tensor(4)}}
    """

    seed: int = 0
    """The one number all random choices follow from."""
    progress: Progress = ignore_progress
    """Told what is done."""
    folder: Path | None = None
    """Where finished pieces are kept; None keeps nothing."""
    ray: str = ""
    """The address of a Ray cluster; "" works here, "local" starts a cluster on this machine."""

    def generator(self, *names: str) -> torch.Generator:
        """A generator of its own for each name, so that pieces can run in any order."""
        digest = hashlib.sha256("\0".join((str(self.seed), *names)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def map_cached(
        self,
        function: Callable[[Sequence[str]], Mapping[str, Mapping[str, torch.Tensor]]],
        names: Sequence[str],
        *,
        batch_size: int = 1,
        label: str = "",
    ) -> dict[str, Tensors]:
        """The tensors of every name, on the CPU, made by `function` or read from the work folder.

        Names go to `function` in batches of fixed members, here or on Ray, and a finished batch is
        kept at once; one that was not kept whole is made again whole. So the result is the same
        to the last bit whatever had been kept and wherever it was made. It does not depend on
        `batch` either if `function` makes of a name the same in any company: random numbers
        from `generator(name)`, nothing carried from one call to the next.

        Args:
            function: makes the tensors of some names. On Ray it is pickled with what it closes
                over; a `Run` in there has its seed and nothing else.
            names: what to make; the work folder tells pieces apart by name and label.
            batch_size: how many names at a time.
            label: what is made, for the progress.

        Raises:
            ExpungeError: a piece cannot be written, or the cluster does not answer.
        """
        names = list(dict.fromkeys(names))
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        place = self.folder / store.make_stem(label) if self.folder else None
        found = store.load_entries(place, names) if place else {}
        missing = [members for members in batches if not found.keys() >= set(members)]
        done = len(names) - sum(map(len, missing))
        self.progress(label, done, len(names))
        for members, made in self._made(function, missing):
            for name in members:
                found[name] = made[name]
                if place:
                    store.save_entry(place, name, made[name])
            done += len(members)
            self.progress(label, done, len(names))
        return {name: found[name] for name in names}

    def checkpoint(self, label: str) -> Tensors | None:
        """What `save_checkpoint` kept last; None if that is nothing, or broken."""
        place = self.folder / CHECKPOINTS if self.folder else None
        return store.load_entries(place, [label]).get(label) if place else None

    def save_checkpoint(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of unfinished work, in the place of the one before; it is there whole or not
        at all. Without a work folder, nothing is kept.

        Raises:
            ExpungeError: it cannot be written.
        """
        if self.folder:
            store.save_entry(self.folder / CHECKPOINTS, label, store.copy_to_cpu(tensors))

    def _made(
        self, function: ray_backend.Make, batches: Sequence[Sequence[str]]
    ) -> Iterator[tuple[Sequence[str], dict[str, Tensors]]]:
        """Each batch and what was made of it, as they are finished."""
        if self.ray and batches:
            yield from ray_backend.spread(function, batches, self.ray)
            return
        for members in batches:
            made = function(members)
            yield members, {name: store.copy_to_cpu(made[name]) for name in members}

    def __reduce__(self) -> tuple[Any, ...]:
        """Where a run is sent, its progress, folder and cluster stay behind."""
        return RunContext, (self.seed,)
