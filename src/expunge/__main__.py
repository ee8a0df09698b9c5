"""The program `expunge`: the command line, answering an interrupt from its first moment on."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

RESTARTED = "EXPUNGE_RESTARTED"
"""Set where Python was started once more, so that it is once at most."""

TWO = ("-X", "-W")
"""Python's options that take a word."""


def run() -> NoReturn:
    """Run the command in `sys.argv` and leave with its exit code."""
    signal.signal(signal.SIGINT, _leave)  # nothing is under way while modules are read
    _restart_if_needed()
    speak_in_any_locale()
    from expunge.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    sys.stdout.flush()
    if code == 130:
        os._exit(code)  # an orderly exit could fall over modules that were only half imported
    sys.exit(code)


def speak_in_any_locale() -> None:
    """Let what a locale cannot write be spelled, `\\u03bb` for λ, and not end the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _restart_if_needed() -> None:
    """Start Python once more where it was started in a way that the command cannot work in.

    In an ASCII locale, prompts and the names of files in other letters cannot be told from bytes, and
    Python's UTF-8 mode can. Without docstrings (`-OO`), transformers cannot be imported; with assertions
    alone left out (`-O`), it can.
    """
    ascii_alone = sys.getfilesystemencoding().lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
    without_docstrings = sys.flags.optimize > 1
    again = os.environ.pop(RESTARTED, "")
    if again or not (ascii_alone or without_docstrings) or os.name == "nt":
        return
    environment = {**os.environ, RESTARTED: "1"}
    options = list(sys.orig_argv[1:])
    if ascii_alone:
        environment["PYTHONUTF8"] = "1"
    if without_docstrings:
        environment["PYTHONOPTIMIZE"] = "1"
        for place, option in enumerate(options):
            if option in ("-m", "-c") or (not option.startswith("-") and options[place - 1] not in TWO):
                break
            options[place] = "-O" if set(option[1:]) == {"O"} else option
    os.execve(sys.executable, [sys.executable, *options], environment)


def _leave(_: int, __: FrameType | None) -> None:
    os.write(2, b"expunge: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    run()
