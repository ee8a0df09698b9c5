"""How many threads the CPU's work gets, so that it does not wait for cores that others are using.

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
"""Operations of one prediction of a denoiser below which its loops are too short to share."""

WINDOW = 0.25
"""Seconds that the load is watched for at first."""

AGAIN = 2.0
"""Seconds after which it is looked at again."""

ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Who sets one of these has chosen, and is left alone."""


@dataclass(frozen=True)
class Ticks:
    """Processor time since the machine started, in seconds."""

    at: float
    """When it was read."""
    busy: float
    """What all processes have used, on all cores."""
    ours: float
    """What this process has used."""


def count_cores() -> float:
    """The cores that this process may use: by affinity, and by the quota of its control group."""
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
    """What the processors have done so far; None where the system does not say."""
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
    """How many cores other processes used between two moments, on average."""
    passed = max(after.at - before.at, 1e-3)
    return max(0.0, (after.busy - before.busy) - (after.ours - before.ours)) / passed


def choose_threads(most: int, free: float) -> int:
    """The threads to take of `most`, where so many cores are free: whole ones, one at least.

    >>> share(2, 1.9), choose_threads(2, 1.2), choose_threads(8, 0.1)
    (2, 1, 1)
    """
    return max(1, min(most, math.floor(free + 0.25)))


@dataclass
class Threads:
    """PyTorch's threads while a command works; what was set before comes back at the end.

    Args:
        small: whether the network's loops are too short to share: one thread then.
    """

    small: bool = False
    most: int = field(default=0, init=False)
    """The threads that PyTorch had."""
    seen: Ticks | None = field(default=None, init=False)
    """The load when it was looked at last."""

    def __enter__(self) -> Threads:
        self.most = torch.get_num_threads()
        if self.most == 1 or any(os.environ.get(name) for name in ASKED):
            self.most = 1  # nothing to choose
            return self
        if self.small:
            torch.set_num_threads(1)
            return self
        before = read_ticks()
        if before is not None:
            time.sleep(WINDOW)
            self.seen = before
            self._choose()
        return self

    def __exit__(self, *_: object) -> None:
        if self.most > 1:
            torch.set_num_threads(self.most)

    def look(self) -> None:
        """Choose again if the last look was some time ago; from the thread that computes."""
        if self.seen is not None and time.monotonic() - self.seen.at >= AGAIN:
            self._choose()

    def _choose(self) -> None:
        before, now = self.seen, read_ticks()
        if before is None or now is None:
            return
        self.seen = now
        chosen = choose_threads(self.most, count_cores() - count_busy_cores(before, now))
        if chosen != torch.get_num_threads():
            torch.set_num_threads(chosen)
