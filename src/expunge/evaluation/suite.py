"""A suite: what to draw, with which seeds, and what should be seen in it. A versioned TOML file.

The file holds concepts. Which of them are erased and which retained follows from what an edit
erases: `Suite.cells` lays out the prompts of each *role*.

    erased      prompts that call for an erased concept: it should not be there
    synonyms    its held-out synonyms, never given to a method: nor should it be there
    retained    prompts of the concepts that stay: they should be there
    content     what else a prompt names when a style is judged: it should be there
    plain       prompts that name nothing: what comes by chance
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, ExpungeWarning, listed, unknown
from expunge.base.files import read_toml
from expunge.problem import key, tidy
from expunge.runtime.schedulers import scheduler_name

FORMAT = 1
"""The version of the file's layout."""
ROLES = ("erased", "synonyms", "retained", "content", "plain")
SEEDS = ("evaluation_seed", "sd_seed", "seed")
"""The columns of seeds that the papers' lists of prompts have."""
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
"""Their columns of guidance scales."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
"""A number as such a list writes it."""
Question = Literal["best", "there", "probability"]


@dataclass(frozen=True)
class SuiteConcept:
    """A concept of a suite, and how its images are known."""

    name: str
    labels: tuple[str, ...] = ()
    """The judge's labels that count as it; by default its name."""
    near: tuple[str, ...] = ()
    """The labels too near to count for or against."""
    synonyms: tuple[str, ...] = ()
    """Held out: a suite's synonyms are given to no method."""
    also: tuple[str, ...] = ()
    """Further names by which an edit may say that it erases this."""
    words: str = ""
    """What a prompt calls it, where that is not its name."""
    retain: tuple[str, ...] = ()
    """What is drawn as retained when this is erased; by default what the suite says."""

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.name.strip():
            raise ExpungeError("a concept of the suite has no name")
        for part in ("name", "words"):
            object.__setattr__(self, part, tidy(getattr(self, part)))
        for part in ("labels", "near", "synonyms", "also", "retain"):
            object.__setattr__(self, part, tuple(map(tidy, getattr(self, part))))
        object.__setattr__(self, "labels", self.labels or (self.name,))
        object.__setattr__(self, "words", self.words or self.name)
        if both := set(self.labels) & set(self.near):
            raise ExpungeError(f"{self.name}: {min(both)!r} cannot count and be too near to count")

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which an edit may mean it."""
        return (self.name, self.words, *self.also)


@dataclass(frozen=True)
class Size:
    """How many images to draw."""

    erased: int = fields.bounded(20, at_least=1)
    """For each erased concept, over all its prompts."""
    erased_in_all: int = fields.bounded(0, at_least=0)
    """For all erased concepts together at the least: fewer concepts get more images each."""
    synonyms: int = fields.bounded(20, at_least=1)
    """For each synonym."""
    retained: int = fields.bounded(20, at_least=1)
    """For each retained concept, over all its prompts."""
    plain: int = fields.bounded(20, at_least=1)
    """For the plain prompts, over all of them."""
    prompts: int = fields.bounded(0, at_least=0)
    """Of each list of prompts at the most so many, evenly taken; 0 is all."""
    each: int = fields.bounded(1, at_least=1)
    """For each prompt of a list that brings no seeds of its own."""

    def __post_init__(self) -> None:
        fields.check(self)


@dataclass(frozen=True)
class Prompts:
    """A list of prompts: written out, a CSV file as the papers share them, or a data set of the Hub."""

    role: Literal["erased", "synonyms", "retained", "plain"] = "erased"
    concept: str = ""
    """The concept they call for; none for captions that are only compared."""
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
        fields.check(self)
        if sum(map(bool, (self.texts, self.csv, self.dataset))) != 1:
            raise ExpungeError("a list of prompts has texts, a csv or a dataset: just one of them")
        for number, text in enumerate(self.texts, 1):
            if not text.strip():
                raise ExpungeError(f"prompt {number} of a list of texts is empty")

    def rows(self, folder: Path) -> list[tuple[str, int | None, float | None]]:
        """The prompts, each with its seed and guidance where it brings them.

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
            if text is None or not str(text).strip():
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
                f"{source}: {listed(empty, 3)} left out, for the prompt is empty",
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
                has = listed([name for name in columns if name], 12)
                raise ExpungeError(f"{source} has no column {named!r}; it has {has}{hint}")
            for name, column in zip(plain, columns, strict=True):
                if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                    raise ExpungeError(f"{source} has a column {column!r}; did you mean {near[0]!r}?")
            return None

        prompt = place(self.prompt_column, ())
        if prompt is None:
            raise TypeError("a list of prompts needs the name of its column")
        return prompt, place(self.seed_column, SEEDS), place(self.guidance_column, GUIDANCE)

    def _file(self, folder: Path) -> tuple[list[str], list[tuple[str, Sequence[Any]]], str]:
        """The columns of the CSV, looked for here and then beside the suite; its rows, each with where
        it stands; and its path."""
        paths = [Path(self.csv), folder / self.csv]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                text = file.read()
        except UnicodeDecodeError:
            raise ExpungeError(f"cannot read the prompts {path}: they are not text in UTF-8") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ExpungeError(f"cannot read the prompts {path}: {why}") from error
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


