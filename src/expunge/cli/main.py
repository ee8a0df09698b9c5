"""The program `expunge`: choose the command, run it, and answer errors with one sentence.

Importing this module imports no torch, which takes seconds: help and checks come first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from expunge import __version__
from expunge.base import registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.cli import draw, erase, evaluate, export_commands, forecast, info, studio_command
from expunge.cli.options import parse_options
from expunge.cli.terminal import catch_interrupts, make_console, show_warnings

USAGE = """\
Erase concepts from text-to-image diffusion models.

usage: expunge COMMAND …

  draw PROMPT       draw images, with or without edits
  forecast          what an erasure would move besides its concepts, in seconds
  erase METHOD      erase concepts; writes an edit
  evaluate EDIT…    judge edits by suites; writes a report
  run EXPERIMENT    erase, judge and report a whole table of methods and concepts
  export EDIT       write an edit as a diffusers folder, a single file, or a LoRA
  merge EDIT…       make one edit of several
  undo MODEL        take the last erasure out of a model that export wrote
  info EDIT|MODEL   what an edit erases, how it was made, whether it fits; what a model has lost
  studio            all of it in the browser, on this machine
  list KIND         methods, models, families, attacks, metrics, suites

  expunge COMMAND --help    shows its options
  expunge --version         shows the version
"""

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "draw": (draw.DrawOptions, draw.run_draw),
    "forecast": (forecast.ForecastOptions, forecast.run_forecast),
    "evaluate": (evaluate.EvaluateOptions, evaluate.run_evaluate),
    "run": (evaluate.RunOptions, evaluate.run_experiment),
    "export": (export_commands.ExportOptions, export_commands.run_export),
    "merge": (export_commands.MergeOptions, export_commands.run_merge),
    "undo": (export_commands.UndoOptions, export_commands.run_undo),
    "studio": (studio_command.StudioOptions, studio_command.run_studio),
    "info": (info.InfoOptions, info.run_info),
    "list": (info.ListOptions, info.run_list),
}
"""The options and the function of every command but `erase`, whose options depend on the method."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its options; by default those of the process.

    Returns:
        The exit code: 0, 2 for bad input, 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = make_console(stderr=True)
    with catch_interrupts() as interrupts, show_warnings(errors):
        try:
            _check_directory()
            _run_command(arguments)
        except (Exception, KeyboardInterrupt) as error:
            # An interrupt during an import may arrive as any other error.
            if interrupts or isinstance(error, KeyboardInterrupt):
                errors.print("expunge: interrupted; no incomplete file was written")
                return 130
            if isinstance(error, ExpungeError):
                errors.print(f"expunge: {error}")
                return 2
            if isinstance(error, OSError) and error.filename is not None:
                errors.print(f"expunge: cannot use {error.filename}: {error.strerror}", markup=False)
                return 2
            raise
        except SystemExit as done:  # from --help
            return int(done.code or 0)
    return 0


def _check_directory() -> None:
    """Check that the working directory exists: without one, importing torch ends the process.

    Raises:
        ExpungeError: it has been deleted.
    """
    try:
        os.getcwd()
    except OSError:
        raise ExpungeError("the working directory is not there any more: go to another one") from None


def _run_command(arguments: list[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        ExpungeError: there is no such command, or it refuses.
    """
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"expunge {__version__}")
    elif command == "erase":
        erase.run_erase(arguments[1:])
    elif command in COMMANDS:
        options, run = COMMANDS[command]
        parsed = parse_options(options, command, arguments[1:])
        with registry.include_suites(getattr(parsed, "include", ())):
            run(parsed)
    else:
        raise UnknownNameError("command", command, [*COMMANDS, "erase"])
