"""The problem: the concepts to erase, what they become, and what must stay."""

from __future__ import annotations

import dataclasses
import re
import typing
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expunge.base.errors import ExpungeError
from expunge.base.fields import check_fields

Kind = Literal["object", "identity", "style", "explicit"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


@dataclass(frozen=True)
class Concept:
    """A concept that a model can draw, and the anchor that it should draw in its place.

    >>> Concept("airplane", anchor="sky").kind
    'object'

    Raises:
        ExpungeError: a name is empty, the kind is none of `KINDS`, or the anchor is the concept itself.
    """

    name: str
    """The words that prompts call it by: "airplane", "Van Gogh"."""
    anchor: str | None = None
    """What it becomes. "" is the empty prompt; None lets the model choose by kind."""
    kind: Kind = "object"
    """What kind of thing it is: one of `KINDS`."""
    synonyms: tuple[str, ...] = ()
    """More names to erase with it."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "name", tidy(self.name))
        object.__setattr__(self, "synonyms", tuple(tidy(name) for name in self.synonyms))
        if self.anchor is not None:
            object.__setattr__(self, "anchor", tidy(self.anchor))
        if not all(map(normalize_name, self.names)):
            raise ExpungeError("a concept needs a name; this one is empty")
        if self.anchor is not None and normalize_name(self.anchor) in map(normalize_name, self.names):
            raise ExpungeError(f"the anchor of {self.name!r} is the concept itself")

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    @classmethod
    def parse(cls, text: str, kind: Kind = "object") -> Concept:
        """Read NAME, NAME=ANCHOR or NAME|SYNONYM|…=ANCHOR.

        >>> Concept.parse("airplane|aircraft=sky")
        Concept(name='airplane', anchor='sky', kind='object', synonyms=('aircraft',))
        >>> Concept.parse("airplane=").anchor
        ''
        """
        names, equals, anchor = text.partition("=")
        name, *synonyms = names.split("|")
        return cls(name, anchor if equals else None, kind, tuple(synonyms))


def match_whole(name: str) -> str:
    """Return a regular expression of a name that is no part of a longer word."""
    # Not \b, which needs a letter on one side: a name may end in a sign, as "C++" does.
    return rf"(?<!\w){re.escape(name)}(?!\w)".replace(r"\ ", r"\s+")


def replace_whole(prompt: str, name: str, words: str) -> str:
    """Return a prompt with words in every place where a name stands as whole words, in any case.

    Args:
        prompt: the prompt.
        name: what is replaced.
        words: what takes its place, as they are.
    """
    # A function, for in a plain replacement `\1` would be a group.
    return re.sub(match_whole(name), lambda _: words, tidy(prompt), flags=re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """The concepts to erase and the prompts to retain.

    >>> Problem(erase=(Concept("airplane", "sky"),), retain=("bird", "ship")).retain
    ('bird', 'ship')

    Raises:
        ExpungeError: there is nothing to erase, or a name is there twice or to be erased and retained.
    """

    erase: tuple[Concept, ...]
    """The concepts to erase."""
    retain: tuple[str, ...] = ()
    """Prompts or names whose images must stay as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.erase, Concept):
            object.__setattr__(self, "erase", (self.erase,))
        object.__setattr__(self, "erase", tuple(self.erase))
        for concept in self.erase:
            if not isinstance(concept, Concept):
                raise ExpungeError(f"erase holds concepts, not {concept!r}: write Concept({concept!r})")
        if isinstance(self.retain, str):
            raise ExpungeError(f"retain is a list of prompts, not the text {self.retain!r}")
        object.__setattr__(self, "retain", tuple(tidy(text) for text in self.retain))
        if not self.erase:
            raise ExpungeError("there is no concept to erase")
        if not all(self.retain):
            raise ExpungeError("a prompt to retain is empty")
        seen: set[str] = set()
        # By key, for "Cat" and "cat" are one concept to a tokenizer that folds case.
        for name in (name for concept in self.erase for name in concept.names):
            if normalize_name(name) in seen:
                raise ExpungeError(f"{name!r} is to be erased twice")
            seen.add(normalize_name(name))
        for text in self.retain:
            if normalize_name(text) in seen:
                raise ExpungeError(f"{text!r} cannot be both erased and retained")

    def find_name(self, prompt: str) -> str:
        """Return the longest erased name that stands in a prompt as whole words, or "" for none.

        >>> Problem((Concept("cat"), Concept("cat face"))).find_name("a photo of the Cat face")
        'cat face'
        """
        # The longest first: "cat" would otherwise be found within "cat face".
        names = sorted((name for concept in self.erase for name in concept.names), key=len, reverse=True)
        prompt = tidy(prompt)
        return next((n for n in names if re.search(match_whole(n), prompt, re.IGNORECASE)), "")

    def with_anchors(self, anchors: Mapping[str, str]) -> Problem:
        """Return the problem with every open anchor set to the one of the concept's kind."""
        chosen = (
            c if c.anchor is not None else dataclasses.replace(c, anchor=_choose_anchor(c, anchors))
            for c in self.erase
        )
        return dataclasses.replace(self, erase=tuple(chosen))

    def overlaps(self) -> list[tuple[str, str]]:
        """Return pairs of an erased name and another name or retained prompt that contains its words.

        >>> Problem((Concept("cat"),), ("a cat's face", "caterpillar")).overlaps()
        [('cat', "a cat's face")]
        """
        owned = [(name, place) for place, c in enumerate(self.erase) for name in c.names]
        others = [*owned, *((text, None) for text in self.retain)]
        # Whole words: "caterpillar" shares letters with "cat", and no token.
        words = {name: set(re.findall(r"\w+", normalize_name(name))) for name, _ in others}
        return [
            (name, other)
            for name, place in owned
            for other, home in others
            if home != place and words[name] and words[name] <= words[other]
        ]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """Build a problem from what `dataclasses.asdict` returned."""
        concepts = (Concept(**{**c, "synonyms": tuple(c["synonyms"])}) for c in data["erase"])
        return cls(tuple(concepts), tuple(data["retain"]))


