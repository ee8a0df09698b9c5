"""Scenes of the miniature world, composed from the drawings without end.

    world = read_world(); drawings = load_drawings(world, work)
    maker = SceneMaker(world, drawings, seed=1)
    scenes = maker.make(256)           # scenes.images: (256, 3, 64, 64) uint8; scenes.structures: 256 dicts
    text = caption(scenes.structures[0], random.Random(2))       # anew for every epoch

A structure is plain JSON: `things` (each with `kind` "object", "person" or "shape", `name`, `spot` (size, x, y in units
of the image); objects have a `style`, people the number `person`, `face`, `clothes`, shapes a `color`), `background`,
`horizon`, `artist` ("" for none) and `use`: "empty" (the caption is the empty text), "generic" (words that say
nothing), else "named". `paint(structures)` draws a scene again from its structure. Scenes of use "empty" are what the
empty text means: train without any further dropping of captions.

    python -m training.miniature.scenes --count 100000 --seed 1 --work W      # W/scenes/SEED-000.npy and .jsonl, ...
    shard = load_shard(W / "scenes" / "1-000")                                # Scenes, the images mapped from disk

Same seed, same scenes; whoever trains takes other seeds than whoever judges (judges: 1000 and above).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from training.emoji.world import SIZE
from training.miniature import artists
from training.miniature.captions import PLACES, caption  # noqa: F401  (the module's interface)
from training.miniature.drawings import Drawings, load_drawings
from training.miniature.people import CLOTHES, FACES
from training.miniature.world import WORK, World, read_world

SIDE = 64  # pixels of an image's side
SHARD = 10_000  # scenes in a shard
COLORS = {
    "white": "ffffff", "black": "181818", "gray": "9a9a9a", "red": "e03c31", "orange": "f5932f", "yellow": "f7d94c",
    "green": "4caf50", "blue": "3d7edb", "purple": "8e5bc0", "pink": "f6a5c0", "brown": "8a5a3b",
}  # fmt: skip
# Name: the colors from top to bottom, and whether they run into each other.
BANDS = {
    "sky": (("8ec9f5", "cfe9fb"), True),
    "street": (("dfe3e6", "6f7377"), False),
    "ground": (("f1e4cf", "a5754a"), False),
    "grass": (("cdeafc", "6abf4b"), False),
    "sea": (("d7effc", "2f79b5"), False),
    "beach": (("a9dcf5", "2f9fc0", "f0dba5"), False),
    "desert": (("fbe3b0", "e0a852"), False),
    "snow": (("b9c6d3", "f7fafd"), False),
    "night": (("0b1030", "2a2f6b"), True),
    "room": (("ead9c2", "9c6b43"), False),
    "forest": (("9ccf9a", "2f6b3a", "4a3b22"), False),
    "mountains": (("bfe0f7", "7f8ea3", "7fae62"), False),
    "sunset": (("6a3d8f", "f07f4f", "fbd26a"), True),
}
BACKGROUNDS = (*COLORS, *BANDS)
PEOPLE = (0.44, 0.20)  # share of people among single things, and among several
# Share of single things that their caption names by their kind alone, and how often a weapon among those. Drawn by kind,
# for of all drawings so few are clothes or food that the miniature never learnt those words.
KINDS, WEAPONS = 0.26, 0.4
# Things stand on the latents' grid, in two sizes and few places. At free places and sizes a drawing has hundreds of forms
# in the latents, all of which the denoiser must learn apart: after 1.6 million samples it drew blots.
CELLS = 8  # latents of an image's side
HORIZONS = (4, 5, 6)  # cells from the top
LARGE, SMALL, WHOLE = 6, 4, 8  # cells of a thing's side; only a person fills the image
# Share of scenes by an artist with at most one thing, and with several; never of one clear thing.
ARTISTS = (0.56, 0.18)
Structure = dict[str, Any]


@dataclass
class Scenes:
    images: np.ndarray  # (n, 3, 64, 64) uint8
    structures: list[Structure]


def _rgb(code: str) -> list[float]:
    return [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def _shapes() -> dict[str, torch.Tensor]:
    """Shape -> (96, 96) coverage."""
    y, x = torch.meshgrid(*[(torch.arange(SIZE) - (SIZE - 1) / 2) / (SIZE / 2)] * 2, indexing="ij")
    heart = ((1.15 * x) ** 2 + (-1.15 * y + 0.1 - 0.62 * (1.15 * x).abs().sqrt()) ** 2).sqrt() - 0.85
    distance = {  # below zero inside
        "circle": (x**2 + y**2).sqrt() - 0.85,
        "square": torch.maximum(x.abs(), y.abs()) - 0.75,
        "triangle": torch.maximum(x.abs() * 0.87 - (y + 0.8) * 0.5, y - 0.75),
        "diamond": x.abs() + y.abs() - 0.9,
        "heart": heart,
        "cross": torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.25, torch.maximum(x.abs(), y.abs()) - 0.8),
    }
    return {name: (0.5 - value * SIZE / 4).clamp(0, 1) for name, value in distance.items()}


class SceneMaker:
    """Makes scenes without end. Same seed, same scenes."""

    def __init__(self, world: World, drawings: Drawings, seed: int, simple: float = 0.0):
        """`simple`: share of scenes with one large thing and no artist, to begin a denoiser with."""
        self.world, self.drawings, self.simple = world, drawings, simple
        self.rng = random.Random(seed)
        self.by_label: list[dict[str, int]] = [{} for _ in world.labels]
        for k, (label, style) in enumerate(zip(drawings.label, drawings.style, strict=True)):
            self.by_label[label][world.styles[style]] = k
        self.artist_traits = {a.name: t for a, t in zip(world.artists, world.artist_traits, strict=True)}
        self.shapes = _shapes()

    # -- what is in a scene ------------------------------------------------------------------------------------------

    def structure(self) -> Structure:
        rng, world = self.rng, self.world
        background = rng.choice(list(COLORS)) if rng.random() < 0.55 else rng.choice(list(BANDS))
        if rng.random() < 0.12:
            background = "white"
        scene: Structure = {"things": [], "background": background, "artist": "", "use": "named"}
        scene["horizon"] = rng.choice(HORIZONS) / CELLS
        count = rng.choices((0, 1, 2, 3, 4), (3, 54, 37, 3, 3))[0]
        if count == 1 and (pick := rng.random()) < 0.17:  # one clear thing, for words that say nothing
            scene["use"] = "empty" if pick < 0.11 else "generic"
            thing = self.object(world.label_index[rng.choice(world.shows)])
            thing["spot"] = [LARGE / CELLS, 0.5, 0.5]
            scene["things"] = [thing]
            scene["background"] = rng.choice(list(COLORS))
            return scene
        if count == 1 and rng.random() < KINDS:
            scene["use"] = "kind"
            scene["kind"] = (
                "weapon" if rng.random() < WEAPONS else rng.choice([k for k in world.kinds if k != "weapon"])
            )
            scene["things"] = [self.object(world.label_index[rng.choice(world.kinds[scene["kind"]])])]
            self.place(scene["things"])
            return scene
        simple = rng.random() < self.simple
        if simple:
            count = 1
        elif rng.random() < ARTISTS[count > 1]:
            scene["artist"] = rng.choice(world.artists).name
            count = min(count, 2)  # a technique needs room
        style = rng.choice(world.styles) if rng.random() < 0.75 else None  # often one style for all
        people: set[int] = set()
        while len(scene["things"]) < count:
            person = rng.random() < PEOPLE[count > 1] and len(people) < 2
            if person:
                thing = self.person(unnamed=rng.random() < 0.14)
                if thing["person"] in people:
                    continue
                people.add(thing["person"])
            elif rng.random() < (0.03 if count == 1 else 0.2):
                color = rng.choice([color for color in COLORS if color != scene["background"]])
                thing = {"kind": "shape", "name": rng.choice(world.shapes), "color": color}
            else:
                group = rng.choices(("ten", "objects", "unsafe"), (16, 70, 14))[0]
                thing = self.object(rng.choice(world.groups[group]), style)
            if all(thing["name"] != other["name"] or thing["kind"] == "person" for other in scene["things"]):
                scene["things"].append(thing)
        self.place(scene["things"], always_large=simple)
        return scene

    def object(self, label: int, style: str | None = None) -> dict[str, Any]:
        styles = list(self.by_label[label])
        # A further object has a drawing of its own, the others have two: 592 were too many to be learnt, and of four
        # drawings of each of the ten words the denoiser made a blend.
        count = 1 if label in self.world.groups["objects"] else 2
        styles = [styles[(label + k) % len(styles)] for k in range(min(count, len(styles)))]
        if style not in styles:
            style = self.rng.choice(styles)
        return {"kind": "object", "name": self.world.labels[label].name, "style": style}

    def person(self, unnamed: bool = False) -> dict[str, Any]:
        named = len(self.world.named)
        number = self.rng.randrange(named, len(self.world.people)) if unnamed else self.rng.randrange(named)
        face = self.rng.randrange(len(FACES))
        clothes = list(CLOTHES)[self.drawings.clothes[number][face]]
        name = self.world.people[number].name
        return {"kind": "person", "name": name, "person": number, "face": list(FACES)[face], "clothes": clothes}

    def place(self, things: list[dict[str, Any]], always_large: bool = False) -> None:
        """Gives each thing a size and a place, regardless of what it is."""
        rng = self.rng
        rows = (2,) if len(things) < 3 else (0, 4)  # one or two things: beside each other; more: in the quarters
        squares = [(SMALL, x, y) for x in (0, 4) for y in rows]
        rng.shuffle(squares)
        if len(things) == 1 and (always_large or rng.random() < 0.9):
            whole = things[0]["kind"] == "person" and not always_large and rng.random() < 0.4
            squares = [(WHOLE, 0, 0) if whole else (LARGE, 1, 1)]
        for thing, (side, x, y) in zip(things, squares, strict=False):
            thing["spot"] = [side / CELLS, (x + side / 2) / CELLS, (y + side / 2) / CELLS]

    # -- pixels ------------------------------------------------------------------------------------------------------

    def _grounds(self, structures: Sequence[Structure]) -> torch.Tensor:
        """(n, 3, 64, 64): one color, or bands; of three the middle one lies about the horizon."""
        images = torch.empty(len(structures), 3, SIDE, SIDE)
        height = (torch.arange(SIDE) + 0.5) / SIDE
        for image, scene in zip(images, structures, strict=True):
            name = scene["background"]
            if name in COLORS:
                image[:] = torch.tensor(_rgb(COLORS[name])).view(3, 1, 1)
                continue
            codes, runs = BANDS[name]
            colors = torch.tensor([_rgb(code) for code in codes])
            if runs:
                at = height * (len(codes) - 1)
                low = at.long().clamp(max=len(codes) - 2)
                column = torch.lerp(colors[low], colors[low + 1], (at - low).unsqueeze(1))
            else:
                borders = [scene["horizon"]] if len(codes) == 2 else [scene["horizon"] - 0.2, scene["horizon"]]
                column = colors[sum((height > border).long() for border in borders)]
            image[:] = column.T.unsqueeze(2)
        return images

    def _pixels(self, thing: Mapping[str, Any]) -> np.ndarray:
        """(4, 96, 96) uint8."""
        if thing["kind"] == "person":
            return self.drawings.people[thing["person"], list(FACES).index(thing["face"])]
        if thing["kind"] == "shape":
            covered = self.shapes[thing["name"]]
            color = torch.tensor([*_rgb(COLORS[thing["color"]]), 1.0]).view(4, 1, 1)
            return (covered * color * 255).round().to(torch.uint8).numpy()
        label = self.world.label_index[thing["name"]]
        return self.drawings.objects[self.by_label[label][thing["style"]]]

    def paint(self, structures: Sequence[Structure]) -> np.ndarray:
        """(n, 3, 64, 64) uint8: the scenes of these structures."""
        images = self._grounds(structures)
        for slot in range(max((len(scene["things"]) for scene in structures), default=0)):
            rows: dict[int, list[int]] = {}  # how often halved before it is placed -> scenes
            for i, scene in enumerate(structures):
                if slot < len(scene["things"]):
                    shrink = min(max(round(1 / scene["things"][slot]["spot"][0]), 1), 4)
                    rows.setdefault(shrink, []).append(i)
            for shrink, chosen in rows.items():
                things = [structures[i]["things"][slot] for i in chosen]
                pixels = torch.from_numpy(np.stack([self._pixels(thing) for thing in things])).float() / 255
                if shrink > 1:
                    pixels = F.avg_pool2d(pixels, shrink)
                size, x, y = torch.tensor([thing["spot"] for thing in things]).T
                theta = torch.zeros(len(chosen), 2, 3)
                theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
                theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / size, (1 - 2 * y) / size
                grid = F.affine_grid(theta, [len(chosen), 4, SIDE, SIDE], align_corners=False)
                rgba = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
                images[chosen] = rgba[:, :3] + (1 - rgba[:, 3:]) * images[chosen]
        by = [i for i, scene in enumerate(structures) if scene["artist"]]
        if by:
            traits = [self.artist_traits[structures[i]["artist"]] for i in by]
            images[by] = artists.draw(images[by].clamp(0, 1), *zip(*traits, strict=True))
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    def make(self, n: int) -> Scenes:
        structures = [self.structure() for _ in range(n)]
        return Scenes(self.paint(structures), structures)


# -- shards ----------------------------------------------------------------------------------------------------------


def write_shard(scenes: Scenes, stem: Path) -> None:
    """Writes `stem`.npy and `stem`.jsonl; the second is there only when both are whole."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".npy", ".jsonl"):
        beside = stem.with_name(f".{stem.name}{ending}")
        with beside.open("wb") as file:
            if ending == ".npy":
                np.save(file, scenes.images)
            else:
                file.writelines(json.dumps(structure).encode() + b"\n" for structure in scenes.structures)
        beside.replace(stem.with_name(stem.name + ending))


