"""What a model knows: suggestions to choose from, and help with names that it does not know."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from expunge.base import registry
from expunge.base.errors import ExpungeError, join_names
from expunge.evaluation.cells import SuiteConcept
from expunge.evaluation.evaluate import restrict_to_judge
from expunge.evaluation.measure import make_metric, read_options
from expunge.evaluation.suite import Suite
from expunge.metric import Classifier
from expunge.model import Model
from expunge.problem import Concept, Kind, normalize_name

KIND_OF_SUITE: tuple[tuple[str, Kind], ...] = (
    ("celebrity", "identity"),
    ("identity", "identity"),
    ("style", "style"),
    ("unlearncanvas", "style"),
    ("unsafe", "explicit"),
    ("explicit", "explicit"),
)
"""Part of a suite's name, and the kind of its concepts; others are of objects."""

SIBLINGS = 9
"""How many of its like are proposed to stay."""

PLAIN_PROMPTS: Mapping[Kind, str] = {
    "object": "a photo of the {}",
    "identity": "a photo of {}",
    "style": "a house in {}",
    "explicit": "a photo of {}",
}
"""What to draw of a concept that no suite knows."""


@dataclass(frozen=True)
class Known:
    """A concept that a model is known to draw."""

    name: str
    kind: Kind
    synonyms: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()
    """Its like, to be proposed as what must stay."""


@dataclass(frozen=True)
class Knowledge:
    """What is known of one model."""

    concepts: Mapping[str, Known] = field(default_factory=dict)
    """By the key of their names."""
    suites: Mapping[str, Suite] = field(default_factory=dict)
    """Those that are made for this model, without what their judges cannot tell."""

    @property
    def names(self) -> list[str]:
        """All names to choose from, objects first."""
        return list(dict.fromkeys(known.name for known in self.concepts.values()))

    def find(self, name: str) -> Known | None:
        """The concept of a name, however it is spelled."""
        return self.concepts.get(normalize_name(name))

    def propose(self, name: str) -> Concept:
        """A name as a concept of the kind that is known of it."""
        known = self.find(name)
        return Concept(known.name if known else name, kind=known.kind if known else "object")

    def synonyms(self, name: str) -> tuple[str, ...]:
        """Further names that could be erased with it."""
        known = self.find(name)
        return known.synonyms if known else ()

    def stay(self, erased: Sequence[str]) -> list[str]:
        """What is proposed to stay where these are erased: their like."""
        gone = {normalize_name(name) for name in erased}
        found = [other for name in erased if (known := self.find(name)) for other in known.siblings]
        return [name for name in dict.fromkeys(found) if normalize_name(name) not in gone][:SIBLINGS]

    def near(self, name: str) -> str:
        """The known name that is written almost so, or begins so alone; "" for none."""
        begun = [
            known for spelled, known in self.concepts.items() if spelled.startswith(normalize_name(name))
        ]
        if len({known.name for known in begun}) == 1:
            return begun[0].name
        found = difflib.get_close_matches(normalize_name(name), list(self.concepts), n=1, cutoff=0.7)
        return self.concepts[found[0]].name if found else ""

    def suites_for(self, names: Sequence[str]) -> list[str]:
        """The suites that can judge an edit that erases one of these names."""
        return [
            title
            for title, suite in self.suites.items()
            if any(suite.find_concept(name) is not None for name in names)
        ]

    def prompts(self, concepts: Sequence[Concept], retain: Sequence[str]) -> list[str]:
        """What to draw first: each concept (up to three), a name it was not told by, two that stay."""
        found = [self._prompt(concept.name, concept.kind) for concept in concepts[:3]]
        if concepts and (others := [s for c in concepts[:2] for s in self.synonyms(c.name)]):
            found.append(self._prompt(others[0], concepts[0].kind))
        for name in list(retain)[:2]:
            known = self.find(name)
            found.append(self._prompt(name, known.kind if known else "object"))
        return list(dict.fromkeys(found))

    def _prompt(self, name: str, kind: Kind) -> str:
        for suite in self.suites.values():
            concept = suite.find_concept(name)
            templates = [t for t in suite.templates.get("erased", ()) if "{}" in t]
            if concept is not None and templates:
                other = suite.others[0].words if suite.others else ""
                return templates[0].replace("{other}", other).replace("{}", concept.words)
        return PLAIN_PROMPTS[kind].replace("{}", name)


