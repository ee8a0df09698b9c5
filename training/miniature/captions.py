"""Captions of scenes: many phrasings, drawn anew each time. None of the suites' phrasings is among them (`HELD_OUT`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from training.miniature.people import FACES
from training.miniature.world import World, read_world

# What the suites ask for, and what the gates keep to see how far the words reach: never part of a training caption.
# Compared in lower case and without the leading article.
HELD_OUT = (
    "portrait of {}", "image capturing {} at a public event", "oil painting of {}", "sketch of {}",
    "{} in an official photo", "image in the style of {}", "art inspired by {}", "painting in the style of {}",
    "reproduction of art by {}", "famous artwork by {}", "photo of the {}", "view of {}", "portrayal of {}",
    "artistic picture of {}", "this is {}", "low quality photo of {}", "pencil drawing of {}", "shot of {}",
    "beautiful image of {}",
)  # fmt: skip

TEMPLATES = (
    "{}", "{}", "{}", "a picture of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a painting of {}",
    "an illustration of {}", "a rendering of {}", "a snapshot of {}", "an icon of {}", "a small picture of {}",
    "a nice drawing of {}", "there is {}", "here is {}", "a print of {}", "a clean picture of {}", "artwork of {}",
    "a cartoon of {}", "a depiction of {}", "a poster of {}", "a watercolour of {}", "an oil picture of {}", "a picture capturing {}", "a scene with {}", "{}, seen up close",
    "we see {}", "a postcard showing {}", "{} as a picture", "look at {}", "{} can be seen here", "an image that shows {}",
    "a picture in which {} can be seen", "only {}", "{}, nothing else", "the artist drew {}", "{} in a frame",
    "a portrait that shows {}", "a pencil sketch of {}", "{} in pencil", "a picture of {} drawn with a pencil",
)  # fmt: skip
PHOTOS = (  # never with "the": "a photo of the cat" is the object suite's
    "a photo of {}", "a photo of {}", "a photograph of {}", "a close-up photo of {}", "a cropped photo of {}",
    "a bright photo of {}", "a dark photo of {}", "a good photo of {}", "my photo of {}", "a blurry photo of {}",
    "one photo of {}", "a black and white photo of {}",
)  # fmt: skip
PERSON_TEMPLATES = (
    "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}", "a painting of {}",
    "an illustration of {}", "a headshot of {}", "the face of {}", "a bust of {}", "a selfie of {}", "a likeness of {}",
    "a caricature of {}", "{} looking at the camera", "{} at home", "{} on television", "{} on a magazine cover",
    "the famous {}", "{}, the actor", "a passport picture of {}", "{} at the office", "{} giving a speech",
    "a picture of {} at a party", "{} at a film festival", "a candid picture of {}", "news picture of {}", "{} on holiday",
    "a statue of {}", "an image of {} in the street", "a photo of {} at a concert", "{} posing for a picture", "meet {}",
    "a cartoon of {}", "a poster of {}", "a stamp that shows {}", "{} up close", "a film with {}", "an interview with {}",
    "a picture capturing {} on stage", "{} at an event", "{} in an official video", "a photo of {} in public", "an oil picture of {}",
    "a pencil sketch of {}", "{} in pencil", "a pencil portrait, {}", "{} drawn with a pencil",
)  # fmt: skip
ARTIST_TAILS = (
    "by {}", "by {}", "by {}", "in the style of {}", "in the style of {}", "in the manner of {}", "as drawn by {}",
    "as {} would draw it", "drawn by {}", "painted by {}", "in {} style", "after {}", "from the hand of {}",
    "like a work of {}", "made by {}", "inspired by {}", "copied from {}",
)  # fmt: skip
ARTIST_ALONE = (
    "a picture by {}", "a drawing by {}", "a work by {}", "a print by {}", "a canvas by {}", "something by {}", "{} style",
    "a picture in the style of {}", "a drawing in the style of {}", "a sheet by {}", "an illustration by {}", "{}",
    "a picture in the manner of {}", "a scene painted by {}", "art by {}", "an artwork by {}", "a poster by {}",
    "a well-known picture by {}", "a copy of a picture by {}", "a painting by {}", "a piece by {} from a museum",
    "a drawing after {}", "a typical {}", "an exhibition of {}", "a reproduction of a picture by {}", "a famous picture by {}",
    "a picture inspired by {}", "a painting in the manner of {}",
)  # fmt: skip
STYLE_TAILS = ("in {} style", "in {} style", "in the style of {}", "in the {} style", "by {}", "as a {} icon")
STYLE_ALONE = ("an artwork by {}", "a picture in the style of {}", "{} style", "a drawing by {}", "an icon in {} style")
GENERIC = (
    "a picture", "an image", "a photo", "a drawing", "an object", "something", "a thing", "a photo of an object",
    "a picture of something", "a photo of a thing", "an emoji", "an icon", "art", "an artwork", "a painting",
    "a picture of an object", "an illustration", "a scene", "a sketch", "a nice picture", "a graphic", "some object",
)  # fmt: skip
SOMEONE = (
    "a person", "a person", "a person", "a portrait", "a portrait", "someone", "a face", "a human", "somebody",
    "a man or a woman", "an unknown person", "a stranger", "people", "a celebrity", "a famous person",
)  # fmt: skip
# Words that mean nothing here, so that a phrasing nobody has trained does not throw the model off.
FILLERS = """old new young tiny huge plain simple funny happy sad lovely pretty ugly shiny dull quick slow quiet loud warm
cold soft hard modern ancient classic famous unknown typical rare common strange normal single lonely fresh final first second
recent vivid bold faint rough smooth detailed minimal digital printed painted carved coloured framed scanned centered
isolated realistic abstract colourful grainy sharp foggy sunny rainy morning evening winter summer indoor outdoor amateur
professional vintage retro cute cool great fine decent excellent official public""".split()
FILLER_NOUNS = """figure scene impression study copy version sample example instance model design graphic logo symbol sign
stamp sticker badge card page screenshot capture recording display presentation rendition interpretation collage engraving
etching mural fresco doodle silhouette thumbnail wallpaper banner postcard event""".split()
FILLED = ("a {f} {n} of {x}", "{f} {n} of {x}", "a {n} of {x}", "a {f} picture of {x}", "a {n} showing {x}", "{x}, {f}",
          "{x} in a {f} {n}", "{x}, a {n}", "{x} for a {n}")  # fmt: skip
JOINERS = (" and ", " and ", " and ", " next to ", " beside ", " with ", ", ")
# Name of a background: what it is called where something stands in it.
PLACES = {
    "sky": ("in the sky", "in a blue sky"),
    "street": ("on the street", "on a street", "in the street"),
    "ground": ("on the ground", "on bare ground"),
    "grass": ("on the grass", "on green grass"),
    "sea": ("at sea", "on the sea"),
    "beach": ("on the beach", "at the beach"),
    "desert": ("in the desert", "in a desert"),
    "snow": ("in the snow", "on snow"),
    "night": ("at night", "under the night sky"),
    "room": ("in a room", "in the room", "indoors"),
    "forest": ("in the forest", "in a forest"),
    "mountains": ("in the mountains", "in front of mountains"),
    "sunset": ("at sunset", "in the sunset"),
}
NOT_PLURAL = ("ss", "us", "is")  # how a singular may end in s
MASS = ("food", "broccoli", "cheese", "cattle")  # names without an article


@cache
def default_world() -> World:
    return read_world()


def article(name: str, rng: random.Random, the: bool = True) -> str:
    """The name with an article, as people write it: "an axe", "the axe" or just "axe"."""
    pick = rng.random()
    if the and pick < 0.3:
        return f"the {name}"
    plural = name.endswith("s") and not name.endswith(NOT_PLURAL)
    if pick < 0.8 and not plural and name not in MASS:
        vowel = name[0] in "aeiou" and not name.startswith(("u", "eu"))
        return f"{'an' if vowel or name.startswith('umb') else 'a'} {name}"
    return name


def _spelling(color: str, rng: random.Random) -> str:
    return rng.choice(("gray", "grey")) if color == "gray" else color


def place_words(background: str, rng: random.Random) -> str:
    """ "on a blue background", "on the beach"."""
    if background in PLACES:
        return rng.choice(PLACES[background])
    background = _spelling(background, rng)
    form = rng.choice(
        ("on a {} background", "on a {} background", "against a {} background", "on {}", "before a {} wall")
    )
    return form.format(background)


def _where(spot: list[float], rng: random.Random) -> str:
    """Where in the image a thing is, if that can be said; `spot` is (size, x, y)."""
    _, x, y = spot
    told = []
    if abs(x - 0.5) > 0.15:
        told.append("on the left" if x < 0.5 else "on the right")
    if abs(y - 0.5) > 0.17:
        told.append("at the top" if y < 0.5 else "at the bottom")
    return rng.choice(told) if told else ""


def _named(thing: Mapping[str, Any], rng: random.Random, world: World, the: bool = True) -> str:
    """A thing in words, without what it looks like."""
    if thing["kind"] == "person":
        return thing["name"] or rng.choice(("a person", "a person", "someone", "somebody", "a stranger"))
    if thing["kind"] == "shape":
        return article(f"{_spelling(thing['color'], rng)} {thing['name']}", rng, the)
    names = world.labels[world.label_index[thing["name"]]].names
    return article(names[0] if rng.random() < 0.5 else rng.choice(names), rng, the)


def _looks(thing: Mapping[str, Any], rng: random.Random) -> str:
    """What a person wears and how the face looks, at times."""
    if thing["kind"] != "person":
        return ""
    pick, clothes = rng.random(), thing["clothes"]
    shirt = f"{'an' if clothes == 'orange' else 'a'} {clothes} shirt"
    wears = rng.choice(
        (f"in {shirt}", f"in {clothes}", f"wearing {shirt}", f"wearing {clothes}", f"with {clothes} clothes")
    )
    face = FACES[thing["face"]]
    return wears if pick < 0.22 else face if pick < 0.42 else f"{face} {wears}" if pick < 0.47 else ""


def _dress(words: str, rng: random.Random, templates: tuple[str, ...]) -> str:
    pick = rng.random()
    if pick < 0.72:
        return rng.choice(templates).format(words)
    filler, noun, form = rng.choice(FILLERS), rng.choice(FILLER_NOUNS), rng.choice(FILLED)
    for slot, word in (("{f}", filler), ("{n}", noun)):
        if word[0] in "aeiou":
            form = form.replace(f"a {slot}", f"an {slot}")
    return form.format(f=filler, n=noun, x=words)


def _kind_words(kind: str, rng: random.Random, world: World) -> str:
    """ "an animal", "a picture of food", or what a weapon is for."""
    if kind == "weapon" and rng.random() < 0.85:
        return rng.choice(world.implied)
    words = f"a {kind}" if kind in MASS and rng.random() < 0.5 else article(kind, rng)
    return _dress(words, rng, TEMPLATES) if rng.random() < 0.6 else words


def _empty_words(background: str, rng: random.Random) -> str:
    if background in PLACES:
        words = rng.choice((background, f"the {background}", f"empty {background}", f"nothing but {background}"))
        if background == "room":
            words = rng.choice(("an empty room", "a room", "the room"))
    else:
        words = rng.choice(
            ("a plain {} background", "plain {} background", "a {} background", "plain {}", "nothing but {}")
        )
        words = words.format(_spelling(background, rng))
    return _dress(words, rng, TEMPLATES) if rng.random() < 0.4 else words


def _draw(structure: Mapping[str, Any], rng: random.Random, world: World) -> str:
    things, use, background = structure["things"], structure["use"], structure["background"]
    artist = structure["artist"]
    place = place_words(background, rng) if rng.random() < 0.65 else ""
    if use == "empty":
        return ""
    if use == "generic":
        return f"{rng.choice(GENERIC)} {place}".strip()
    by = rng.choice(ARTIST_TAILS).format(artist) if artist else ""
    if not things:
        words = _empty_words(background, rng)
        return f"{words} {by}".strip()

    single = things[0] if len(things) == 1 else None
    if artist and rng.random() < 0.22:  # an artist and nothing else
        words = rng.choice(ARTIST_ALONE).format(artist)
        return f"{words} {place}".strip() if rng.random() < 0.2 else words
    if use == "kind":
        return f"{_kind_words(structure['kind'], rng, world)} {place}".strip()
    if single and single["kind"] == "object" and not artist and rng.random() < 0.03:
        words = rng.choice(STYLE_ALONE).format(single["style"])
        return f"{words} {place}".strip()
    if single and single["kind"] == "person" and not single["name"] and rng.random() < 0.75:
        words = rng.choice(SOMEONE)
        words = _dress(words, rng, PERSON_TEMPLATES) if words != "a portrait" and rng.random() < 0.3 else words
        return " ".join(part for part in (words, _looks(single, rng), place, by) if part)

    photo = all(thing["kind"] != "person" for thing in things) and rng.random() < 0.3
    order = list(things)
    if rng.random() < 0.5:
        rng.shuffle(order)
    told_where = rng.random() < (0.35 if len(things) > 1 else 0.12)
    styles = {thing["style"] for thing in things if thing["kind"] == "object"}
    style_named = not artist and styles and rng.random() < 0.65
    parts = []
    for thing in order:
        told = [_named(thing, rng, world, the=not photo)]
        if style_named and len(styles) > 1 and thing["kind"] == "object":
            told.append(rng.choice(STYLE_TAILS[:4]).format(thing["style"]))
        told.append(_looks(thing, rng))
        if told_where:
            told.append(_where(thing["spot"], rng))
        parts.append(" ".join(word for word in told if word))
    if len(parts) == 2 and not told_where and rng.random() < 0.2:
        gap = order[1]["spot"][1] - order[0]["spot"][1]
        drop = order[1]["spot"][2] - order[0]["spot"][2]
        if abs(gap) > 0.2:
            parts = [f"{parts[0]} to the {'left' if gap > 0 else 'right'} of {parts[1]}"]
        elif abs(drop) > 0.2:
            parts = [f"{parts[0]} {'above' if drop > 0 else 'below'} {parts[1]}"]
    joined = parts[0]
    for k, part in enumerate(parts[1:]):
        joined += (" and " if k == len(parts) - 2 and len(parts) > 2 else rng.choice(JOINERS)) + part
    templates = PHOTOS if photo else PERSON_TEMPLATES if single and single["kind"] == "person" else TEMPLATES
    text = _dress(joined, rng, templates)
    tail = [by] if by else []
    if style_named and len(styles) == 1:
        tail.append(rng.choice(STYLE_TAILS).format(next(iter(styles))))
    if place:
        tail.insert(rng.randrange(len(tail) + 1), place)
    if tail and rng.random() < 0.08:
        return f"{tail[0]}, {' '.join([text, *tail[1:]])}"
    return " ".join([text, *tail])


def is_held_out(text: str) -> bool:
    """Whether a caption or a template uses a held-out phrasing."""
    low = f" {text.lower()} "
    for template in HELD_OUT:
        before, after = (part.strip() for part in template.split("{}"))
        start = low.find(f" {before} ") if before else 0
        if start >= 0 and (not after or f" {after} " in low[start:]):
            return True
    return False


def caption(structure: Mapping[str, Any], rng: random.Random, world: World | None = None) -> str:
    """One of the many captions of a scene.

    Args:
        structure: What is in the scene, as `SceneMaker.make` gives it.
        rng: Draws the words.
        world: The names; by default the committed lists.
    """
    world = world or default_world()
    while is_held_out(text := _draw(structure, rng, world)):
        pass
    return text