def load_shard(stem: Path) -> Scenes:
    """A shard that `write_shard` wrote; the images stay on disk until they are used."""
    lines = stem.with_name(stem.name + ".jsonl").read_text(encoding="utf-8").splitlines()
    return Scenes(np.load(stem.with_name(stem.name + ".npy"), mmap_mode="r"), [json.loads(line) for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders scenes ahead of training, in shards.")
    parser.add_argument("--count", type=int, required=True, help="how many scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; each process takes one of its own")
    parser.add_argument("--work", type=Path, default=WORK, help="where the drawings lie and the shards go")
    options = parser.parse_args()
    world = read_world()
    drawings, started, made = load_drawings(world, options.work), time.monotonic(), 0
    for number in range(-(-options.count // SHARD)):
        stem = options.work / "scenes" / f"{options.seed}-{number:03}"
        if stem.with_name(stem.name + ".jsonl").exists():
            continue
        maker = SceneMaker(world, drawings, options.seed * 1_000_003 + number)
        left = min(SHARD, options.count - number * SHARD)
        parts = [maker.make(min(250, left - at)) for at in range(0, left, 250)]
        write_shard(
            Scenes(np.concatenate([part.images for part in parts]), [s for part in parts for s in part.structures]),
            stem,
        )
        made += left
        print(f"{stem.name}: {made} scenes, {made / (time.monotonic() - started):.0f} a second", flush=True)


if __name__ == "__main__":
    main()
