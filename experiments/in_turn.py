"""Erase each of some words in turn, watch what becomes of it, its synonyms and all the others.

Everything is relative to the original on the same prompts and seeds; images too near to say count
neither for nor against; a prompt that the original draws right in fewer than half of its images is
left out and listed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import expunge
from expunge import Concept, Probe, Problem
from expunge.emoji.detector import FOLDER, UNRECOGNISABLE, Detector
from expunge.evaluation.cells import SuiteConcept
from expunge.method import Method


@dataclass(frozen=True)
class Looks:
    """What the detector names in the images of every prompt, n each, always with the same seeds."""

    tops: dict[str, list[str]]
    there: dict[str, Tensor]
    """(n,) of 0 and 1: whether the label the prompt stands for is in the image at all."""

    @property
    def unrecognisable(self) -> float:
        tops = [top for each in self.tops.values() for top in each]
        return tops.count(UNRECOGNISABLE) / len(tops)


class InTurn:
    """The words, what stays around them, and the original's images of them all, drawn once."""

    def __init__(
        self,
        words: Sequence[SuiteConcept],
        bystanders: Sequence[SuiteConcept] = (),
        *,
        n: int,
        seed: int = 0,
        model: str = "emoji",
        batch_size: int = 32,
    ) -> None:
        """`bystanders` are watched like the other words, but no method is told of them."""
        self.words, self.bystanders = tuple(words), tuple(bystanders)
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self.model, self.detector = expunge.load(model), Detector.load()
        meant = [(name, word) for word in (*words, *bystanders) for name in (word.name, *word.synonyms)]
        self.meant = dict(meant)
        self.original = self.look(tuple(self.meant), "the original")
        before = {name: self.right(self.original, name) for name in self.meant}
        self.before = {name: float(right.nanmean()) for name, right in before.items()}
        self.left_out = [name for name, share in self.before.items() if not share >= 0.5]

    def look(self, names: Sequence[str], title: str) -> Looks:
        """Draw "a photo of the NAME" for every name and ask the detector."""
        probe = Probe.of([f"a photo of the {name}" for name in names], self.n, self.seed)
        with Progress(transient=True) as bar:
            task = bar.add_task(title)
            images = self.model.draw(
                probe,
                batch_size=self.batch_size,
                progress=lambda _, done, total: bar.update(task, completed=done, total=total),
            )
        tops: dict[str, list[str]] = {}
        there: dict[str, Tensor] = {}
        for name, part in zip(names, images.split(self.n), strict=True):
            seen, word = self.detector(part), self.meant[name]
            known = [seen.has(label) for label in word.labels if label in self.detector.label_names]
            tops[name], there[name] = seen.top(), torch.stack(known).any(0).float()
        return Looks(tops, there)

    def right(self, looks: Looks, name: str) -> Tensor:
        """(n,) of 1, 0, nan for one prompt."""
        word = self.meant[name]
        shown = [math.nan if top in word.near else float(top in word.labels) for top in looks.tops[name]]
        return torch.tensor(shown)

    def erase(self, word: SuiteConcept, method: Method, anchor: str | None) -> dict[str, Any]:
        """The row of one erased word; entries that begin with "_" are answers (prompts, n)."""
        others = tuple(other.name for other in self.words if other is not word)
        edit = expunge.erase(
            self.model, Problem((Concept(word.name, anchor),), others), method, seed=self.seed
        )
        beside = tuple(other.name for other in self.bystanders)
        names = [n for n in (word.name, *word.synonyms, *others, *beside) if n not in self.left_out]
        with self.model.using(edit):
            after = self.look(names, f"without {word.name}")
        groups = {
            "erased": (word.name,),
            "synonyms": word.synonyms,
            "retained": others,
            "beside": beside,
        }
        row: dict[str, Any] = {}
        for group, members in groups.items():
            members = tuple(name for name in members if name in names)
            if members:
                row[f"_{group}"] = (
                    torch.stack([self.right(after, name) for name in members]),
                    torch.stack([self.right(self.original, name) for name in members]),
                )
        shares = {g: _relative(*row[f"_{g}"]) for g in groups if f"_{g}" in row}
        raw = {f"{g}_raw": float(row[f"_{g}"][0].nanmean()) for g in shares}
        return {
            **row,
            **shares,
            **raw,
            "erased_at_all": float(after.there[word.name].mean()),
            "unrecognisable": after.unrecognisable,
            "unrecognisable_in_erased": after.tops[word.name].count(UNRECOGNISABLE) / self.n,
            "H": _harmonic(raw["erased_raw"], shares["retained"], shares.get("synonyms")),
            "each": {name: float(self.right(after, name).nanmean()) for name in names},
            "seen_instead": dict(Counter(after.tops[word.name]).most_common(4)),
            "anchor": edit.record.problem.erase[0].anchor,
            "seconds": edit.record.seconds,
            "edit": edit.hash,
        }

    def run(self, method: Method, anchor: str | None = None) -> dict[str, Any]:
        """Every word erased in turn: means with their intervals, and a row a word."""
        judged = [word for word in self.words if word.name not in self.left_out]
        if not judged:
            raise SystemExit("The original draws none of the words: there is nothing to erase.")
        rows = {word.name: self.erase(word, method, anchor) for word in judged}
        means = {}
        for name in ("erased", "synonyms", "retained", "beside"):
            answers = [row[f"_{name}"] for row in rows.values() if f"_{name}" in row]
            if answers:
                means[name] = _mean_with_interval(answers)
        for name in ("erased_at_all", "unrecognisable", "unrecognisable_in_erased", "H"):
            means[name] = {"mean": sum(row[name] for row in rows.values()) / len(rows)}
        return {
            "method": {"name": type(method).__name__, **dataclasses.asdict(method)},
            "mean": means,
            "rows": {
                word: {key: value for key, value in row.items() if not key.startswith("_")}
                for word, row in rows.items()
            },
        }

    def provenance(self) -> dict[str, Any]:
        """What the figures hang on, besides the method."""
        held_out = FOLDER / "held_out.json"
        weights = (FOLDER / "model.safetensors").read_bytes()
        return {
            "prompt": "a photo of the {}",
            "images_a_cell": self.n,
            "first_seed": self.seed,
            "model": self.model.name,
            "sampler": type(self.model.pipe.scheduler).__name__,
            "num_inference_steps": self.model.num_inference_steps,
            "guidance_scale": self.model.guidance_scale,
            "resolution": 64,
            "original": self.before,
            "left_out": self.left_out,
            "near": {word.name: word.near for word in self.words if word.near},
            "detector": {
                "sha256": hashlib.sha256(weights).hexdigest(),
                "held_out": json.loads(held_out.read_text("utf8")) if held_out.is_file() else None,
            },
        }


