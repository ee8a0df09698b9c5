"""Choose the number of CPU threads, so that work does not wait for cores that others are using.

A parallel loop ends when its slowest thread does. Where another program holds one of two cores, the
thread that wants it waits for its turn, some milliseconds, in every one of the many short loops of
a small network, and the other thread spins meanwhile: two threads are then far slower than one.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

SMALL = 2e9
"""FLOPs of one forward pass below which a denoiser's loops are too short to share."""

MEASURE = 0.25
"""Seconds for which the load is measured at first."""

REMEASURE = 2.0
"""Seconds after which the load is measured again."""

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which the user has chosen the number of threads."""


@dataclass(frozen=True)
class Ticks:
    """CPU time since the machine started, in seconds."""

    at: float
    """When it was read, by the monotonic clock, in seconds."""
    busy: float
    """CPU time of all processes, on all cores."""
    ours: float
    """CPU time of this process."""


def count_cores() -> float:
    """Return how many cores this process may use, by its affinity and its control group's quota."""
    try:
        allowed = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # no such thing on macOS and Windows
        allowed = float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()[:2]
        return min(allowed, max(1.0, int(quota) / int(period)))
    except (OSError, ValueError):
        return allowed


def read_ticks() -> Ticks | None:
    """Read the CPU time used so far; None where the system does not report it."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()
        # user, nice, system, idle, iowait, irq, softirq, steal
        numbers = [int(word) for word in line[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    busy = sum(numbers) - numbers[3] - numbers[4]
    return Ticks(time.monotonic(), busy / hertz, time.process_time())


def count_busy_cores(before: Ticks, after: Ticks) -> float:
    """Return how many cores other processes used between two readings, on average."""
    passed = max(after.at - before.at, 1e-3)
    return max(0.0, (after.busy - before.busy) - (after.ours - before.ours)) / passed


def choose_threads(most: int, free: float) -> int:
    """Return how many of `most` threads to use where `free` cores are idle: one at the least.

    >>> choose_threads(2, 1.9), choose_threads(2, 1.2), choose_threads(8, 0.1)
    (2, 1, 1)
    """
    return max(1, min(most, math.floor(free + 0.25)))


@dataclass
class Threads:
    """Set PyTorch's number of threads for a `with` block, and restore it at the end.

    Args:
        small: whether the network's loops are too short to share; one thread is then fastest.
    """

    small: bool = False
    most: int = field(default=0, init=False)
    """The number of threads that PyTorch had."""
    seen: Ticks | None = field(default=None, init=False)
    """The last reading of the load; None where it is not measured."""

    def __enter__(self) -> Threads:
        self.most = torch.get_num_threads()
        if self.most == 1 or any(os.environ.get(name) for name in CHOSEN_BY_USER):
            self.most = 1  # nothing to choose
            return self
        if self.small:
            torch.set_num_threads(1)
            return self
        before = read_ticks()
        if before is not None:
            time.sleep(MEASURE)
            self.seen = before
            self._choose()
        return self

    def __exit__(self, *_: object) -> None:
        if self.most > 1:
            torch.set_num_threads(self.most)

    def adjust(self) -> None:
        """Choose again if the last reading is old; call it from the thread that computes."""
        if self.seen is not None and time.monotonic() - self.seen.at >= REMEASURE:
            self._choose()

    def _choose(self) -> None:
        before, now = self.seen, read_ticks()
        if before is None or now is None:
            return
        self.seen = now
        chosen = choose_threads(self.most, count_cores() - count_busy_cores(before, now))
        if chosen != torch.get_num_threads():
            torch.set_num_threads(chosen)
