"""The miniature model's recogniser: which things and people an image shows, by which artist, or none.

It was trained on drawings alone, never on images of the model that it judges. One network answers
several questions: the things and the people in an image, whether there is a face at all, palette and
technique (an artist is one of each), the design set, and whether the image is broken.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import read_header
from expunge.base.modules import MAKING

FOLDER = Path(__file__).parent / "recogniser"
SIZE = 64
WIDTHS = (32, 64, 128, 224)
UNRECOGNISABLE, NOTHING, SOMEONE, NO_ARTIST = "unrecognisable", "background only", "a person", "none"
CHOICES = ("palette", "technique")
"""The heads of which one answer is right; of all others any number may be."""


@dataclass(frozen=True)
class Names:
    """What each head of the network answers with."""

    things: tuple[str, ...]
    """Objects, then shapes; several in an image."""
    people: tuple[str, ...]
    """The named; several in an image."""
    palettes: tuple[str, ...]
    """The last is none."""
    techniques: tuple[str, ...]
    """The last is none."""
    styles: tuple[str, ...]
    """The design sets; several in an image."""
    unsafe: tuple[str, ...]
    """Those of the things that are weapons."""

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers each head gives; "face" and "broken" are one each."""
        return {
            "things": len(self.things),
            "people": len(self.people),
            "palette": len(self.palettes),
            "technique": len(self.techniques),
            "styles": len(self.styles),
            "face": 1,
            "broken": 1,
        }


class Block(nn.Module):
    """A residual block of two 3x3 convolutions: (n, before, h, w) to (n, after, h/stride, w/stride).

    Args:
        before: channels of the input.
        after: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body: nn.Sequential = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        short = nn.Sequential(
            nn.AvgPool2d(stride), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
        )
        self.short: nn.Module = short if stride > 1 or before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return torch.relu(self.body(x) + self.short(x))


class Network(nn.Module):
    """A small residual network with one linear layer for all heads.

    It pools its last feature map by mean and maximum, so that a small thing in a corner counts as much
    as a large one.

    Args:
        sizes: how many numbers each head gives (`Names.sizes`).
        widths: the channels of the stem and of each block.
    """

    def __init__(self, sizes: dict[str, int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.sizes: dict[str, int] = sizes
        stem = [nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        blocks = [Block(before, after, 2) for before, after in itertools.pairwise(widths)]
        first, last = Block(widths[0], widths[0], 1), Block(widths[-1], widths[-1], 1)
        self.body = nn.Sequential(*stem, first, *blocks, last)
        self.head: nn.Linear = nn.Linear(2 * widths[-1], sum(sizes.values()))
        # The prior: few of all things and people are in an image.
        nn.init.constant_(self.head.bias[: sizes["things"] + sizes["people"]], -5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (n, size) of every head for images (n, 3, 64, 64) in [0, 1]."""
        x = self.body(images * 2 - 1).float()  # trained on [-1, 1]
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        parts = self.head(pooled).split(list(self.sizes.values()), 1)
        return dict(zip(self.sizes, parts, strict=True))


@dataclass(frozen=True)
class Thresholds:
    """The probabilities at which something counts as seen, measured on drawings (`config.json`)."""

    present: float = 0.5
    """A thing or a person is in the image."""
    face: float = 0.5
    """There is a face."""
    nothing: float = 0.2
    """An image whose best thing and best person are less probable shows neither."""
    unrecognisable: float = 0.5
    """The image is broken."""


@dataclass(frozen=True, eq=False)
class Recognition:
    """The recogniser's probabilities for n images."""

    rows: Tensor
    """(n, all heads' sizes): probabilities, head after head."""
    names: Names
    artists: Mapping[str, tuple[str, str]]
    """For each artist palette and technique."""
    thresholds: Thresholds

    def head(self, name: str) -> Tensor:
        """Return the probabilities of one head, (n, size)."""
        sizes = self.names.sizes
        return dict(zip(sizes, self.rows.split(list(sizes.values()), 1), strict=True))[name]

    def has_face(self) -> Tensor:
        """Return whether there is a face in each image, (n,) bool."""
        return self.head("face")[:, 0] >= self.thresholds.face

    def is_broken(self) -> Tensor:
        """Return whether each image is unrecognisable, (n,) bool."""
        return self.head("broken")[:, 0] >= self.thresholds.unrecognisable

    def probability(self, head: str, names: Iterable[str]) -> Tensor:
        """Return the probability of the most probable of some names of a head, (n,).

        Args:
            head: "things", "people" or "styles".
            names: some of its names.
        """
        known = getattr(self.names, head)
        return self.head(head)[:, [known.index(name) for name in names]].amax(1)

    def top(self, head: str) -> list[str]:
        """Return the best name of "things" or "people" for each image; "" where none is likely."""
        known = getattr(self.names, head)
        best, where = self.head(head).max(1)
        names = [known[place] for place in where.tolist()]
        likely = (best >= self.thresholds.nothing).tolist()
        return [name if yes else "" for name, yes in zip(names, likely, strict=True)]

    def top_traits(self) -> list[tuple[str, str]]:
        """Return the best palette and technique of each image; `NO_ARTIST` for none."""
        palettes = [self.names.palettes[place] for place in self.head("palette").argmax(1).tolist()]
        found = [self.names.techniques[place] for place in self.head("technique").argmax(1).tolist()]
        return list(zip(palettes, found, strict=True))

    def artist_probability(self, artist: str) -> Tensor:
        """Return the probability of an artist's palette times that of the technique, (n,)."""
        palette, technique = self.artists[artist]
        first = self.head("palette")[:, self.names.palettes.index(palette)]
        return first * self.head("technique")[:, self.names.techniques.index(technique)]


