"""What the text tower learns from: captions with the words in them that name a concept, and pairs that differ in one.

A pair is a caption and the same caption with one concept's words replaced: by another concept's, by another name of
the same concept, or by the words for any of its kind. The differences of the two captions' states are the concept's
shifts, which the tower keeps apart.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from training.miniature.captions import PLACES
from training.miniature.people import CLOTHES, FACES
from training.miniature.scenes import COLORS
from training.miniature.world import World

SWAPPED = {
    "object": 3.0,
    "person": 4.0,
    "artist": 4.0,
}  # how often a kind's words are replaced, beside others' 1
ANY = "any"  # the concept of a kind's own words, "person:any" say


@dataclass(frozen=True)
class Mention:
    """Words of a caption that name a concept; a concept's key is "kind:name"."""

    words: str
    concept: str


@dataclass(frozen=True)
class Sentence:
    """A caption, what it mentions, and the facts that its end state should know.

    A fact is a string of keys joined by "+": "object:cat", or "object:cat+colour:red" for a red cat.
    """

    text: str
    mentions: tuple[Mention, ...]
    facts: frozenset[str]


@dataclass(frozen=True)
class Vocabulary:
    """The names each concept answers to, and the words for any of a kind."""

    names: Mapping[str, tuple[str, ...]]  # concept -> its names, the first its own
    anchors: Mapping[str, tuple[str, ...]]  # kind -> words for any of it

    def kind(self, concept: str) -> str:
        return concept.split(":", 1)[0]

    def concepts(self) -> list[str]:
        """All keys, those of the kinds' own words included."""
        return [*self.names, *(f"{kind}:{ANY}" for kind in self.anchors)]


@dataclass(frozen=True)
class Pair:
    """A sentence and its partner, which differs in the mention `at` alone; `same`: both name one concept."""

    first: Sentence
    second: Sentence
    at: int
    same: bool


def replace_words(text: str, old: str, new: str) -> str:
    """The text with the words `old`, as whole words, replaced once, and "a" or "an" before them made right.

    >>> replace_words("a photo of a cat", "cat", "elephant")
    'a photo of an elephant'
    """
    vowel = new[:1].lower() in "aeiou"

    def put(match: re.Match[str]) -> str:
        before = match[1] or ""
        if before.lower() in ("a ", "an "):
            before = before[0] + ("n " if vowel else " ")
        return before + new

    return re.sub(rf"(\b[Aa]n? )?(?<!\w){re.escape(old)}(?!\w)", put, text, count=1)


def pair_of(sentence: Sentence, vocabulary: Vocabulary, rng: random.Random) -> Pair:
    """The sentence beside a partner; one without mentions is its own partner, and `at` is -1."""
    if not sentence.mentions:
        return Pair(sentence, sentence, -1, True)
    likely = [SWAPPED.get(vocabulary.kind(mention.concept), 1.0) for mention in sentence.mentions]
    at = rng.choices(range(len(likely)), likely)[0]
    mention = sentence.mentions[at]
    kind, concept = vocabulary.kind(mention.concept), mention.concept
    pick, other = rng.random(), concept
    others = [name for name in vocabulary.names.get(concept, ()) if name != mention.words]
    if pick < 0.25 and others:
        words = rng.choice(others)
    elif pick < 0.5 and vocabulary.anchors.get(kind) and not concept.endswith(f":{ANY}"):
        words, other = rng.choice(vocabulary.anchors[kind]), f"{kind}:{ANY}"
    else:
        taken = {m.concept for m in sentence.mentions}
        other = rng.choice([key for key in of_kind(vocabulary, kind) if key not in taken] or [concept])
        words = rng.choice(vocabulary.names[other])
    facts = frozenset("+".join(other if key == concept else key for key in fact.split("+")) for fact in sentence.facts)
    mentions = (*sentence.mentions[:at], Mention(words, other), *sentence.mentions[at + 1 :])
    text = replace_words(sentence.text, mention.words, words)
    return Pair(sentence, Sentence(text, mentions, facts), at, other == concept)


