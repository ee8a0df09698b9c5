"""Find which tokens of two prompts correspond, where the prompts differ in one phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """Token positions of a prompt and of the same with another phrase in it.

    The first `head` positions of both correspond; so do `tail` positions from `first` and from
    `second` on: the words after the phrase, the end, and the padding. The phrase has no
    counterpart, nor has the padding that the shorter prompt has more.
    """

    head: int
    first: int
    second: int
    tail: int

    @property
    def alone(self) -> tuple[slice, slice]:
        """The first prompt's positions without a counterpart: its phrase, and surplus padding."""
        return slice(self.head, self.first), slice(self.first + self.tail, None)


def match_tokens(first: Tensor, second: Tensor, ends: tuple[int, int]) -> Match:
    """Match two prompts by the common beginning and the common end of their words.

    >>> photo_of_cat, photo_of_big_dog = torch.tensor([0, 5, 6, 1, 1]), torch.tensor([0, 5, 8, 7, 1])
    >>> match_tokens(photo_of_cat, photo_of_big_dog, (3, 4))
    Match(head=2, first=3, second=4, tail=1)

    Args:
        first: (tokens,), the tokenizer's numbers: start, words, end, padding.
        second: the other prompt's, (tokens,).
        ends: where the end token of each stands.
    """
    shorter = min(ends)
    same = first[:shorter] == second[:shorter]
    head = int(same.long().cumprod(0).sum())
    # Behind the head alone: a word that is in both the beginning and the end must not count twice.
    words = [ids[head:end].flip(0) for ids, end in zip((first, second), ends, strict=True)]
    n = min(map(len, words))
    behind = int((words[0][:n] == words[1][:n]).long().cumprod(0).sum())
    starts = (ends[0] - behind, ends[1] - behind)
    return Match(head, starts[0], starts[1], len(first) - max(starts))


def locate_phrases(before: Sequence[int], after: Sequence[int], content_mask: Tensor) -> Tensor:
    """Locate the phrase in each of n prompts: (n, tokens), bool.

    Args:
        before: how many tokens the words before the phrase have, of each prompt.
        after: how many those after it have.
        content_mask: (n, tokens), bool, the prompts' content tokens.
    """
    place = torch.arange(content_mask.shape[1], device=content_mask.device)
    begin = content_mask.long().argmax(1, keepdim=True)
    # Of several text encoders' tokens the first one's: they run on without a gap.
    n = (content_mask | (place < begin)).long().cumprod(1).sum(1, keepdim=True) - begin
    first, last = (torch.tensor(x, device=content_mask.device)[:, None] for x in (before, after))
    return (place >= begin + first) & (place < begin + n - last)