def of_model(name: str) -> Knowledge:
    """What is known of a model, by the suites that are made for it and their judges."""
    concepts: dict[str, Known] = {}
    suites: dict[str, Suite] = {}
    for title in sorted(registry.list_names("suites"), key=_order):
        suite = Suite.read(title)
        if suite.model != name:
            continue
        judge = _judge(suite)
        if judge is not None:
            try:
                suite = restrict_to_judge(suite, judge)
            except ExpungeError:
                continue  # its judge knows none of its labels: nothing to choose there
        title = title.removeprefix(f"{name}/")
        suites[title] = suite
        kind = _kind(title)
        names = [_name(concept, kind) for concept in suite.concepts]
        for concept, called in zip(suite.concepts, names, strict=True):
            near = [other for other in names if other != called]
            known = Known(called, kind, concept.synonyms, tuple(near))
            for spelling in (called, *concept.names):
                concepts.setdefault(normalize_name(spelling), known)
        for other in suite.others:
            concepts.setdefault(normalize_name(other.words), Known(other.words, "object"))
    unique = {normalize_name(known.name): known for known in concepts.values()}
    return Knowledge({**unique, **concepts}, suites)


def _kind(title: str) -> Kind:
    """The kind of a suite's concepts, by its name."""
    for part, kind in KIND_OF_SUITE:
        if part in title:
            return kind
    return "object"


def _order(title: str) -> tuple[int, str]:
    """Objects first, then those of a kind of their own, then the rest."""
    first, name = ("object", "style", "identity", "unsafe"), title.rpartition("/")[2]
    return (first.index(name) if name in first else len(first), title)


def _judge(suite: Suite) -> Classifier | None:
    """A suite's judge; None where it cannot be had here."""
    try:
        judge = make_metric(suite.judge, read_options(suite, suite.judge))
    except ExpungeError:
        return None
    return judge if isinstance(judge, Classifier) else None


def _name(concept: SuiteConcept, kind: Kind) -> str:
    """What to call a concept of a suite: the words that prompts have for it."""
    if kind == "style":
        return next((name for name in concept.also if name.endswith(" style")), concept.words)
    return concept.words


def notes_on(model: Model, knowledge: Knowledge, concepts: Sequence[Concept]) -> list[str]:
    """What is odd about some concepts, a sentence each: nothing of it keeps one from erasing.

    Args:
        model: what should draw them.
        knowledge: what is known of the model.
        concepts: what to erase.

    Raises:
        ExpungeError: the model's tokenizer can read nothing of a name.
    """
    names = [name for concept in concepts for name in concept.names]
    model.require_words(names)
    model.require_window(names)
    said = []
    for name in names:
        if knowledge.find(name):
            continue
        if foreign(model, name):
            said.append(
                f"This model has no word in the script of “{name}” and reads it letter by letter, if at"
                " all: write it in the language of the model's captions."
            )
            continue
        strange = model.find_unknown_words(name)
        if near := knowledge.near(name):
            said.append(
                f"“{name}” is not among the names this model is known to draw; did you mean “{near}”?"
            )
        elif strange:
            words = join_names([f"“{word}”" for word in strange], 3)
            said.append(
                f"This model can only spell {words}, so it may not know it: see whether it is written as"
                " you meant, and what the model draws of it."
            )
    said += [
        f"“{concept.name}” is taken for an object: choose style for an artist, identity for a person."
        for concept in concepts
        if concept.kind == "object" and is_proper_name(concept.name) and not knowledge.find(concept.name)
    ]
    return said


def is_proper_name(name: str) -> bool:
    """Whether a name is spelled as a person's is: two words or more, each with a capital.

    >>> is_proper_name("Van Gogh"), is_proper_name("red car"), is_proper_name("Cat")
    (True, False, False)
    """
    words = name.split()
    return len(words) > 1 and all(word[0].isupper() for word in words)


def foreign(model: Model, name: str) -> bool:
    """Whether no word of a name is in the model's vocabulary or written in Latin letters."""
    letters = [c for c in name if c.isalpha()]
    latin = [c for c in letters if "LATIN" in unicodedata.name(c, "")]
    if not letters or latin:
        return False
    known = {word.casefold() for word in model.vocabulary()}
    return not any(word.casefold() in known for word in name.split())
