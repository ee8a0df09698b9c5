"""Progress that nobody is told of, and libraries that say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""


def ignore_progress(label: str, done: int, total: int) -> None:
    """The progress of a library: none."""


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence diffusers, transformers and the hub for the length of a block."""
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