@dataclass(frozen=True)
class Ask:
    """One question to an image: is this concept in it?"""

    role: str
    concept: str
    labels: tuple[str, ...]
    near: tuple[str, ...] = ()
    item: str = ""
    """The words it stands for: what the original does not draw is left out by these."""


@dataclass(frozen=True)
class Cell:
    """A prompt, its seeds, and what is asked of its images."""

    role: str
    """The role it is shown under."""
    concept: str
    prompt: str
    seeds: tuple[int, ...]
    asks: tuple[Ask, ...]
    guidance: float | None = None
    stand_in: str = ""
    """The prompt whose own tokens take the place of this prompt's: what is left is the residual."""


@dataclass(frozen=True)
class Settings:
    """What a suite's file says in single values."""

    version: int = 0
    """Of the suite: 1 for the first. Results of different versions are not compared."""
    format: int = 1
    """Of the file."""
    score: Literal["H_o", "H_c", "H_style", "H_unsafe", "H_a"] = "H_c"
    """The one number of the suite."""
    model: str = "emoji"
    """The model it is made for; any other can be named when it is run."""
    judge: str = "detector"
    """The metric that answers what an image shows."""
    question: Question = "best"
    """What it is asked: its best label, whether a label is there at all, or a label's probability."""
    metrics: tuple[str, ...] = ()
    """What else is measured."""
    num_inference_steps: int | None = None
    """Denoising steps; by default the model's own."""
    guidance_scale: float | None = None
    """Guidance; by default the model's own."""
    scheduler: str = ""
    """The sampler, by diffusers' class, such as DDIM; by default the model's own."""
    first_seed: int = 0
    """Every prompt's images have this seed and those after it."""
    anchor: str | None = None
    """What erased concepts should become, where methods are compared at one anchor."""
    erase: tuple[str, ...] = ()
    """Concepts that have a name and nothing else to say."""
    retain: tuple[str, ...] = ()
    """The concepts drawn as retained; by default all that are not erased."""
    known_as: str = ""
    """Another suite that says how concepts of the same names are known: their labels, and those too
    near."""
    stand_in: str = ""
    """Erased prompts keep their end and padding tokens alone; their own tokens are this prompt's."""
    notes: str = ""
    """What a reader of its results should know."""

    def __post_init__(self) -> None:
        fields.check(self)
        object.__setattr__(self, "scheduler", scheduler_name(self.scheduler))


