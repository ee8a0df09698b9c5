"""Lists of prompts: written out in a suite, a CSV file as the papers share them, or a data set."""

from __future__ import annotations

import csv
import difflib
import io
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from expunge.base import fields, files
from expunge.base.errors import ExpungeError, ExpungeWarning, join_names
from expunge.problem import normalize_name

SEEDS = ("evaluation_seed", "sd_seed", "seed")
"""The columns of seeds that the papers' lists of prompts have."""
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
"""Their columns of guidance scales."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
"""A number as such a list writes it."""


@dataclass(frozen=True)
class PromptList:
    """A list of prompts: written out, a CSV file as the papers share them, or a data set of the Hub."""

    role: Literal["erased", "synonyms", "retained", "plain"] = "erased"
    concept: str = ""
    """The concept they call for; none for captions that are only compared."""
    kind: str = ""
    """What kind of prompts they are, such as "long": results give each kind by itself."""
    texts: tuple[str, ...] = ()
    csv: str = ""
    """A file with the column `prompt`, and perhaps seeds and guidance (`SEEDS`, `GUIDANCE`)."""
    dataset: str = ""
    """A data set on the Hub, "owner/name"."""
    split: str = "train"
    prompt_column: str = "prompt"
    seed_column: str = ""
    """The column of the seeds; by default the first of `SEEDS` that is there."""
    guidance_column: str = ""
    """The column of the guidance scales; by default the first of `GUIDANCE` that is there."""

    def __post_init__(self) -> None:
        fields.check_fields(self)
        if sum(map(bool, (self.texts, self.csv, self.dataset))) != 1:
            raise ExpungeError("a list of prompts has texts, a csv or a dataset: just one of them")
        if not self.prompt_column.strip():
            raise ExpungeError("prompt_column must name the column of the prompts; this one is empty")
        for number, text in enumerate(self.texts, 1):
            if not normalize_name(text):
                raise ExpungeError(f"prompt {number} of a list of texts is empty")

    def read_rows(self, folder: Path) -> list[tuple[str, int | None, float | None]]:
        """Read the prompts, each with its seed and guidance where it brings them.

        Seeds are whole numbers from 0 to below 2**63, read exactly or refused.

        Raises:
            ExpungeError: the file or the package is missing, a named column is not there, a row does
                not fit, or there are no prompts.
        """
        if self.texts:
            return [(text, None, None) for text in self.texts]
        columns, table, source = self._file(folder) if self.csv else self._dataset()
        prompt, seed, guidance = self._columns(columns, source)
        rows: list[tuple[str, int | None, float | None]] = []
        empty = []
        for where, row in table:
            text = row[prompt]
            if text is None or not normalize_name(str(text)):
                if self.csv:
                    raise ExpungeError(f"{source}, {where}: the prompt is empty")
                empty.append(where)
                continue
            try:
                found = None if seed is None else _whole(row[seed])
                scale = None if guidance is None else _scale(row[guidance])
            except ExpungeError as error:
                raise ExpungeError(f"{source}, {where}: {error}") from None
            rows.append((str(text), found, scale))
        if not rows:
            raise ExpungeError(f"{source} holds no prompts")
        if empty:  # nobody can mend a data set of the Hub
            warnings.warn(
                f"{source}: {join_names(empty, 3)} left out, for the prompt is empty",
                ExpungeWarning,
                stacklevel=2,
            )
        return rows

    def _columns(self, columns: Sequence[str], source: str) -> tuple[int, int | None, int | None]:
        """Where prompts, seeds and guidance stand among the columns.

        Raises:
            ExpungeError: a named column, or the prompts', is not there; or one that was not named is
                almost called as a known one.
        """
        plain = [_column(name) for name in columns]

        def place(named: str, known: Sequence[str]) -> int | None:
            for name in (named,) if named else known:
                if name in columns:
                    return columns.index(name)
                if _column(name) in plain:
                    return plain.index(_column(name))
            if named:
                near = difflib.get_close_matches(_column(named), plain, n=1, cutoff=0.6)
                hint = f"; did you mean {columns[plain.index(near[0])]!r}?" if near else ""
                has = join_names([name for name in columns if name], 12)
                raise ExpungeError(f"{source} has no column {named!r}; it has {has}{hint}")
            for name, column in zip(plain, columns, strict=True):
                # Seeds under a misspelt header would be ignored in silence.
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
                near += [one for one in known if sorted(one) == sorted(name)]
                if near:
                    raise ExpungeError(f"{source} has a column {column!r}; did you mean {near[0]!r}?")
            return None

        prompt = place(self.prompt_column, ())
        if prompt is None:
            raise TypeError("a list of prompts needs the name of its column")
        seed, guidance = place(self.seed_column, SEEDS), place(self.guidance_column, GUIDANCE)
        for words, found, field in (
            ({"seed"}, seed, "seed_column"),
            ({"guidance", "cfg"}, guidance, "guidance_column"),
        ):
            for name, column in zip(plain, columns, strict=True):
                if found is None and words & set(name.split("_")):
                    warnings.warn(
                        f"{source}: the column {column!r} is not read; {field} names it if it should be",
                        ExpungeWarning,
                        stacklevel=3,
                    )
        return prompt, seed, guidance

    def _file(self, folder: Path) -> tuple[list[str], list[tuple[str, Sequence[Any]]], str]:
        """Read the CSV: its columns, its rows, each with where it stands, and its path.

        It is looked for here and then beside the suite.
        """
        paths = [Path(self.csv), folder / self.csv]
        path = next((path for path in paths if files.is_file(path)), paths[0])
        try:
            # Spreadsheets write a byte order mark, which would else begin the first column's name.
            with path.open(newline="", encoding="utf-8-sig") as file:
                text = file.read()
        except UnicodeDecodeError:
            raise ExpungeError(f"cannot read the prompts {path}: they are not text in UTF-8") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ExpungeError(f"cannot read the prompts {path}: {why}") from error
        # Strict: by default the reader takes an unclosed quote to the end of the file as one cell.
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        columns: list[str] = []
        rows: list[tuple[str, Sequence[Any]]] = []
        while True:
            line = reader.line_num + 1
            where = f"row {len(rows) + 1} (line {line})" if columns else f"line {line}, the header"
            try:
                cells = [cell.strip() for cell in next(reader)]
            except StopIteration:
                break
            except csv.Error as error:
                why = f"a quote is not closed, or stands within a cell ({error})"
                raise ExpungeError(f"{path}, {where}: {why}") from None
            if not cells or (cells == [""] and len(columns) != 1):
                continue
            if not columns:
                columns = self._header(cells, path)
                continue
            if len(cells) != len(columns):
                more = "; a prompt with commas stands in quotes" if len(cells) > len(columns) else ""
                counted = f"{len(cells)} cell{'s' * (len(cells) > 1)} under {len(columns)} columns"
                raise ExpungeError(f"{path}, {where}: {counted}{more}")
            for cell in cells:
                if self._swallowed(cell, columns):
                    raise ExpungeError(
                        f"{path}, {where}: a quote is not closed: a cell holds further rows"
                    )
            rows.append((where, cells))
        if not columns:
            raise ExpungeError(f"{path} holds no prompts")
        return columns, rows, str(path)

    def _header(self, cells: list[str], path: Path) -> list[str]:
        if len(cells) == 1:
            for sign, name in (("\t", "tabs"), (";", "semicolons"), ("|", "bars")):
                if sign in cells[0]:
                    raise ExpungeError(
                        f"{path} separates its columns by {name}; separate them by commas"
                    )
        named = [_column(cell) for cell in cells if cell]  # an index has no name
        if twice := [name for name, n in Counter(named).items() if n > 1]:
            raise ExpungeError(f"{path} has two columns {twice[0]!r}")
        return cells

    def _swallowed(self, cell: str, columns: list[str]) -> bool:
        """Whether a cell of several lines holds what looks like a row that ends there."""
        lines = cell.splitlines()[:-1] if len(columns) > 1 else []
        numbers = {_column(name) for name in (*SEEDS, *GUIDANCE, self.seed_column, self.guidance_column)}
        places = [i for i, name in enumerate(columns) if name and _column(name) in numbers]
        for line in lines:
            parts = line.split(",")[-len(columns) :]
            if len(parts) == len(columns) and all(
                NUMBER.fullmatch(parts[i].strip()) or not parts[i].strip() for i in places if i
            ):
                return True
        return False

    def _dataset(self) -> tuple[list[str], list[tuple[str, Sequence[Any]]], str]:
        """The same of a data set."""
        try:
            from datasets import load_dataset
        except ImportError:
            raise ExpungeError(
                f"the prompts {self.dataset} are a data set of the Hub: pip install datasets"
            ) from None
        try:
            found = list(load_dataset(self.dataset, split=self.split))
        except Exception as error:  # the library raises what it likes
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExpungeError(f"cannot load the data set {self.dataset}: {said}") from error
        columns = list(dict.fromkeys(str(name) for row in found for name in row))
        rows: list[tuple[str, Sequence[Any]]] = [
            (f"row {n}", [row.get(name) for name in columns]) for n, row in enumerate(found, 1)
        ]
        return columns, rows, self.dataset


def _column(name: str) -> str:
    """What two ways to write the name of a column share."""
    return re.sub(r"[\s_-]+", "_", normalize_name(name))


def _number(value: Any, what: str) -> Decimal | None:
    """The exact number of a cell; None of an empty one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = str(value).strip()
    if isinstance(value, bool) or not NUMBER.fullmatch(text):
        raise ExpungeError(f"the {what} {text!r} is not a number")
    return Decimal(text)


def _whole(value: Any) -> int | None:
    """A seed, exactly as it was written."""
    number = _number(value, "seed")
    if number is None:
        return None
    # A data set may hold seeds as floats, which above 2**53 are no longer those that were meant.
    if isinstance(value, float) and abs(value) > 2**53:
        raise ExpungeError(f"the seed {value!r} was rounded: above 2**53, write seeds as whole numbers")
    if not 0 <= number < 2**63 or number != int(number):
        raise ExpungeError(f"a seed is a whole number from 0 to below 2**63, not {value!r}")
    return int(number)


def _scale(value: Any) -> float | None:
    """A guidance scale."""
    number = _number(value, "guidance")
    if number is None:
        return None
    if not 0 <= float(number) < float("inf"):
        raise ExpungeError(f"guidance is at least 0 and finite, not {value!r}")
    return float(number)
