"""Fetches and rasterises what scenes are made of: objects of four emoji sets, people, and plain shapes.

    python -m training.miniature.drawings --work W       # once; needs npm, node and resvg-py

Leaves in W: `objects.npy` (n, 4, 96, 96), `objects.json` (label and style of each), `people.npy` (people, faces, 4, 96,
96) and `people.json` (each drawing's clothes). All pixels are uint8 RGBA with premultiplied alpha.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from training.emoji.world import PACKAGES, SIZE, fetch, find_icon, rasterise
from training.miniature.people import CLOTHES, FACES, specification, svgs
from training.miniature.world import OTHER_FILES, WORK, World, read_world


@dataclass(frozen=True)
class Drawings:
    """All drawings, premultiplied uint8 RGBA of 96x96 pixels. `people` stays on disk until it is used."""

    objects: np.ndarray  # (n, 4, 96, 96); shapes are white
    label: list[int]  # of each object the place in world.labels
    style: list[int]  # of each object the place in world.styles
    people: np.ndarray  # (people, faces, 4, 96, 96)
    clothes: list[list[int]]  # of each drawing of a person the color of the clothes, a place in CLOTHES


def _rgba(png: bytes) -> np.ndarray:
    """(4, 96, 96) uint8, premultiplied."""
    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels.round().astype(np.uint8).transpose(2, 0, 1)


def _save(path: Path, save: Callable[[Path], object]) -> None:
    """Writes beside and moves, so that a broken run leaves nothing half-written."""
    beside = path.with_name("." + path.name)
    save(beside)
    beside.replace(path)


def draw_objects(world: World, work: Path) -> None:
    pixels, labels, styles = [], [], []
    for s, style in enumerate(world.styles):
        icons = fetch(PACKAGES[style], work / "packages")
        for k, label in enumerate(world.labels):
            if icon := find_icon(icons, label.name, OTHER_FILES.get(label.name, ())):
                pixels.append(rasterise(icons, icon).transpose(2, 0, 1))
                labels.append(k)
                styles.append(s)
            else:
                print(f"{style} has no drawing of {label.name}")
    facts = json.dumps({"labels": [world.labels[k].name for k in labels], "styles": [world.styles[s] for s in styles]})
    _save(work / "objects.npy", lambda path: _write_array(path, np.stack(pixels)))
    _save(work / "objects.json", lambda path: path.write_text(facts, encoding="utf-8"))


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def draw_people(world: World, work: Path) -> None:
    """Every person with every face; the clothes of each drawing are drawn by lot."""
    import resvg_py

    rng = random.Random(7)
    clothes = [[rng.randrange(len(CLOTHES)) for _ in FACES] for _ in world.people]
    colors = list(CLOTHES)
    array = np.zeros((len(world.people), len(FACES), 4, SIZE, SIZE), np.uint8)
    for start in range(0, len(world.people), 40):
        chosen = range(start, min(start + 40, len(world.people)))
        wanted = [
            specification(world.people[i], face, colors[color])
            for i in chosen
            for face, color in zip(FACES, clothes[i], strict=True)
        ]
        pictures = iter(svgs(wanted, work / "npm"))
        for i in chosen:
            for j in range(len(FACES)):
                png = resvg_py.svg_to_bytes(svg_string=next(pictures), width=SIZE, height=SIZE)
                array[i, j] = _rgba(bytes(png))
        print(f"people: {chosen[-1] + 1} of {len(world.people)}", flush=True)
    _save(work / "people.npy", lambda path: _write_array(path, _rounded(array)))
    facts = json.dumps({"people": _looks(world), "faces": list(FACES), "clothes": clothes})
    _save(work / "people.json", lambda path: path.write_text(facts, encoding="utf-8"))


def _looks(world: World) -> list[list[str]]:
    return [list(person.features) for person in world.people]


def _made_for(world: World, work: Path) -> bool:
    """Whether the people drawn in `work` are the world's."""
    if not (work / "people.json").exists():
        return False
    facts = json.loads((work / "people.json").read_text(encoding="utf-8"))
    return facts["people"] == _looks(world) and facts["faces"] == list(FACES)


def _rounded(people: np.ndarray) -> np.ndarray:
    """Busts end below in a curve, so that one that does not stand on the image's edge looks like a bust."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    inside = np.clip((1 - ((x - 0.5) / 0.56) ** 2 - ((y - 0.55) / 0.45) ** 4 * (y > 0.55)) * 12 + 0.5, 0, 1)
    inside = np.where(y > 0.6, inside, 1.0)
    return (people * inside).round().astype(np.uint8)


def load_drawings(world: World, work: Path = WORK) -> Drawings:
    """Reads the drawings; makes them first where they are not there yet, or are another world's."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = {label.name for label in world.labels}
    if not (work / "objects.json").exists() or wanted != set(
        json.loads((work / "objects.json").read_text(encoding="utf-8"))["labels"]
    ):
        draw_objects(world, work)
    if not _made_for(world, work):
        draw_people(world, work)
    facts = json.loads((work / "objects.json").read_text(encoding="utf-8"))
    return Drawings(
        np.load(work / "objects.npy"),
        [world.label_index[name] for name in facts["labels"]],
        [world.styles.index(name) for name in facts["styles"]],
        np.load(work / "people.npy", mmap_mode="r"),
        json.loads((work / "people.json").read_text(encoding="utf-8"))["clothes"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="where the drawings go")
    load_drawings(read_world(), parser.parse_args().work)


if __name__ == "__main__":
    main()