_JOINERS = "\u200c\u200d"
"""The zero-width joiners: they shape letters of some scripts, and join several emoji to one."""
_TAGS = "[\U000e0020-\U000e007f]"
"""The tag characters, which spell a region behind a black flag."""
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Invisible characters that Unicode does not class as format characters."""
_SPELLINGS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bb\u02bc\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
)
"""Typographic apostrophes, quotes and hyphens, with the plain ones that they stand for."""


def tidy(text: str) -> str:
    """Return a name or a prompt in composed form (NFC), without invisible characters.

    To a tokenizer, an invisible character is a token like any other, so the concept erased would not be
    the one that the user sees. Joiners stay between letters or emoji that they shape, and so do the tag
    characters of flags.

    >>> tidy(" Tu\u0308rkiye\u200b ") == "T\u00fcrkiye"
    True
    """
    text = unicodedata.normalize("NFC", text)
    kept = [c for i, c in enumerate(text) if _is_visible(text, i)]
    return "".join(kept).strip()


def _is_visible(text: str, place: int) -> bool:
    """Whether a character is seen: no control, and of format a tag, or a joiner outside Latin script."""
    kind = unicodedata.category(text[place])
    if kind not in ("Cf", "Cc"):
        return True
    if kind == "Cc":
        return text[place].isspace()
    if re.match(_TAGS, text[place]):
        # Without the black flag that they make another flag of, tags are not seen at all.
        return re.sub(f"{_TAGS}*$", "", text[:place]).endswith("\U0001f3f4")
    inside = 0 < place < len(text) - 1
    return text[place] in _JOINERS and inside and min(text[place - 1], text[place + 1]) > "\u058f"


def normalize_name(name: str) -> str:
    """Return the key of a name, equal for all its spellings.

    Spellings may differ in case, spacing, Unicode form, invisible characters, and the kind of apostrophe
    or hyphen.

    >>> normalize_name("Ｃａｔ  face\u200b") == normalize_name("cat face")
    True
    """
    text = _UNSEEN.sub("", tidy(name)).translate(_SPELLINGS)
    for _ in range(2):  # folding the case can decompose letters again
        text = unicodedata.normalize("NFKC", text).translate(_SPELLINGS).casefold()
    # A joiner between letters is a matter of spelling; between emoji it makes another emoji.
    joined = re.sub(r"(?<=\w)[\u200c\u200d](?=\w)", "", text)
    return " ".join(joined.split())


def _choose_anchor(concept: Concept, anchors: Mapping[str, str]) -> str:
    """Return the anchor of a concept's kind, or the empty prompt where that is the concept itself."""
    anchor = anchors[concept.kind]
    return "" if normalize_name(anchor) in map(normalize_name, concept.names) else anchor
