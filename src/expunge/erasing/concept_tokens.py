"""The token embeddings that stand for a concept or a word, and the words that stand for all others."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.model import Model
from expunge.ops.prompt_alignment import locate_phrases
from expunge.problem import Concept
from expunge.text import Text


def last_tokens(text: Text) -> Tensor:
    """Take the embedding of each prompt's last content token, of every encoder (`Text.from_last_token`).

    Args:
        text: n encoded prompts.

    Returns:
        (n · encoders, d), float64 on the CPU: prompt by prompt, encoder by encoder.
    """
    # Causal encoders gather a phrase in its last token; the earlier ones know only their beginning.
    places = [(row, span.start) for row in range(len(text)) for span in text.from_last_token(row)]
    return torch.stack([text.embeddings[row, place] for row, place in places]).double().cpu()


def find_phrases(model: Model, templates: Sequence[str], text: Text, n_names: int = 1) -> Tensor:
    """Find where the concept's phrase stands in prompts made of it.

    Args:
        model: whose tokenizer counts the words around the phrase.
        templates: phrasings with {} in the phrase's place.
        text: the prompts, name after name, each template by template.
        n_names: how many names there are.

    Returns:
        (n, tokens), bool.
    """
    sides = [template.split("{}") for template in templates] * n_names
    before, after = ([model.count_tokens(side.strip()) for side in x] for x in zip(*sides, strict=True))
    return locate_phrases(before, after, text.content_mask)


def vocabulary_words(model: Model, erased: Sequence[Concept]) -> list[str]:
    """List the words that the tokenizer knows whole, without those in any concept's names.

    Args:
        model: whose tokenizer to ask.
        erased: the concepts.

    Returns:
        The words in the order of the tokenizer's numbers, which is that of their frequency.
    """
    # A word of a name, such as the "cat" of "black cat", must not be held where it is.
    taken = {word for c in erased for name in c.names for word in re.findall(r"\w+", name.lower())}
    return [word for word in model.vocabulary() if word not in taken]


def sample_words(
    model: Model, erased: Sequence[Concept], n: int, generator: torch.Generator
) -> list[str]:
    """Draw some of `vocabulary_words`.

    Args:
        model: whose tokenizer to ask.
        erased: the concepts.
        n: how many words, at most.
        generator: chooses the words.
    """
    words = vocabulary_words(model, erased)
    order = torch.randperm(len(words), generator=generator)
    return [words[i] for i in order[:n].tolist()]
