"""The program `expunge`: the command line, answering an interrupt from its first moment on."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn, TextIO


class Output:
    """Standard output or error: a reader that has left stops no work, and a full disk is remembered.

    What is printed is news of the work, so the work goes on without it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """Why not all was written, unless nobody reads it any more."""

    def write(self, text: str) -> int:
        """Write, as long as someone reads."""
        with self._watched():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        with self._watched():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _watched(self) -> Any:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = self.error or error
            # What is left in the buffer, and what follows, goes nowhere, and Python ends in peace.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


RESTARTED = "EXPUNGE_RESTARTED"
"""Set where Python was started once more, so that it is once at most."""

TWO = ("-X", "-W")
"""Python's options that take a word."""


def run() -> NoReturn:
    """Run the command in `sys.argv` and leave with its exit code."""
    signal.signal(signal.SIGINT, _leave)  # nothing is under way while modules are read
    _restart_if_needed()
    speak_in_any_locale()
    out, err = _outputs()
    from expunge.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    out.flush()
    if out.error is not None:
        err.write(f"expunge: cannot write the output: {out.error.strerror or out.error}\n")
        code = code or 2
    err.flush()
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


def _outputs() -> tuple[Output, Output]:
    """Put standard output and error behind an `Output` each, though they were closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except (
            OSError
        ):  # else the next file that is opened would get the number, and all that is printed
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, Output(getattr(sys, name)))
    out: Any = sys.stdout
    err: Any = sys.stderr
    return out, err


def _leave(_: int, __: FrameType | None) -> None:
    os.write(2, b"expunge: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    run()