@lru_cache
def _of_kind(keys: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(key for key in keys if key.startswith(f"{kind}:"))


def of_kind(vocabulary: Vocabulary, kind: str) -> tuple[str, ...]:
    """The concepts of a kind."""
    return _of_kind(tuple(vocabulary.names), kind)


class Codes:
    """A fixed random vector for every fact, and for a sentence the sum of its facts', of length one."""

    def __init__(self, width: int):
        self.width = width
        self.known: dict[str, Tensor] = {}

    def of(self, fact: str) -> Tensor:
        if fact not in self.known:
            generator = torch.Generator().manual_seed(zlib.crc32(fact.encode()))
            self.known[fact] = torch.randn(self.width, generator=generator) / self.width**0.5
        return self.known[fact]

    def __call__(self, facts: Sequence[frozenset[str]]) -> Tensor:
        """(n, width)."""
        empty = torch.zeros(self.width)
        total = torch.stack([sum((self.of(fact) for fact in sorted(each)), empty) for each in facts])
        return total / total.norm(dim=1, keepdim=True).clamp(min=1e-6)


class Spans:
    """Finds where a mention's tokens stand among a caption's."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self.of = lru_cache(1 << 16)(lambda words: tuple(tokenizer(words, add_special_tokens=False).input_ids))

    def find(self, ids: Sequence[int], words: str) -> tuple[int, int] | None:
        """(first, one past the last), or None where they are not."""
        wanted = self.of(words)
        for k in range(len(ids) - len(wanted) + 1):
            if tuple(ids[k : k + len(wanted)]) == wanted:
                return k, k + len(wanted)
        return None


# -- the miniature's captions --------------------------------------------------------------------------------------------

WHERE = ("on the left", "on the right", "at the top", "at the bottom")
BEHIND = ("object", "person", "shape")  # kinds that a look, a shirt or a place in the image belongs to


WORN = re.compile(r"\b(wearing|in|with)( a)? \|(?! background| wall)")  # the colour after it is the clothes'


@dataclass(frozen=True)
class Lexicon:
    """Which words of a caption mean which concept."""

    concepts: Mapping[str, str]  # words in lower case -> concept
    vocabulary: Vocabulary

    def read(self, text: str) -> Sentence:
        """What a caption mentions, the longest words first, and the facts: each concept, and which look, shirt or
        place in the image belongs to which thing."""
        found: list[tuple[int, int, Mention]] = []
        words = [match.span() for match in re.finditer(r"[\w'-]+", text)]
        at = 0
        while at < len(words):
            for count in range(min(6, len(words) - at), 0, -1):
                first, last = words[at][0], words[at + count - 1][1]
                concept = self.concepts.get(text[first:last].lower())
                if concept:
                    found.append((first, last, Mention(text[first:last], concept)))
                    at += count
                    break
            else:
                at += 1
        facts, thing, colour = set(), "", ""
        for first, last, mention in found:
            kind = mention.concept.split(":")[0]
            facts.add(mention.concept)
            if kind in BEHIND:
                if kind == "shape" and colour:
                    facts.add(f"{mention.concept}+{colour}")
                thing, colour = mention.concept, ""
            elif kind == "colour":
                colour = mention.concept
                if thing.startswith("person") and WORN.search(f"{text[:first]}|{text[last:]}"):
                    facts.add(f"{thing}+{colour}")
            elif kind in ("face", "where") and thing:
                facts.add(f"{thing}+{mention.concept}")
        return Sentence(text, tuple(mention for *_, mention in found), frozenset(facts))


def lexicon_of(world: World) -> Lexicon:
    """The miniature's: objects, people, artists, shapes, design sets, colours, faces, places, and words for any of a
    kind."""
    names: dict[str, tuple[str, ...]] = {}
    for label in world.labels:
        names[f"object:{label.name}"] = label.names
    names |= {f"person:{person.name}": (person.name,) for person in world.named}
    names |= {f"artist:{artist.name}": (artist.name,) for artist in world.artists}
    names |= {f"shape:{shape}": (shape,) for shape in world.shapes}
    names |= {f"style:{style}": (style,) for style in world.styles}
    names |= {f"colour:{colour}": (colour,) for colour in dict.fromkeys((*COLORS, *CLOTHES))}
    names |= {f"place:{place}": (*phrases, place) for place, phrases in PLACES.items()}
    names |= {f"face:{face}": (words,) for face, words in FACES.items()}
    names |= {f"where:{where}": (where,) for where in WHERE}
    anchors = {
        "object": ("thing", "object"),
        "person": ("person", "stranger", "human", "celebrity", "famous person"),
        "artist": ("an artist", "a painter"),
    }
    further = {f"kind:{kind}": (kind,) for kind in world.kinds}
    concepts = {word.lower(): concept for concept, each in names.items() for word in each}
    concepts |= {word: concept for concept, each in further.items() for word in each}
    concepts |= dict.fromkeys(world.implied, "kind:weapon")
    concepts |= {word: f"{kind}:{ANY}" for kind, each in anchors.items() for word in each}
    concepts |= dict.fromkeys(("someone", "somebody", "unknown person", "face", "portrait"), f"person:{ANY}")
    return Lexicon(concepts, Vocabulary(names | further, anchors))
