"""The contract of a metric: it looks at images one by one and says a row of numbers of each.

The rows are kept beside the images and never taken twice (`expunge.evaluation.image_cache`). What
becomes of them:

    Metric      the first number of the row, averaged over the images of a role
    Classifier       answers a suite's questions: is this concept in the image?
    Distance    one number for all images of a role against the original's, or real ones
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
    """Something to measure on images. One subclass a file in `metrics/`; fields are options."""

    higher_is_better: ClassVar[bool]
    paired: ClassVar[bool] = False
    """Whether it compares an image with the original's of the same prompt and seed."""
    share: ClassVar[bool] = False
    """Whether its numbers lie in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def provenance(self) -> Mapping[str, Any]:
        """What its numbers hang on, besides the images: weights, versions, thresholds."""

    @property
    def feature_key(self) -> Mapping[str, Any]:
        """What its rows hang on, besides the images: metrics that say the same share their rows."""
        return {"metric": type(self).__name__, **asdict(self), **self.provenance}

    @abstractmethod
    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """(n, width): a row of numbers for each image.

        Args:
            images: (n, 3, height, width) in [0, 1]; all nan where the model gave no numbers.
            prompts: what each was drawn for.
            references: what the original drew for the same prompts and seeds, where `paired`.
        """


class Classifier(Metric):
    """A metric that says what an image shows."""

    higher_is_better = True

    @abstractmethod
    def knows(self, label: str) -> bool:
        """Whether it can tell this label at all."""

    @abstractmethod
    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """(n,) in [0, 1]: whether one of the labels is what images show; nan where that cannot be
        said, as with labels that are too near.

        Args:
            rows: (n, width), what `measure` gave.
            labels: those that count as the concept.
            near: those that count neither for nor against.
            question: "best", the best label is one of them; "there", one of them is in the image,
                beside whatever else; "probability", how likely one of them is.
        """

    @abstractmethod
    def broken(self, rows: Tensor) -> Tensor:
        """(n,) bool: which images are unrecognisable. They count neither as erased nor as kept."""

    def counts(self, rows: Tensor, labels: Sequence[str]) -> dict[str, Tensor]:
        """For each part that labels stand for how often images show it, (n,) whole numbers.

        By default a label is a part, and an image shows it once or not at all.

        Args:
            rows: (n, width), what `measure` gave.
            labels: those that count as a concept.
        """
        known = [label for label in labels if self.knows(label)]
        return {label: self.score(rows, [label], (), "there").nan_to_num(0).round() for label in known}

    def shown(self, rows: Tensor) -> list[str]:
        """What each image shows, in a word, for captions; by default nothing is said."""
        return [""] * len(rows)


@dataclass(frozen=True, eq=False)
class Apart:
    """A distance between two sets, and what each image does to it.

    Were image i's weight in its set raised from 1/n to (1 + ε)/n, the distance would rise by
    ε/n of its influence: resampled like any other mean, influences give the interval.

    Source: Davison, Hinkley, Bootstrap Methods and their Application, 1997, section 2.7.
    """

    value: float
    influence: Tensor
    """(n,), of mean zero: of each row of the first set."""
    of_reference: Tensor
    """(m,), of mean zero: of each row of the second."""


class Distance(Metric):
    """A metric that compares sets of images by the rows taken of them."""

    higher_is_better = False
    from_anchor: ClassVar[bool] = False
    """Whether what is drawn for an erased concept is compared with what its anchor draws."""

    @abstractmethod
    def distance(self, rows: Tensor, reference: Tensor) -> Apart:
        """How far apart two sets of rows are, (n, width) and (m, width)."""

    def real(self) -> Tensor | None:
        """The rows of real images to compare with; None for what the original drew."""
        return None


def blank(images: Tensor) -> Tensor:
    """(n,) bool: images that are one colour all over, or no numbers at all."""
    flat = images.flatten(2)
    return ~((flat.amax(2) - flat.amin(2)).amax(1) > 1.5 / 255)


def read_images(folder: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """The images of a folder, (n, 3, height, width) in [0, 1].

    Raises:
        ExpungeError: there are none, or they differ in size and `size` does not say which is meant.
    """
    paths = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in image_files.ENDINGS
    )
    if not paths:
        raise ExpungeError(f"{folder} holds no images")
    found = [image_files.read_image(path, size) for path in paths]
    if len({image.shape for image in found}) > 1:
        raise ExpungeError(f"the images in {folder} differ in size")
    return torch.stack(found)
