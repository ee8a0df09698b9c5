"""The prompts of MACE's concepts, and the sums over their tokens that both closed forms need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.erasing.fusion import LazyTensors
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts
from expunge.model import Model
from expunge.ops.least_squares import add_gram, add_outer, mirror
from expunge.ops.prompt_alignment import match_tokens
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
    """The sums over all prompts that the closed forms need, (d, d) each, float64."""

    whole: Tensor
    """Σ e eᵀ over all tokens of the concepts' prompts."""
    contexts: Tensor
    """Σ eᶠ eᶠᵀ, over the tokens around a phrase."""
    cross: Tensor
    """Σ eᵍ eᶠᵀ."""

    @classmethod
    def of(cls, groups: Sequence[AnchorGroup]) -> PromptSums:
        """Add up the tokens of every prompt; each is encoded once."""
        sums: list[Tensor] = []
        for group in groups:
            anchored = group.read(group.anchored)
            # On the CPU in float64: the sums run over a hundred concepts' tokens.
            goals = anchored.embeddings.cpu()
            width = goals.shape[-1]
            sums = sums or [torch.zeros(width, width, dtype=torch.float64) for _ in range(3)]
            whole, alone, cross = sums
            # What goes to the same rows is added up first: one product for all concepts of an anchor.
            moved = torch.zeros(goals.shape, dtype=torch.float64)
            for prompts in group.erased.values():
                text = group.read(prompts)
                add_gram(whole, text.embeddings[text.read].cpu())
                add_gram(alone, add_aligned(text, anchored, moved))
            add_outer(cross, goals.flatten(0, 1), moved.flatten(0, 1))
        whole, alone, cross = sums
        # The phrases' own tokens are few: subtracting their sum saves a pass over all others.
        contexts = mirror(alone.neg_().add_(mirror(whole)))
        return cls(whole, contexts, cross)


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


def add_aligned(text: Text, goal: Text, moved: Tensor) -> Tensor:
    """Add each token of a concept's prompts to the place of its counterpart in the anchor's prompts.

    Args:
        text: the concept's prompts, name after name, each template by template.
        goal: the anchor's prompts, one a template.
        moved: (templates, tokens, d), is added to.

    Returns:
        The tokens without a counterpart, the phrases and surplus padding: (n, d).
    """
    ids, goal_ids, alone = text.ids.cpu(), goal.ids.cpu(), []
    for row, embeddings in enumerate(text.embeddings.cpu()):
        there = row % len(goal)
        for (own, end), (_, goal_end) in zip(text.segments(row), goal.segments(there), strict=True):
            e, place = embeddings[own], moved[there, own]
            m = match_tokens(
                ids[row, own], goal_ids[there, own], (end - own.start, goal_end - own.start)
            )
            # Before the phrase places agree; behind it they differ by the phrases' lengths.
            place[: m.head] += e[: m.head]
            place[m.second : m.second + m.tail] += e[m.first : m.first + m.tail]
            alone += [e[positions] for positions in m.alone]
    return torch.cat(alone)


def read_rows(groups: Sequence[AnchorGroup]) -> LazyTensors:
    """Return for each concept all tokens of its prompts, (n, d), encoded when they are asked for."""
    of = {name: group for group in groups for name in group.erased}
    return LazyTensors(
        of, lambda name: of[name].read(of[name].erased[name]).embeddings.flatten(0, 1).cpu()
    )
