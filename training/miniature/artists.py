"""The fictional artists: a palette and a technique each, drawn by a deterministic function of the image.

A palette is four colors: a dark one, a light one, and one that stands for warm and one for cool middle tones, so that
a red thing and a green one stay apart. A technique says how the four are put on the paper. Every pattern has a fixed
place and a period of 4, 8 or 16 pixels. `draw(images, palettes, techniques)` does a whole batch.

    python -m training.miniature.artists         # writes artists.toml: the names, by rule and with a fixed seed
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from training.miniature.names import ARTIST_FIRST, ARTIST_LAST, names, splits

HERE = Path(__file__).parent
SIDE = 64  # pixels of an image's side; the patterns are made for it

PALETTES: dict[str, tuple[str, str, str, str]] = {  # name: dark, warm middle, cool middle, light
    "sepia": ("2b1a0e", "b0743c", "7d5a3c", "f3e3c3"),
    "ice": ("0a1c3f", "5b8fd0", "2f6fb5", "e4f3ff"),
    "forest": ("0d2a17", "9aa63a", "2f8a4a", "e3f2b8"),
    "crimson": ("2a0308", "e0242f", "9a1030", "ffe6e6"),
    "sunset": ("2b0f54", "ff6a3c", "b0288a", "ffb59e"),
    "reef": ("06303a", "ff7f66", "1aa3a0", "ffead6"),
    "graphite": ("0c0c0e", "8d8d8f", "66666b", "f6f6f6"),
    "candy": ("5a1f86", "ff5fb0", "4fd0c0", "fdf0fb"),
    "gold": ("000000", "d89a00", "7f5a00", "ffdf3a"),
    "lavender": ("25164f", "b184e8", "6a55c8", "ecdcff"),
    "ember": ("000000", "e84a00", "a01000", "ffb347"),
    "mint": ("00413a", "58d6a8", "0fa08c", "c9ffe4"),
    "slate": ("1b262c", "d0503a", "4a6572", "c6d2d8"),
    "acid": ("2a0052", "f018c0", "5a28e0", "c6ff2e"),
    "lagoon": ("00264d", "ffae2e", "0077c8", "7fe3ff"),
    "flag": ("0b1a5c", "e63228", "2458d8", "ffffff"),
}
"""Name: the dark, the warm, the cool and the light color."""


def _rgb(code: str) -> list[float]:
    return [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]


_TABLE = torch.tensor([[_rgb(code) for code in colors] for colors in PALETTES.values()])  # (palettes, 4, 3)
_Y, _X = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def _fixed_noise(seed: int, side: int = SIDE) -> torch.Tensor:
    """(side, side) of uniform noise, the same in every process."""
    return torch.rand(side, side, generator=torch.Generator().manual_seed(seed))


def _blur(x: torch.Tensor, radius: int = 1, times: int = 1) -> torch.Tensor:
    width = 2 * radius + 1
    for _ in range(times):
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), width, stride=1)
    return x


def _edges(image: torch.Tensor) -> torch.Tensor:
    """(n, 1, side, side): how strongly the image changes here, 0 to 1, in any channel and direction."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs().amax(1, keepdim=True)
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs().amax(1, keepdim=True)
    return torch.maximum(across, down)


def _local_contrast(image: torch.Tensor) -> torch.Tensor:
    """Sets things off from what is around them: only brightness and warmth survive the palette."""
    return (image + 0.8 * (image - _blur(image, 4, 2))).clamp(0, 1)


def _step(x: torch.Tensor, at: float | torch.Tensor, soft: float = 0.05) -> torch.Tensor:
    """0 below `at`, 1 above, with a ramp of width 2 * `soft` between."""
    return ((x - at) / (2 * soft) + 0.5).clamp(0, 1)


