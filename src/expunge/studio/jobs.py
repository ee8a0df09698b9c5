"""Long work, one piece at a time: who comes first is served first, and everyone sees their place."""

from __future__ import annotations

import errno
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from expunge.base.errors import ExpungeError, ExpungeWarning

log: logging.Logger = logging.getLogger(__name__)

WAITING, WORKING, DONE, FAILED, CANCELLED = "waiting", "working", "done", "failed", "cancelled"


class CancelledError(Exception):
    """Raised inside a job whose owner has called it off."""


@dataclass(eq=False)
class Job:
    """A piece of work, and how far it is."""

    owner: str
    """The session it belongs to."""
    label: str
    """What it does, as a page says it: "Erasing"."""
    work: Callable[[Job], Any]
    """Does it; calls `tell` now and then, and is called off there."""
    state: str = WAITING
    step: str = ""
    """What it is doing right now."""
    share: float = 0.0
    """How much is done, 0 to 1."""
    left: float | None = None
    """Seconds until the end, where that is known."""
    result: Any = None
    error: str = ""
    """Why it failed, in a sentence."""
    notes: list[str] = field(default_factory=list)
    """Warnings, a sentence each."""
    clock: Callable[[], float] = time.monotonic
    _cancel: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _since: tuple[str, float, int] = ("", 0.0, 0)

    @property
    def active(self) -> bool:
        """Whether it waits or works."""
        return self.state in (WAITING, WORKING)

    def cancel(self) -> None:
        """Call it off: a waiting job never starts, a working one ends at its next `tell`."""
        self._cancel.set()

    def check(self) -> None:
        """Go on, or stop here if the job was called off.

        Raises:
            CancelledError: it was.
        """
        if self._cancel.is_set():
            raise CancelledError

    def progress(self, label: str, done: int, total: int) -> None:
        """What methods, drawings and suites tell of (`expunge.base.quiet.Progress`).

        Args:
            label: what is being done.
            done: units that are done.
            total: units there will be.

        Raises:
            CancelledError: the job was called off.
        """
        self.check()
        now = self.clock()
        if self._since[0] != label:
            self._since = label, now, done
        _, start, before = self._since
        self.step, self.share = label, done / total if total else 1.0
        steady = done > before and now - start > 0.5
        self.left = (now - start) * (total - done) / (done - before) if steady else None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False if it has not within `timeout` seconds."""
        return self._ended.wait(timeout)

    def run(self) -> None:
        """Do the work here and now; errors become a sentence."""
        self.state = WORKING
        try:
            self.check()
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", ExpungeWarning)
                try:
                    self.result = self.work(self)
                finally:
                    said = [str(w.message) for w in heard if issubclass(w.category, ExpungeWarning)]
                    self.notes.extend(dict.fromkeys(said))
            self.state, self.share, self.left = DONE, 1.0, 0.0
        except CancelledError:
            self.state = CANCELLED
        except Exception as error:
            self.error, self.state = sentence(error), FAILED
        finally:
            self._ended.set()


def sentence(error: Exception) -> str:
    """What went wrong, in a sentence; what nobody foresaw is logged whole."""
    if isinstance(error, ExpungeError):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "The memory of this machine is not enough for this; nothing was changed."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: make room, and try again; nothing that was finished is lost."
    if isinstance(error, OSError) and error.filename is not None:
        return f"Cannot use {error.filename}: {error.strerror}."
    log.error("unexpected error in the studio", exc_info=error)
    return (
        f"Something went wrong that nobody foresaw ({type(error).__name__}). What you had is as it was;"
        " the details stand in the terminal that the studio runs in."
    )


class Desk:
    """Takes jobs from many sessions and does one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._news = threading.Condition()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue.

        Raises:
            ExpungeError: its owner has another one there.
        """
        with self._news:
            if other := self.of(job.owner):
                raise ExpungeError(
                    f"{other.label.lower()} is still under way here: wait for it, or cancel it"
                )
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="studio", daemon=True)
                self._thread.start()
            self._news.notify()
        return job

    def of(self, owner: str) -> Job | None:
        """The job that a session has waiting or at work."""
        mine = (job for job in (self._current, *self._waiting) if job and job.owner == owner)
        return next((job for job in mine if job.active), None)

    def place(self, job: Job) -> int:
        """How many jobs come before this one; 0 for one at work."""
        with self._news:
            if job not in self._waiting:
                return 0
            busy = self._current is not None and self._current.active
            return list(self._waiting).index(job) + busy

    def cancel(self, job: Job) -> None:
        """Call a job off; one that waits leaves the queue at once."""
        with self._news:
            job.cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                job.run()

    def close(self, timeout: float = 10.0) -> None:
        """Call off all work, and wait for its end: a program that ends in the middle of it is aborted.

        Args:
            timeout: seconds to wait at most.
        """
        with self._news:
            jobs = [*self._waiting, *([self._current] if self._current else [])]
        for job in jobs:
            self.cancel(job)
        for job in jobs:
            job.wait(timeout)

    def _serve(self) -> None:
        while True:
            with self._news:
                self._current = None
                while not self._waiting:
                    self._news.wait()
                self._current = self._waiting.popleft()
            self._current.run()
