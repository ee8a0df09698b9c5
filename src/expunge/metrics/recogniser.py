"""A recogniser of your own: faces, styles or objects, as transformers classification folders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.modules import MAKING
from expunge.metric import Classifier, is_blank


@dataclass(frozen=True, eq=False)
class LabelledNetwork:
    """An image classifier and its labels."""

    processor: Any
    network: Any
    labels: tuple[str, ...]
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """(n, labels): softmax of the logits."""
        parts = []
        for part in images.nan_to_num().split(32):
            given = self.processor(images=list(part), do_rescale=False, return_tensors="pt")
            parts.append(self.network(**given).logits.softmax(1))
        return torch.cat(parts)


@dataclass(frozen=True)
class Recogniser(Classifier):
    """softmax of one or more image classifiers' logits, each over its own labels.

    A label is looked for among those of the classifier that has it: styles in one, objects in another.
    An image whose best label is `nothing` (no face, say) counts neither for nor against, as in the
    protocols that ask among images with a face. Labels are compared without regard to case, and
    hyphens and underscores are spaces.
    """

    folders: tuple[str, ...] = ()
    """Folders that transformers reads as image classifiers, weights as safetensors."""
    nothing: str = ""
    """Their label for images that show none of their classes."""

    @property
    def _classifiers(self) -> tuple[LabelledNetwork, ...]:
        if not self.folders:
            raise ExpungeError(
                "the recogniser needs folders that transformers reads as image classifiers:"
                ' write folders = ["…"] in [options.recogniser] of the suite'
            )
        return tuple(_load(folder) for folder in self.folders)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Each classifier's folder, and the hash of its weights."""
        return {
            "classifiers": [
                {"folder": Path(folder).name, "sha256": one.digest, "labels": len(one.labels)}
                for folder, one in zip(self.folders, self._classifiers, strict=True)
            ]
        }

    @torch.inference_mode()
    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return each classifier's probabilities, and 1 for a blank image, (n, labels + 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        seen = [one(images) for one in self._classifiers]
        return torch.cat([*seen, is_blank(images)[:, None].float()], 1)

    def knows(self, label: str) -> bool:
        """Return whether the label is among its own."""
        return any(_plain(label) in one.labels for one in self._classifiers)

    def score(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        """Return whether one of the labels is what images show, (n,) in [0, 1], or nan.

        Args:
            rows: (n, width), from `measure`.
            labels: those that count as the concept.
            near: labels whose images count neither way.
            question: "top1", "present" or "probability".
        """
        # All labels of a concept are one classifier's: a style is not asked for among objects.
        wanted = {_plain(label) for label in labels}
        names, chances = next(
            (one.labels, part) for one, part in self._parts(rows) if wanted & set(one.labels)
        )
        places = [place for place, name in enumerate(names) if name in wanted]
        best = chances.argmax(1)
        if question == "top1":
            answers = torch.isin(best, torch.tensor(places)).float()
        else:
            answers = chances[:, places].sum(1)
            answers = (answers >= 0.5).float() if question == "present" else answers
        # As the papers ask among images with a face: without one, there is no answer.
        dropped = {_plain(name) for name in (self.nothing, *near) if name}
        neither = [place for place, name in enumerate(names) if name in dropped]
        return answers.masked_fill(torch.isin(best, torch.tensor(neither)), float("nan"))

    def find_broken(self, rows: Tensor) -> Tensor:
        """Return which images are unrecognisable, (n,) bool."""
        return rows[:, -1] > 0.5

    def describe(self, rows: Tensor) -> list[str]:
        """Return the best label of each image."""
        bests = [
            [one.labels[place] for place in part.argmax(1).tolist()] for one, part in self._parts(rows)
        ]
        return [", ".join(names) for names in zip(*bests, strict=True)]

    def _parts(self, rows: Tensor) -> list[tuple[LabelledNetwork, Tensor]]:
        """Each classifier with its columns."""
        classifiers = self._classifiers
        parts = rows[:, :-1].split([len(one.labels) for one in classifiers], 1)
        return list(zip(classifiers, parts, strict=True))


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


@cache
def _load(folder: str) -> LabelledNetwork:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        with MAKING:
            network = AutoModelForImageClassification.from_pretrained(
                folder, use_safetensors=True
            ).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or ["?"])[0]
        raise ExpungeError(f"cannot load the recogniser {folder}: {said}") from error
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    table = network.config.id2label
    labels = tuple(_plain(table[i]) for i in range(len(table)))
    return LabelledNetwork(processor, network, labels, digest.hexdigest())
