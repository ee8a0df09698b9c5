"""The closed-form refit of a model's text entries, as UCE solves it and others repeat it (RECE).

    min_W'  Σ ‖W' e − W a‖² + Σ ‖W' r − W r‖² + λ ‖W' − W‖²,      W' = W M

`Refit` gathers the sums of e, a and r from encoded prompts, for the tokens and for the vector of the
whole prompt, and solves for one M of all layers. A method that finds embeddings by other means, such as
adversarial ones, adds rows to `Refit.tokens` itself.

Source: UCE (Gandikota et al., WACV 2024, arXiv 2308.14761), eq. 7, solved in `ops.refit_sums`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from expunge.changes import Change, Changes, LowRank, Right
from expunge.erasing.concept_tokens import sample_words
from expunge.model import Model
from expunge.ops.least_squares import CHUNK, pad_right_factor
from expunge.ops.refit_sums import RefitSums
from expunge.problem import Concept
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(eq=False)
class Refit:
    """The sums over encoded prompts: of their tokens, and of the vectors of whole prompts."""

    tokens: RefitSums = field(default_factory=RefitSums)
    pooled: RefitSums = field(default_factory=RefitSums)
    """No rows are added for a model without such a vector."""
    prompt_size: int = 1
    """How many numbers the tokens of one prompt are: tokens · width."""

    def erase(
        self,
        erased: Text,
        anchored: Text,
        weight: float = 1.0,
        positions: Literal["last-and-after", "last"] = "last-and-after",
    ) -> None:
        """Send prompts' tokens where those of other prompts go, aligned from the last content token on.

        Args:
            erased: n prompts that name a concept.
            anchored: the same prompts with its anchor, row for row.
            weight: of each prompt.
            positions: the last content token and the end and padding after it, or that token alone.
        """
        self.prompt_size = erased.embeddings[0].numel()
        self.tokens.erase(*match_from_last_token(erased, anchored, positions), weight)
        if erased.pooled is not None and anchored.pooled is not None:
            self.pooled.erase(erased.pooled, anchored.pooled, weight)

    def retain(self, text: Text, weight: float = 1.0, positions: Literal["all", "last"] = "all") -> None:
        """Keep prompts' tokens where they go.

        Args:
            text: the prompts.
            weight: of each prompt.
            positions: all of a prompt's tokens, or its last content token alone.
        """
        if positions == "all":
            rows = text.embeddings[text.read]
        else:
            spans = [(row, span) for row in range(len(text)) for span in text.from_last_token(row)]
            rows = torch.stack([text.embeddings[row, span.start] for row, span in spans])
        self.tokens.retain(rows, weight)
        if text.pooled is not None:
            self.pooled.retain(text.pooled, weight)

    def retain_words(
        self,
        model: Model,
        erased: Sequence[Concept],
        n: int,
        weight: float,
        run: RunContext,
        positions: Literal["all", "last"] = "all",
    ) -> None:
        """Keep a sample of the tokenizer's own words where they go.

        Args:
            model: encodes them.
            erased: the concepts whose words are left out.
            n: how many words, at most.
            weight: of all words together.
            run: its seed chooses them.
            positions: as in `retain`.
        """
        words = sample_words(model, erased, n, run.generator("words"))
        # 64 prompts of 512 tokens, each 7680 wide, would be a gigabyte.
        step = max(1, min(64, CHUNK // self.prompt_size))
        for start in range(0, len(words), step):
            run.progress("reading words", start, len(words))
            text = model.encode(words[start : start + step])
            self.retain(text, weight / len(words), positions)
        run.progress("reading words", len(words), len(words))

    def solve(self, model: Model, ridge: float) -> Changes:
        """Solve for one M of all layers that read tokens, and one of each that reads the pooled vector.

        Args:
            model: whose layers to change.
            ridge: λ of the tokens, in units of a squared embedding.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        changes = self._change_tokens(model, ridge)
        for entry in model.pooled_entries():
            # A vector of the whole prompt is one row where its tokens are many: λ in proportion.
            share = self.pooled.energy / self.tokens.energy
            inputs = model.weight(entry.layer).shape[1]
            changes.append(
                Right((entry.layer,), pad_right_factor(self.pooled.solve(ridge * share), inputs))
            )
        return tuple(changes)

    def _change_tokens(self, model: Model, ridge: float) -> list[Change]:
        """Solve for what the layers that read tokens become: W M, or W + (W P) Q where that is less."""
        layers = tuple(entry.layer for entry in model.text_entries())
        rank = self.tokens.rank
        shapes = [model.weight(layer).shape for layer in layers] if rank is not None else []
        # By the numbers that the edit would hold: thin factors of every layer, or one matrix for all.
        if rank is None or rank * sum(map(sum, shapes)) >= shapes[0][1] ** 2:
            return [Right(layers, self.tokens.solve(ridge))]
        right, down = self.tokens.factor(ridge)
        ups = ((model.weight(layer).cpu().double() @ right).float() for layer in layers)
        return [LowRank((layer,), up, down.float()) for layer, up in zip(layers, ups, strict=True)]


def match_from_last_token(
    erased: Text, anchored: Text, positions: Literal["last-and-after", "last"] = "last-and-after"
) -> tuple[Tensor, Tensor]:
    """Pair the tokens of prompts with those of their anchors' from the last content token on.

    Args:
        erased: n prompts.
        anchored: n prompts, row for row.
        positions: as in `Refit.erase`.

    Returns:
        e and a, (rows, d) each: prompt by prompt, encoder by encoder.
    """
    pairs = []
    for row in range(len(erased)):
        spans = zip(erased.from_last_token(row), anchored.from_last_token(row), strict=True)
        for span, goal_span in spans:
            e, a = erased.embeddings[row, span], anchored.embeddings[row, goal_span]
            # Of the longer phrase less padding is left: what has no counterpart stays out.
            n = 1 if positions == "last" else min(len(e), len(a))
            # What the denoiser does not read is zeros, and moves nothing.
            read = erased.read[row, span][:n]
            pairs.append((e[:n][read], a[:n][read]))
    e, a = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return e, a
