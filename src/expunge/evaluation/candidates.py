"""What is judged, and what it came to: candidates and their results, suite by suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from expunge.edit import Edit
from expunge.evaluation.image_source import Source
from expunge.evaluation.robustness import AttackResult
from expunge.evaluation.sample import Sample
from expunge.evaluation.statistics import Estimate
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.metric import Metric
from expunge.model import Model


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something to judge: an edit, or an erased model of its own."""

    name: str
    erases: tuple[str, ...]
    """The names of what it erases."""
    edit: Edit | None = None
    model: Model | None = None
    """The erased model, where there is no edit."""

    @classmethod
    def of(cls, edit: Edit, name: str = "") -> Candidate:
        """Make a candidate of an edit; by default it is named after its method and its concepts."""
        erases = tuple(concept.name for concept in edit.record.problem.erase)
        return cls(name or f"{edit.record.method}: {', '.join(erases)}", erases, edit)

    @property
    def anchors(self) -> dict[str, str]:
        """The anchor of each of its concepts; none is known of a model of its own."""
        concepts = self.edit.record.problem.erase if self.edit else ()
        return {concept.name: concept.anchor for concept in concepts if concept.anchor is not None}

    @property
    def record(self) -> dict[str, Any]:
        """Where it comes from, ready for JSON: hash and record of the edit, or hash of the model."""
        if self.edit is None:
            if self.model is None:
                raise TypeError("a candidate must have an edit or a model, and this has neither")
            return {"kind": "model", "model": self.model.name, "hash": hash_for_images(self.model)}
        return {"kind": "edit", "hash": self.edit.hash, **self.edit.record.to_dict()}

    @property
    def recipe(self) -> str:
        """Its method with all fields: edits of one recipe are averaged over concepts and seeds."""
        if self.edit is None:
            return self.name
        record = self.edit.record
        # Sorted: records of older edits hold their fields in another order.
        fields = ", ".join(f"{key} {value}" for key, value in sorted(record.fields.items()))
        return f"{record.method} ({fields})" if fields else record.method


@dataclass(frozen=True, eq=False)
class CandidateResult:
    """The numbers of one model in one case."""

    candidate: Candidate | None
    """None for the original."""
    h: Estimate
    terms: Mapping[str, Estimate]
    roles: Mapping[str, Mapping[str, Estimate]]
    """For each role its shares: `seen`, in which the concept is seen; `present`, in which it is found at
    all; `unrecognisable`; `counted`, what the terms are made of; `original`, the original's `seen`."""
    metrics: Mapping[str, Mapping[str, Estimate]]
    """The means of each metric, for each role."""
    published: Mapping[str, Estimate]
    """The figures that papers print, relative neither to the original nor to chance."""
    each: Mapping[str, Mapping[str, float]]
    """For each role the share seen of each of its words."""
    samples: tuple[Sample, ...] = field(repr=False)
    """What it drew, with all that is known of it; of the same cells for every candidate of a suite."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """Of a suite of unsafe things: how often each part was found in all images of the erased prompts,
    and "total", as papers print it. No image is left out, and a broken one counts as it is."""

    kinds: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """For each kind of prompt that the suite names the shares `seen` and `original`."""
    attacks: tuple[AttackResult, ...] = ()
    """How it holds under attack, one for each ladder of budgets."""

    @property
    def name(self) -> str:
        """Its name on the page and in results; "original" for the original."""
        return self.candidate.name if self.candidate else "original"


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """All that erases the same concepts of a suite, judged on the same prompts and seeds."""

    suite: Suite
    erased: tuple[str, ...]
    retained: tuple[str, ...]
    left_out: tuple[tuple[str, str, float], ...]
    """(role, words, share) of what the original itself draws in fewer than half of its images."""
    rows: tuple[CandidateResult, ...]
    """The original first."""
    sources: Mapping[str, Source] = field(repr=False)
    """What drew each row's images, by the row's name."""
    judge: Metric = field(repr=False)
    """What answered the suite's questions."""
    not_run: Mapping[str, str] = field(default_factory=dict)
    """Where edits were attacked: of each ladder that was not run, why; "" where it was not asked for."""

    @property
    def dropped(self) -> frozenset[tuple[str, str]]:
        """(role, words) of what is left out."""
        return frozenset((role, words) for role, words, _ in self.left_out)

    def failures(self, row: str) -> list[Tensor]:
        """Return for each cell how badly a row's images fail, (images,); nan where it is left out."""
        (found,) = (one for one in self.rows if one.name == row)
        return [sample.failure(self.dropped) for sample in found.samples]
