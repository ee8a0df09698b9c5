"""Read concepts from a file: `.txt`, `.csv`, `.toml` or `.yaml`.

`.txt`, one a line, as on the command line; what follows the last comma is the kind:

    # a comment starts at the beginning of a line or after a space
    airplane=sky
    cat|kitty=ground
    Washington, D.C.=a city, object
    Van Gogh=art, style

`.csv`, with a header that names some of the columns name, anchor, kind and synonyms, the synonyms
separated by `|`; an empty anchor or kind is left open:

    name,anchor,kind,synonyms
    airplane,sky,,aircraft|jet

`.toml`, with the fields of `Concept`, and what to retain:

    retain = ["bird", "ship"]

    [[concept]]
    name = "airplane"
    anchor = ""

LECO's prompts (`.toml`, `.yaml`) and sliders of ai-toolkit (`.yaml`) are read, too: see `trainer_files`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from expunge.base.errors import ExpungeError, ExpungeWarning, UnknownNameError, join_names
from expunge.base.fields import build
from expunge.base.files import parse_toml
from expunge.cli.trainer_files import is_trainer_file, parse_yaml, read_trainer_file
from expunge.problem import KINDS, Concept, Kind, Problem, normalize_name

YAML = (".yaml", ".yml")
"""The endings of YAML files, in which other trainers say what to erase."""

COLUMNS = ("name", "anchor", "kind", "synonyms")
"""The columns that a `.csv` file may have."""

Located = Iterator[tuple[str, Concept]]
"""Concepts, each with its place in the file: "line 3"."""


def read_problem(named: Sequence[str], file: str | None, kind: str, retain: Sequence[str]) -> Problem:
    """Read the problem that a command's options state.

    Args:
        named: concepts as `Concept.parse` reads them.
        file: a file of further concepts, as `read_concepts` reads it.
        kind: the kind of concepts that name none.
        retain: prompts that must stay.

    Raises:
        ExpungeError: there is no such kind, the file cannot be read, or the problem is not whole.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of concept", kind, KINDS)
    concepts = tuple(Concept.parse(text, cast(Kind, kind)) for text in named)
    in_file, also = read_concepts(file, cast(Kind, kind)) if file else ((), ())
    return Problem(concepts + in_file, (*retain, *also))


