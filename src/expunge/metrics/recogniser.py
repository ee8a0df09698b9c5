"""A recogniser of your own: faces, styles or objects, as a transformers classification folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.errors import ExpungeError
from expunge.metric import Judge, blank


@dataclass(frozen=True)
class Recogniser(Judge):
    """softmax of an image classifier's logits over all its labels.

    A picture whose best label is `nothing` (no face, say) counts neither for nor against, as in the
    protocols that ask among pictures with a face. Labels are compared without regard to case.
    """

    folder: str = ""
    """A folder that transformers reads as an image classifier, weights as safetensors."""
    nothing: str = ""
    """Its label for pictures that show none of its classes."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        _, _, labels, digest = _load(self.folder)
        return {"folder": Path(self.folder).name, "sha256": digest, "labels": len(labels)}

    @torch.inference_mode()
    def measure(
        self, pictures: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        processor, network, _, _ = _load(self.folder)
        parts = []
        for part in pictures.nan_to_num().split(32):
            given = processor(images=list(part), do_rescale=False, return_tensors="pt")
            parts.append(network(**given).logits.softmax(1))
        return torch.cat([torch.cat(parts), blank(pictures)[:, None].float()], 1)

    def knows(self, label: str) -> bool:
        return label.casefold() in _load(self.folder)[2]

    def answer(self, rows: Tensor, labels: Sequence[str], near: Sequence[str], question: str) -> Tensor:
        names = _load(self.folder)[2]
        places = [names.index(label.casefold()) for label in labels if self.knows(label)]
        chances = rows[:, : len(names)]
        best = chances.argmax(1)
        if question == "best":
            answers = torch.isin(best, torch.tensor(places)).float()
        else:
            answers = chances[:, places].sum(1)
            answers = (answers >= 0.5).float() if question == "there" else answers
        dropped = {name.casefold() for name in (self.nothing, *near) if name}
        neither = [place for place, name in enumerate(names) if name in dropped]
        return answers.masked_fill(torch.isin(best, torch.tensor(neither)), float("nan"))

    def broken(self, rows: Tensor) -> Tensor:
        return rows[:, -1] > 0.5

    def shown(self, rows: Tensor) -> list[str]:
        names = _load(self.folder)[2]
        return [names[place] for place in rows[:, : len(names)].argmax(1).tolist()]


@cache
def _load(folder: str) -> tuple[Any, Any, list[str], str]:
    """The processor, the network, its labels and the hash of its weights."""
    if not folder:
        raise ExpungeError(
            "the recogniser needs a folder that transformers reads as an image classifier"
        )
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or ["?"])[0]
        raise ExpungeError(f"cannot load the recogniser {folder}: {said}") from error
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    table = network.config.id2label
    return processor, network, [table[i].casefold() for i in range(len(table))], digest.hexdigest()
