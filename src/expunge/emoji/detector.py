"""The emoji model's detector: classifies what an image shows, in which style, or that it is broken.

It was trained on the real drawings only, never on images of the model that it judges. It answers two
different questions: *what is it* (`Recognition.top`, one label an image) and *is this in it at all*
(`Recognition.has`, one label at a time, against that label's own threshold).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import read_header
from expunge.base.modules import MAKING

FOLDER = Path(__file__).parent / "detector"
SIZE = 64
UNRECOGNISABLE, NOTHING = "unrecognisable", "nothing"


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
        self.short: nn.Sequential = nn.Sequential(
            nn.AvgPool2d(stride), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return torch.relu(self.body(x) + self.short(x))


class Network(nn.Module):
    """A small residual network with one linear head for labels, styles and *unrecognisable*.

    It strides early, and pools its last feature map by mean and maximum, so that a small object in a
    corner counts as much as a large one.

    Args:
        labels: how many labels the head has.
        styles: how many styles it has.
        widths: the channels of the stem and of each block.
    """

    def __init__(self, labels: int, styles: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes: list[int] = [labels, styles, 1]
        stem = [nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        blocks = [Block(before, after, 2) for before, after in itertools.pairwise(widths)]
        self.body = nn.Sequential(*stem, *blocks, Block(widths[-1], widths[-1], 1))
        self.head: nn.Linear = nn.Linear(2 * widths[-1], sum(self.sizes))
        nn.init.constant_(self.head.bias[:labels], -4)  # the prior: one label in fifty is in an image

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, labels), (n, styles) and (n,) of images (n, 3, 64, 64) in [0, 1]."""
        x = self.body(images * 2 - 1)  # trained on [-1, 1]
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        labels, styles, broken = self.head(pooled).split(self.sizes, 1)
        return labels, styles, broken[:, 0]


@dataclass(frozen=True)
class DetectorConfig:
    """The contents of `config.json`: the network's shape, the names, and the thresholds."""

    label_names: tuple[str, ...]
    """The names of the labels, in the order of the logits."""
    style_names: tuple[str, ...]
    """The names of the styles, in the order of the logits."""
    widths: tuple[int, ...]
    """The channels of the network's stages."""
    thresholds: tuple[float, ...]
    """The probability at which each label is present: 1 % false positives on two-object scenes."""
    nothing: float
    """An image whose best label is less probable than this shows a background and nothing else."""
    unrecognisable: float
    """The probability at which an image counts as broken: 1 % false positives on real scenes."""


@dataclass(frozen=True)
class Recognition:
    """The detector's probabilities for n images, each label by itself."""

    labels: Tensor
    """(n, labels)"""
    styles: Tensor
    """(n, styles)"""
    unrecognisable: Tensor
    """(n,): noise, blur or a muddle; a plain background is none of these."""
    settings: DetectorConfig

    def __len__(self) -> int:
        return len(self.labels)

    def top(self) -> list[str]:
        """Return what each image shows: its best label, "nothing" or "unrecognisable"."""
        best, where = self.labels.max(1)
        # "Unrecognisable" is decided last, because noise may resemble any label or none.
        names = [self.settings.label_names[index] for index in where.tolist()]
        for i in range(len(self)):
            if best[i] < self.settings.nothing:
                names[i] = NOTHING
            if self.unrecognisable[i] >= self.settings.unrecognisable:
                names[i] = UNRECOGNISABLE
        return names

    def has(self, label: str) -> Tensor:
        """Return whether a label is in each image, whatever else is: (n,) bool.

        Raises:
            ExpungeError: the detector does not know the label.
        """
        names = self.settings.label_names
        if label not in names:
            raise UnknownNameError("label", label, names)
        index = names.index(label)
        return self.labels[:, index] >= self.settings.thresholds[index]

    def top_style(self) -> list[str]:
        """Return the most probable style of each image."""
        return [self.settings.style_names[index] for index in self.styles.argmax(1).tolist()]

    def broken(self) -> Tensor:
        """Return whether each image is unrecognisable: (n,) bool."""
        return self.unrecognisable >= self.settings.unrecognisable


class Detector:
    """Classifies the images of the emoji model.

    >>> detector = Detector.load()              # doctest: +SKIP
    >>> detector(model.draw(probe)).top()       # doctest: +SKIP
    ['airplane', 'airplane', 'unrecognisable']

    Cost: about 0.04 GFLOP an image; a thousand images in a second or two on two cores.
    """

    network: Network
    settings: DetectorConfig

    def __init__(self, network: Network, settings: DetectorConfig) -> None:
        self.network, self.settings = network.eval(), settings

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Detector:
        """Read a detector, by default the one that ships.

        Raises:
            ExpungeError: a file is missing, cut short, or is not a detector's.
        """
        folder = FOLDER if folder is None else Path(folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        read_header(weights)
        try:
            table = json.loads(config.read_text(encoding="utf-8"))
            many = {
                name: tuple(table[name])
                for name in ("label_names", "style_names", "widths", "thresholds")
            }
            settings = DetectorConfig(
                **many, nothing=table["nothing"], unrecognisable=table["unrecognisable"]
            )
            with MAKING:
                network = Network(len(settings.label_names), len(settings.style_names), settings.widths)
                network.load_state_dict(safetensors.torch.load_file(weights))
        except OSError as error:
            raise ExpungeError(f"cannot read {config}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ExpungeError(
                f"{folder} is not a detector's folder, or config and weights differ"
            ) from error
        # Convolutions of small images are faster in this layout on CPUs.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(network, settings)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.settings.label_names

    @property
    def style_names(self) -> tuple[str, ...]:
        """The names of the styles."""
        return self.settings.style_names

    @torch.inference_mode()
    def __call__(self, images: Tensor, batch_size: int = 128) -> Recognition:
        """Classify images (n, 3, 64, 64) in [0, 1].

        Raises:
            ExpungeError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ExpungeError(
                f"the detector reads images (n, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}"
            )
        # In batches, so that memory does not grow with the number of images.
        device = next(self.network.parameters()).device
        batches = [self.network(batch.to(device).float()) for batch in images.split(batch_size)]
        labels, styles, broken = (
            torch.cat(parts).sigmoid().cpu() for parts in zip(*batches, strict=True)
        )
        return Recognition(labels, styles, broken, self.settings)
