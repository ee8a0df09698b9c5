"""The emoji model's detector: which of its things an image shows, in which style, or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.emoji.detector import FOLDER, NOTHING, SIZE, Detector, Recognition
from expunge.metric import Classifier, is_blank
from expunge.metrics._clip import resized


@dataclass(frozen=True)
class EmojiDetector(Classifier):
    """The probabilities of all labels, of all styles, and of *unrecognisable*.

    Labels and styles are both asked for by name. Blank images, and those that are no numbers, are
    unrecognisable whatever the network says.
    """

    folder: str = ""
    """Another detector's folder; by default the one that ships."""

    @property
    def _path(self) -> Path:
        return Path(self.folder) if self.folder else FOLDER

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The hash of its weights, its labels, thresholds, and accuracy on held-out drawings."""
        held_out = self._path / "held_out.json"
        settings = _load(self._path).settings
        return {
            "sha256": _digest(self._path),
            "labels": len(settings.label_names),
            "styles": list(settings.style_names),
            "nothing below": settings.nothing,
            "unrecognisable from": settings.unrecognisable,
            "held out": json.loads(held_out.read_text("utf8")) if held_out.is_file() else None,
        }

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the probabilities of labels, styles and unrecognisable, (n, labels + styles + 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        # nan would come out as nan, and rows are kept as numbers: black is unrecognisable, too.
        seen = _load(self._path)(resized(images.nan_to_num(), SIZE))
        broken = seen.unrecognisable.masked_fill(is_blank(images), 1.0)
        return torch.cat([seen.labels, seen.styles, broken[:, None]], 1)

    def recognition(self, rows: Tensor) -> Recognition:
        """What was measured, in the detector's own words."""
        settings = _load(self._path).settings
        sizes = [len(settings.label_names), len(settings.style_names), 1]
        labels, styles, broken = rows.split(sizes, 1)
        return Recognition(labels, styles, broken[:, 0], settings)

    def knows(self, label: str) -> bool:
        """Return whether the label is among its own."""
        settings = _load(self._path).settings
        return label in settings.label_names or label in settings.style_names

    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """Return whether one of the labels is what images show, (n,) in [0, 1], or nan.

        Args:
            rows: (n, width), from `measure`.
            labels: those that count as the concept.
            near: labels whose images count neither way.
            question: "top1", "present" or "probability".
        """
        seen = self.recognition(rows)
        names = seen.settings.label_names
        styles = [style for style in labels if style in seen.settings.style_names]
        wanted = [label for label in labels if label in names]
        if styles:
            # One image has one style, and several labels: styles compete among themselves alone.
            places = [seen.settings.style_names.index(style) for style in styles]
            if question == "probability":
                return seen.styles[:, places].amax(1)
            return torch.isin(seen.styles.argmax(1), torch.tensor(places)).float()
        if question == "probability":
            return seen.labels[:, [names.index(label) for label in wanted]].amax(1)
        if question == "present":
            return torch.stack([seen.has(label) for label in wanted]).any(0).float()
        tops = seen.top()
        return torch.tensor([float("nan") if top in near else float(top in wanted) for top in tops])

    def find_broken(self, rows: Tensor) -> Tensor:
        """Return which images are unrecognisable, (n,) bool."""
        return self.recognition(rows).broken()

    def describe(self, rows: Tensor) -> list[str]:
        """Return the best label of each image."""
        tops = self.recognition(rows).top()
        return ["background only" if top == NOTHING else top for top in tops]


@cache
def _load(folder: Path) -> Detector:
    return Detector.load(folder)


@cache
def _digest(folder: Path) -> str:
    _load(folder)  # says clearly what is missing
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
