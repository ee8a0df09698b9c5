"""The world the emoji model can draw: labels, the names they answer to, and the drawings of each.

`world.toml` is the list; the drawings come from npm packages of openly licensed icon sets (licences: NOTICE).
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tomllib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "emojione": "@iconify-json/emojione@1.2.3",
}
SIZE = 96  # drawings are rasterised larger than they are shown, so that a scene only ever shrinks them


@dataclass(frozen=True)
class Label:
    """One thing that can be drawn: its detector label, the names it answers to, and its group."""

    name: str
    names: tuple[str, ...]
    group: str  # "ten", "objects", "unsafe" or "flags"


@dataclass(frozen=True)
class World:
    labels: tuple[Label, ...]
    styles: tuple[str, ...]
    kinds: dict[str, tuple[str, ...]]  # super-category -> label names
    implied: tuple[str, ...]  # descriptions of the unsafe group that name no member
    implied_held_out: tuple[str, ...]

    def group(self, name: str) -> tuple[Label, ...]:
        return tuple(label for label in self.labels if label.group == name)

    def index(self, name: str) -> int:
        return next(i for i, label in enumerate(self.labels) if label.name == name)


def flag_names(country: str, adjective: str) -> tuple[str, ...]:
    the = "the " if country.startswith("United") or country.endswith("Republic") else ""
    return (f"flag of {the}{country}", f"{country} flag", f"{adjective} flag", f"national flag of {the}{country}")


def read_world(path: Path = HERE / "world.toml") -> World:
    table = tomllib.loads(path.read_text(encoding="utf8"))
    labels = [
        Label(name, tuple(names), group)
        for group in ("ten", "objects", "unsafe")
        for name, names in table[group].items()
    ]
    labels += [
        Label(f"flag: {country}", flag_names(country, adjective), "flags")
        for country, adjective in table["flags"].items()
    ]
    known = {label.name for label in labels}
    kinds = {kind: tuple(members) for kind, members in table["kinds"].items()}
    kinds["weapon"] = tuple(table["unsafe"])
    kinds["flag"] = tuple(label.name for label in labels if label.group == "flags")
    for kind, members in kinds.items():
        if unknown := set(members) - known:
            raise ValueError(f"world.toml: [kinds] {kind} names {sorted(unknown)}, which are not labels.")
    return World(
        tuple(labels),
        tuple(table["styles"]),
        kinds,
        tuple(table["implied"]["phrases"]),
        tuple(table["implied"]["held_out"]),
    )


def fetch(package: str, folder: Path) -> dict:
    """An iconify set: `{"icons": {name: {"body": svg, ...}}, "width": ..., "height": ...}`."""
    stem = package.lstrip("@").replace("/", "-").rsplit("@", 1)
    archive = folder / f"{stem[0]}-{stem[1]}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
        icons["chars"] = json.load(tar.extractfile("package/chars.json"))
    return icons


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("ü", "u").replace("&", "and")).strip("-")


# Where a set's file name is not the slug of the label.
OTHER_NAMES = {
    "delivery truck": ["delivery-truck"],
    "house": ["house", "house-building"],
    "flag: Türkiye": ["turkiye", "turkey"],
    "water pistol": ["water-pistol", "pistol"],
    "evergreen tree": ["evergreen-tree"],
    "wrapped gift": ["wrapped-gift", "wrapped-present"],
    "soft ice cream": ["soft-ice-cream"],
}


def find_icon(icons: dict, label: str) -> dict | None:
    base = [slug(label.removeprefix("flag: ")), *OTHER_NAMES.get(label, [])]
    if label.startswith("flag: "):
        base = [form.format(name) for name in base for form in ("flag-for-{}", "flag-for-flag-{}", "flag-{}", "flag-for-the-{}")]
    for name in base:
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name in icons["icons"]:
            return icons["icons"][name]
    return None


def rasterise(icons: dict, icon: dict) -> np.ndarray:
    """(SIZE, SIZE, 4) uint8, premultiplied alpha, so that shrinking leaves no dark fringe."""
    import resvg_py
    from PIL import Image

    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    rgba = np.asarray(Image.open(BytesIO(png)).convert("RGBA")).astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba.round().astype(np.uint8)


@dataclass(frozen=True)
class Drawings:
    """All drawings of a world. `pixels[k]` is one drawing of label `label[k]` in style `style[k]`."""

    pixels: torch.Tensor  # (n, 4, SIZE, SIZE) uint8, premultiplied
    label: torch.Tensor  # (n,) index into world.labels
    style: torch.Tensor  # (n,) index into world.styles


def load_drawings(world: World, folder: Path) -> Drawings:
    """Fetches, rasterises and keeps the drawings in `folder`; the second call reads them from there."""
    from safetensors.torch import load_file, save_file

    cache = folder / "drawings.safetensors"
    if not cache.exists():
        pixels, labels, styles = [], [], []
        for s, style in enumerate(world.styles):
            icons = fetch(PACKAGES[style], folder / "packages")
            for k, label in enumerate(world.labels):
                if icon := find_icon(icons, label.name):
                    pixels.append(rasterise(icons, icon))
                    labels.append(k)
                    styles.append(s)
                elif label.group != "flags":
                    print(f"{style} has no drawing of {label.name}")
        tensors = {
            "pixels": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
            "label": torch.tensor(labels),
            "style": torch.tensor(styles),
        }
        save_file(tensors, cache)
    tensors = load_file(cache)
    return Drawings(tensors["pixels"], tensors["label"], tensors["style"])
