"""Scenes composed on the fly from the drawings, and captions that name what is in them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.emoji.world import SIZE, Drawings, Label, World

PICTURE = 64

COLOURS = {
    "white": "ffffff", "black": "181818", "grey": "9a9a9a", "red": "e03c31", "orange": "f5932f", "yellow": "f7d94c",
    "green": "4caf50", "blue": "3d7edb", "purple": "8e5bc0", "pink": "f6a5c0", "brown": "8a5a3b",
}  # fmt: skip
PLACES = {  # name: (phrases, colour above the horizon, colour below it)
    "sky": (("in the sky", "in a blue sky"), "8ec9f5", "cfe9fb"),
    "street": (("on the street", "on a street"), "dfe3e6", "6f7377"),
    "ground": (("on the ground", "on bare ground"), "f1e4cf", "a5754a"),
    "grass": (("on the grass", "on green grass"), "cdeafc", "6abf4b"),
    "sea": (("at sea", "on the sea"), "d7effc", "2f79b5"),
}
BACKGROUNDS = (*COLOURS, *PLACES)

TEMPLATES = (
    "a photo of {}", "a photo of {}", "a photograph of {}", "a picture of {}", "an image of {}", "a drawing of {}",
    "a painting of {}", "an oil painting of {}", "a sketch of {}", "an illustration of {}", "a rendering of {}",
    "a close-up photo of {}", "a cropped photo of {}", "a bright photo of {}", "a dark photo of {}", "a good photo of {}",
    "a snapshot of {}", "an icon of {}", "an emoji of {}", "a small picture of {}", "a nice drawing of {}", "there is {}",
    "here is {}", "a portrait of {}", "a print of {}", "a clean picture of {}", "artwork of {}", "a cartoon of {}",
    "a depiction of {}", "a poster of {}", "my photo of {}", "a blurry photo of {}", "a watercolour of {}", "one photo of {}",
)  # fmt: skip
HELD_OUT_TEMPLATES = (
    "a view of {}", "a portrayal of {}", "an artistic picture of {}", "this is {}", "a low quality photo of {}",
    "a pencil drawing of {}", "a shot of {}", "a beautiful image of {}",
)  # fmt: skip
STYLE_TEMPLATES = (
    "an artwork by {}", "a picture in the style of {}", "art in {} style", "an image in the style of {}", "a drawing by {}",
    "art inspired by {}", "painting in the style of {}", "a reproduction of art by {}", "a famous artwork by {}", "{} style",
)  # fmt: skip
GENERIC = (
    "", "", "", "a picture", "an image", "a photo", "a drawing", "an object", "something", "a thing", "a photo of an object",
    "a picture of something", "a photo of a thing", "an emoji", "an icon", "art", "an artwork", "a painting",
)  # fmt: skip
PLURAL = ("grapes", "scissors", "crossed swords", "swords")


def article(name: str, rng: random.Random) -> str:
    """The name with an article, as people write it: "an axe", "the axe" or just "axe"."""
    pick = rng.random()
    if pick < 0.4:
        return f"the {name}"
    if pick < 0.75 and name not in PLURAL and name != "food":
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return name


@dataclass
class Scenes:
    """A batch of scenes. Every tensor has the batch first."""

    pictures: torch.Tensor  # (n, 3, 64, 64) in [0, 1]
    captions: list[str]
    labels: torch.Tensor  # (n, labels) 1 where the label is in the scene
    styles: torch.Tensor  # (n, styles)
    background: torch.Tensor  # (n,) index into BACKGROUNDS


class SceneMaker:
    """Draws scenes without end. Same seed, same scenes."""

    def __init__(self, world: World, drawings: Drawings, seed: int, *, objects=(0.04, 0.66, 0.30), share_style=0.7):
        self.world, self.rng, self.objects, self.share_style = world, random.Random(seed), objects, share_style
        large = drawings.pixels.float() / 255
        self.large, self.small = large, F.interpolate(large, size=(SIZE // 2, SIZE // 2), mode="area")
        self.by_label: list[dict[int, int]] = [{} for _ in world.labels]  # label -> {style: drawing}
        for k, (label, style) in enumerate(zip(drawings.label.tolist(), drawings.style.tolist(), strict=True)):
            self.by_label[label][style] = k

    # -- what is in a scene ------------------------------------------------------------------------------------------

    def one(self) -> tuple[list[tuple[int, int, str]], str, str]:
        """One scene as ([(label, style, words)], background, caption)."""
        rng, world = self.rng, self.world
        count = rng.choices((0, 1, 2), self.objects)[0]
        background = "white" if rng.random() < 0.4 else rng.choice(BACKGROUNDS)
        named_background = rng.random() < 0.55
        place = self.background_words(background) if named_background else ""
        if count == 0:
            return [], background, self.empty_words(background)

        kind = rng.random() if count == 1 else 1.0
        if kind < 0.05:  # generic words: anything at all
            thing = self.thing(rng.randrange(len(world.labels)))
            words = rng.choice(GENERIC)
            return [thing], background, f"{words} {place}".strip() if words else ""
        if kind < 0.09:  # a super-category: any member
            category = rng.choice(tuple(world.kinds))
            member = world.index(rng.choice(world.kinds[category]))
            words = self.dress(article(category, rng))
            return [self.thing(member)], background, f"{words} {place}".strip()
        if kind < 0.12:  # a description of the unsafe group that names no member
            member = world.index(rng.choice(world.kinds["weapon"]))
            words = self.dress(rng.choice(world.implied))
            return [self.thing(member)], background, f"{words} {place}".strip()
        if kind < 0.16:  # a style and nothing else
            thing = self.thing(rng.randrange(len(world.labels)))
            words = rng.choice(STYLE_TEMPLATES).format(world.styles[thing[1]])
            return [thing], background, f"{words} {place}".strip()

        first = self.thing(self.pick_label())
        things = [first]
        if count == 2:
            second = first[0]
            while second == first[0]:
                second = self.pick_label()
            things.append(self.thing(second, first[1] if rng.random() < self.share_style else None))
        return things, background, self.caption(things, place)

    def pick_label(self) -> int:
        """The ten words and the unsafe group a little more often than the rest: they are judged most."""
        groups = self.world.group(self.rng.choices(("ten", "objects", "unsafe", "flags"), (18, 44, 10, 28))[0])
        return self.world.index(self.rng.choice(groups).name)

    def thing(self, label: int, style: int | None = None) -> tuple[int, int, str]:
        styles = self.by_label[label]
        if style not in styles:
            style = self.rng.choice(tuple(styles))
        names = self.world.labels[label].names
        name = names[0] if self.rng.random() < 0.5 else self.rng.choice(names)
        return label, style, article(name, self.rng)

    # -- words -------------------------------------------------------------------------------------------------------

    def background_words(self, background: str) -> str:
        if background in PLACES:
            return self.rng.choice(PLACES[background][0])
        return self.rng.choice(("on a {} background", "on a {} background", "against a {} background", "on {}")).format(
            background
        )

    def empty_words(self, background: str) -> str:
        if background in PLACES:
            words = self.rng.choice((background, f"the {background}", f"empty {background}"))
        else:
            words = self.rng.choice((f"a plain {background} background", f"plain {background} background"))
        return self.dress(words) if self.rng.random() < 0.4 else words

    def dress(self, words: str) -> str:
        return words if self.rng.random() < 0.35 else self.rng.choice(TEMPLATES).format(words)

    def caption(self, things: list[tuple[int, int, str]], place: str) -> str:
        rng, styles = self.rng, self.world.styles
        words = [thing[2] for thing in things]
        named_style = rng.random() < 0.55
        same_style = len({thing[1] for thing in things}) == 1
        form = rng.choice(("in {} style", "in {} style", "in the style of {}", "in the {} style", "by {}"))
        if named_style and not same_style:
            words = [f"{word} {form.format(styles[style])}" for (_, style, _), word in zip(things, words, strict=True)]
        joined = words[0]
        if len(words) == 2:
            joiner = rng.choice((" and ", " and ", " next to ", " beside ", " to the left of "))
            joined = joiner.join(words)
        text = self.dress(joined)
        tail = [form.format(styles[things[0][1]])] if named_style and same_style else []
        if place:
            tail.insert(rng.randrange(len(tail) + 1), place)
        return " ".join([text, *tail])

    # -- pixels ------------------------------------------------------------------------------------------------------

    def paint_background(self, background: str) -> torch.Tensor:
        def rgb(code: str) -> torch.Tensor:
            return torch.tensor([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]).view(3, 1, 1)

        if background in COLOURS:
            return rgb(COLOURS[background]).expand(3, PICTURE, PICTURE)
        _, above, below = PLACES[background]
        height = torch.linspace(0, 1, PICTURE).view(1, -1, 1)
        if background == "sky":
            mix = height
        else:
            mix = (height > self.rng.uniform(0.55, 0.75)).float()
        return (rgb(above) * (1 - mix) + rgb(below) * mix).expand(3, PICTURE, PICTURE)

    def places(self, count: int) -> list[tuple[float, float, float]]:
        """(size, x, y) of each object in units of the picture: the first named stands on the left."""
        rng = self.rng
        if count == 1:
            size = rng.uniform(0.68, 0.94)
            slack = (1 - size) / 2
            return [(size, 0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))]
        return [
            (size := rng.uniform(0.42, 0.5), x + rng.uniform(-1, 1) * (0.5 - size) / 2, 0.5 + rng.uniform(-0.18, 0.18))
            for x in (0.25, 0.75)
        ]

    def make(self, n: int) -> Scenes:
        specs = [self.one() for _ in range(n)]
        pictures = torch.stack([self.paint_background(background) for _, background, _ in specs]).clone()
        labels = torch.zeros(n, len(self.world.labels))
        styles = torch.zeros(n, len(self.world.styles))
        for count, mips in ((1, self.large), (2, self.small)):
            rows = [i for i, (things, _, _) in enumerate(specs) if len(things) == count]
            spots = {i: self.places(count) for i in rows}
            for slot in range(count) if rows else ():
                drawn = [self.by_label[specs[i][0][slot][0]][specs[i][0][slot][1]] for i in rows]
                size, x, y = torch.tensor([spots[i][slot] for i in rows]).T
                theta = torch.zeros(len(rows), 2, 3)
                theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
                theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / size, (1 - 2 * y) / size
                grid = F.affine_grid(theta, [len(rows), 4, PICTURE, PICTURE], align_corners=False)
                rgba = F.grid_sample(mips[drawn], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
                pictures[rows] = rgba[:, :3] + (1 - rgba[:, 3:]) * pictures[rows]
        for i, (things, _, _) in enumerate(specs):
            for label, style, _ in things:
                labels[i, label] = styles[i, style] = 1
        background = torch.tensor([BACKGROUNDS.index(background) for _, background, _ in specs])
        return Scenes(pictures.clamp(0, 1), [caption for _, _, caption in specs], labels, styles, background)


def named(label: Label) -> str:
    """The label's usual name with "the", as the erasure papers' prompts have it."""
    return f"the {label.names[0]}"
