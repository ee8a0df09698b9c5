"""The tokens that gates open on, read from a concept's prompts and its anchor's (ACE, Sluice)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.erasing.concept_tokens import find_phrases
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts
from expunge.model import Model
from expunge.ops.prompt_alignment import match_tokens
from expunge.problem import Concept, Problem
from expunge.text import Text

BANDS = (0, 3, 9, 27)
"""Where the gates of the end and the padding begin, in tokens from the end token on. What these tokens
say of a prompt fades as they go on, so that one gate for all would fit none. The phrase's own tokens and
the words behind it have a gate each, too."""


class GateSettings(Protocol):
    """What reading a concept's gates asks of a method."""

    @property
    def gate_on(self) -> str:
        """Where gates open: "phrase" is the concept's own tokens alone."""

    @property
    def num_retain_words(self) -> int:
        """How many of the tokenizer's own words gates stay closed on."""

    @property
    def gate_ridge(self) -> float:
        """λ of a gate's direction."""

    @property
    def n_std(self) -> float:
        """How many standard deviations above the mean of general tokens still count as closed."""

    @property
    def max_overlap(self) -> float:
        """How far into the concept, whose own mean is at 1, a retained prompt may lie."""

    def templates_for(self, concept: Concept) -> tuple[str, ...]:
        """Return the phrasings that a concept is erased in."""


