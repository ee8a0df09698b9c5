"""A suite: what to draw, with which seeds, and what should be seen in it. A versioned TOML file.

It holds concepts. What an edit erases says which stay: `Suite.cells` lays out each *role*'s prompts.

    erased      prompts that call for an erased concept: it should not be there
    synonyms    its held-out synonyms, never given to a method: nor should it be there
    retained    prompts of the concepts that stay: they should be there
    content     what else a prompt names when a style is judged: it should be there
    plain       prompts that name nothing: what comes by chance
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, UnknownNameError, find_nearest, join_names
from expunge.base.files import read_toml
from expunge.base.shipped import DEFAULT_MODEL
from expunge.evaluation.cells import ROLES, Cell, Question, Size, SuiteConcept, check_question
from expunge.evaluation.prompt_lists import PromptList
from expunge.problem import normalize_name
from expunge.runtime.schedulers import parse_scheduler

FORMAT = 1
"""The version of the file's layout."""


@dataclass(frozen=True)
class Settings:
    """What a suite's file says in single values."""

    version: int = 0
    """Of the suite: 1 for the first. Results of different versions are not compared."""
    format: int = 1
    """Of the file."""
    score: Literal["H_o", "H_c", "H_style", "H_unsafe", "H_a"] = "H_c"
    """The one number of the suite."""
    model: str = DEFAULT_MODEL
    """The model it is made for; any other can be named when it is run."""
    judge: str = ""
    """The metric that answers what an image shows; by default the model's own, else the detector."""
    question: Question = "top1"
    """What it is asked: its best label, whether a label is present at all, or a label's probability."""
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
    """Another suite that says by which labels concepts of the same names are known."""
    stand_in: str = ""
    """Erased prompts keep their end and padding tokens alone; their own tokens are this prompt's."""
    notes: str = ""
    """What a reader of its results should know."""

    def __post_init__(self) -> None:
        check_question(self.question)
        own = self.model if self.model in registry.list_names("metrics") else "detector"
        object.__setattr__(self, "judge", self.judge or own)
        fields.check_fields(self)
        object.__setattr__(self, "scheduler", parse_scheduler(self.scheduler))