def _relative(after: Tensor, before: Tensor) -> float:
    """The mean over prompts of what is left of the original's share, each capped at 1.

    A prompt whose images are all too near to say has none, and is no part of the mean.
    """
    shares = (after.nanmean(-1) / before.nanmean(-1)).clamp(max=1)
    shares = shares[~shares.isnan()]
    return float(shares.mean()) if len(shares) else 0.0


def _harmonic(erased: float, retained: float, synonyms: float | None) -> float:
    """H_o, the harmonic mean of what is gone, what is kept, and (if asked) which synonyms are gone."""
    terms = [1 - erased, retained, *([] if synonyms is None else [1 - synonyms])]
    return len(terms) / sum(1 / term for term in terms) if all(terms) else 0.0


def _mean_with_interval(answers: Sequence[tuple[Tensor, Tensor]], draws: int = 1000) -> dict[str, Any]:
    """The mean over words and its 95 % interval: seeds drawn again, for all prompts at once."""
    generator = torch.Generator().manual_seed(0)
    n = answers[0][0].shape[-1]

    def mean(seeds: Tensor) -> float:
        each = [_relative(after[:, seeds], before[:, seeds]) for after, before in answers]
        return sum(each) / len(each)

    again = [mean(torch.randint(n, (n,), generator=generator)) for _ in range(draws)]
    low, high = torch.tensor(again).quantile(torch.tensor([0.025, 0.975])).tolist()
    images = sum(int((~after.isnan()).sum()) for after, _ in answers)
    return {"mean": mean(torch.arange(n)), "interval": [low, high], "pictures": images}