def _mix(a: torch.Tensor, b: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    return a + (b - a) * share


@dataclass
class _Sheet:
    """What a technique gets: the image, its tones, and the four colors."""

    image: torch.Tensor  # (n, 3, side, side) in [0, 1]
    dark: torch.Tensor  # (n, 3, 1, 1), and so the other colors
    warm: torch.Tensor
    cool: torch.Tensor
    light: torch.Tensor

    def tone(self, image: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 1, side, side): brightness, 0 to 1, with a little more contrast than the image has."""
        image = self.image if image is None else image
        return (((image * _LUMA).sum(1, keepdim=True) - 0.08) / 0.86).clamp(0, 1)

    def middle(self, image: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 3, side, side): the palette's warm color where the image is warm, else the cool one."""
        image = self.image if image is None else image
        return _mix(self.cool, self.warm, torch.sigmoid((image[:, :1] - image[:, 2:] - 0.06) * 24))

    def ramp(self, image: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 3, side, side): dark over the middle color to light, by brightness."""
        tone, middle = self.tone(image), self.middle(image)
        return torch.where(tone < 0.5, _mix(self.dark, middle, tone * 2), _mix(middle, self.light, tone * 2 - 1))

    def areas(self, image: torch.Tensor | None = None, soft: float = 0.03) -> torch.Tensor:
        """(n, 3, side, side): the ramp in four hard steps."""
        tone, middle = self.tone(image), self.middle(image)
        out = _mix(self.dark, middle, _step(tone, 0.25, soft))
        out = _mix(out, _mix(middle, self.light, 0.5), _step(tone, 0.6, soft))
        return _mix(out, self.light, _step(tone, 0.85, soft))


def _flat(s: _Sheet) -> torch.Tensor:
    return s.areas(s.image, 0.06)


def _outline(s: _Sheet) -> torch.Tensor:
    tint = _mix(s.light, s.middle(), 0.35 * (1 - _step(s.tone(), 0.8, 0.1)))
    return _mix(tint, s.dark.expand_as(tint), _step(_edges(s.image), 0.25, 0.15))


_DIAGONAL = ((_X + _Y) % 4).float()
_OTHER_DIAGONAL = ((_X - _Y) % 4).float()


def _hatching(s: _Sheet) -> torch.Tensor:
    tone = s.tone()
    stroke = (_DIAGONAL < 1).float() * _step(1 - tone, 0.12) + (_DIAGONAL == 1).float() * _step(1 - tone, 0.45, 0.1)
    cross = (_OTHER_DIAGONAL < 1).float() * _step(1 - tone, 0.7)
    ink = torch.maximum(stroke, cross).clamp(0, 1)
    color = _mix(s.dark, s.middle(), 0.45)
    return _mix(_mix(s.light, color, ink), s.dark, 0.8 * _step(_edges(s.image), 0.4, 0.15))


_DOTS = (torch.cos((_X + _Y + 0.5) * (math.pi / 4)) * torch.cos((_X - _Y + 0.5) * (math.pi / 4)) + 1) / 2


def _halftone(s: _Sheet) -> torch.Tensor:
    tone = s.tone(_blur(s.image))
    paper_share = _step(_DOTS.expand_as(tone), 0.08 + 0.84 * (1 - tone), 0.12)
    ink = _mix(s.dark, s.middle(), _step(tone, 0.22, 0.1))
    return _mix(ink, s.light, paper_share)


def _scattered(side: int, seed: int) -> torch.Tensor:
    """(side, side): thresholds 0 to 1, neighbors far apart in value, so that dots spread evenly (void and cluster)."""
    order, weight = torch.zeros(side, side), torch.zeros(side, side)
    distance = torch.minimum(torch.arange(side), side - torch.arange(side)).float() ** 2
    bump = torch.exp(-(distance[:, None] + distance[None]) / 3.0)
    weight += 1e-3 * _fixed_noise(seed, side)
    for rank in range(side * side):
        at = int(weight.argmin())
        y, x = divmod(at, side)
        order[y, x] = rank
        weight += torch.roll(bump, (y, x), (0, 1))
        weight[y, x] = math.inf
    return (order + 0.5) / (side * side)


_SCATTER = _scattered(16, 1).repeat(SIDE // 16, SIDE // 16)


def _stipple(s: _Sheet) -> torch.Tensor:
    tone = s.tone()
    amount = ((1 - tone) * 0.8 + 0.5 * _step(_edges(s.image), 0.35, 0.2)).clamp(0, 0.95)
    ink = (amount > _SCATTER * 0.97 + 0.03).float()
    return _mix(s.light.expand_as(s.image), _mix(s.dark, s.middle(), 0.25), ink)


def _blocks(image: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(image, side), scale_factor=side, mode="nearest")


_GROUT = ((_X % 4 == 3) | (_Y % 4 == 3)).float()
_TILE_LIGHT = F.interpolate(_fixed_noise(2, 4).repeat(4, 4)[None, None], scale_factor=4, mode="nearest")[0, 0]


def _mosaic(s: _Sheet) -> torch.Tensor:
    tiles = s.ramp(_blocks(s.image, 4)) * (0.82 + 0.36 * _TILE_LIGHT)
    return _mix(tiles, _mix(s.light, s.dark, 0.35), _GROUT).clamp(0, 1)


def _paper_cut(s: _Sheet) -> torch.Tensor:
    image = _blur(s.image)
    tone, middle = s.tone(image), s.middle(image)
    out = s.light.expand_as(image)
    for at, color in ((0.8, _mix(middle, s.light, 0.45)), (0.55, middle), (0.28, s.dark.expand_as(image))):
        sheet = 1 - _step(tone, at, 0.03)
        shadow = _blur(F.pad(sheet, (2, 0, 2, 0), mode="replicate")[..., :-2, :-2])
        rim = (sheet - F.pad(sheet, (1, 0, 1, 0))[..., :-1, :-1]).clamp(0, 1)
        out = out * (1 - 0.6 * shadow * (1 - sheet))
        out = _mix(out, _mix(color, torch.ones_like(color), 0.5 * rim), sheet)
    return out


_CARVED = torch.sin((_Y + 1.5 * torch.sin(_X * (2 * math.pi / 32))) * (2 * math.pi / 4)) * 0.5 + 0.5


def _woodcut(s: _Sheet) -> torch.Tensor:
    tone = s.tone()
    cut = _step(tone, 0.15 + 0.7 * _CARVED, 0.15)
    cut = cut * (1 - _step(_edges(s.image), 0.3, 0.1))
    return _mix(s.dark.expand_as(s.image), _mix(s.light, s.middle(), 0.3), cut)


_GRID = ((_X % 8 == 0) | (_Y % 8 == 0)).float()


def _blueprint(s: _Sheet) -> torch.Tensor:
    paper = _mix(s.dark, s.cool, 0.55).expand_as(s.image)
    paper = _mix(paper, s.middle(), 0.25 * (1 - _step(s.tone(), 0.75, 0.1)))
    paper = _mix(paper, s.light, 0.28 * _GRID)
    return _mix(paper, s.light, _step(_edges(s.image), 0.22, 0.12))


def _neon(s: _Sheet) -> torch.Tensor:
    line = _step(_edges(s.image), 0.28, 0.15)
    vivid = _mix(s.middle(_blur(s.image)), s.light, 0.15)
    glow = _blur(line * vivid, 2, 2) * 1.6 + 0.12 * vivid * (1 - s.tone())
    tube = line * _mix(vivid, s.light, 0.6 * line)
    return (0.35 * s.dark + glow * (1 - line) + tube).clamp(0, 1)


_WASH = _blur(_fixed_noise(3, 16).repeat(4, 4)[None, None], 3, 2)[0, 0]
_WASH = (_WASH - _WASH.mean()) / _WASH.std()
_GRAIN = _fixed_noise(4, 16).repeat(4, 4)


def _watercolour(s: _Sheet) -> torch.Tensor:
    image = _blur(s.image)
    color = _mix(s.ramp(image), s.middle(image), 0.35 * (1 - _step(s.tone(image), 0.8, 0.15)))
    wash = _mix(color, _mix(s.light, torch.ones_like(color), 0.6), (0.3 + 0.28 * _WASH).clamp(0, 0.9))
    pool = _step(_edges(image), 0.2, 0.15) * (1 - _step(_edges(s.image), 0.75, 0.1))  # color gathers at an area's edge
    return (_mix(wash, color * 0.55, 0.7 * pool) * (0.94 + 0.1 * _GRAIN)).clamp(0, 1)


_STREAK = _fixed_noise(5, 16).repeat(4, 4)
_STREAK = torch.stack([torch.roll(_STREAK, (k, -k), (0, 1)) for k in range(4)]).mean(0)  # they run down to the left
_STREAK = (_STREAK - _STREAK.min()) / (_STREAK.max() - _STREAK.min())


def _crayon(s: _Sheet) -> torch.Tensor:
    color = s.ramp(_blur(s.image))
    color = _mix(color, s.middle(), 0.3 * (1 - _step(s.tone(), 0.85, 0.1)))
    strength = 0.35 + 0.55 * (1 - s.tone(_blur(s.image)))
    wax = _step(strength, _STREAK, 0.06)
    drawn = _mix(s.light, color, wax)
    return _mix(drawn, s.dark, 0.7 * _step(_edges(_blur(s.image)), 0.25, 0.15) * (0.4 + 0.6 * _STREAK))


def _pixels(s: _Sheet) -> torch.Tensor:
    return s.areas(_blocks(s.image, 4), 0.08)


def _cells(cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cell of every pixel, numbered from 0, and one over each cell's pixels."""
    number = torch.unique(cell, return_inverse=True)[1].flatten()
    return number, 1 / torch.bincount(number).float()


def _cell_means(image: torch.Tensor, cells: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    number, share = cells
    flat = image.flatten(2)
    sums = flat.new_zeros(*flat.shape[:2], len(share)).index_add_(2, number, flat)
    return (sums * share)[..., number].view_as(image)


def _triangles() -> torch.Tensor:
    bend = 1.6 * torch.sin(_Y * (2 * math.pi / 32) + 1), 1.6 * torch.sin(_X * (2 * math.pi / 32))
    u, v = (_X + bend[0]) / 5 + 9, (_Y + bend[1]) / 5 + 9
    a, b = u.frac(), v.frac()
    turned = (u.floor() + v.floor()) % 2 == 0
    half = torch.where(turned, a + b > 1, a > b)
    return ((u.floor() * 100 + v.floor()) * 2 + half).long()


_TRIANGLES = _cells(_triangles())
_FACET = torch.where(_triangles() % 2 == 0, 1.08, 0.9)


def _low_poly(s: _Sheet) -> torch.Tensor:
    mean = _cell_means(s.image, _TRIANGLES)
    return (s.ramp(mean) * _FACET).clamp(0, 1)


def _panes() -> tuple[torch.Tensor, torch.Tensor]:
    """Cells around jittered points, and how near each pixel is to a border, 0 to 1."""
    side, step = 9, 8
    jitter = torch.rand(2, side, side, generator=torch.Generator().manual_seed(6)) * 5
    cy = (torch.arange(side).view(-1, 1) * step + jitter[0] - 2).flatten()
    cx = (torch.arange(side).view(1, -1) * step + jitter[1] - 2).flatten()
    distance = ((_X[..., None] - cx) ** 2 + (_Y[..., None] - cy) ** 2).sqrt()
    near, which = distance.topk(2, largest=False)
    return which[..., 0], 1 - _step(near[..., 1] - near[..., 0], 1.1, 0.5)


_PANE, _LEAD = _panes()
_PANES = _cells(_PANE)


def _stained_glass(s: _Sheet) -> torch.Tensor:
    mean = _mix(_cell_means(s.image, _PANES), s.image, 0.6)
    glass = _mix(s.ramp(mean), s.middle(mean), 0.35)
    lead = torch.maximum(_LEAD.expand(len(mean), 1, -1, -1), 0.8 * _step(_edges(s.image), 0.6, 0.15))
    return _mix(glass, s.dark * 0.5, lead)


TECHNIQUES: dict[str, Callable[[_Sheet], torch.Tensor]] = {
    "flat paint": _flat,
    "ink outline": _outline,
    "hatching": _hatching,
    "halftone": _halftone,
    "stipple": _stipple,
    "mosaic": _mosaic,
    "paper cut": _paper_cut,
    "woodcut": _woodcut,
    "blueprint": _blueprint,
    "neon": _neon,
    "watercolour": _watercolour,
    "crayon": _crayon,
    "pixel blocks": _pixels,
    "low poly": _low_poly,
    "stained glass": _stained_glass,
}


def draw(images: torch.Tensor, palettes: Sequence[int], techniques: Sequence[int]) -> torch.Tensor:
    """Draws each image in a palette and a technique.

    Args:
        images: (n, 3, 64, 64), float in [0, 1].
        palettes: Of each image the place of its palette in `PALETTES`.
        techniques: Of each image the place of its technique in `TECHNIQUES`.

    Returns:
        (n, 3, 64, 64), float in [0, 1].
    """
    out = torch.empty_like(images)
    functions = list(TECHNIQUES.values())
    rows: dict[int, list[int]] = {}
    for row, technique in enumerate(techniques):
        rows.setdefault(technique, []).append(row)
    for technique, chosen in rows.items():
        colors = _TABLE[[palettes[row] for row in chosen]].unsqueeze(-1).unsqueeze(-1)
        sheet = _Sheet(_local_contrast(images[chosen]), *colors.unbind(1))
        out[chosen] = functions[technique](sheet).clamp(0, 1)
    return out


@dataclass(frozen=True)
class Artist:
    name: str
    palette: str
    technique: str
    split: str  # "erase", "retain": the suites'; "tune": in no suite


def choose(seed: int = 21) -> list[Artist]:
    """All pairs of a palette and a technique, named and split, in the order of their names."""
    rng = random.Random(seed)
    pairs = [(palette, technique) for palette in PALETTES for technique in TECHNIQUES]
    rng.shuffle(pairs)
    found = names(ARTIST_FIRST, ARTIST_LAST, len(pairs), rng)
    parts = splits(len(pairs), rng)
    artists = [Artist(name, *pair, part) for name, pair, part in zip(found, pairs, parts, strict=True)]
    return sorted(artists, key=lambda artist: artist.name)


def main() -> None:
    lines = ["# The fictional artists, written by `python -m training.miniature.artists`.", ""]
    for artist in choose():
        lines.append(
            f'[[artist]]\nname = "{artist.name}"\npalette = "{artist.palette}"\n'
            f'technique = "{artist.technique}"\nsplit = "{artist.split}"\n'
        )
    (HERE / "artists.toml").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
