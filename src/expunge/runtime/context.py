"""The context of a run: its seed, its progress, what it saves for resuming, and its Ray cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expunge.base.quiet import Progress, ignore_progress
from expunge.runtime import ray_backend, store
from expunge.runtime.store import Tensors

CHECKPOINTS = "checkpoints"
"""The folder in the work folder for the state of unfinished work, such as an optimizer's."""


@dataclass(frozen=True)
class RunContext:
    """The context in which a `fit` or an attack runs.

    >>> def double(names):
    ...     return {name: {"x": torch.tensor(2 * int(name))} for name in names}
    >>> RunContext(seed=3).map_cached(double, ["1", "2"])
    {'1': {'x': tensor(2)}, '2': {'x': tensor(4)}}
    """

    seed: int = 0
    """The seed of all random numbers."""
    progress: Progress = ignore_progress
    """Called with what is done, how much of it, and how much there is in all."""
    folder: Path | None = None
    """The work folder, for resuming; None saves nothing."""
    ray: str = ""
    """The address of a Ray cluster; "" runs in this process, "local" starts one on this machine."""
    findings: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """What is worth telling, ready for JSON: a search adds what it found, and its queries."""

    def generator(self, *names: str) -> torch.Generator:
        """Return a CPU generator that is seeded by the run's seed and the names.

        With one for each piece of work, the pieces may be computed in any order.
        """
        # "\0" cannot be part of a name, so ("ab", "c") and ("a", "bc") differ.
        digest = hashlib.sha256("\0".join((str(self.seed), *names)).encode()).digest()
        # Seven bytes: seeds must be below 2**63.
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def map_cached(
        self,
        function: Callable[[Sequence[str]], Mapping[str, Mapping[str, torch.Tensor]]],
        names: Sequence[str],
        *,
        batch_size: int = 1,
        label: str = "",
    ) -> dict[str, Tensors]:
        """Return the tensors of every name, on the CPU, computed or read from the work folder.

        Names go to `function` in batches whose members are fixed, here or on Ray. A finished batch is
        saved at once; a batch that was saved in part is computed again as a whole. So the result is the
        same to the last bit, whatever had been saved and wherever it was computed. It does not depend
        on `batch_size` either if `function` treats each name by itself: random numbers from
        `generator(name)`, no state from one call to the next.

        Args:
            function: computes the tensors of some names. For Ray it is pickled with what it closes
                over; a `RunContext` in there arrives with its seed and nothing else.
            names: what to compute; the work folder tells entries apart by name and label.
            batch_size: how many names are computed in one call.
            label: what is computed, for the progress and the work folder.

        Raises:
            ExpungeError: an entry cannot be written, or the cluster does not answer.
        """
        # Batches are cut before anything is looked up, so that resuming never changes their members.
        names = list(dict.fromkeys(names))
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        place = self.folder / store.make_stem(label) if self.folder else None
        found = store.load_entries(place, names) if place else {}
        missing = [members for members in batches if not found.keys() >= set(members)]
        done = len(names) - sum(map(len, missing))
        self.progress(label, done, len(names))
        for members, computed in self._compute(function, missing):
            for name in members:
                found[name] = computed[name]
                if place:
                    store.save_entry(place, name, computed[name])
            done += len(members)
            self.progress(label, done, len(names))
        return {name: found[name] for name in names}

    def checkpoint(self, label: str) -> Tensors | None:
        """Return what `save_checkpoint` saved last; None if there is nothing, or it is broken."""
        place = self.folder / CHECKPOINTS if self.folder else None
        return store.load_entries(place, [label]).get(label) if place else None

    def save_checkpoint(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Save the state of unfinished work in place of the last one, whole or not at all.

        Without a work folder, nothing is saved.

        Raises:
            ExpungeError: it cannot be written.
        """
        if self.folder:
            store.save_entry(self.folder / CHECKPOINTS, label, store.copy_to_cpu(tensors))

    def _compute(
        self, function: ray_backend.Make, batches: Sequence[Sequence[str]]
    ) -> Iterator[tuple[Sequence[str], dict[str, Tensors]]]:
        """Yield each batch with its tensors, as they are finished."""
        if self.ray and batches:
            yield from ray_backend.spread(function, batches, self.ray)
            return
        for members in batches:
            tensors = function(members)
            yield members, {name: store.copy_to_cpu(tensors[name]) for name in members}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the seed alone: a worker has neither this process's folder nor its terminal."""
        return RunContext, (self.seed,)
