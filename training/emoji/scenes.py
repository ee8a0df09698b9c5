"""Scenes composed on the fly from the drawings, and captions that name what is in them.

A scene is thought up in plain Python (`SceneMaker.plan`), which other processes can do ahead, and painted where the
drawings lie, on a CPU or a GPU (`SceneMaker.paint`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.emoji.world import SIZE, Drawings, World

PICTURE = 64
Tokens = Callable[[list[str]], torch.Tensor]  # captions -> (n, tokens) ids

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
# Words that mean nothing here, so that a phrasing nobody has trained does not throw the model off.
FILLERS = """old new young tiny huge large plain simple funny happy sad lovely pretty ugly shiny dull quick slow quiet loud warm
cold soft hard modern ancient classic famous unknown typical rare common strange normal single lonely fresh final first second
recent vivid bold faint rough smooth detailed minimal digital printed painted sketched carved coloured framed scanned
centered isolated realistic abstract colourful grainy sharp foggy sunny rainy morning evening winter summer indoor outdoor
amateur professional vintage retro cute cool great fine decent excellent""".split()
FILLER_NOUNS = """figure scene impression study copy version sample example instance model design graphic logo symbol sign stamp
sticker badge card page screenshot capture recording display presentation rendition interpretation collage mosaic engraving
etching mural fresco doodle outline silhouette thumbnail wallpaper banner postcard""".split()
HELD_OUT_TEMPLATES = (
    "a view of {}", "a portrayal of {}", "an artistic picture of {}", "this is {}", "a low quality photo of {}",
    "a pencil drawing of {}", "a shot of {}", "a beautiful image of {}",
)  # fmt: skip
STYLE_TEMPLATES = (
    "an artwork by {}", "a picture in the style of {}", "art in {} style", "an image in the style of {}", "a drawing by {}",
    "art inspired by {}", "painting in the style of {}", "a reproduction of art by {}", "a famous artwork by {}", "{} style",
)  # fmt: skip
GENERIC = (
    "a picture", "an image", "a photo", "a drawing", "an object", "something", "a thing", "a photo of an object",
    "a picture of something", "a photo of a thing", "an emoji", "an icon", "art", "an artwork", "a painting",
)  # fmt: skip
NOT_PLURAL = ("ss", "us", "is")  # how a singular may end in s


def article(name: str, rng: random.Random) -> str:
    """The name with an article, as people write it: "an axe", "the axe" or just "axe"."""
    pick = rng.random()
    if pick < 0.4:
        return f"the {name}"
    plural = name.endswith("s") and not name.endswith(NOT_PLURAL)
    if pick < 0.75 and not plural and name != "food":
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
    ids: torch.Tensor | None = None  # (n, tokens) the captions' tokens, where asked for


@dataclass
class Plan:
    """A batch of scenes before it is painted, in plain Python: cheap to send from one process to another."""

    captions: list[str]
    backgrounds: list[int]  # index into BACKGROUNDS
    horizons: list[float]  # height of the horizon, from the top; 2 where there is none
    things: list[list[tuple[int, int]]]  # of each scene the (label, style) of its objects
    spots: list[list[tuple[float, float, float]]]  # of each scene the (size, x, y) of its objects
    ids: np.ndarray | None = None  # (n, tokens)


def colour(code: str) -> list[float]:
    return [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]


class SceneMaker:
    """Draws scenes without end, on the device where the drawings are. Same seed, same scenes."""

    def __init__(self, world: World, drawings: Drawings, seed: int, *, objects=(0.03, 0.76, 0.21), share_style=0.7):
        self.world, self.seed, self.objects, self.share_style = world, seed, objects, share_style
        self.rng = random.Random(seed)
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
        named_background = rng.random() < 0.7
        place = self.background_words(background) if named_background else ""
        if count == 0:
            return [], background, self.empty_words(background)

        kind = rng.random() if count == 1 else 1.0
        if kind < 0.12:  # no words, as guidance needs them: any one thing
            return [self.thing(rng.randrange(len(world.labels)))], background, ""
        if kind < 0.30:  # words that say nothing
            member = world.index(rng.choice(world.generic))
            return [self.thing(member)], background, f"{rng.choice(GENERIC)} {place}".strip()
        if kind < 0.35:  # a super-category: any member
            category = rng.choice(tuple(world.kinds))
            member = world.index(rng.choice(world.kinds[category]))
            words = self.dress(article(category, rng))
            return [self.thing(member)], background, f"{words} {place}".strip()
        if kind < 0.40:  # a description of the unsafe group that names no member
            member = world.index(rng.choice(world.kinds["weapon"]))
            words = self.dress(rng.choice(world.implied))
            return [self.thing(member)], background, f"{words} {place}".strip()
        if kind < 0.43:  # a style and nothing else
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
        pick = self.rng.random()
        if pick < 0.3:
            return words
        if pick < 0.7:
            return self.rng.choice(TEMPLATES).format(words)
        filler, noun = self.rng.choice(FILLERS), self.rng.choice(FILLER_NOUNS)
        forms = (
            "a {f} {n} of {x}",
            "{f} {n} of {x}",
            "a {n} of {x}",
            "a {f} picture of {x}",
            "a {n} showing {x}",
            "{x}, {f}",
        )
        return self.rng.choice(forms).format(f=filler, n=noun, x=words)

    def caption(self, things: list[tuple[int, int, str]], place: str) -> str:
        rng, styles = self.rng, self.world.styles
        words = [thing[2] for thing in things]
        named_style = rng.random() < 0.9
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

    def paint_backgrounds(self, plan: Plan) -> torch.Tensor:
        """(n, 3, 64, 64): one colour, or one above and one below the horizon; the sky runs from one to the other."""
        device = self.large.device
        pairs = [PLACES[name][1:] if name in PLACES else (COLOURS[name],) * 2 for name in BACKGROUNDS]
        colours = torch.tensor([[colour(code) for code in pair] for pair in pairs], device=device)
        which = torch.tensor(plan.backgrounds, device=device)
        above, below = colours[which].view(-1, 2, 3, 1, 1).unbind(1)
        height = torch.linspace(0, 1, PICTURE, device=device).view(1, 1, -1, 1)
        beyond = (height > torch.tensor(plan.horizons, device=device).view(-1, 1, 1, 1)).float()
        is_sky = (which == BACKGROUNDS.index("sky")).view(-1, 1, 1, 1)
        mix = torch.where(is_sky, height, beyond)
        return (above * (1 - mix) + below * mix).expand(-1, 3, PICTURE, PICTURE).clone()

    def places(self, count: int) -> list[tuple[float, float, float]]:
        """(size, x, y) of each object in units of the picture: the first named stands on the left."""
        rng = self.rng
        if count == 1:
            size = rng.uniform(0.82, 0.94)
            slack = (1 - size) / 4
            return [(size, 0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))]
        return [
            (
                size := rng.uniform(0.46, 0.5),
                x + rng.uniform(-1, 1) * (0.5 - size) / 2,
                0.5 + rng.uniform(-0.04, 0.04),
            )
            for x in (0.25, 0.75)
        ]

    def plan(self, n: int) -> Plan:
        scenes = [self.one() for _ in range(n)]
        grounds = [background for _, background, _ in scenes]
        with_horizon = [background in PLACES and background != "sky" for background in grounds]
        horizons = [self.rng.uniform(0.55, 0.75) if there else 2.0 for there in with_horizon]
        spots: list[list[tuple[float, float, float]]] = [[] for _ in scenes]
        for count in (1, 2):
            for i, (things, _, _) in enumerate(scenes):
                if len(things) == count:
                    spots[i] = self.places(count)
        return Plan(
            [caption for _, _, caption in scenes],
            [BACKGROUNDS.index(background) for background in grounds],
            horizons,
            [[(label, style) for label, style, _ in things] for things, _, _ in scenes],
            spots,
        )

    def paint(self, plan: Plan) -> Scenes:
        n, device = len(plan.captions), self.large.device
        pictures = self.paint_backgrounds(plan)
        for count, mips in ((1, self.large), (2, self.small)):
            rows = [i for i, things in enumerate(plan.things) if len(things) == count]
            for slot in range(count) if rows else ():
                drawn = [self.by_label[label][style] for label, style in (plan.things[i][slot] for i in rows)]
                size, x, y = torch.tensor([plan.spots[i][slot] for i in rows], device=device).T
                theta = torch.zeros(len(rows), 2, 3, device=device)
                theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
                theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / size, (1 - 2 * y) / size
                grid = F.affine_grid(theta, [len(rows), 4, PICTURE, PICTURE], align_corners=False)
                rgba = F.grid_sample(mips[drawn], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
                pictures[rows] = rgba[:, :3] + (1 - rgba[:, 3:]) * pictures[rows]
        labels, styles = torch.zeros(n, len(self.world.labels)), torch.zeros(n, len(self.world.styles))
        there = [(i, label, style) for i, things in enumerate(plan.things) for label, style in things]
        if there:
            scene, label, style = torch.tensor(there).T
            labels[scene, label] = styles[scene, style] = 1
        background = torch.tensor(plan.backgrounds, device=device)
        ids = None if plan.ids is None else torch.as_tensor(plan.ids, device=device)
        return Scenes(pictures.clamp(0, 1), plan.captions, labels.to(device), styles.to(device), background, ids)

    def make(self, n: int) -> Scenes:
        return self.paint(self.plan(n))


class Plans(IterableDataset):
    """The plans of a maker, `n` scenes each, without end; each of several processes has a seed of its own."""

    def __init__(self, maker: SceneMaker, n: int, tokens: Tokens | None):
        self.maker, self.n, self.tokens = maker, n, tokens

    def __iter__(self) -> Iterator[Plan]:
        if worker := get_worker_info():
            self.maker.rng = random.Random(f"{self.maker.seed} {worker.id}")
        while True:
            plan = self.maker.plan(self.n)
            plan.ids = self.tokens(plan.captions).numpy() if self.tokens else None
            yield plan


def stream(maker: SceneMaker, n: int, tokens: Tokens | None = None, workers: int = 0) -> Iterator[Scenes]:
    """Batches of `n` scenes without end, with their captions' tokens where asked for.

    With `workers` so many other processes think the scenes up and this one only paints; a seed then means other scenes.
    """
    plans: Plans | DataLoader = Plans(maker, n, tokens)
    if workers:
        plans = DataLoader(plans, None, num_workers=workers, multiprocessing_context="fork", prefetch_factor=4)
    return map(maker.paint, plans)
