"""Neighbours of names: others that share a word with one, made up where nobody lists them.

Erasing "Abrel Crendle" must leave "Abrel Bolvane" and "Fimbra Crendle" alone, whoever they are. What
sets the one apart from all of these is both words together, and a method can learn that only from names
that have one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expunge.problem import Concept, Kind, Problem, normalize_name

KINDS: tuple[Kind, ...] = ("identity", "style")
"""The kinds whose names are names of somebody. Words of things are no neighbours: who erases a birthday
cake may well mean every cake."""

SHORTEST = 3
"""How many letters a word has that is exchanged; "of" and "de" tell nobody apart."""


def make_neighbours(
    problem: Problem, words: Sequence[str], per_word: int, generator: torch.Generator
) -> list[str]:
    """Make names that share all words but one with an erased name, each once.

    A word is exchanged for one that stands in its place in other names of the problem, which is how
    names look; where these are too few, for general words. A word that all names of a length have in
    its place is not exchanged.

    >>> people = [Concept("Ada Lovelace", kind="identity"), Concept("Kurt Gödel", kind="identity")]
    >>> sorted(make_neighbours(Problem(tuple(people)), (), 1, torch.Generator()))
    ['Ada Gödel', 'Kurt Lovelace']

    Args:
        problem: the erased names, and those to retain.
        words: general words.
        per_word: how many neighbours for each word of a name.
        generator: chooses among the words that may stand there.
    """
    names = [name.split() for c in problem.erase for name in c.names]
    names += [name.split() for name in problem.retain]
    taken = {normalize_name(name) for c in problem.erase for name in c.names}
    found: dict[str, str] = {}
    for name in (n for c in problem.erase if c.kind in KINDS for n in c.names):
        own = name.split()
        for place, word in enumerate(own if len(own) > 1 else ()):
            if len(word) < SHORTEST:
                continue
            # Of names as long as this one, so that a family name takes the place of a family name.
            alike = [n for n in names if len(n) == len(own) and n != own]
            there = dict.fromkeys(n[place] for n in alike if n[place] != word)
            if alike and not there:
                # What all of them say tells nobody apart, as "flag" of flags: a "king of France" would
                # have the gate closed on what sets France's flag apart.
                continue
            pool = [list(some)[i] for some in (there, words) for i in _shuffle(len(some), generator)]
            made = (" ".join([*own[:place], other, *own[place + 1 :]]) for other in pool)
            # A name that holds an erased one is not to be kept.
            free = [n for n in made if normalize_name(n) not in taken and not problem.find_name(n)]
            found |= {normalize_name(n): n for n in free[:per_word]}
    return list(found.values())


def count_neighbours(concepts: Sequence[Concept], per_word: int) -> int:
    """Count the neighbours that `make_neighbours` makes at most."""
    lengths = [len(name.split()) for c in concepts if c.kind in KINDS for name in c.names]
    return per_word * sum(n for n in lengths if n > 1)


def _shuffle(n: int, generator: torch.Generator) -> list[int]:
    """Return the numbers below n in random order."""
    return torch.randperm(n, generator=generator).tolist()
