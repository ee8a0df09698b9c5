"""What a suite lays out: concepts, how many images of each, and the cells that are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.base import fields
from expunge.base.errors import ExpungeError
from expunge.problem import tidy

ROLES = ("erased", "synonyms", "retained", "content", "plain")
"""What a prompt is there for (`expunge.evaluation.suite`)."""
Question = Literal["top1", "present", "probability"]
"""What a judge is asked (`expunge.metric.Classifier.score`)."""
RENAMED_QUESTIONS = {"best": "top1", "there": "present"}
"""Questions that had another name in earlier versions: {old: new}."""


def check_question(question: str) -> None:
    """Answer the old name of a question with the one that it has now.

    Raises:
        ExpungeError: it is an old one.
    """
    if question in RENAMED_QUESTIONS:
        raise ExpungeError(f"the question {question!r} is named {RENAMED_QUESTIONS[question]!r} now")


@dataclass(frozen=True)
class Target:
    """A concept that is looked for in an image."""

    role: str
    concept: str
    labels: tuple[str, ...]
    near: tuple[str, ...] = ()
    words: str = ""
    """The words it stands for: what the original does not draw is left out by these."""


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
        fields.check_fields(self)
        if not self.name.strip():
            raise ExpungeError("a concept of the suite has no name")
        for part in ("name", "words"):
            # Invisible characters in a file must not make a name that no edit's name equals.
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

    def target(self, role: str, words: str) -> Target:
        """Return what is looked for in an image whose prompt calls it by these words."""
        return Target(role, self.name, self.labels, self.near, words)


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
        fields.check_fields(self)


@dataclass(frozen=True)
class Cell:
    """A prompt, its seeds, and what is looked for in its images."""

    role: str
    """The role it is shown under."""
    concept: str
    prompt: str
    seeds: tuple[int, ...]
    targets: tuple[Target, ...]
    guidance: float | None = None
    stand_in: str = ""
    """The prompt whose own tokens take the place of this prompt's: what is left is the residual."""
    kind: str = ""
    """What kind of prompt it is, where the suite says so."""
