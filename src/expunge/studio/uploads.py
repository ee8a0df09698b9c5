"""What comes in from outside: its ending, size and content are checked before anything reads it."""

from __future__ import annotations

from pathlib import Path

from expunge.base import files
from expunge.base.errors import ExpungeError, join_names

LIMITS = {
    ".txt": 1_000_000,
    ".csv": 1_000_000,
    ".toml": 1_000_000,
    ".json": 40_000_000,
    ".safetensors": 1_000_000_000,
}
"""The largest file of each kind that is taken, in bytes."""

LISTS = (".txt", ".csv", ".toml")
"""Lists of concepts."""

OPENED = (".json", ".safetensors")
"""What a session goes on from: its file, or an edit."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


def check(path: str | Path, endings: tuple[str, ...]) -> Path:
    """Check a file that somebody gave.

    Args:
        path: where it lies.
        endings: those that are taken here.

    Raises:
        ExpungeError: it has another ending, is pickled, too large, empty, or not whole.
    """
    path = Path(path)
    ending, name = path.suffix.lower(), path.name
    if ending in PICKLES:
        raise ExpungeError(f"{name} is {files.PICKLED}")
    if ending not in endings:
        raise ExpungeError(
            f"{name} is none of the files that are read here: {join_names(list(endings), 5)}"
        )
    try:
        n = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ExpungeError(f"cannot read {name}: {error.strerror or error}") from None
    if n > LIMITS[ending]:
        most = files.format_bytes(LIMITS[ending])
        raise ExpungeError(f"{name} is {files.format_bytes(n)}; a {ending} file may have {most} here")
    if not n:
        raise ExpungeError(f"{name} is empty")
    # A safetensors file begins with its header's length, whose first byte may be a pickle's too.
    if ending != ".safetensors" and start.startswith((b"PK\3\4", b"\x80")):
        raise ExpungeError(f"{name} is {files.PICKLED}")
    if ending == ".safetensors":
        try:
            files.read_header(path)
        except ExpungeError as error:
            raise ExpungeError(str(error).replace(str(path), name)) from None
    return path
