"""Contact sheets: people with their names, one scene by every artist, and random scenes with captions.

python -m training.miniature.sheets --work W       # W/people.png, W/artists.png, W/scenes.png
"""

from __future__ import annotations

import argparse
import random
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from training.miniature.artists import PALETTES, TECHNIQUES
from training.miniature.captions import caption
from training.miniature.drawings import load_drawings
from training.miniature.people import FACES
from training.miniature.scenes import SceneMaker
from training.miniature.world import WORK, read_world


def sheet(images: np.ndarray, texts: list[str], columns: int, *, scale: int = 1, lines: int = 2) -> Image.Image:
    """Puts (n, 3, h, w) uint8 images in rows, each with its text below."""
    side, row = images.shape[-1] * scale, images.shape[-1] * scale + 11 * lines + 4
    out = Image.new("RGB", (columns * (side + 6), -(-len(images) // columns) * row), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = i % columns * (side + 6), i // columns * row
        out.paste(Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for k, line in enumerate(textwrap.wrap(text, side // 6)[:lines]):
            pen.text((x, y + side + 11 * k), line, fill="black")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="where the drawings lie and the sheets go")
    work = parser.parse_args().work
    world = read_world()
    maker = SceneMaker(world, load_drawings(world, work), 1000)

    def alone(number: int) -> dict:
        face = number % len(FACES)
        thing = {"kind": "person", "name": "", "person": number, "face": list(FACES)[face], "spot": [0.96, 0.5, 0.52]}
        return {"things": [thing], "background": "white", "artist": "", "horizon": 0.6}

    images = maker.paint([alone(k) for k in range(len(world.people))])
    sheet(images, [person.name or "unnamed" for person in world.people], 20, scale=1).save(work / "people.png")

    scene = alone(3)
    scene["things"][0]["spot"] = [0.62, 0.33, 0.69]
    scene["things"].append({"kind": "object", "name": "cat", "style": "noto", "spot": [0.4, 0.78, 0.72]})
    scene["background"] = "beach"
    drawn = {(a.palette, a.technique): a.name for a in world.artists}
    pairs = [(palette, technique) for palette in PALETTES for technique in TECHNIQUES if (palette, technique) in drawn]
    images = maker.paint([scene | {"artist": drawn[pair]} for pair in pairs])
    sheet(images, [drawn[pair] for pair in pairs], len(TECHNIQUES), scale=1).save(work / "artists.png")

    scenes, rng = maker.make(60), random.Random(5)
    texts = [caption(structure, rng, world) or "(empty)" for structure in scenes.structures]
    sheet(scenes.images, texts, 10, scale=2, lines=4).save(work / "scenes.png")


if __name__ == "__main__":
    main()
