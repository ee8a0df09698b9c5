"""The closed-form refit of a model's text entries, as UCE solves it and others repeat it (RECE).

    min_W'  Σ ‖W' e − W a‖² + Σ ‖W' r − W r‖² + λ ‖W' − W‖²,      W' = W M

`Refit` gathers the sums of e, a and r from encoded prompts, for the tokens and for the vector of the
whole prompt, and solves for one M of all layers. A method that finds embeddings by other means, such as
adversarial ones, adds rows to `Refit.tokens` itself.

Source: UCE (Gandikota et al., WACV 2024, arXiv 2308.14761), eq. 7, solved in `ops.least_squares`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from expunge.changes import Changes, Right
from expunge.erasing.concept_tokens import sample_words
from expunge.model import Model
from expunge.ops.least_squares import gram, outer, pad_right_factor, solve_right_factor
from expunge.problem import Concept
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(eq=False)
class RefitSums:
    """The sums that one M is solved from: (d, d) each, float64, zero until rows are added."""

    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    """G = Σ e eᵀ over what is erased."""
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    """C = Σ a eᵀ."""
    prior: Tensor = field(default_factory=lambda: torch.zeros(()))
    """P = Σ r rᵀ over what is retained."""

    def erase(self, rows: Tensor, goals: Tensor, weight: float = 1.0) -> None:
        """Send rows to goals.

        Args:
            rows: e, (n, d).
            goals: a, (n, d).
            weight: of each row.
        """
        e, a = rows.cpu(), goals.cpu()
        # Not in place: the sums begin as scalars, since the width is known from the first rows.
        self.gram = self.gram + weight * gram(e)
        self.cross = self.cross + weight * outer(a, e)

    def retain(self, rows: Tensor, weight: float = 1.0) -> None:
        """Keep rows r, (n, d), where they go."""
        self.prior = self.prior + weight * gram(rows.cpu())

    def solve(self, ridge: float) -> Tensor:
        """Solve for M, (d, d), float32.

        Args:
            ridge: λ, at least 0.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        return solve_right_factor(self.cross, self.gram, self.prior, ridge).float()


@dataclass(eq=False)
class Refit:
    """The sums over encoded prompts: of their tokens, and of the vectors of whole prompts."""

    tokens: RefitSums = field(default_factory=RefitSums)
    pooled: RefitSums = field(default_factory=RefitSums)
    """No rows are added for a model without such a vector."""

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
            rows = text.embeddings.flatten(0, 1)
        else:
            spans = [(row, span) for row in range(len(text)) for span in text.from_last_token(row)]
            rows = torch.stack([text.embeddings[row, span.start] for row, span in spans])
        self.tokens.retain(rows, weight)
        if text.pooled is not None:
            self.pooled.retain(text.pooled, weight)

    def retain_words(
        self, model: Model, erased: Sequence[Concept], n: int, weight: float, run: RunContext
    ) -> None:
        """Keep a sample of the tokenizer's own words, every one of their tokens, where they go.

        Args:
            model: encodes them.
            erased: the concepts whose words are left out.
            n: how many words, at most.
            weight: of all words together.
            run: its seed chooses them.
        """
        words = sample_words(model, erased, n, run.generator("words"))
        for start in range(0, len(words), 64):
            run.progress("reading words", start, len(words))
            self.retain(model.encode(words[start : start + 64]), weight / len(words))
        run.progress("reading words", len(words), len(words))

    def solve(self, model: Model, ridge: float) -> Changes:
        """Solve for one M of all layers that read tokens, and one of each that reads the pooled vector.

        Args:
            model: whose layers to change.
            ridge: λ of the tokens, in units of a squared embedding.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        layers = tuple(entry.layer for entry in model.text_entries())
        changes = [Right(layers, self.tokens.solve(ridge))]
        for entry in model.pooled_entries():
            # A vector of the whole prompt is one row where its tokens are many: λ in proportion.
            share = float(self.pooled.gram.trace() / self.tokens.gram.trace())
            inputs = model.weight(entry.layer).shape[1]
            changes.append(
                Right((entry.layer,), pad_right_factor(self.pooled.solve(ridge * share), inputs))
            )
        return tuple(changes)


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
            pairs.append((e[:n], a[:n]))
    e, a = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return e, a
