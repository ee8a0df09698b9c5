"""Prompts as tokens: for CLIP's tokenizers, T5's, and those of language models with their templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError


@dataclass(frozen=True, eq=False)
class Tokens:
    """Distinct prompts, padded or cut to one length."""

    ids: Tensor
    """(n, tokens), int64"""
    mask: Tensor
    """(n, tokens), 1 where there is no padding"""
    content_mask: Tensor
    """(n, tokens), bool: the prompt's own tokens, neither start, template, end nor padding"""
    end: Tensor | None = None
    """(n,), int64: the first place behind the prompt's own tokens, by default the last that is no
    padding"""

    def __post_init__(self) -> None:
        if self.end is None:
            object.__setattr__(self, "end", self.mask.sum(1) - 1)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, *, starts: bool = True) -> Tokens:
    """The tokens of prompts.

    Args:
        tokenizer: CLIP's, which begins with a start token, or T5's, which does not.
        prompts: the texts.
        length: how many tokens each has in the end.
        starts: whether the tokenizer begins with a start token.
    """
    padded = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    place = torch.arange(length)
    # Counted by the mask and not by the id: SD 1's tokenizer pads with the end token itself.
    end = padded.attention_mask.sum(1, keepdim=True) - 1  # where the end token stands
    own = (place >= int(starts)) & (place < end)
    return Tokens(padded.input_ids, padded.attention_mask, own)


def count(tokenizer: Any, prompt: str) -> int:
    """How many tokens of its own a prompt has, uncut."""
    return len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)


def knows(tokenizer: Any, prompt: str) -> bool:
    """Whether a tokenizer makes anything of a prompt."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return not set(ids) <= set(tokenizer.all_special_ids)  # the unknown token is one of them


BEGINS = ("▁", "Ġ")
"""What marks the beginning of a word: in SentencePiece's vocabularies, and in those of bytes."""


def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """The whole words that a tokenizer knows, in small letters, in the order of their numbers."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    words = [token.removesuffix("</w>") for token in tokens if token.endswith("</w>")]  # CLIP's
    if not words:
        words = [token[1:] for token in tokens if token.startswith(BEGINS) and token[1:].islower()]
    return tuple(word for word in words if len(word) > 2 and word.isascii() and word.isalpha())


def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's last hidden states but one, (n, tokens, width), and its pooled output, (n, width)."""
    states, pooled = [], []
    for part in ids.split(64):
        output = encoder(part.to(encoder.device), output_hidden_states=True)
        # SDXL and SD 3 were trained on the state before the last layer, without the final norm.
        states.append(output.hidden_states[-2])
        pooled.append(output[0])
    return torch.cat(states), torch.cat(pooled)


@dataclass(frozen=True)
class Template:
    """What a family puts around a prompt before its text encoder reads it."""

    before: str = ""
    after: str = ""

    def around(self, prompt: str) -> str:
        return f"{self.before}{prompt}{self.after}"


MARK = "\x1aprompt\x1a"
"""Stands for the prompt while a chat template is taken apart; no prompt has it."""


def chat_template(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> Template:
    """What a tokenizer's chat template puts around the text `MARK` of some messages.

    Args:
        tokenizer: of a language model.
        messages: the conversation, with `MARK` in the place of the prompt.
        **options: of the template: `add_generation_prompt`, `enable_thinking`.

    Raises:
        ExpungeError: the tokenizer has no chat template, or one that changes the prompt.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one of its own
    if not getattr(tokenizer, "chat_template", None):
        raise ExpungeError(
            f"this model's tokenizer, {type(tokenizer).__name__}, has no chat template, and its text"
            " encoder reads prompts in one: take the tokenizer folder of the original model"
        )
    try:
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # whatever the template raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExpungeError(f"this model's chat template fails: {reason}") from error
    if whole.count(MARK) != 1:
        raise ExpungeError("this model's chat template does not hold the prompt once, as it should")
    before, after = whole.split(MARK)
    return Template(before, after)


def tokenize_in(
    tokenizer: Any,
    prompts: Sequence[str],
    template: Template,
    length: int,
    *,
    padding: Literal["max_length", "longest"] = "max_length",
    side: Literal["left", "right", "own"] = "own",
) -> Tokens:
    """The tokens of prompts in a template, as a language model's tokenizer makes them.

    A token that holds the template's last space and the prompt's first letter counts as the prompt's.
    The tokenizer is not told how to pad, as it would remember that.

    Args:
        tokenizer: one that says which characters each token stands for.
        prompts: the texts.
        template: what stands around each.
        length: the most tokens that a text may have, template and all; what is more is cut off.
        padding: up to `length`, or to the longest text.
        side: where the padding stands; by default where the tokenizer puts it.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    found = tokenizer(
        [template.around(prompt) for prompt in prompts],
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
    )
    longest = length if padding == "max_length" else max(map(len, found.input_ids))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    left = (tokenizer.padding_side if side == "own" else side) == "left"

    def padded(rows: Sequence[Sequence[Any]], value: Any) -> Tensor:
        blanks = ([value] * (longest - len(row)) for row in rows)
        pairs = zip(rows, blanks, strict=True)
        return torch.tensor([[*b, *row] if left else [*row, *b] for row, b in pairs])

    ids, offsets = padded(found.input_ids, fill), padded(found.offset_mapping, (0, 0))
    attended = padded([[1] * len(row) for row in found.input_ids], 0)
    starts, stops = offsets.unbind(-1)
    first = len(template.before)
    last = torch.tensor([[first + len(prompt)] for prompt in prompts])
    mask = attended.bool()
    # Special tokens have the empty span (0, 0), which `stops > starts` leaves out.
    own = mask & (stops > first) & (starts < last) & (stops > starts)
    place = torch.arange(own.shape[1])
    # Behind the own tokens; where there are none, behind the template's beginning.
    before = mask & (stops <= first)
    behind = torch.where(own.any(1, keepdim=True), own, before)
    end = torch.where(behind, place + 1, 0).amax(1).clamp_max(own.shape[1] - 1)
    return Tokens(ids, attended, own, end)


def surroundings(tokenizer: Any, template: Template) -> int:
    """How many tokens a template has beside those of the prompt."""
    # The length is a bound that no text reaches, so that nothing is cut off.
    tokens = tokenize_in(tokenizer, ["a"], template, 2**20, padding="longest")
    return int((~tokens.content_mask).sum())


def own_tokens(tokenizer: Any, prompt: str, template: Template) -> int:
    """Count a prompt's own tokens in a template, uncut.

    Args:
        tokenizer: the language model's.
        prompt: the prompt.
        template: what stands around it.
    """
    return int(tokenize_in(tokenizer, [prompt], template, 2**20, padding="longest").content_mask.sum())