@dataclass(frozen=True)
class Suite(Settings):
    """Prompts, seeds, sampler, what counts as what, and what to measure.

    >>> suite = Suite.read("object")                              # doctest: +SKIP
    >>> suite.cells(["airplane"])[0].prompt                       # doctest: +SKIP
    'a photo of the airplane'
    """

    name: str = ""
    concepts: tuple[SuiteConcept, ...] = ()
    others: tuple[SuiteConcept, ...] = ()
    """What takes the place of {other} in a template."""
    others_role: str = "content"
    """What is asked of the others: content or retained."""
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each role its prompts, {} in the place of the concept."""
    prompts: tuple[Prompts, ...] = ()
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """"quick" and "full"."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The fields of metrics, by their names."""
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each attack, "NAME" or "NAME:LADDER", its fields; one is a list, the budgets (`robust`)."""
    folder: Path = Path()
    """Where it was read."""

    def __post_init__(self) -> None:
        """Reading has checked every part."""

    @classmethod
    def read(cls, name: str | Path) -> Suite:
        """Read a suite: one that ships, by its name, or a file.

        Raises:
            ExpungeError: there is none, or something in it is wrong.
        """
        path = Path(name)
        if path.suffix.lower() != ".toml":
            if str(name) not in registry.names("suites"):
                raise unknown("suite", str(name), registry.names("suites"))
            path = registry.HERE / "suites" / f"{name}.toml"
        table = read_toml(path)
        try:
            return cls.from_table(table, path.stem, path.parent)
        except ExpungeError as error:
            raise ExpungeError(f"suite {path.stem}: {error}") from None

    @classmethod
    def from_table(cls, table: Mapping[str, Any], name: str, folder: Path = Path()) -> Suite:
        """A suite from a parsed file.

        Raises:
            ExpungeError: an unknown key, metric or concept; no prompts; a newer format.
        """
        parts = ("concepts", "others", "templates", "prompts", "sizes", "options", "attacks")
        plain = {key: value for key, value in table.items() if key not in parts}
        known = [*Settings.__dataclass_fields__, *parts]
        for word in plain:
            if word not in known:
                raise unknown("key", word, known)
        settings = Settings(**plain)
        if settings.version < 1:
            raise ExpungeError("it needs a version, a whole number from 1")
        if settings.format > FORMAT:
            raise ExpungeError(f"its format is {settings.format}; this expunge reads up to {FORMAT}")
        others = dict(_is_table(table.get("others", {}), "others"))
        role = others.pop("role", "content")
        if role not in ("content", "retained"):
            raise ExpungeError(f"the role of others must be content or retained, not {role!r}")
        concepts = _concepts(table.get("concepts", {}), "concepts")
        more = _concepts(others, "others")
        if settings.known_as:
            other = settings.known_as
            if Path(other).stem == name:
                raise ExpungeError(f"known_as names the suite itself, {other!r}")
            said = cls.read(folder / other if other.lower().endswith(".toml") else other).concepts
            told = {key(concept.name): concept for concept in said}
            concepts, more = (
                tuple(_known_as(concept, told.get(key(concept.name))) for concept in group)
                for group in (concepts, more)
            )
        bare = {key(text): text for text in reversed((*settings.erase, *settings.retain))}
        named = {key(concept.name) for concept in concepts}
        concepts += tuple(SuiteConcept(bare[text]) for text in reversed(bare) if text not in named)
        lists = table.get("prompts", [])
        if not isinstance(lists, list):
            raise ExpungeError("prompts is a list of tables: write [[prompts]]")
        sizes = {"quick": Size(), "full": Size()} | {
            key: fields.build(Size, _is_table(value, f"sizes.{key}"), f"sizes.{key}")
            for key, value in _is_table(table.get("sizes", {}), "sizes").items()
        }
        options = {
            key: _is_table(value, f"options.{key}")
            for key, value in _is_table(table.get("options", {}), "options").items()
        }
        attacks = {
            key: _is_table(value, f"attacks.{key}")
            for key, value in _is_table(table.get("attacks", {}), "attacks").items()
        }
        suite = cls(
            **{key: getattr(settings, key) for key in Settings.__dataclass_fields__},
            name=name,
            concepts=concepts,
            others=more,
            others_role=role,
            templates=_templates(table.get("templates", {})),
            prompts=tuple(
                fields.build(Prompts, _is_table(one, "prompts"), "[[prompts]]") for one in lists
            ),
            sizes=sizes,
            options=options,
            attacks=attacks,
            folder=folder,
        )
        suite._check()
        return suite

    def _check(self) -> None:
        names = [concept.name for concept in self.concepts]
        known = set(map(key, names))
        if len(known) < len(names):
            twice = next(n for n, count in Counter(map(key, names)).items() if count > 1)
            raise ExpungeError(f"the concept {twice!r} is there twice")
        if not names:
            raise ExpungeError("it has no concepts, so there is nothing to erase")
        for size in self.sizes:
            if size not in ("quick", "full"):
                raise unknown("size", size, ("quick", "full"))
        for metric in (self.judge, *self.metrics, *self.options):
            if metric not in registry.names("metrics"):
                raise unknown("metric", metric, registry.names("metrics"))
        for attack in self.attacks:
            if attack.partition(":")[0] not in registry.names("attacks"):
                raise unknown("attack", attack.partition(":")[0], registry.names("attacks"))
        for concept in self.concepts:
            for name in concept.retain:
                if key(name) not in known:
                    raise unknown("concept", name, names)
        for one in self.prompts:
            if one.concept and key(one.concept) not in known:
                raise unknown("concept", one.concept, names)
            if one.role in ("erased", "synonyms") and not one.concept:
                raise ExpungeError(f"a list of {one.role} prompts must say which concept they call for")
        if not self.templates.get("erased") and not any(one.role == "erased" for one in self.prompts):
            raise ExpungeError("it has no prompts that call for what is erased")
        for role, templates in self.templates.items():
            for template in templates:
                if "{other}" in template and not self.others:
                    raise ExpungeError(f"{template!r} asks for others, and the suite has none")
                if role != "plain" and "{}" not in template:
                    raise ExpungeError(f"a template has {{}} for the concept; {template!r} has not")

    def concept(self, name: str) -> SuiteConcept | None:
        """The concept that goes by a name, or None."""
        wanted = key(name)
        return next((c for c in self.concepts if wanted in map(key, c.names)), None)

    def erased(self, names: Sequence[str]) -> tuple[SuiteConcept, ...]:
        """Which of its concepts an edit erases, by the names that it erases.

        Raises:
            ExpungeError: none.
        """
        found = [self.concept(name) for name in names]
        concepts = tuple(dict.fromkeys(concept for concept in found if concept))
        if not concepts:
            shown = ", ".join(c.name for c in self.concepts[:12])
            more = f" and {len(self.concepts) - 12} more" if len(self.concepts) > 12 else ""
            raise ExpungeError(
                f"suite {self.name} knows nothing of {', '.join(map(repr, names))};"
                f" it knows {shown}{more}"
            )
        return concepts

    def retained(self, erased: Sequence[SuiteConcept]) -> tuple[SuiteConcept, ...]:
        """The concepts that should stay when these are erased."""
        names = [name for concept in erased for name in concept.retain]
        if not names:
            names = list(self.retain) or [concept.name for concept in self.concepts]
        gone = {label for concept in erased for label in concept.labels}
        wanted = set(map(key, names))
        kept = (concept for concept in self.concepts if key(concept.name) in wanted)
        return tuple(c for c in kept if c not in erased and not gone & set(c.labels))

    def cells(self, erased: Sequence[str], *, full: bool = False) -> tuple[Cell, ...]:
        """What to draw for an edit that erases these names, and what to ask.

        Raises:
            ExpungeError: it knows none of them, or a file of prompts is missing.
        """
        gone = self.erased(erased)
        size = self.sizes["full" if full else "quick"]
        each = max(size.erased, -(-size.erased_in_all // len(gone)))
        cells: list[Cell] = []
        for concept in gone:
            cells += self._filled("erased", concept, concept.words, each)
            for synonym in concept.synonyms:
                cells += self._filled("synonyms", concept, synonym, size.synonyms)
        for concept in self.retained(gone):
            cells += self._filled("retained", concept, concept.words, size.retained)
        asks = tuple(Ask("plain", c.name, c.labels, c.near, c.words) for c in gone)
        for prompt, _, n in self._spread(self.templates.get("plain", ()), "", size.plain):
            cells.append(Cell("plain", "", prompt, self._seeds(n), asks))
        for one in self.prompts:
            if one.role in ("retained", "plain") or key(one.concept) in {key(c.name) for c in gone}:
                cells += self._listed(one, size)
        return tuple(cells)

    def anchor_cells(
        self, erased: Sequence[str], anchors: Mapping[str, str], *, full: bool = False
    ) -> tuple[Cell, ...]:
        """What to draw of the anchors: the erased concepts' prompts with their anchors named instead.

        Each cell has the seeds of the erased prompts and then as many further ones.

        Args:
            erased: the names that an edit erases.
            anchors: for each name its anchor; the suite's own counts before.
            full: the size.

        Returns:
            nothing where an anchor is not known, or prompts are no templates.
        """
        gone = self.erased(erased)
        size = self.sizes["full" if full else "quick"]
        each = max(size.erased, -(-size.erased_in_all // len(gone)))
        known = {c.name: anchor for name, anchor in anchors.items() if (c := self.concept(name))}
        chosen = [self.anchor if self.anchor is not None else known.get(c.name) for c in gone]
        templates = self.templates.get("erased", ())
        if None in chosen or not templates:
            return ()
        cells = []
        for anchor, concepts in Counter(chosen).items():
            n = each * concepts
            filled = self._spread(templates, anchor, n) if anchor else [("", None, n)]
            cells += [Cell("anchor", "", prompt, self._seeds(2 * n), ()) for prompt, _, n in filled]
        return tuple(cells)

    def _filled(self, role: str, concept: SuiteConcept, words: str, images: int) -> Iterator[Cell]:
        """The cells of one concept under one name."""
        templates = self.templates.get(role) or self.templates.get("erased", ())
        for prompt, other, n in self._spread(templates, words, images):
            asks = [Ask(role, concept.name, concept.labels, concept.near, words)]
            if other is not None:
                asks.append(Ask(self.others_role, other.name, other.labels, other.near, other.words))
            stand_in = self.stand_in if role in ("erased", "synonyms") else ""
            yield Cell(role, concept.name, prompt, self._seeds(n), tuple(asks), None, stand_in)

    def _spread(
        self, templates: Sequence[str], words: str, images: int
    ) -> Iterator[tuple[str, SuiteConcept | None, int]]:
        """Images spread evenly over all prompts: (prompt, the other in it, how many)."""
        filled: list[tuple[str, SuiteConcept | None]] = []
        for template in templates:
            for other in self.others if "{other}" in template else (None,):
                text = template.replace("{other}", other.words) if other else template
                filled.append((text.replace("{}", words), other))
        if len(filled) > images:
            filled = [filled[i * len(filled) // images] for i in range(images)]
        for i, (prompt, other) in enumerate(filled):
            yield prompt, other, images // len(filled) + (i < images % len(filled))

    def _seeds(self, n: int) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + n))

    def _listed(self, one: Prompts, size: Size) -> Iterator[Cell]:
        """The cells of a list of prompts."""
        rows = one.rows(self.folder)
        if size.prompts and len(rows) > size.prompts:
            rows = [rows[i * len(rows) // size.prompts] for i in range(size.prompts)]
        concept = self.concept(one.concept) if one.concept else None
        for prompt, seed, guidance in rows:
            seeds = self._seeds(size.each) if seed is None else (seed,)
            named = concept.name if concept else ""
            item = prompt if len(seeds) > 1 else named  # one image says little of its prompt
            asks = (Ask(one.role, concept.name, concept.labels, concept.near, item),) if concept else ()
            yield Cell(one.role, named, prompt, seeds, asks, guidance)


def _column(name: str) -> str:
    """What two ways to write the name of a column share."""
    return re.sub(r"[\s_-]+", "_", key(name))


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


def _is_table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ExpungeError(f"{name} must be a table, not {value!r}")
    return value


def _concepts(table: Any, name: str) -> tuple[SuiteConcept, ...]:
    """The concepts of a table such as `"cat" = { near = ["cat face"] }`."""
    return tuple(
        fields.build(SuiteConcept, {"name": key, **_is_table(value, f"{name}.{key}")}, f"{name}.{key}")
        for key, value in _is_table(table, name).items()
    )


def _known_as(concept: SuiteConcept, told: SuiteConcept | None) -> SuiteConcept:
    """A concept with another's labels, unless it has its own."""
    if told is None or concept.near or concept.labels != (concept.name,):
        return concept
    return dataclasses.replace(concept, labels=told.labels, near=told.near)


def _templates(table: Any) -> dict[str, tuple[str, ...]]:
    templates = {}
    for role, texts in _is_table(table, "templates").items():
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ExpungeError(f"templates.{role} must be a list of text")
        templates[role] = tuple(texts)
    return templates
