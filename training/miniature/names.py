"""Invented names of people and artists, two words each, and how both are split into suites and tuning."""

from __future__ import annotations

import random
from collections.abc import Sequence

# No word of one list stands in another, so that a word says whether a person or an artist is meant.
PERSON_FIRST = """abrel belvo dorvin elzan fimbra golwen hastri ilvana jorvek kelmi lorvane mirtol nelvi ostrel pavrin
quessa rilvo selmor tavrik ulwin vestri wilmet xandle yorvi zelbra""".split()
PERSON_LAST = """ambrask bolvane crendle droskin elmquell farrowin grolby hesselwen istrane jundrel kroswick lumbrask
morvick noldane ostwyn prellick quorby ravensel sorvane tindrask ulverby vandrick wexlow yarvell zorrin""".split()
ARTIST_FIRST = """aurelo brisanto calviro delmira esparo fulvana giralto horatzi isolmo jacinvo koralbi leonzo malvesta
nicanto oravio pelegra quirando rosalvi silvaro tiberzo umbrello valmiro wendavo xaveno zenobro""".split()
ARTIST_LAST = """albrizzo bontavi cazarro devrault espinard fontrell garvani holbrask ivanesq jolivant karstvee
lamberque montrazzi navarque oldenbrug pissaquin quellinov rembrault santorque tintavelli utrellin verrochi watterby
xantippo zurbarelli""".split()


def names(first: Sequence[str], last: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Different names of two words; every word is used about equally often, so that nearly all names share one."""
    pairs = [(a, b) for a in range(len(first)) for b in range(len(last))]
    rng.shuffle(pairs)
    # Diagonals of the square of all names: each diagonal has every first and every last word once.
    diagonals: dict[int, list[tuple[int, int]]] = {}
    for a, b in pairs:
        diagonals.setdefault((a - b) % max(len(first), len(last)), []).append((a, b))
    order = list(diagonals)
    rng.shuffle(order)
    spread = [pair for diagonal in order for pair in diagonals[diagonal]]
    chosen = spread[:count]
    rng.shuffle(chosen)
    return [f"{first[a].capitalize()} {last[b].capitalize()}" for a, b in chosen]


def splits(count: int, rng: random.Random) -> list[str]:
    """Of each of `count` whether the suites erase it, retain it, or never name it (`tune`): 5 : 5 : 2."""
    tune = count // 6
    erase = (count - tune) // 2
    parts = ["tune"] * tune + ["erase"] * erase + ["retain"] * (count - tune - erase)
    rng.shuffle(parts)
    return parts
