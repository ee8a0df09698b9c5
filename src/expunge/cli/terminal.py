"""What the command line shows: tables, progress bars, warnings, and how it answers Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from expunge.base.errors import ExpungeWarning

if TYPE_CHECKING:
    from expunge.base.quiet import Progress
    from expunge.checkpoints.pace import Pace

WIDE = 100_000
"""Columns of an output that is not a terminal, so that rich neither cuts nor wraps a line there."""


def make_console(*, stderr: bool = False) -> Console:
    """Return a rich console that prints text literally: no [markup] and no :emoji: names."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def make_plain_table(*columns: str) -> Table:
    """Return a table without borders; without `columns`, a two-column list of names and texts."""
    if columns:
        return Table(*columns, box=None, pad_edge=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def print_table(shown: Table | str) -> None:
    """Print a table or a text; in a pipe, without the spaces that fill up the last column."""
    console = make_console()
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as captured:
        console.print(shown)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextlib.contextmanager
def show_progress(pace: Pace | None = None) -> Iterator[Progress]:
    """Show progress bars on a terminal, or an occasional line where stderr is not one.

    Resumed work is announced once: how much of it an earlier command had finished.

    Args:
        pace: the clock of the whole command; with it, the remaining time of all steps is shown, too.

    Yields:
        The callback that the work reports its progress to.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:

        def print_line(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        if pace is None:
            yield make_line_progress(print_line)
            return
        from expunge.checkpoints.pace import make_printer

        pace.listeners.append(make_printer(pace, print_line))
        yield _make_resume_notice()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}
        if pace is not None:
            from expunge.checkpoints.pace import format_duration

            whole = bars.add_task("in all", total=1.0)
            pace.listeners.append(
                lambda left, done: bars.update(
                    whole, completed=done, description=f"about {format_duration(left)} left in all"
                )
            )

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
                _print_resumed(label, done, total)
            bars.update(tasks[label], completed=done, total=total)

        yield update


def make_line_progress(
    say: Callable[[str], None], every: float = 30.0, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Return a progress callback that writes lines: per cent done, and the time left.

    Args:
        say: writes one line.
        every: the least number of seconds between two lines.
        clock: returns the time in seconds.
    """
    starts: dict[str, tuple[float, int]] = {}
    last_line = clock()

    def update(label: str, done: int, total: int) -> None:
        nonlocal last_line
        now = clock()
        if label not in starts:
            starts[label] = now, done
            _print_resumed(label, done, total)
        start, before = starts[label]
        if now - last_line < every or done <= before or done >= total:
            return
        # Only what this command did counts: resumed work took no time now.
        last_line, rest = now, (now - start) * (total - done) / (done - before)
        left = f"{rest / 60:.0f} min" if rest >= 90 else f"{rest:.0f} s"
        say(f"{label}: {100 * done // total} % done, about {left} left")

    return update


def _make_resume_notice() -> Progress:
    """Return a progress callback that only announces resumed work."""
    seen: set[str] = set()

    def update(label: str, done: int, total: int) -> None:
        if label not in seen:
            seen.add(label)
            _print_resumed(label, done, total)

    return update


def _print_resumed(label: str, done: int, total: int) -> None:
    if done:
        print(f"{label}: {done} of {total} were finished before")


@contextlib.contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on Ctrl-C, and yield the list of signals received so far.

    The list tells an interrupt apart where a library turned the KeyboardInterrupt into another error.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        while frame:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                # Raised during an import, it could end in a library's own code and abort the process.
                os.write(2, b"expunge: interrupted\n")
                os._exit(130)
            if frame.f_code.co_name == "__del__":
                # Raised in a finaliser, it would be printed and ignored: once more a moment later.
                again = threading.Timer(0.05, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    # Python allows signal handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def show_warnings(console: Console) -> Iterator[None]:
    """Print every ExpungeWarning as one line, and hide the warnings of other libraries."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, ExpungeWarning):
            console.print(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ExpungeWarning)
        warnings.showwarning = show
        yield
