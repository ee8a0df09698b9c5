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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expunge import fields, registry
from expunge.errors import ExpungeError, unknown
from expunge.files import read_toml
<<<<<<< HEAD
from expunge.problem import key
from expunge.sampling import scheduler_name
=======
>>>>>>> parent of 5511a34 (Read prompts, images and names to the letter; show names whole)

FORMAT = 1
"""The version of the file's layout."""
ROLES = ("erased", "synonyms", "retained", "content", "plain")
Question = Literal["best", "there", "probability"]


@dataclass(frozen=True)
class SuiteConcept:
    """A concept of a suite, and how its pictures are known."""

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
    """How many pictures to draw."""

    erased: int = fields.bounded(20, at_least=1)
    """For each erased concept, over all its prompts."""
    erased_in_all: int = fields.bounded(0, at_least=0)
    """For all erased concepts together at the least: fewer concepts get more pictures each."""
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
    """A file with the column `prompt`, and perhaps `evaluation_seed` and `evaluation_guidance`."""
    dataset: str = ""
    """A data set on the Hub, "owner/name"."""
    split: str = "train"
    prompt_column: str = "prompt"
    seed_column: str = "evaluation_seed"
    guidance_column: str = "evaluation_guidance"

    def __post_init__(self) -> None:
        fields.check(self)
        if sum(map(bool, (self.texts, self.csv, self.dataset))) != 1:
            raise ExpungeError("a list of prompts has texts, a csv or a dataset: just one of them")

    def rows(self, folder: Path) -> list[tuple[str, int | None, float | None]]:
        """The prompts, each with its seed and guidance where it brings them.

        Raises:
            ExpungeError: the file or the package is missing, or holds no prompts.
        """
        if self.texts:
            return [(text, None, None) for text in self.texts]
        table = self._file(folder) if self.csv else self._dataset()
        rows = []
        for number, row in enumerate(table, 1):
            prompt = row.get(self.prompt_column)
            if prompt is None:
                raise ExpungeError(
                    f"{self.csv or self.dataset} has no column {self.prompt_column!r};"
                    f" it has {', '.join(map(str, row))}"
                )
            try:
                seed, guidance = row.get(self.seed_column), row.get(self.guidance_column)
                rows.append(
                    (
                        str(prompt),
                        None if seed in (None, "") else int(float(seed)),
                        None if guidance in (None, "") else float(guidance),
                    )
                )
            except (TypeError, ValueError):
                raise ExpungeError(
                    f"{self.csv or self.dataset}, row {number}: seed {seed!r} or guidance {guidance!r}"
                    " is not a number"
                ) from None
        if not rows:
            raise ExpungeError(f"{self.csv or self.dataset} holds no prompts")
        return rows

    def _file(self, folder: Path) -> list[dict[str, Any]]:
        """The rows of the CSV, looked for here and then beside the suite."""
        paths = [Path(self.csv), folder / self.csv]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ExpungeError(
                f"cannot read the prompts {path}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def _dataset(self) -> list[dict[str, Any]]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ExpungeError(
                f"the prompts {self.dataset} are a data set of the Hub: pip install datasets"
            ) from None
        try:
            return list(load_dataset(self.dataset, split=self.split))
        except Exception as error:  # the library raises what it likes
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExpungeError(f"cannot load the data set {self.dataset}: {said}") from error


@dataclass(frozen=True)
class Ask:
    """One question to a picture: is this concept in it?"""

    role: str
    concept: str
    labels: tuple[str, ...]
    near: tuple[str, ...] = ()
    item: str = ""
    """The words it stands for: what the original does not draw is left out by these."""


@dataclass(frozen=True)
class Cell:
    """A prompt, its seeds, and what is asked of its pictures."""

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
    """The metric that answers what a picture shows."""
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
    """Every prompt's pictures have this seed and those after it."""
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
        for key in plain:
            if key not in known:
                raise unknown("key", key, known)
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
            told = {concept.name: concept for concept in said}
            concepts, more = (
                tuple(_known_as(concept, told.get(concept.name)) for concept in group)
                for group in (concepts, more)
            )
        bare = dict.fromkeys((*settings.erase, *settings.retain))
        named = {concept.name for concept in concepts}
        concepts += tuple(SuiteConcept(text) for text in bare if text not in named)
        lists = table.get("prompts", [])
        if not isinstance(lists, list):
            raise ExpungeError("prompts is a list of tables: write [[prompts]]")
        sizes = {"quick": Size(), "full": Size()} | {
            key: fields.build(Size, _is_table(value, f"sizes.{key}"))
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
            prompts=tuple(fields.build(Prompts, _is_table(one, "prompts")) for one in lists),
            sizes=sizes,
            options=options,
            attacks=attacks,
            folder=folder,
        )
        suite._check()
        return suite

    def _check(self) -> None:
        names = [concept.name for concept in self.concepts]
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
                if name not in names:
                    raise unknown("concept", name, names)
        for one in self.prompts:
            if one.concept and one.concept not in names:
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
        wanted = _key(name)
        return next((c for c in self.concepts if wanted in map(_key, c.names)), None)

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
        kept = (concept for concept in self.concepts if concept.name in names)
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
            if one.role in ("retained", "plain") or one.concept in {c.name for c in gone}:
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

    def _filled(self, role: str, concept: SuiteConcept, words: str, pictures: int) -> Iterator[Cell]:
        """The cells of one concept under one name."""
        templates = self.templates.get(role) or self.templates.get("erased", ())
        for prompt, other, n in self._spread(templates, words, pictures):
            asks = [Ask(role, concept.name, concept.labels, concept.near, words)]
            if other is not None:
                asks.append(Ask(self.others_role, other.name, other.labels, other.near, other.words))
            stand_in = self.stand_in if role in ("erased", "synonyms") else ""
            yield Cell(role, concept.name, prompt, self._seeds(n), tuple(asks), None, stand_in)

    def _spread(
        self, templates: Sequence[str], words: str, pictures: int
    ) -> Iterator[tuple[str, SuiteConcept | None, int]]:
        """Pictures spread evenly over all prompts: (prompt, the other in it, how many)."""
        filled: list[tuple[str, SuiteConcept | None]] = []
        for template in templates:
            for other in self.others if "{other}" in template else (None,):
                text = template.replace("{other}", other.words) if other else template
                filled.append((text.replace("{}", words), other))
        if len(filled) > pictures:
            filled = [filled[i * len(filled) // pictures] for i in range(pictures)]
        for i, (prompt, other) in enumerate(filled):
            yield prompt, other, pictures // len(filled) + (i < pictures % len(filled))

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
            item = prompt if len(seeds) > 1 else one.concept  # one picture says little of its prompt
            asks = (Ask(one.role, concept.name, concept.labels, concept.near, item),) if concept else ()
            yield Cell(one.role, one.concept, prompt, seeds, asks, guidance)


def _key(name: str) -> str:
    return " ".join(name.casefold().split())


def _is_table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ExpungeError(f"{name} must be a table, not {value!r}")
    return value


def _concepts(table: Any, name: str) -> tuple[SuiteConcept, ...]:
    """The concepts of a table such as `"cat" = { near = ["cat face"] }`."""
    return tuple(
        fields.build(SuiteConcept, {"name": key, **_is_table(value, f"{name}.{key}")})
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
