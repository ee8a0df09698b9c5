"""The folder in which a long command keeps what it has finished, until its output is saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError
from expunge.base.files import make_slug, replacing

try:
    import fcntl
except ImportError:  # Windows has none, and two equal commands are not told apart there
    fcntl = None  # type: ignore[assignment]

COMMAND = "command.json"
"""The file that says whose folder it is."""

LOCK = ".lock"
"""The file that a command holds locked while it works in the folder; a killed one lets it go."""

OR = "or choose another output"


def find_work_dir(output: str | Path) -> Path:
    """The work folder of a command that writes `output`: beside it, and called after it.

    >>> find_work_dir("edits/no-airplane.safetensors").name
    'no-airplane.safetensors.work'
    """
    output = Path(output)
    name = f"{output.name}.work"
    try:
        longest = os.pathconf(output.parent, "PC_NAME_MAX")
    except (OSError, AttributeError, ValueError):
        longest = 255
    if len(os.fsencode(name)) > longest:
        digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]
        name = f"{make_slug(output.name, 40)}-{digest}.work"
    return output.with_name(name)


@contextlib.contextmanager
def open_work_dir(folder: str | Path | None, command: Mapping[str, Any]) -> Iterator[Path | None]:
    """The work folder of a command, for the length of a block; found again by the same command.

    It is left behind if anything was kept in it.

    Args:
        folder: where it is, or None for no folder.
        command: what the command does, ready for JSON; two commands are one if these are equal.

    Raises:
        ExpungeError: the folder belongs to another command, one is at work in it at this moment, or it
            cannot be made.
    """
    if folder is None:
        yield None
        return
    folder = Path(folder)
    with _locked(folder) as free:
        if not free:
            raise ExpungeError(f"another expunge is at work in {folder}; wait for it, {OR}")
        _claim(folder, json.loads(json.dumps(command)))
        try:
            yield folder
        finally:
            if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
                _remove(folder)


def remove(folder: str | Path) -> None:
    """Take a work folder away, if it is there and is one, and no other command is at work in it."""
    if (Path(folder) / COMMAND).is_file():
        with _locked(Path(folder)) as free:
            if free:
                _remove(Path(folder))


def _remove(folder: Path) -> None:
    if (folder / COMMAND).is_file():
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder locked for the length of a block; False where another command holds it.

    Raises:
        ExpungeError: the folder cannot be made or written.
    """
    lock = folder / LOCK
    handle = None
    try:
        while handle is None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # another command has just taken the folder away
            free = _lock(handle)
            # Who had it before may have taken the folder away: then this locks nothing.
            if free and not _same(handle, lock):
                os.close(handle)
                handle = None
    except FileExistsError:
        raise ExpungeError(
            f"{folder} is in the way and no work folder of expunge's; move it, {OR}"
        ) from None
    except OSError as error:
        raise ExpungeError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield free
    finally:
        if free and not (folder / COMMAND).is_file():
            with contextlib.suppress(OSError):  # someone else's folder, or none at all
                lock.unlink()
                folder.rmdir()
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file; False where another command has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        return True
    return True


def _same(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


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
