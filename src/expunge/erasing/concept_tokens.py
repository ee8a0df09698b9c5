"""The rows of a text that stand for a concept: each prompt's last own token, in every encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.model import Model
from expunge.problem import Concept
from expunge.text import Text


def last_tokens(text: Text) -> Tensor:
    """The embedding of each prompt's last own token, in float64 on the CPU.

    A prompt without any, the empty one, has its start token there, or its end token where there is no
    start.

    Args:
        text: n encoded prompts.

    Returns:
        (n · encoders, width): prompt by prompt, encoder by encoder.
    """
    rows = []
    for row in range(len(text)):
        for own, end in text.segments(row):
            rows.append(text.embeddings[row, max(own.start, end - 1)])
    return torch.stack(rows).double().cpu()


def pairs(concept: Concept, templates: Sequence[str]) -> list[tuple[str, str]]:
    """The prompts that name a concept, each with the same prompt about its anchor.

    Every name of the concept stands in every template. The empty anchor is the empty prompt.
    """
    return [
        (template.format(name), template.format(concept.anchor) if concept.anchor else "")
        for name in concept.names
        for template in templates
    ]


def general_words(
    model: Model, concepts: Sequence[Concept], n: int, generator: torch.Generator
) -> list[str]:
    """A sample of the words that the tokenizer knows whole, without those in any concept's names.

    Args:
        model: whose tokenizer to ask.
        concepts: what is erased.
        n: at most so many words.
        generator: chooses them.
    """
    taken = {word for c in concepts for name in c.names for word in re.findall(r"\w+", name.lower())}
    words = [word for word in model.vocabulary() if word not in taken]
    order = torch.randperm(len(words), generator=generator)
    return [words[i] for i in order[:n].tolist()]
