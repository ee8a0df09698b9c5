"""The work folder: where a long command saves finished parts, until its output is written."""

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
"""The file that records the command that the folder belongs to."""

LOCK = ".lock"
"""The file that a command keeps locked while it runs; the system unlocks it if the command is killed."""

OR = "or choose another output"


def find_work_dir(output: str | Path) -> Path:
    """Return the work folder of a command that writes `output`: beside it, and named after it.

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
    """Open the work folder of a command for a block; the same command finds it again later.

    It stays there if anything was saved in it.

    Args:
        folder: the folder; None yields None.
        command: what the command does, ready for JSON; two commands are the same if these are equal.

    Raises:
        ExpungeError: the folder belongs to another command, another process uses it, or it cannot be
            created.
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
    """Delete a work folder, if it is one and no other process uses it."""
    if (Path(folder) / COMMAND).is_file():
        with _locked(Path(folder)) as free:
            if free:
                _remove(Path(folder))


def _remove(folder: Path) -> None:
    if (folder / COMMAND).is_file():
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder for a block; yield False where another process has locked it.

    Raises:
        ExpungeError: the folder cannot be created or written.
    """
    lock = folder / LOCK
    handle = None
    try:
        while handle is None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # another process has just deleted the folder
            free = _lock(handle)
            # The process that had the lock may have deleted the folder: then this locks nothing.
            if free and not _is_open_at(handle, lock):
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
            with contextlib.suppress(OSError):  # the folder is in use, or gone
                lock.unlink()
                folder.rmdir()
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file; return False where another process has."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _is_open_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _claim(folder: Path, command: Mapping[str, Any]) -> None:
    """Record a command as the owner of a folder, or check that it is.

    Raises:
        ExpungeError: the folder belongs to another command, or is not a work folder.
    """
    file = folder / COMMAND
    if not file.is_file():
        # A command that was killed before it wrote this file leaves at most a hidden one.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ExpungeError(f"{folder} is in the way and no work folder of expunge's; move it, {OR}")
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(command, ensure_ascii=False, indent=1), "utf-8")
        return
    try:
        other = json.loads(file.read_text(encoding="utf-8"))
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
