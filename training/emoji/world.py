"""The world the emoji model can draw: labels, the names they answer to, and the drawings of each.

`world.toml` is the list of the small world, `full.toml` of the full one; the drawings come from npm packages of
openly licensed icon sets (licences: NOTICE).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tomllib
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
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
    "old noto": "@iconify-json/noto-v1@1.2.5",
    "flat fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "round flags": "@iconify-json/circle-flags@1.2.11",
    "flag icons": "flag-icons@7.5.0",
}
WORLD, WORK = HERE / "world.toml", Path("training/emoji/made")
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
    generic: tuple[str, ...]  # label names: what is shown where the words say nothing
    held_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # label name -> names kept out of training
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)  # label name -> further names of its drawings
    flag_styles: tuple[str, ...] = ()  # the styles that hold flags and nothing else

    @cached_property
    def _groups(self) -> dict[str, tuple[Label, ...]]:
        names = dict.fromkeys(label.group for label in self.labels)
        return {name: tuple(label for label in self.labels if label.group == name) for name in names}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {label.name: i for i, label in enumerate(self.labels)}

    def group(self, name: str) -> tuple[Label, ...]:
        return self._groups.get(name, ())

    def index(self, name: str) -> int:
        return self._places[name]


# Countries with an article, besides the United ..., ... Republic and ... Islands.
WITH_ARTICLE = (
    "Bahamas",
    "Comoros",
    "Gambia",
    "Isle of Man",
    "Maldives",
    "Netherlands",
    "Philippines",
    "Seychelles",
)


def flag_names(country: str, adjective: str) -> tuple[str, ...]:
    """How a flag is called; not every country has an adjective."""
    article = country.startswith("United") or country.endswith(("Republic", "Islands")) or country in WITH_ARTICLE
    the = "the " if article else ""
    with_adjective = (f"{adjective} flag",) if adjective else ()
    return (
        f"flag of {the}{country}",
        f"{country} flag",
        *with_adjective,
        f"national flag of {the}{country}",
    )


def place_options(parser: argparse.ArgumentParser) -> None:
    """What every stage asks for: which world, and where its work lies."""
    parser.add_argument("--world", type=Path, default=WORLD, help="what can be drawn: world.toml, or full.toml")
    parser.add_argument("--work", type=Path, default=WORK, help="its drawings, checkpoints and trained parts")


def read_world(path: Path = WORLD) -> World:
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
    for group, members in {**kinds, "generic": table["generic"]["shows"]}.items():
        if unknown := set(members) - known:
            raise ValueError(f"{path.name}: {group} names {sorted(unknown)}, which are not labels.")
    return World(
        tuple(labels),
        (*table["styles"], *table.get("flag_styles", ())),
        kinds,
        tuple(table["implied"]["phrases"]),
        tuple(table["implied"]["held_out"]),
        tuple(table["generic"]["shows"]),
        {name: tuple(names) for name, names in table.get("held_out_names", {}).items()},
        {name: tuple(names) for name, names in table.get("files", {}).items()},
        tuple(table.get("flag_styles", ())),
    )


def archive_of(package: str, folder: Path) -> Path:
    """The package's archive in `folder`, fetched by npm where it is not there yet."""
    stem = package.lstrip("@").replace("/", "-").rsplit("@", 1)
    archive = folder / f"{stem[0]}-{stem[1]}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return archive


def fetch(package: str, folder: Path) -> dict:
    """An iconify set: `{"icons": {name: {"body": svg, ...}}, "width": ..., "height": ...}`.

    A set of flags alone names them by their countries' codes: "flag-fr".
    """
    with tarfile.open(archive_of(package, folder)) as tar:
        if "package/icons.json" in tar.getnames():
            found = json.load(tar.extractfile("package/icons.json"))
            if "circle-flags" in package:
                found = found | {"icons": {f"flag-{code}": icon for code, icon in found["icons"].items()}}
            return found
        # flag-icons: one file a flag, named by its country's code
        icons = {}
        for member in tar:
            if match := re.fullmatch(r"package/flags/4x3/(.+)\.svg", member.name):
                svg = (tar.extractfile(member) or io.BytesIO()).read().decode()
                icons[f"flag-{match[1]}"] = {"body": svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]}
        return {"icons": icons, "width": 640, "height": 480}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("ü", "u").replace("&", "and")).strip("-")


def plain_slug(text: str) -> str:
    """The slug without accents and apostrophes."""
    return slug(unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode())


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


def find_icon(icons: dict, label: str, files: tuple[str, ...] = ()) -> dict | None:
    """The set's drawing of a label; `files` are further names to look for."""
    thing = label.removeprefix("flag: ")
    base = [slug(thing), *OTHER_NAMES.get(label, []), plain_slug(thing)]
    if label.startswith("flag: "):
        forms = ("flag-for-{}", "flag-for-flag-{}", "flag-{}", "flag-for-the-{}")
        base = [form.format(name) for name in base for form in forms]
    for name in (*base, *files):
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

    def to(self, device: torch.device) -> Drawings:
        return Drawings(self.pixels.to(device), self.label, self.style)


def load_drawings(world: World, folder: Path) -> Drawings:
    """Fetches, rasterises and keeps the drawings in `folder`; the second call reads them from there."""
    from safetensors.torch import load_file, save_file

    cache = folder / "drawings.safetensors"
    if not cache.exists():
        pixels, labels, styles = [], [], []
        for s, style in enumerate(world.styles):
            icons = fetch(PACKAGES[style], folder / "packages")
            for k, label in enumerate(world.labels):
                if icon := find_icon(icons, label.name, world.files.get(label.name, ())):
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