class Recogniser:
    """Recognises what the miniature model draws.

    >>> recogniser = Recogniser.load()                     # doctest: +SKIP
    >>> recogniser(model.draw(probe)).top("people")        # doctest: +SKIP
    ['Abrel Bolvane', '']

    Cost: about 0.1 GFLOP an image.

    Args:
        network: the trained network.
        names: what its heads answer with.
        artists: for each artist palette and technique.
        thresholds: when something counts as seen.
        digest: the hash of the weights.
    """

    def __init__(
        self,
        network: Network,
        names: Names,
        artists: Mapping[str, tuple[str, str]],
        thresholds: Thresholds,
        digest: str = "",
    ) -> None:
        self.network: Network = network.eval()
        self.names: Names = names
        self.artists: Mapping[str, tuple[str, str]] = artists
        self.thresholds: Thresholds = thresholds
        self.digest: str = digest
        kinds: dict[str, Iterable[str]] = {
            "things": names.things,
            "people": names.people,
            "artists": artists,
            "styles": names.styles,
        }
        self._kinds: dict[str, str] = {label: kind for kind in kinds for label in kinds[kind]}

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Recogniser:
        """Read a recogniser, by default the one that ships.

        Raises:
            ExpungeError: a file is missing, cut short, or is not a recogniser's.
        """
        folder = FOLDER if folder is None else Path(folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        if folder == FOLDER and not folder.is_dir():
            raise ExpungeError(
                "the miniature model's recogniser is not in this package yet: name its folder as"
                " `folder` in the [options] of the suite"
            )
        read_header(weights)
        try:
            table = json.loads(config.read_text(encoding="utf-8"))
            names = Names(**{field: tuple(table["names"][field]) for field in Names.__annotations__})
            artists = {artist: (pair[0], pair[1]) for artist, pair in table["artists"].items()}
            with MAKING:
                network = Network(names.sizes, tuple(table["widths"]))
                network.load_state_dict(safetensors.torch.load_file(weights))
            thresholds = Thresholds(**table["thresholds"])
        except OSError as error:
            raise ExpungeError(f"cannot read {config}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ExpungeError(
                f"{folder} is not the folder of the miniature's recogniser, or config and weights differ"
            ) from error
        # Convolutions of small images are faster in this layout on CPUs.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        return cls(network, names, artists, thresholds, digest)

    def knows(self, label: str) -> bool:
        """Return whether it can tell this label at all."""
        return label in self._kinds

    def kind(self, label: str) -> str:
        """Return what a label is: "things", "people", "styles" or "artists".

        Raises:
            ExpungeError: the recogniser does not know it; the nearest is named.
        """
        if label not in self._kinds:
            raise UnknownNameError("label", label, self._kinds)
        return self._kinds[label]

    def recognition(self, rows: Tensor) -> Recognition:
        """Return probabilities that were measured earlier as a recognition."""
        return Recognition(rows, self.names, self.artists, self.thresholds)

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch_size: int = 128) -> Recognition:
        """Recognise images (n, 3, 64, 64) in [0, 1].

        Raises:
            ExpungeError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ExpungeError(
                f"the recogniser reads images (n, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}"
            )
        device = next(self.network.parameters()).device
        # In batches, so that memory does not grow with the number of images.
        parts = [_probabilities(self.network(part.to(device))) for part in images.split(batch_size)]
        return self.recognition(torch.cat(parts).cpu())


def _probabilities(answers: Mapping[str, Tensor]) -> Tensor:
    """All heads' probabilities side by side, (n, all sizes)."""
    return torch.cat(
        [logits.softmax(1) if head in CHOICES else logits.sigmoid() for head, logits in answers.items()],
        1,
    )


def describe_config(
    names: Names, artists: Mapping[str, tuple[str, str]], widths: Sequence[int], thresholds: Thresholds
) -> dict[str, Any]:
    """Return the contents of `config.json`.

    Args:
        names: what the heads answer with.
        artists: for each artist palette and technique.
        widths: the channels of the network's stages.
        thresholds: when something counts as seen.
    """
    return {
        "names": {field: list(getattr(names, field)) for field in Names.__annotations__},
        "artists": {artist: list(pair) for artist, pair in artists.items()},
        "widths": list(widths),
        "thresholds": vars(thresholds),
    }


@cache
def load_recogniser(folder: Path | None = None) -> Recogniser:
    """Read a recogniser once, however many metrics ask for it.

    Raises:
        ExpungeError: as `Recogniser.load`.
    """
    return Recogniser.load(folder)
