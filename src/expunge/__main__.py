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


def run() -> NoReturn:
    """Run the command in `sys.argv` and leave with its exit code."""
    signal.signal(signal.SIGINT, _leave)  # nothing is under way while modules are read
    out, err = _outputs()
    from expunge.cli import main

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