@dataclass(frozen=True, eq=False)
class GateTokens:
    """The tokens of one gate: where it opens, and what they should become."""

    rows: Tensor
    """(n, d), the concept's tokens."""
    neutral: Tensor
    """(n, d), those of the same prompts with the anchor in it."""
    differences: Tensor
    """(prompts, d), their mean in a prompt less that of its neutral ones."""
    sizes: tuple[int, ...] = ()
    """How many of the tokens are of each prompt, one after the other; () where nobody asks."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> GateTokens:
        """Gather the tokens of prompts.

        Args:
            pairs: of each prompt the concept's tokens and the anchor's, (tokens, d) each.
        """
        means = torch.stack([(e - n).mean(0) for e, n in pairs])
        rows, neutral = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return cls(rows, neutral, means, tuple(len(e) for e, _ in pairs))

    @property
    def differs(self) -> bool:
        """Whether concept and anchor are not the same tokens."""
        return bool(self.differences.norm(dim=1).max() > 1e-3 * self.neutral.norm(dim=1).mean())


def read_tokens(
    settings: GateSettings, model: Model, problem: Problem, retained: Mapping[str, Text]
) -> tuple[dict[str, list[GateTokens]], dict[str, GateTokens]]:
    """Read for each concept the tokens of each of its gates, and the vectors of its whole prompts.

    Args:
        settings: the phrasings, and which tokens have gates.
        model: whose text encoder reads.
        problem: the concepts.
        retained: what is retained and the anchors, encoded.

    Returns:
        Both by concept; the second is empty where the model has no such vector.

    Raises:
        ExpungeError: a concept is its anchor to the model.
    """
    known = torch.cat([text.embeddings[text.content_mask] for text in retained.values()]).double()
    tokens, vectors = {}, {}
    for concept in problem.erase:
        text, anchored = encode_concept(settings, model, concept)
        tokens[concept.name] = group_tokens(settings, model, concept, known, text, anchored)
        if text.pooled is not None and anchored.pooled is not None:
            goals = anchored.pooled.repeat(len(concept.names), 1)
            # A vector counts as a prompt of one token.
            pairs = zip(text.pooled.double().split(1), goals.double().split(1), strict=True)
            vectors[concept.name] = GateTokens.of(list(pairs))
    return tokens, vectors


def encode_concept(settings: GateSettings, model: Model, concept: Concept) -> tuple[Text, Text]:
    """Encode a concept's prompts, name after name, and its anchor's, one a template.

    Args:
        settings: the phrasings.
        model: whose text encoder reads.
        concept: the concept.

    Raises:
        ExpungeError: a prompt is longer than the model reads.
    """
    templates = settings.templates_for(concept)
    prompts = assemble_prompts(concept, templates)
    goals = assemble_anchor_prompts(concept, templates)
    model.require_window([*prompts, *goals])
    return model.encode(prompts), model.encode(goals)


def group_tokens(
    settings: GateSettings,
    model: Model,
    concept: Concept,
    known: Tensor,
    text: Text,
    anchored: Text,
) -> list[GateTokens]:
    """Group a concept's tokens by gate: its phrase's, those of the words behind it, each band's.

    Args:
        settings: the phrasings, and which tokens have gates.
        model: whose tokenizer counts.
        concept: the concept.
        known: (m, d), tokens of the anchors and of what is retained.
        text: the concept's prompts, as `encode_concept` returns them.
        anchored: its anchor's.

    Raises:
        ExpungeError: the concept is its anchor to the model.
    """
    templates = settings.templates_for(concept)
    phrase = find_phrases(model, templates, text, len(concept.names))
    anchor_phrase = find_phrases(model, templates, anchored)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2 + len(BANDS))]
    for row in range(len(text)):
        goal_row = row % len(templates)
        e, n = text.embeddings[row].double(), anchored.embeddings[goal_row].double()
        # Each token of the phrase becomes the last one of the anchor's: in a causal encoder the last
        # has read them all. The empty prompt has its end token there.
        ending = min(int(anchored.first_end[goal_row]), int(anchored.read[goal_row].nonzero().max()))
        word = int(anchor_phrase[goal_row].nonzero().max()) if concept.anchor else ending
        places = phrase[row].nonzero()[:, 0]
        found[0].append((e[places], n[word].expand(len(places), -1)))
        ends = tuple(int(x.first_end[i]) for x, i in ((text, row), (anchored, goal_row)))
        m = match_tokens(text.ids[row].cpu(), anchored.ids[goal_row].cpu(), (ends[0], ends[1]))
        # As far as both prompts have counterparts, and the denoiser reads.
        last = min(m.first + m.tail, int(text.read[row].nonzero().max()) + 1)
        after = max(m.first, int(places[-1]) + 1)
        marks = [after, *(min(ends[0] + start, last) for start in BANDS), last]
        shift = m.second - m.first
        for band, (start, stop) in enumerate(pairwise(marks), 1):
            if start < stop:
                found[band].append((e[start:stop], n[start + shift : stop + shift]))
    found[0] = _distinct(found[0], known)
    if settings.gate_on == "phrase":
        found = found[:1]
    groups = [group for group in (GateTokens.of(pairs) for pairs in found if pairs) if group.differs]
    # Within one phrase the words differ from one another, so that `differs` would not tell.
    alone = text.embeddings - anchored.embeddings.repeat(len(concept.names), 1, 1)
    if not groups or bool(alone.norm() <= 1e-6 * text.embeddings.norm()):
        raise ExpungeError(
            f"{concept.name!r} and its anchor {concept.anchor!r} are the same to this model,"
            " so there is no direction to take away: choose another anchor"
        )
    return groups


def _distinct(pairs: Sequence[tuple[Tensor, Tensor]], known: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keep the tokens of a phrase that are the concept's alone.

    Words before the last may be anybody's: the "flag" and the "of" of a country's flag. A token is left
    out if it stands nearer to a token of an anchor's or a retained prompt than half as far as the last
    token stands from the anchor.

    Args:
        pairs: of each prompt the phrase's tokens and the anchor's, (tokens, d) each.
        known: (m, d), tokens of the anchors and of what is retained.
    """
    if not len(known):
        return list(pairs)
    # The median: phrasings differ in how far they put a name from its anchor.
    far = torch.stack([(e[-1] - n[-1]).norm() for e, n in pairs]).median()
    found = []
    for e, n in pairs:
        alone = torch.cdist(e, known).amin(1) > far / 2
        # Always: without its last token nothing of the phrase may be left.
        alone[-1] = True
        found.append((e[alone], n[alone]))
    return found
