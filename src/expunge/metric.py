"""The contract of a metric: it looks at images one by one and gives a row of numbers for each.

The rows are kept beside the images and never taken twice (`expunge.evaluation.image_cache`). What
becomes of them:

    Metric        the first number of the row, averaged over the images of a role
    Classifier    answers a suite's questions: is this concept in the image?
    Distance      one number for all images of a role against the original's, or real ones
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.base import image_files
from expunge.base.errors import ExpungeError
from expunge.base.fields import check_fields


@dataclass(frozen=True)
class Metric(ABC):
    """Something to measure on images. One subclass a file in `metrics/`; fields are options.

    Raises:
        TypeError: a subclass does not say whether `higher_is_better`.
    """

    higher_is_better: ClassVar[bool]
    """Whether more of it is better on the images of what should stay as it is."""
    paired: ClassVar[bool] = False
    """Whether it compares an image with the original's of the same prompt and seed."""
    share: ClassVar[bool] = False
    """Whether its numbers lie in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(getattr(self, "higher_is_better", None), bool):
            name = type(self).__name__
            raise TypeError(f"the metric {name} must say higher_is_better = True or False")

    @property
    @abstractmethod
    def provenance(self) -> Mapping[str, Any]:
        """What its numbers hang on, besides the images: weights, versions, thresholds; ready for JSON.

        Raises:
            ExpungeError: a package or weights that it needs are missing.
        """

    @property
    def feature_key(self) -> Mapping[str, Any]:
        """Cache key of the per-image rows; metrics with equal keys share them."""
        return {"metric": type(self).__name__, **asdict(self), **self.provenance}

    @abstractmethod
    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return a row of numbers for each image, (n, width), the same whatever images stand beside it.

        Args:
            images: (n, 3, height, width) in [0, 1]; all nan where the model gave no numbers, and its row
                is finite all the same.
            prompts: what each was drawn for.
            references: what the original drew for the same prompts and seeds, where `paired`.

        Raises:
            TypeError: it is paired, and there are no references.
        """


class Classifier(Metric):
    """A metric that says what an image shows."""

    higher_is_better = True

    @abstractmethod
    def knows(self, label: str) -> bool:
        """Return whether it can tell this label at all."""

    @abstractmethod
    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """Return whether one of the labels is what images show, (n,) in [0, 1].

        It is nan where that cannot be said, as with labels that are too near.

        Args:
            rows: (n, width), what `measure` gave.
            labels: those that count as the concept.
            near: those that count neither for nor against.
            question: "top1", the best label is one of them; "present", one of them is in the image,
                beside whatever else; "probability", how likely one of them is.
        """

    @abstractmethod
    def find_broken(self, rows: Tensor) -> Tensor:
        """Return which images are unrecognisable, (n,) bool: they are neither erased nor retained."""

    def count_parts(self, rows: Tensor, labels: Sequence[str]) -> dict[str, Tensor]:
        """Return how often images show each part that labels stand for, (n,) whole numbers.

        By default a label is a part, and an image shows it once or not at all.

        Args:
            rows: (n, width), what `measure` gave.
            labels: those that count as a concept.
        """
        known = [label for label in labels if self.knows(label)]
        # A label too near to tell is nan, and counts as not shown.
        return {label: self.score(rows, [label], (), "present").nan_to_num(0).round() for label in known}

    def describe(self, rows: Tensor) -> list[str]:
        """Return what each image shows, in a word, for captions; by default nothing is said."""
        return [""] * len(rows)


@dataclass(frozen=True, eq=False)
class SetDistance:
    """A distance between two sets, and what each image does to it.

    Were image i's weight in its set raised from 1/n to (1 + ε)/n, the distance would rise by
    ε/n of its influence: resampled like any other mean, influences give the interval.

    Source: Davison, Hinkley, Bootstrap Methods and their Application, 1997, section 2.7.
    """

    value: float
    influence: Tensor
    """(n,), of mean zero: of each row of the first set."""
    reference_influence: Tensor
    """(m,), of mean zero: of each row of the second."""


class Distance(Metric):
    """A metric that compares sets of images by the rows taken of them."""

    higher_is_better = False
    from_anchor: ClassVar[bool] = False
    """Whether what is drawn for an erased concept is compared with what its anchor draws."""

    @abstractmethod
    def distance(self, rows: Tensor, reference: Tensor) -> SetDistance:
        """Return how far apart two sets of rows are.

        Args:
            rows: (n, width), of the first set.
            reference: (m, width), of the second.

        Raises:
            ExpungeError: a set has fewer than two rows.
        """

    def load_real(self) -> Tensor | None:
        """Return the rows of real images to compare with, (m, width); None for the original's."""
        return None


def is_blank(images: Tensor) -> Tensor:
    """Return which images are one colour all over, or nan, (n,) bool.

    Args:
        images: (n, 3, height, width) in [0, 1].
    """
    flat = images.flatten(2)
    # Two of 255 levels: less is what rounding makes of a single colour.
    return ~((flat.amax(2) - flat.amin(2)).amax(1) > 1.5 / 255)


def read_images(folder: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read the images of a folder, (n, 3, height, width) in [0, 1].

    Args:
        folder: where they are, at any depth.
        size: height and width in pixels to scale them to; by default they are taken as they are.

    Raises:
        ExpungeError: there are none, or they differ in size and `size` does not say which is meant.
    """
    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in image_files.ENDINGS
    )
    if not paths:
        raise ExpungeError(f"{folder} holds no images")
    images = [image_files.read_image(path, size) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise ExpungeError(f"the images in {folder} differ in size")
    return torch.stack(images)
