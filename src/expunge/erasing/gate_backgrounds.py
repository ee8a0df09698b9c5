"""What gates stay closed on: general words, and what a problem retains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.gate_tokens import GateSettings, GateTokens
from expunge.erasing.prompt_templates import KEPT, assemble_retained_prompts
from expunge.model import Model
from expunge.ops.gates import Background
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True, eq=False)
class GateBackgrounds:
    """What a concept's gates stay closed on."""

    tokens: Background
    """For the gates on tokens."""
    vectors: Background | None
    """For the gates on vectors of whole prompts, where the model has them."""


def read_backgrounds(
    settings: GateSettings,
    model: Model,
    problem: Problem,
    retained: Mapping[str, Text],
    run: RunContext,
) -> dict[str, GateBackgrounds]:
    """Read for each concept general words in the phrasing kept for its kind, and what is retained.

    Args:
        settings: how many words, and how gates are fitted.
        model: whose text encoder reads.
        problem: the concepts.
        retained: what is retained and the anchors, as `encode_retained` returns them.
        run: draws the words, and is told how far it is.
    """
    # Thinned: padding tokens are nearly equal, and would outweigh all others in the spread.
    kept = torch.cat([thin_padding(text) for text in retained.values()])
    # Unthinned: the edge of a gate must lie beyond every token that stays.
    shut = torch.cat([text.embeddings[text.read] for text in retained.values()])
    whole = [text.pooled for text in retained.values() if text.pooled is not None]
    # Guidance may lead away from another text than the empty prompt: gates are closed on that, too.
    nothing = model.unconditional(1)
    if nothing.pooled is not None:
        whole.append(nothing.pooled)
    if not torch.equal(nothing.embeddings, model.encode([""]).embeddings):
        shut = torch.cat([shut, nothing.embeddings[nothing.read]])
    words = draw_words(settings, model, problem, run)
    found: dict[str, GateBackgrounds] = {}
    for concept in problem.erase:
        if concept.kind not in found:
            template = KEPT[concept.kind]
            chosen = ["", *(template.format(word) for word in words)]
            label = f"reading {concept.kind} words"
            tokens, vectors = read_prompts(model, chosen, label, run)
            found[concept.kind] = GateBackgrounds(
                Background(tokens, kept, settings.gate_ridge, settings.n_std, shut),
                None
                if vectors is None
                else Background(vectors, torch.cat(whole), settings.gate_ridge, settings.n_std),
            )
    return {concept.name: found[concept.kind] for concept in problem.erase}


def draw_words(settings: GateSettings, model: Model, problem: Problem, run: RunContext) -> list[str]:
    """Draw words of the tokenizer's vocabulary that are in no concept's name.

    Args:
        settings: how many.
        model: whose tokenizer knows the words.
        problem: the concepts.
        run: its seed.
    """
    return sample_words(model, problem.erase, settings.num_retain_words, run.generator("words"))


def read_prompts(
    model: Model, prompts: Sequence[str], label: str, run: RunContext
) -> tuple[Tensor, Tensor | None]:
    """Encode prompts in batches.

    Args:
        model: whose text encoder reads.
        prompts: the prompts.
        label: what is done, for the progress.
        run: is told how far it is.

    Returns:
        Their tokens with few of the padding (`thin_padding`), (n, d), and the vectors of whole prompts.
    """
    tokens, vectors = [], []
    for start in range(0, len(prompts), 64):
        run.progress(label, start, len(prompts))
        text = model.encode(prompts[start : start + 64])
        tokens.append(thin_padding(text))
        if text.pooled is not None:
            vectors.append(text.pooled)
    run.progress(label, len(prompts), len(prompts))
    return torch.cat(tokens), torch.cat(vectors) if vectors else None


def retained_phrasings(problem: Problem) -> list[str]:
    """Return the phrasings in which gates are kept closed on what a problem retains.

    They are the bare name, and for each kind that is erased a phrasing in which nothing is erased.
    """
    return list(dict.fromkeys(["{}", *(KEPT[c.kind] for c in problem.erase)]))


def encode_retained(model: Model, problem: Problem) -> dict[str, Text]:
    """Encode what is retained, and the anchors, in a few prompts each.

    Returns:
        By name; the empty anchor's prompt is the empty one.
    """
    names = dict.fromkeys((*problem.retain, *(c.anchor or "" for c in problem.erase)))
    ways = retained_phrasings(problem)
    prompts = {name: assemble_retained_prompts([name], ways) if name else [""] for name in names}
    text = model.encode([prompt for some in prompts.values() for prompt in some])
    rows = iter(range(len(text)))
    return {name: text[[next(rows) for _ in some]] for name, some in prompts.items()}


def keep_separable(
    settings: GateSettings,
    model: Model,
    problem: Problem,
    tokens: Mapping[str, Sequence[GateTokens]],
    backgrounds: Mapping[str, Background],
    retained: Mapping[str, Text],
) -> dict[str, list[GateTokens]]:
    """Keep the gates whose tokens differ enough from what is retained; of the padding's, not all may.

    Args:
        settings: how far a retained prompt may lie in a concept.
        model: whose text encoder reads.
        problem: the concepts and what is retained.
        tokens: of each gate, by concept.
        backgrounds: what each concept's gates stay closed on.
        retained: as `encode_retained` returns it.

    Raises:
        ExpungeError: a retained prompt lies in a concept's phrase.
    """
    apart: dict[str, list[GateTokens]] = {}
    names = {concept.name: concept.names for concept in problem.erase}
    for concept, members in tokens.items():
        apart[concept], background = [], backgrounds[concept]
        bare = model.encode(names[concept]).embeddings
        one = {n for n in problem.retain if _contains(bare, retained[n].embeddings[0])}
        for group in members:
            way = background.direction(group.rows)
            overlaps = {
                name: max(
                    background.reach(way, thin_padding(retained[name]).double()), float(name in one)
                )
                for name in problem.retain
            }
            nearest = max(overlaps, key=lambda name: overlaps[name], default="")
            if not nearest or overlaps[nearest] <= settings.max_overlap:
                apart[concept].append(group)
            # The first group is the phrase's: without it nothing is erased. Padding may be left
            # out.
            elif group is members[0]:
                raise ExpungeError(
                    f"{nearest!r} to retain lies in what is erased with {concept!r}: their overlap"
                    f" is {overlaps[nearest]:.2f}, and {settings.max_overlap:g} is the most allowed"
                )
    return apart


def _contains(texts: Tensor, other: Tensor) -> bool:
    """Tell whether a text, (tokens, d), is one of some, (n, tokens, d).

    What is erased and what is retained stand in different phrasings, and a text encoder tells tokens in
    different places apart: that two names are one shows where both stand alone.
    """
    return bool(((texts - other).norm(dim=2) <= 1e-3 * other.norm(dim=1)).all(1).any())


def thin_padding(text: Text) -> Tensor:
    """Return start, content and end tokens, (n, d), and a few of the padding, which is much the same."""
    end = text.first_end
    behind = torch.arange(text.content_mask.shape[1], device=end.device) - end
    # Powers of two: what the padding says changes fast at first and slowly later.
    few = torch.isin(behind, torch.tensor([1, 2, 4, 8, 16, 32, 64], device=end.device))
    return text.embeddings[((behind <= 0) | few) & text.read]
