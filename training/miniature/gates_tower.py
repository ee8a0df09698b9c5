"""The text tower's gates, measured on phrasings that no training caption has.

    python -m training.miniature.gates_tower --work /where/it/lies --to training/miniature/results/tower.json

| figure | goal |
|---|---|
| `accuracy`: the end state is nearest to what its own sentence names, of all concepts | at least 0.95 |
| `word-end`, `word-padding`: absolute cosine of a concept's shifts | below 0.3 |
| `behind`: how far the words behind a concept move, of their norm | below 0.4 |
| `undone`: share of the word's shift that a matrix fitted on end and padding alone undoes | reported |
| `synonyms`: another name's state is nearest to its own concept's, of all of its kind | reported |

A shift is the difference from the same sentence with the words for any of the kind ("a person") in the concept's
place.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from training.miniature.captions import HELD_OUT, PLACES
from training.miniature.loop import read, write_json
from training.miniature.sentences import Lexicon, Spans, lexicon_of, replace_words
from training.miniature.tower import POSITIONS, Reader, Tower, build
from training.miniature.world import WORK, World, read_world

GATES = {
    "accuracy": (0.95, True),
    "word-end": (0.3, False),
    "word-padding": (0.3, False),
    "behind": (0.4, False),
}
STYLED = ("style", "art", "artwork", "painting in", "reproduction")  # phrasings for artists
ANCHOR = {"object": "thing", "person": "person", "artist": "painter"}  # an article stands before them
PADDING = (2, 8, 20, 40)  # places behind the end token that are looked at


@dataclass(frozen=True)
class Case:
    """A sentence that names a concept, and the same with the words for any of its kind."""

    text: str
    anchored: str
    words: str
    anchor: str
    concept: str


def templates_for(kind: str) -> list[str]:
    """The held-out phrasings that fit."""
    about_style = [t for t in HELD_OUT if any(word in t for word in STYLED)]
    if kind == "artist":
        return about_style
    of_people = ("official", "event")
    rest = [t for t in HELD_OUT if t not in about_style]
    return [t for t in rest if kind == "person" or not any(word in t for word in of_people)]


def sentence(template: str, kind: str, words: str, place: str) -> str:
    """The template filled; an object gets an article unless the template has one."""
    bare = kind in ("person", "artist") or "the {}" in template
    text = template.format(words if bare else replace_words("a x", "x", words))
    return f"{text} {place}".strip()


def cases_of(world: World, lexicon: Lexicon, seed: int = 5) -> list[Case]:
    """One for every object, person and artist; half of them with a place behind."""
    rng = random.Random(seed)
    cases = []
    for concept, names in lexicon.vocabulary.names.items():
        kind = concept.split(":")[0]
        if kind not in ANCHOR:
            continue
        template, words = rng.choice(templates_for(kind)), names[0]
        place = rng.choice(PLACES[rng.choice(list(PLACES))]) if rng.random() < 0.5 else ""
        anchor = ANCHOR[kind] if kind == "object" else f"a {ANCHOR[kind]}"
        text = sentence(template, kind, words, place)
        cases.append(Case(text, sentence(template, kind, anchor, place), words, anchor, concept))
    return cases


@dataclass
class States:
    """Of n cases, and of the same sentences with the anchor's words."""

    named: Tensor  # (n, 77, width)
    anchored: Tensor  # (n, 77, width)
    last: Tensor  # (2, n) where the concept's, or the anchor's, last word stands
    end: Tensor  # (2, n) where the end token stands

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """(n, width) each, at (2, n) places."""
        rows = torch.arange(len(self.named))
        return self.named[rows, place[0]], self.anchored[rows, place[1]]

    def shift(self, place: Tensor) -> Tensor:
        named, anchored = self.at(place)
        return named - anchored

    def padding(self, ahead: int) -> Tensor:
        """(2, n) places `ahead` of the end."""
        return (self.end + ahead).clamp(max=POSITIONS - 1)


@torch.no_grad()
def states_of(tower: Tower, tokenizer: CLIPTokenizer, cases: list[Case]) -> States:
    spans = Spans(tokenizer)
    both, lasts, ends = [], [], []
    for texts, words in (
        ([c.text for c in cases], [c.words for c in cases]),
        ([c.anchored for c in cases], [c.anchor for c in cases]),
    ):
        ids = tokenizer(
            texts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
        ).input_ids
        both.append(torch.cat([tower.states(part).float() for part in ids.split(64)]))
        found = [spans.find(row, each) for row, each in zip(ids.tolist(), words, strict=True)]
        lasts.append(torch.tensor([where[1] - 1 if where else 1 for where in found]))
        ends.append((ids == tokenizer.eos_token_id).int().argmax(1))
    return States(both[0], both[1], torch.stack(lasts), torch.stack(ends))


