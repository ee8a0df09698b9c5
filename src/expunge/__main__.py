"""The program `expunge`: start the command line so that Ctrl-C, pipes and any locale work at once."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn, TextIO


class Output:
    """Standard output or error that survives a closed pipe, and remembers a full disk.

    What is printed only reports the work, so the work goes on without it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """Why the output is incomplete; None where the reader merely closed the pipe."""

    def write(self, text: str) -> int:
        """Write text, unless the reader has closed the pipe."""
        with self._catch_write_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        with self._catch_write_errors():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _catch_write_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = self.error or error
            # Discard the rest of the output: else Python fails again when it flushes at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


RESTARTED = "EXPUNGE_RESTARTED"
"""An environment variable set when Python is restarted, so that this happens at most once."""

WITH_VALUE = ("-X", "-W")
"""The options of Python that take a value."""


def run() -> NoReturn:
    """Run the command in `sys.argv` and leave with its exit code."""
    signal.signal(signal.SIGINT, _exit_interrupted)  # no work is under way during the imports
    _restart_if_needed()
    speak_in_any_locale()
    out, err = _wrap_outputs()
    from expunge.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    out.flush()
    if out.error is not None:
        err.write(f"expunge: cannot write the output: {out.error.strerror or out.error}\n")
        code = code or 2
    err.flush()
    if code == 130:
        os._exit(code)  # a regular exit could fail in modules that are imported in part
    sys.exit(code)


def speak_in_any_locale() -> None:
    r"""Escape characters that the locale cannot write, as `\u03bb` for λ, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _restart_if_needed() -> None:
    """Restart Python where it was started in a mode that the command cannot run in.

    In an ASCII locale, prompts and file names with other letters cannot be decoded; Python's UTF-8 mode
    decodes them. Without docstrings (`-OO`), transformers cannot be imported; `-O` alone is fine.
    """
    ascii_only = sys.getfilesystemencoding().lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
    without_docstrings = sys.flags.optimize > 1
    again = os.environ.pop(RESTARTED, "")
    if again or not (ascii_only or without_docstrings) or os.name == "nt":
        return
    environment = {**os.environ, RESTARTED: "1"}
    options = list(sys.orig_argv[1:])
    if ascii_only:
        environment["PYTHONUTF8"] = "1"
    if without_docstrings:
        environment["PYTHONOPTIMIZE"] = "1"
        for place, option in enumerate(options):
            if option in ("-m", "-c") or (
                not option.startswith("-") and options[place - 1] not in WITH_VALUE
            ):
                break
            options[place] = "-O" if set(option[1:]) == {"O"} else option
    os.execve(sys.executable, [sys.executable, *options], environment)


def _wrap_outputs() -> tuple[Output, Output]:
    """Replace standard output and error by an `Output` each, also where they were closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would get this number, and all output with it
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, Output(getattr(sys, name)))
    out: Any = sys.stdout
    err: Any = sys.stderr
    return out, err


def _exit_interrupted(_: int, __: FrameType | None) -> None:
    os.write(2, b"expunge: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    run()
