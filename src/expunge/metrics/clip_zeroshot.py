"""CLIP zero-shot: which of some classes an image goes with best, and how surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.shipped import DEFAULT_MODEL
from expunge.metric import Classifier, is_blank
from expunge.metrics._clip import towers

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10."""


@dataclass(frozen=True)
class ClipZeroshot(Classifier):
    """softmax(scale · cos(image, "a photo of the CLASS")) over the classes.

    Its row ends with 1 where the image is blank. The first number, for the table, is the highest
    probability. MACE's accuracies are the mean probability of the class.

    Source: Radford et al., CLIP, ICML 2021, section 3.1.2.
    """

    classes: tuple[str, ...] = TEN
    """What an image can be."""
    template: str = "a photo of the {}"
    scale: float = bounded(100.0, above=0)
    """Of the cosines before the softmax."""
    model: str = DEFAULT_MODEL
    """The shipped CLIP, or one of transformers by folder or hub id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.classes) < 2:
            raise ExpungeError("clip_zeroshot needs at least two classes to choose from")

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The CLIP, the hash of its weights, and the classes."""
        return {
            "model": self.model,
            "sha256": towers(self.model).digest,
            "classes": list(self.classes),
            "template": self.template,
            "scale": self.scale,
        }

    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the probability of each class, and 1 for a blank image, (n, classes + 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        clip = towers(self.model)
        texts = clip.embed_texts([self.template.format(name) for name in self.classes])
        chances = (self.scale * clip.embed_images(images) @ texts.T).softmax(1)
        # A blank image goes with some class best, too: only the last number tells it.
        return torch.cat([chances, is_blank(images)[:, None].float()], 1)

    def knows(self, label: str) -> bool:
        """Return whether the label is among its own."""
        return label in self.classes

    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """Return whether one of the labels is what images show, (n,) in [0, 1], or nan.

        Args:
            rows: (n, width), from `measure`.
            labels: those that count as the concept.
            near: not read: a class is one of few.
            question: "top1", "present" or "probability".
        """
        # Labels that are no class have no probability: a suite may name several for a concept.
        places = [self.classes.index(label) for label in labels if self.knows(label)]
        chances = rows[:, : len(self.classes)]
        if question == "top1":
            return torch.isin(chances.argmax(1), torch.tensor(places)).float()
        sure = chances[:, places].sum(1)
        return (sure >= 0.5).float() if question == "present" else sure

    def find_broken(self, rows: Tensor) -> Tensor:
        """Return which images are unrecognisable, (n,) bool."""
        return rows[:, -1] > 0.5

    def describe(self, rows: Tensor) -> list[str]:
        """Return the best label of each image."""
        return [self.classes[place] for place in rows[:, : len(self.classes)].argmax(1).tolist()]