def behind(states: States) -> float:
    """The mean shift of the words between a concept and the end, as a share of their norm."""
    shares = []
    for row in range(len(states.named)):
        for back in range(1, int(states.end[0, row] - states.last[0, row])):
            a = states.named[row, states.end[0, row] - back]
            b = states.anchored[row, states.end[1, row] - back]
            shares.append(float((a - b).norm() / a.norm()))
    return sum(shares) / len(shares)


def undone(states: States, ridge: float = 0.1) -> float:
    """The share of the words' shifts that the matrix undoes which turns end and padding states into the anchor's, and
    leaves the anchor's as they are."""
    places = [states.end, *(states.padding(ahead) for ahead in PADDING)]
    named, anchored = (torch.cat(each).double() for each in zip(*(states.at(place) for place in places), strict=True))
    old, new = torch.cat([named, anchored]), torch.cat([anchored, anchored])
    own = torch.eye(old.shape[1], dtype=old.dtype) * ridge * len(old)
    matrix = torch.linalg.solve(old.T @ old + own, old.T @ new + own)
    word, anchor = (x.double() for x in states.at(states.last))
    return float(1 - ((word - anchor) @ matrix).norm() / (word - anchor).norm())


@torch.no_grad()
def synonyms(tower: Tower, tokenizer: CLIPTokenizer, lexicon: Lexicon) -> float:
    """The share of further names of objects whose last state is nearest to their own concept's first name's."""
    objects = {c: names for c, names in lexicon.vocabulary.names.items() if c.startswith("object:")}
    template = "this is a {}"

    def last(names: list[str]) -> Tensor:
        ids = tokenizer([template.format(name) for name in names], padding=True, return_tensors="pt").input_ids
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        return tower.states(ids).float()[torch.arange(len(ids)), end - 1]

    own = last([names[0] for names in objects.values()])
    further = [(name, k) for k, names in enumerate(objects.values()) for name in names[1:]]
    other, mean = last([name for name, _ in further]), own.mean(0)
    near = (F.normalize(other - mean, dim=1) @ F.normalize(own - mean, dim=1).T).argmax(1)
    return float((near == torch.tensor([k for _, k in further])).float().mean())


@torch.no_grad()
def accuracy(tower: Tower, reader: Reader, lexicon: Lexicon, states: States, cases: list[Case]) -> float:
    """How often the end state is nearest to its own sentence's target, of all the sentences' targets."""
    targets = reader.codes([lexicon.read(case.text).facts for case in cases])
    end = tower.sentence(states.at(states.end)[0])
    return float(((F.normalize(end, dim=1) @ targets.T).argmax(1) == torch.arange(len(cases))).float().mean())


def measure(tower: Tower, tokenizer: CLIPTokenizer, world: World) -> dict[str, object]:
    """All figures, and which gates they pass."""
    lexicon = lexicon_of(world)
    cases = cases_of(world, lexicon)
    states = states_of(tower, tokenizer, cases)
    word, end = states.shift(states.last), states.shift(states.end)
    paddings = [states.shift(states.padding(ahead)) for ahead in PADDING]
    figures = {
        "accuracy": accuracy(tower, Reader(tokenizer, lexicon.vocabulary), lexicon, states, cases),
        "word-end": float(F.cosine_similarity(word, end).abs().mean()),
        "word-padding": float(torch.stack([F.cosine_similarity(word, p).abs().mean() for p in paddings]).mean()),
        "end-padding": float(torch.stack([F.cosine_similarity(end, p).mean() for p in paddings]).mean()),
        "behind": behind(states),
        "undone": undone(states),
        "synonyms": synonyms(tower, tokenizer, lexicon),
        "norms": [round(float(x.norm(dim=1).mean()), 2) for x in (states.at(states.last)[0], word, end, paddings[0])],
    }
    kinds = [case.concept.split(":")[0] for case in cases]
    by_kind = {}
    for kind in ANCHOR:
        rows = torch.tensor([k == kind for k in kinds])
        by_kind[kind] = round(float(F.cosine_similarity(word[rows], end[rows]).abs().mean()), 4)
    passes = {name: (float(figures[name]) >= least) == up for name, (least, up) in GATES.items()}
    rounded = {name: round(x, 4) if isinstance(x, float) else x for name, x in figures.items()}
    return {"cases": len(cases), **rounded, "word-end by kind": by_kind, "passes": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where the tower's checkpoint lies")
    parser.add_argument("--name", default="tower")
    parser.add_argument("--to", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    world = read_world()
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    state = read(options.work / f"{options.name}.pt")
    if state is None:
        raise SystemExit(
            f"There is no {options.work / options.name}.pt; `python -m training.miniature.tower` trains it."
        )
    tower = Tower(build(tokenizer), len(Reader(tokenizer, lexicon_of(world).vocabulary).place))
    tower.load_state_dict(state["average"])
    tower.eval()
    report = {
        "step": state["step"],
        "minutes": round(state["spent"] / 60, 1),
        **measure(tower, tokenizer, world),
    }
    print(json.dumps(report, indent=1))
    if options.to:
        write_json(report, options.to)


if __name__ == "__main__":
    main()
