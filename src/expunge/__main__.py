"""The program `expunge`: the command line, answering an interrupt from its first moment on."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """Run the command in `sys.argv` and leave with its exit code."""
    signal.signal(signal.SIGINT, _leave)  # nothing is under way while modules are read
    from expunge.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if sys.stdout is not None:  # it is None where the caller closed it
        sys.stdout.flush()
    if code == 130:
        os._exit(code)  # an orderly exit could fall over modules that were only half imported
    sys.exit(code)


def _leave(_: int, __: FrameType | None) -> None:
    os.write(2, b"expunge: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    run()