@dataclass(frozen=True)
class Suite(Settings):
    """PromptList, seeds, sampler, what counts as what, and what to measure.

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
    prompts: tuple[PromptList, ...] = ()
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
    def read(cls, name: str | Path, model: str = "") -> Suite:
        """Read a suite: one that ships by its name, `model`'s own before others, or a file.

        Raises:
            ExpungeError: there is none, or something in it is wrong.
        """
        path = Path(name)
        if path.suffix.lower() != ".toml":
            path = registry.find_suite(str(name), model, DEFAULT_MODEL)
        table = read_toml(path)
        try:
            return cls.from_table(table, path.stem, path.parent)
        except ExpungeError as error:
            raise ExpungeError(f"suite {path.stem}: {error}") from None

    @classmethod
    def from_table(cls, table: Mapping[str, Any], name: str, folder: Path = Path()) -> Suite:
        """Make a suite from a parsed file.

        Args:
            table: what the file holds.
            name: the suite's name.
            folder: where its lists of prompts are looked for.

        Raises:
            ExpungeError: an unknown key, metric or concept; no prompts; a newer format.
        """
        parts = ("concepts", "others", "templates", "prompts", "sizes", "options", "attacks")
        plain = {key: value for key, value in table.items() if key not in parts}
        keys = [*Settings.__dataclass_fields__, *parts]
        if unknown := [word for word in plain if word not in keys]:
            raise UnknownNameError("key", unknown[0], keys)
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
            where = folder / other if other.lower().endswith(".toml") else other
            known = cls.read(where, settings.model).concepts
            namesakes = {normalize_name(concept.name): concept for concept in known}
            concepts, more = (
                tuple(_known_as(one, namesakes.get(normalize_name(one.name))) for one in group)
                for group in (concepts, more)
            )
        # Reversed, so that of several spellings the first one stays; turned back below.
        bare = {normalize_name(text): text for text in reversed((*settings.erase, *settings.retain))}
        named = {normalize_name(concept.name) for concept in concepts}
        concepts += tuple(SuiteConcept(bare[text]) for text in reversed(bare) if text not in named)
        lists = table.get("prompts", [])
        if not isinstance(lists, list):
            raise ExpungeError("prompts is a list of tables: write [[prompts]]")
        sizes = {"quick": Size(), "full": Size()} | {
            key: fields.build(Size, _is_table(value, f"sizes.{key}"), f"sizes.{key}")
            for key, value in _is_table(table.get("sizes", {}), "sizes").items()
        }
        options, attacks = (
            {k: _is_table(v, f"{part}.{k}") for k, v in _is_table(table.get(part, {}), part).items()}
            for part in ("options", "attacks")
        )
        suite = cls(
            **{key: getattr(settings, key) for key in Settings.__dataclass_fields__},
            name=name,
            concepts=concepts,
            others=more,
            others_role=role,
            templates=_templates(table.get("templates", {})),
            prompts=tuple(
                fields.build(PromptList, _is_table(one, "prompts"), "[[prompts]]") for one in lists
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
        known = set(map(normalize_name, names))
        if len(known) < len(names):
            twice = next(n for n, count in Counter(map(normalize_name, names)).items() if count > 1)
            raise ExpungeError(f"the concept {twice!r} is there twice")
        if not names:
            raise ExpungeError("it has no concepts, so there is nothing to erase")
        for size in self.sizes:
            if size not in ("quick", "full"):
                raise UnknownNameError("size", size, ("quick", "full"))
        for metric in (self.judge, *self.metrics, *self.options):
            if metric not in registry.list_names("metrics"):
                raise UnknownNameError("metric", metric, registry.list_names("metrics"))
        for attack in self.attacks:
            name = attack.partition(":")[0]  # what follows is one of its ladders
            if name not in registry.list_names("attacks"):
                raise UnknownNameError("attack", name, registry.list_names("attacks"))
        for concept in self.concepts:
            for name in concept.retain:
                if normalize_name(name) not in known:
                    raise UnknownNameError("concept", name, names)
        for one in self.prompts:
            if one.concept and normalize_name(one.concept) not in known:
                raise UnknownNameError("concept", one.concept, names)
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

    def find_concept(self, name: str) -> SuiteConcept | None:
        """Return the concept that goes by a name, or None."""
        wanted = normalize_name(name)
        return next((c for c in self.concepts if wanted in map(normalize_name, c.names)), None)

    def find_erased(self, names: Sequence[str]) -> tuple[SuiteConcept, ...]:
        """Return the suite's concepts that an edit erases, by the names that it erases.

        Raises:
            ExpungeError: none.
        """
        # One table for all names; reversed, so that of two concepts of a name the first one stays.
        known = {normalize_name(name): c for c in reversed(self.concepts) for name in c.names}
        concepts = tuple(dict.fromkeys(c for name in names if (c := known.get(normalize_name(name)))))
        if not concepts:
            own = [concept.name for concept in self.concepts]
            near = find_nearest(names[0], own, 0.7) if names else ""
            asked, hint = ", ".join(map(repr, names)), f"; did you mean {near!r}?" if near else ""
            shown = f"it knows {join_names(own, 12)}{hint}"
            raise ExpungeError(f"suite {self.name} knows nothing of {asked}; {shown}")
        return concepts

    def find_retained(self, erased: Sequence[SuiteConcept]) -> tuple[SuiteConcept, ...]:
        """Return the concepts that should stay when these are erased."""
        names = [name for concept in erased for name in concept.retain]
        if not names:
            names = list(self.retain) or [concept.name for concept in self.concepts]
        # What the judge knows by an erased label cannot be told from the erased, so is not retained.
        gone = {label for concept in erased for label in concept.labels}
        wanted = set(map(normalize_name, names))
        kept = (concept for concept in self.concepts if normalize_name(concept.name) in wanted)
        return tuple(c for c in kept if c not in erased and not gone & set(c.labels))

    def cells(self, erased: Sequence[str], *, full: bool = False) -> tuple[Cell, ...]:
        """Lay out what to draw for an edit that erases these names, and what to look for.

        Args:
            erased: the names that the edit erases.
            full: the papers' number of images instead of the quick one.

        Raises:
            ExpungeError: it knows none of them, or a file of prompts is missing.
        """
        gone = self.find_erased(erased)
        size = self.sizes["full" if full else "quick"]
        each = max(size.erased, -(-size.erased_in_all // len(gone)))
        cells: list[Cell] = []
        for concept in gone:
            cells += self._filled("erased", concept, concept.words, each)
            for synonym in concept.synonyms:
                cells += self._filled("synonyms", concept, synonym, size.synonyms)
        for concept in self.find_retained(gone):
            cells += self._filled("retained", concept, concept.words, size.retained)
        # Asked of every erased concept: prompts that name none tell how often each is seen by chance.
        targets = tuple(c.target("plain", c.words) for c in gone)
        for prompt, _, n in self._spread(self.templates.get("plain", ()), "", size.plain):
            cells.append(Cell("plain", "", prompt, self._seeds(n), targets))
        wanted = {normalize_name(concept.name) for concept in gone}
        for one in self.prompts:
            if one.role in ("retained", "plain") or normalize_name(one.concept) in wanted:
                cells += self._listed(one, size)
        return tuple(cells)

    def anchor_cells(
        self, erased: Sequence[str], anchors: Mapping[str, str], *, full: bool = False
    ) -> tuple[Cell, ...]:
        """Lay out what to draw of the anchors: the erased concepts' prompts with their anchors named.

        Each cell has the seeds of the erased prompts and then as many further ones.

        Args:
            erased: the names that an edit erases.
            anchors: for each name its anchor; the suite's own counts before.
            full: the size.

        Returns:
            nothing where an anchor is not known, or prompts are no templates.
        """
        gone = self.find_erased(erased)
        size = self.sizes["full" if full else "quick"]
        each = max(size.erased, -(-size.erased_in_all // len(gone)))
        known = {c.name: anchor for name, anchor in anchors.items() if (c := self.find_concept(name))}
        chosen = [self.anchor if self.anchor is not None else known.get(c.name) for c in gone]
        templates = self.templates.get("erased", ())
        if None in chosen or not templates:
            return ()
        cells = []
        for anchor, concepts in Counter(chosen).items():
            # Two concepts with one anchor have twice the erased images, and so many must its own be.
            n = each * concepts
            filled = self._spread(templates, anchor, n) if anchor else [("", None, n)]
            cells += [Cell("anchor", "", prompt, self._seeds(2 * n), ()) for prompt, _, n in filled]
        return tuple(cells)

    def _filled(self, role: str, concept: SuiteConcept, words: str, images: int) -> Iterator[Cell]:
        """The cells of one concept under one name."""
        templates = self.templates.get(role) or self.templates.get("erased", ())
        for prompt, other, n in self._spread(templates, words, images):
            targets = [concept.target(role, words)]
            if other is not None:
                targets.append(other.target(self.others_role, other.words))
            stand_in = self.stand_in if role in ("erased", "synonyms") else ""
            yield Cell(role, concept.name, prompt, self._seeds(n), tuple(targets), None, stand_in)

    def _spread(
        self, templates: Sequence[str], words: str, images: int
    ) -> Iterator[tuple[str, SuiteConcept | None, int]]:
        """Images spread evenly over all prompts: (prompt, the other in it, how many)."""
        filled: list[tuple[str, SuiteConcept | None]] = []
        for template in templates:
            for other in self.others if "{other}" in template else (None,):
                text = template.replace("{other}", other.words) if other else template
                filled.append((text.replace("{}", words), other))
        # Evenly taken and not the first ones: they stand by template, and each should have its part.
        if len(filled) > images:
            filled = [filled[i * len(filled) // images] for i in range(images)]
        for i, (prompt, other) in enumerate(filled):
            yield prompt, other, images // len(filled) + (i < images % len(filled))

    def _seeds(self, n: int) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + n))

    def _listed(self, one: PromptList, size: Size) -> Iterator[Cell]:
        """The cells of a list of prompts."""
        rows = one.read_rows(self.folder)
        if size.prompts and len(rows) > size.prompts:
            rows = [rows[i * len(rows) // size.prompts] for i in range(size.prompts)]
        concept = self.find_concept(one.concept) if one.concept else None
        for prompt, seed, guidance in rows:
            seeds = self._seeds(size.each) if seed is None else (seed,)
            named = concept.name if concept else ""
            words = prompt if len(seeds) > 1 else named  # one image says little of its prompt
            targets = (concept.target(one.role, words),) if concept else ()
            yield Cell(one.role, named, prompt, seeds, targets, guidance, kind=one.kind)


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


def _known_as(concept: SuiteConcept, namesake: SuiteConcept | None) -> SuiteConcept:
    """A concept with another's labels, unless it has its own."""
    if namesake is None or concept.near or concept.labels != (concept.name,):
        return concept
    return dataclasses.replace(concept, labels=namesake.labels, near=namesake.near)


def _templates(table: Any) -> dict[str, tuple[str, ...]]:
    templates = {}
    for role, texts in _is_table(table, "templates").items():
        if role not in ROLES:
            raise UnknownNameError("role", role, ROLES)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ExpungeError(f"templates.{role} must be a list of text")
        templates[role] = tuple(texts)
    return templates
