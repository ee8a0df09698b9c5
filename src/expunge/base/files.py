"""Read and write files safely: written beside and moved into place, checked before they are read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError

PICKLED = "pickled, and reading it could run a stranger's code; convert it to .safetensors first"
"""What a message says of weight files that are not safetensors."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of the small text that Git LFS leaves in place of a file it has not fetched."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends well, and is deleted otherwise.

    A file that was at `path` stays as it was until then. Missing parent folders are created. Of a
    symbolic link, the file it points to is replaced.

    Raises:
        ExpungeError: the folder cannot be created or written, or `path` is a folder.
    """
    path = Path(path)
    temporary = None
    try:
        target = _target(path)
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffix tells libraries the format; a very long one is part of the name, not a format.
        suffix = path.suffix if len(path.suffix) <= 16 else ""
        handle, name = tempfile.mkstemp(prefix=".", suffix=suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are for their owner alone
        temporary.replace(target)
    except OSError as error:
        raise ExpungeError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Check, before the work and not after it, that `path` can be written.

    Raises:
        ExpungeError: it cannot.
    """
    path = Path(path)
    try:
        target = _target(path)
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        with tempfile.NamedTemporaryFile(prefix=".", dir=folder):
            pass
    except OSError as error:
        raise ExpungeError(f"cannot write {path}: {error.strerror or error}") from error


def _target(path: Path) -> Path:
    """Return the path that is written in the end: a symbolic link's target, or the path itself.

    Raises:
        OSError: the links form a loop, or the working directory is gone.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "its symbolic links form a loop")
    return target


def is_file(path: str | Path) -> bool:
    """Whether there is a file of this name.

    Raises:
        ExpungeError: the name is too long, or its folder may not be searched.
    """
    return _is(Path(path).is_file, path)


def is_dir(path: str | Path) -> bool:
    """Whether there is a folder of this name.

    Raises:
        ExpungeError: as `is_file`.
    """
    return _is(Path(path).is_dir, path)


def _is(ask: Callable[[], bool], path: str | Path) -> bool:
    try:
        return ask()
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error


def check_results(folder: str | Path, suites: Iterable[str]) -> None:
    """Check that a folder can take the results of these suites.

    Raises:
        ExpungeError: it holds the results of other suites, or a file that is not a report.
    """
    file = Path(folder) / "results.json"
    if not is_file(file):
        return
    try:
        there = {case["suite"]["name"] for case in parse_json(file.read_text(encoding="utf-8"))["cases"]}
    except (ValueError, KeyError, TypeError):
        raise ExpungeError(f"{file} is not ours to replace; name another folder") from None
    if there != set(suites):
        raise ExpungeError(
            f"{folder} holds results of the suite {', '.join(sorted(there))}; name another folder"
        )


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a safetensors file: names, dtypes, shapes and metadata.

    Raises:
        ExpungeError: the file is missing, is not a safetensors file (but pickled, or a Git LFS pointer),
            or has another length than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if 0 < length <= size - 8 else b""
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    if start == POINTER[:8]:
        check_pointer(path)
    try:
        header = parse_json(text)
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if not all(isinstance(v, str) for v in header.get("__metadata__", {}).values()):
            raise ValueError("its metadata are not text")
    except (ValueError, TypeError, KeyError, AttributeError):
        pickled = start.startswith((b"PK\3\4", b"\x80"))
        why = f" but {PICKLED}" if pickled else ""
        raise ExpungeError(f"{path} is not a whole safetensors file{why}") from None
    if size != 8 + length + end:
        raise ExpungeError(
            f"{path} is not a whole safetensors file: {size:,} bytes where it should have"
            f" {8 + length + end:,}"
        )
    return header


def check_pointer(path: Path) -> None:
    """Check that a file is not a pointer that Git LFS left in its place.

    Raises:
        ExpungeError: it is one, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    if start == POINTER:
        raise ExpungeError(
            f"{path} is a pointer of Git LFS in place of the file: run `git lfs pull` in its folder"
        )


def check_weights(folder: str | Path) -> None:
    """Check that every weight file in a folder and its subfolders is there and complete.

    Only headers and lengths are read. For a diffusers folder that is about to be loaded,
    `variants.check_read` checks only the files that are read.

    Raises:
        ExpungeError: a shard named by an index is missing, a file is cut short, or only pickled ones are
            there.
    """
    folder = Path(folder)
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        try:
            shards = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ExpungeError(f"{index} is not an index of weight files") from None
        for shard in shards:
            if not (index.parent / shard).is_file():
                raise ExpungeError(f"the weight file {index.parent / shard} is missing")
    for file in sorted(folder.rglob("*.safetensors")):
        read_header(file)
    for file in sorted(folder.glob("*/*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            raise ExpungeError(f"{file} is {PICKLED}")


def make_slug(text: str, longest: int = 60) -> str:
    """Return a text's ASCII letters, in lower case, and digits, joined by hyphens, for a file name.

    >>> make_slug("Côte d'Ivoire 🇨🇮")
    'c-te-d-ivoire'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest]


def find_cache_folder() -> Path:
    """Return the cache folder: `EXPUNGE_CACHE`, or `expunge` in the user's cache folder.

    Raises:
        ExpungeError: neither is set, and there is no home folder.
    """
    if chosen := os.environ.get("EXPUNGE_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "expunge"
    try:
        return Path.home() / ".cache" / "expunge"
    except RuntimeError:
        raise ExpungeError(
            "there is no home folder to keep the cache in: set EXPUNGE_CACHE to a folder"
        ) from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML from a file of unknown origin.

    Raises:
        tomllib.TOMLDecodeError: it is not TOML, or nested deeper than Python reads.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deeply") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ExpungeError: it cannot be read, or is not TOML in UTF-8.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExpungeError(f"{path} is not a TOML file: {error}") from None


def format_bytes(n: float) -> str:
    """Return a number of bytes with its unit.

    >>> format_bytes(1234567), format_bytes(2e9), format_bytes(80)
    ('1.2 MB', '2.0 GB', '0.1 kB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n / 1e3:.1f} kB"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a file of unknown origin.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one table.

    Raises:
        ExpungeError: it cannot be read, or holds something else, such as a Git LFS pointer.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        data = None
    if not isinstance(data, dict):
        check_pointer(path)
        raise ExpungeError(f"{path} is not a JSON table")
    return data


def check_space(folder: str | Path, needed: int) -> None:
    """Check that the disk of a folder, which need not exist yet, has `needed` bytes free.

    Raises:
        ExpungeError: it has not.
    """
    folder = Path(folder).absolute()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise ExpungeError(f"cannot write {folder}: {error.strerror or error}") from error
    if free < needed:
        raise ExpungeError(
            f"the disk of {folder} has {format_bytes(free)} free;"
            f" {format_bytes(needed)} are to be written"
        )


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and is deleted otherwise.

    Raises:
        ExpungeError: something is at `path` already, or the folder cannot be created or written.
    """
    path = Path(path)
    temporary = None
    try:
        target = _target(path)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ExpungeError(f"{path} is there already; choose another folder, or move it away")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise ExpungeError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
