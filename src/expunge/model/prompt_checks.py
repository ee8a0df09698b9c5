"""What every family checks of prompts before it encodes them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from expunge.base.errors import ExpungeError, ExpungeWarning


def check_unicode(prompts: Sequence[str]) -> None:
    """Check that every prompt is valid Unicode: a command line passes invalid bytes on as surrogates.

    Raises:
        ExpungeError: one is not.
    """
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            shown = prompt.encode("utf-8", "backslashreplace").decode()
            raise ExpungeError(f"'{shown}' is not text in UTF-8; see what encoding it is in") from None


def warn_truncated(prompt: str, tokens: int, window: int) -> None:
    """Warn that a prompt is longer than the window and will be truncated.

    Args:
        prompt: the prompt.
        tokens: how many tokens it has.
        window: how many the model reads.
    """
    warnings.warn(
        f"{prompt[:40]!r}… has {tokens} tokens; the model reads the first {window}",
        ExpungeWarning,
        stacklevel=3,
    )
