"""Progress callbacks, and silence for the libraries underneath."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is in all."""


def ignore_progress(label: str, done: int, total: int) -> None:
    """Do nothing: the progress callback where none is given.

    Args:
        label: what is being done.
        done: how much of it is done.
        total: how much there is in all.
    """


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence the logs, warnings and bars of diffusers, transformers and the hub for a block."""
    import diffusers
    import huggingface_hub
    import transformers

    bars = (diffusers.utils.logging, transformers.utils.logging)
    logs = (*bars, huggingface_hub.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    for log in bars:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()
