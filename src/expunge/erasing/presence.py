"""Fit how a concept is found in a prompt: between the prompts that name it and all others.

The cosine of a prompt's embedding with a concept's direction (`changes.presence`) says how much of the
concept is in it. Where "much" begins differs between concepts and text encoders, so it is read off
prompts that name the concept, and others that do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from expunge.changes.presence import measure_cosine
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.prompt_templates import RETAINED, TEMPLATES, assemble_retained_prompts
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.text import Text

CERTAIN = math.log(99)
"""The logit of 0.99: how sure a fitted presence is of the concept's own prompts, and of all others."""


def list_other_prompts(
    model: Model, problem: Problem, general: int, run: RunContext
) -> tuple[list[str], list[str]]:
    """List prompts in which no concept is to be found: those to retain, and of general words.

    Args:
        model: whose tokenizer knows the words.
        problem: what is erased and retained; anchors and the empty prompt are retained, too.
        general: how many words.
        run: its seed chooses them.
    """
    anchors = [concept.anchor for concept in problem.erase if concept.anchor]
    kept = list(dict.fromkeys([*problem.retain, *anchors]))
    words = sample_words(model, problem.erase, general, run.generator("words"))
    return ["", *assemble_retained_prompts(kept)], assemble_retained_prompts(words)


def count_prompts(problem: Problem, general: int) -> int:
    """Count the prompts that `fit_presence` encodes, at most, with so many general words."""
    named = sum(len(c.names) * len(TEMPLATES[c.kind]) for c in problem.erase)
    return named + len(RETAINED) * (len(problem.retain) + len(problem.erase) + general) + 1


def fit_presence(
    model: Model,
    problem: Problem,
    direction: Tensor,
    others: tuple[Sequence[str], Sequence[str]],
    *,
    least: float,
    pooled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fit the centre and the width of each name's presence: (names,) each.

    The prompts that name it begin at the 5 % quantile of their cosines; others end at the largest of
    those to retain, or at the 99 % quantile of general words. The centre is half-way, and the width such
    that both ends are told with 99 %.

    Args:
        model: encodes the prompts.
        problem: the concepts.
        direction: of each name of each concept, in their order, (names, tokens, in).
        others: as `list_other_prompts` returns them.
        least: the smallest gap between the two that counts, so that the width is above 0.
        pooled: whether directions are those of vectors of whole prompts.
    """

    def measure(prompts: Sequence[str]) -> Tensor:
        parts = (model.encode(prompts[i : i + 64]) for i in range(0, len(prompts), 64))
        rows = (prompt_rows(text, direction.shape[-1], pooled=pooled) for text in parts)
        return torch.cat([measure_cosine(x, direction) for x in rows])

    kept, general = others
    edge = measure(kept).amax(0)
    if general:
        # A general word may be another name of a concept: the highest few have no say.
        edge = torch.maximum(edge, measure(general).quantile(0.99, dim=0))
    names = [(name, concept.kind) for concept in problem.erase for name in concept.names]
    start = torch.stack([
        # Of each name its own column: every prompt is measured along the directions of all names.
        measure([way.format(name) for way in TEMPLATES[kind]])[:, i].quantile(0.05)
        for i, (name, kind) in enumerate(names)
    ])  # fmt: skip
    # The centre is half-way even where the two overlap; only the width must be kept above 0.
    gap = (start - edge).clamp(min=least)
    return (start + edge) / 2, gap / (2 * CERTAIN)


def prompt_rows(text: Text, inputs: int, *, pooled: bool = False) -> Tensor:
    """Return what a layer is given of prompts, (n, tokens, inputs), float32 on the CPU.

    Args:
        text: the prompts.
        inputs: the width of the layer's input: what stands behind a pooled vector, such as SDXL's sizes,
            counts as 0.
        pooled: whether it is given the vector of the whole prompt, which then counts as one token.
    """
    if not pooled:
        return text.embeddings.float().cpu()
    if text.pooled is None:
        raise TypeError("text with a pooled vector is expected, not without")
    vectors = text.pooled[:, None].float().cpu()
    return pad(vectors, (0, inputs - vectors.shape[-1]))
