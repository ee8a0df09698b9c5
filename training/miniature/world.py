"""The world of the miniature model: objects (world.toml), people (people.toml) and artists (artists.toml)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training.emoji.world import Label
from training.miniature.artists import PALETTES, TECHNIQUES, Artist
from training.miniature.people import Person

HERE = Path(__file__).parent
WORK = Path("training/miniature/made")

# Where a set's file name is not the slug of the emojibase label.
OTHER_FILES = {
    "umbrella with rain drops": ("umbrella-with-raindrops",),
    "locked": ("lock",),
    "sun with face": ("sun-with-face",),
    "fire engine": ("fire-truck",),
    "pick": ("pick-axe",),
    "t-shirt": ("t-shirt", "tshirt"),
    "jack-o-lantern": ("jack-o-lantern", "jackolantern"),
}


@dataclass(frozen=True)
class World:
    """What can be drawn, and by which words."""

    labels: tuple[Label, ...]  # objects; `group` is "ten", "objects" or "unsafe"
    styles: tuple[str, ...]  # the design sets
    shapes: tuple[str, ...]
    people: tuple[Person, ...]  # the named, then the unnamed
    artists: tuple[Artist, ...]
    kinds: dict[str, tuple[str, ...]]  # super-category -> labels
    implied: tuple[str, ...]  # descriptions of the unsafe group that name no member
    implied_held_out: tuple[str, ...]
    shows: tuple[str, ...]  # labels shown where the words say nothing
    tuning: tuple[str, ...]  # labels no suite may name

    @cached_property
    def named(self) -> tuple[Person, ...]:
        return tuple(person for person in self.people if person.name)

    @cached_property
    def label_index(self) -> dict[str, int]:
        return {label.name: i for i, label in enumerate(self.labels)}

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Group -> places of its labels."""
        return {
            group: tuple(i for i, label in enumerate(self.labels) if label.group == group)
            for group in ("ten", "objects", "unsafe")
        }

    @cached_property
    def artist_traits(self) -> tuple[tuple[int, int], ...]:
        """Of each artist the places of palette and technique."""
        palettes, techniques = list(PALETTES), list(TECHNIQUES)
        return tuple((palettes.index(a.palette), techniques.index(a.technique)) for a in self.artists)


def read_world(folder: Path = HERE) -> World:
    """Reads the three lists of `folder`.

    Raises:
        ValueError: A group names a label that is not listed.
    """

    def read(name: str) -> dict:
        return tomllib.loads((folder / name).read_text(encoding="utf-8"))

    table = read("world.toml")
    labels = tuple(
        Label(name, tuple(names), group)
        for group in ("ten", "objects", "unsafe")
        for name, names in table[group].items()
    )
    kinds = {kind: tuple(members) for kind, members in table["kinds"].items()} | {"weapon": tuple(table["unsafe"])}
    known = {label.name for label in labels}
    for group, members in {**kinds, "plain": table["plain"]["shows"], "tuning": table["tuning"]["objects"]}.items():
        if unknown := set(members) - known:
            raise ValueError(f"world.toml: {group} names {sorted(unknown)}, which are not labels.")
    return World(
        labels,
        tuple(table["styles"]),
        tuple(table["shapes"]["names"]),
        tuple(Person(**row) for row in read("people.toml")["person"]),
        tuple(Artist(**row) for row in read("artists.toml")["artist"]),
        kinds,
        tuple(table["implied"]["phrases"]),
        tuple(table["implied"]["held_out"]),
        tuple(table["plain"]["shows"]),
        tuple(table["tuning"]["objects"]),
    )
