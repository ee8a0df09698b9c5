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

from expunge.changes import Change, Changes, LowRank, Right
from expunge.erasing.concept_tokens import sample_words
from expunge.model import Model
from expunge.ops.least_squares import (
    CHUNK,
    add_gram,
    add_outer,
    mirror,
    pad_right_factor,
    solve_right_factor,
)
from expunge.ops.row_span import solve_in_span
from expunge.problem import Concept
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Rows of the least squares that have one weight."""

    rows: Tensor
    """e or r, (n, d)."""
    goals: Tensor | None
    """a, (n, d), where they are sent; None where they stay."""
    weight: float
    """Of each row."""


@dataclass(eq=False)
class RefitSums:
    """The rows that one M is solved from, or, once they fill the space, their sums (d, d), float64."""

    pending: list[WeightedRows] = field(default_factory=list)
    """Rows that are in no sum yet: all of them, while they are fewer than d."""
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    """G, C and P; G and P on and below the diagonal alone."""
    energy: float = 0.0
    """The trace of G."""

    @property
    def gram(self) -> Tensor:
        """G = Σ e eᵀ over what is erased."""
        return mirror(self._summed()[0])

    @property
    def cross(self) -> Tensor:
        """C = Σ a eᵀ."""
        return self._summed()[1]

    @property
    def prior(self) -> Tensor:
        """P = Σ r rᵀ over what is retained."""
        return mirror(self._summed()[2])

    def erase(self, rows: Tensor, goals: Tensor, weight: float = 1.0) -> None:
        """Send rows to goals.

        Args:
            rows: e, (n, d).
            goals: a, (n, d).
            weight: of each row.
        """
        self.energy += weight * float(rows.double().square().sum())
        self._add(WeightedRows(rows.cpu(), goals.cpu(), weight))

    def retain(self, rows: Tensor, weight: float = 1.0) -> None:
        """Keep rows r, (n, d), where they go."""
        self._add(WeightedRows(rows.cpu(), None, weight))

    @property
    def rank(self) -> int | None:
        """How many rows are erased; None where all rows together are as many as the text is wide."""
        if self.sums is not None:
            return None
        return sum(len(some.rows) for some in self.pending if some.goals is not None) or None

    def factor(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Solve for P, (d, rank), and Q, (rank, d), of M = I + P Q, float64, where there is a rank.

        Args:
            ridge: λ, at least 0.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        erased, goals, retained = [], [], []
        for some in self.pending:
            root = some.weight**0.5
            if some.goals is None:
                retained.append(root * some.rows.double())
            else:
                erased.append(root * some.rows.double())
                goals.append(root * some.goals.double())
        kept = torch.cat([erased[0][:0], *retained])
        return solve_in_span(torch.cat(erased), torch.cat(goals), kept, ridge)

    def solve(self, ridge: float) -> Tensor:
        """Solve for M, (d, d), float32.

        Args:
            ridge: λ, at least 0.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        if self.rank is not None:
            right, down = self.factor(ridge)
            matrix = right @ down
            matrix.diagonal().add_(1)
            return matrix.float()
        return solve_right_factor(self.cross, self.gram, self.prior, ridge).float()

    def _add(self, some: WeightedRows) -> None:
        """Keep rows as they are while they are few, and their sums from then on."""
        self.pending.append(some)
        if self.sums is not None or sum(len(each.rows) for each in self.pending) >= some.rows.shape[1]:
            self._summed()

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, with all rows in them."""
        if self.sums is None:
            width = self.pending[0].rows.shape[1] if self.pending else 0
            gram, cross, prior = (torch.zeros(width, width, dtype=torch.float64) for _ in range(3))
            self.sums = gram, cross, prior
        gram, cross, prior = self.sums
        for some in self.pending:
            if some.goals is None:
                add_gram(prior, some.rows, some.weight)
            else:
                add_gram(gram, some.rows, some.weight)
                add_outer(cross, some.goals, some.rows, some.weight)
        self.pending.clear()
        return self.sums


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
