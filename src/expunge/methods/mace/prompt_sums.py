"""The prompts of MACE's concepts, and the sums over their tokens that both closed forms need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.erasing.fusion import LazyTensors
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts
from expunge.model import Model
from expunge.ops.prompt_alignment import match_tokens
from expunge.ops.refit_sums import RefitSums
from expunge.problem import Concept, Problem
from expunge.text import Text


@dataclass(frozen=True, eq=False)
class AnchorGroup:
    """The prompts of the concepts that have one kind and one anchor."""

    read: Callable[[Sequence[str]], Text]
    """Encodes prompts, one concept's at a time: all do not fit in memory."""
    anchored: Sequence[str]
    """The anchor's prompts, one a template."""
    erased: Mapping[str, Sequence[str]]
    """For each concept its prompts: name after name, each template by template."""


@dataclass(frozen=True, eq=False)
class PromptSums:
    """What the closed forms need of all prompts; sums are (d, d), float64, and made when asked for."""

    around: RefitSums
    """The tokens around a phrase, eᶠ, and where they are sent, eᵍ."""
    phrases: RefitSums
    """The tokens without a counterpart: the phrases, and surplus padding."""

    @property
    def contexts(self) -> Tensor:
        """Σ eᶠ eᶠᵀ, over the tokens around a phrase."""
        return self.around.gram.add_(self.around.prior)

    @property
    def cross(self) -> Tensor:
        """Σ eᵍ eᶠᵀ."""
        return self.around.cross.add_(self.around.prior)

    @property
    def whole(self) -> Tensor:
        """Σ e eᵀ over all tokens of the concepts' prompts."""
        return self.contexts.add_(self.phrases.prior)

    @classmethod
    def of(cls, groups: Sequence[AnchorGroup]) -> PromptSums:
        """Add up the tokens of every prompt; each is encoded once."""
        sums = cls(RefitSums(), RefitSums())
        for group in groups:
            anchored = group.read(group.anchored)
            for prompts in group.erased.values():
                sums.add(group.read(prompts), anchored)
        return sums

    def add(self, text: Text, goal: Text) -> None:
        """Send each token of a concept's prompts to its counterpart in the anchor's prompts.

        Args:
            text: the concept's prompts, name after name, each template by template.
            goal: the anchor's prompts, one a template.
        """
        ids, goal_ids, read = text.ids.cpu(), goal.ids.cpu(), text.read.cpu()
        goals = goal.embeddings.cpu()
        pairs, alone = [], []
        for row, embeddings in enumerate(text.embeddings.cpu()):
            there = row % len(goal)
            for (own, end), (_, goal_end) in zip(text.segments(row), goal.segments(there), strict=True):
                e, g, counts = embeddings[own], goals[there, own], read[row, own]
                m = match_tokens(
                    ids[row, own], goal_ids[there, own], (end - own.start, goal_end - own.start)
                )
                # Before the phrase places agree; behind it they differ by the phrases' lengths.
                for first, second, n in ((0, 0, m.head), (m.first, m.second, m.tail)):
                    # What the denoiser does not read is zeros, and adds nothing.
                    some = counts[first : first + n]
                    pairs.append((e[first : first + n][some], g[second : second + n][some]))
                alone += [e[positions] for positions in m.alone]
        rows, aims = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        self.around.erase(rows, aims)
        self.phrases.retain(torch.cat(alone))


def group_by_anchor(model: Model, problem: Problem, templates: Sequence[str] = ()) -> list[AnchorGroup]:
    """Put concepts and anchors into their templates, and gather concepts of one kind and anchor.

    Args:
        model: whose window the prompts must fit, and whose text encoder reads them.
        problem: the concepts.
        templates: phrasings with {} in the concept's place; by default those of each concept's kind.

    Raises:
        ExpungeError: a prompt is longer than the model reads.
    """
    alike: dict[tuple[str, str], list[Concept]] = {}
    for concept in problem.erase:
        # By kind, too: the templates, and so the anchor's prompts, are those of a kind.
        alike.setdefault((concept.kind, concept.anchor or ""), []).append(concept)
    groups = []
    for concepts in alike.values():
        goals = assemble_anchor_prompts(concepts[0], templates)
        prompts = {concept.name: assemble_prompts(concept, templates) for concept in concepts}
        model.require_window([*goals, *(p for some in prompts.values() for p in some)])
        groups.append(AnchorGroup(model.encode, goals, prompts))
    return groups


def read_rows(groups: Sequence[AnchorGroup]) -> LazyTensors:
    """Return for each concept all tokens of its prompts, (n, d), encoded when they are asked for."""
    of = {name: group for group in groups for name in group.erased}
    return LazyTensors(
        of, lambda name: of[name].read(of[name].erased[name]).embeddings.flatten(0, 1).cpu()
    )