def read_concepts(
    path: str | Path, kind: Kind = "object"
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """Read the concepts of a file, and the prompts that it asks to retain.

    Args:
        path: a `.txt`, `.csv`, `.toml` or `.yaml` file in UTF-8.
        kind: the kind of a concept whose line names none.

    Raises:
        ExpungeError: the file cannot be read, a line does not fit, or a concept stands there twice.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*_READERS, *YAML):
        raise ExpungeError(f"concepts are read from a .txt, .csv, .toml or .yaml file, not from {path}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ExpungeError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    data = parse_yaml(path, text) if suffix in YAML else None
    if suffix == ".toml":
        data = _parse_toml(path, text)
    located: Iterable[tuple[str, Concept]]
    if is_trainer_file(data):
        located, retain = _read_trainers(path, data, kind)
    else:
        retain = _read_retain(path, data or {})
        located = _READERS[suffix](path, text, kind)
    concepts = []
    seen: dict[str, str] = {}
    for where, concept in located:
        for name in concept.names:
            if normalize_name(name) in seen:
                raise ExpungeError(
                    f"{path}, {where}: {name!r} was there on {seen[normalize_name(name)]}"
                )
            seen[normalize_name(name)] = where
        concepts.append(concept)
    if not concepts and not retain:
        raise ExpungeError(f"{path} names no concept")
    return tuple(concepts), retain


def _read_trainers(path: Path, data: Any, kind: Kind) -> tuple[Located, tuple[str, ...]]:
    """Read the file of another trainer, and warn of what has no place in a problem."""
    read = read_trainer_file(path, data, kind)
    if read.unmapped:
        left = join_names(list(read.unmapped), 8)
        warnings.warn(
            f"{path} is another trainer's, and this of it was left out: {left}; how to erase"
            " is a matter of the method's own options",
            ExpungeWarning,
            stacklevel=3,
        )
    return iter(read.concepts), tuple(read.retain)


def _read_lines(path: Path, text: str, kind: Kind) -> Located:
    """Read the concepts of a `.txt` file."""
    # Not `splitlines`, to which a separator within a name, such as U+2028, ends a line, too.
    for number, content in enumerate(re.split(r"\r\n?|\n", text), 1):
        where = f"line {number}"
        content = re.sub(r"(^|\s)#.*", "", content).strip()
        if not content:
            continue
        with _name_place(path, where):
            named, comma, own = content.rpartition(",")
            own = own.strip()
            if comma and own not in KINDS:
                problem = UnknownNameError("kind of concept", own, KINDS)
                raise ExpungeError(f"{problem} (what follows the last comma is the kind)")
            concept = Concept.parse(named if comma else content, cast(Kind, own) if comma else kind)
        yield where, concept


def _read_rows(path: Path, text: str, kind: Kind) -> Located:
    """Read the concepts of a `.csv` file."""
    rows = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        try:
            cells = [cell.strip() for cell in next(rows)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ExpungeError(f"{path}, line {rows.line_num}: {error}") from error
        if not any(cells):
            continue
        where = f"line {rows.line_num}"
        with _name_place(path, where):
            if not header:
                header = _check_header(cells)
                continue
            if len(cells) > len(header):
                raise ExpungeError(f"{len(cells)} cells stand under {len(header)} columns")
            row = {column: cell for column, cell in zip(header, cells, strict=False) if cell}
            synonyms = tuple(filter(None, (name.strip() for name in row.pop("synonyms", "").split("|"))))
            concept = build(Concept, {"name": "", "kind": kind, **row, "synonyms": synonyms})
        yield where, concept


def _check_header(columns: list[str]) -> list[str]:
    """Return the columns of a `.csv` file.

    Raises:
        ExpungeError: one is unknown or there twice, or `name` is missing.
    """
    for column in columns:
        if column not in COLUMNS:
            raise UnknownNameError("column", column, COLUMNS)
    if "name" not in columns or len(set(columns)) < len(columns):
        raise ExpungeError(f"the header must name each column once, and one of them name: {columns}")
    return columns


def _read_tables(path: Path, text: str, kind: Kind) -> Located:
    """Read the concepts of a `.toml` file."""
    tables = _check_keys(path, _parse_toml(path, text)).get("concept", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ExpungeError(f"{path}: a concept is a table of its own, under [[concept]]")
    heads = re.finditer(r"^[ \t]*\[\[\s*concept\s*\]\]", text, re.MULTILINE)
    places = [f"line {text.count(chr(10), 0, head.start()) + 1}" for head in heads]
    if len(places) != len(tables):  # the tables are written inline, so lines cannot be told
        places = [f"concept {number}" for number in range(1, len(tables) + 1)]
    for where, table in zip(places, tables, strict=True):
        with _name_place(path, where):
            concept = build(Concept, {"name": "", "kind": kind, **table})
        yield where, concept


def _read_retain(path: Path, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the prompts to retain of a `.toml` file."""
    retain = _check_keys(path, data).get("retain", [])
    if not isinstance(retain, list) or not all(isinstance(prompt, str) for prompt in retain):
        raise ExpungeError(f"{path}: retain must be a list of prompts, not {retain!r}")
    return tuple(retain)


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise ExpungeError(f"{path} is not TOML: {error}") from error


def _check_keys(path: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a `.toml` file holds.

    Raises:
        ExpungeError: it has a key that is not known.
    """
    for name in data:
        if name not in ("concept", "retain"):
            raise ExpungeError(f"{path}: {UnknownNameError('key', name, ('concept', 'retain'))}")
    return data


@contextlib.contextmanager
def _name_place(path: Path, where: str) -> Iterator[None]:
    """Put the file and the line before the message of an error."""
    try:
        yield
    except ExpungeError as error:
        raise ExpungeError(f"{path}, {where}: {error}") from error


_READERS: dict[str, Callable[[Path, str, Kind], Located]] = {
    ".txt": _read_lines,
    ".csv": _read_rows,
    ".toml": _read_tables,
}
