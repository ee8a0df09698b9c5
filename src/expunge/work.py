"""The folder in which a long command keeps what it has finished, until its output is saved."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError
from expunge.files import replacing

COMMAND = "command.json"
"""The file that says whose folder it is."""

OR = "or choose another output"


@contextlib.contextmanager
def opened(folder: str | Path | None, command: Mapping[str, Any]) -> Iterator[Path | None]:
    """The work folder of a command, for the length of a block; found again by the same command.

    It is left behind if anything was kept in it.

    Args:
        folder: where it is, or None for no folder.
        command: what the command does, ready for JSON; two commands are one if these are equal.

    Raises:
        ExpungeError: the folder belongs to another command, or cannot be made.
    """
    if folder is None:
        yield None
        return
    folder = Path(folder)
    _claim(folder, json.loads(json.dumps(command)))
    try:
        yield folder
    finally:
        if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
            discard(folder)


def discard(folder: str | Path) -> None:
    """Take a work folder away, if it is there and is one."""
    if (Path(folder) / COMMAND).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path, command: Mapping[str, Any]) -> None:
    """Make the folder this command's, or see that it is."""
    file = folder / COMMAND
    if not file.is_file():
        # A command that was killed before it had signed its folder leaves at most a hidden file.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ExpungeError(f"{folder} is in the way and no work folder of expunge's; move it, {OR}")
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(command, ensure_ascii=False, indent=1), "utf8")
        return
    try:
        other = json.loads(file.read_text("utf8"))
        differing = [key for key in command if other.get(key) != command[key]]
    except (OSError, ValueError, AttributeError):
        raise ExpungeError(
            f"the work folder {folder} has no legible {COMMAND}; delete it, {OR}"
        ) from None
    if differing:
        raise ExpungeError(
            f"the work folder {folder} was made by another command (other {' and '.join(differing)});"
            f" delete it, {OR}"
        )
