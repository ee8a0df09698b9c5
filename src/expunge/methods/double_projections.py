"""Double Projections: send a concept to its part in what is safe, and move nothing known; seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Right
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.prompt_templates import (
    assemble_anchor_prompts,
    assemble_prompts,
    require_place,
)
from expunge.method import Method
from expunge.model import Model
from expunge.ops.least_squares import gram
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class DoubleProjections(Method):
    """Project a concept on what is safe, and send it there by a change that the known cannot feel.

        c* = Π_safe c,        min_Δ Σ_c ‖(W + Δ N) c − W c*‖² + s ‖Δ N‖²

    The first projection makes the proxy c* of each of the concept's tokens c: its part in the span of
    safe embeddings. The second one, N, keeps the change in the left null space of the known embeddings,
    what is retained and general words. With X = N C and C* the proxies, columns a token,

        W' = W [I + (C* − C) (XᵀX + s I)⁻¹ Xᵀ].

    One matrix serves every key and value projection.

    Known of the paper are its two steps, not its formulas: ours are which embeddings are safe and known,
    the penalty s, and `slack`, how much of the known ones counts as none. Where the known embeddings
    themselves are safe, the change takes from W just what the concept has and they have not. A vector of
    the whole prompt stays as it is.

    Cost: encodes a few hundred short prompts; two eigenvalue problems of the text's width, whatever the
    number of layers.

    Source: Zhang, Cheng, Wang, Liu, CVPR 2026, arXiv 2604.10032.
    """

    citation: ClassVar[str] = (
        "Zhang, Cheng, Wang, Liu: Closed-Form Concept Erasure via Double Projections."
        " CVPR 2026, arXiv 2604.10032."
    )
    strength_field: ClassVar[str] = "strength_penalty"
    stronger: ClassVar[str] = "a smaller strength_penalty, or a larger slack"
    presets: ClassVar[Presets] = read_presets(__file__)

    safe: Literal["known", "anchor"] = "anchor"
    """What a proxy is made of: all known embeddings, or the anchor's and the empty prompt's tokens."""
    slack: float = bounded(1e-3, above=0, at_most=1)
    """The share of the known embeddings' energy that lies where the edit may act. Larger erases more
    and moves the known more; 1 lets it act everywhere."""
    strength_penalty: float = bounded(1.0, at_least=0)
    """s, the pull of the change to zero, in units of a squared embedding. Larger erases less."""
    num_retain_words: int = bounded(500, at_least=0)
    """How many of the tokenizer's own words are known beside what the problem retains."""
    positions: Literal["last", "last-and-after"] = "last"
    """Tokens of a prompt that count: its last own token, or also the end and padding after it, which
    fill more of the space and leave the edit less to act in."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that name a concept, with {} in its place. The paper's own are not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        erased = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        return Cost(2 * erased + len(problem.retain) + self.num_retain_words + 1, products=40)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        words = sample_words(model, problem.erase, self.num_retain_words, run.generator("words"))
        anchors = [p for c in problem.erase for p in assemble_anchor_prompts(c, self.templates)]
        # The anchors are known, too: where a concept is sent must not move itself.
        known = self._gram(model, ["", *problem.retain, *anchors, *words], run)
        free = free_directions(known, self.slack)
        tokens, proxies = [], []
        for concept in problem.erase:
            erased = assemble_prompts(concept, self.templates)
            anchored = assemble_anchor_prompts(concept, self.templates)
            model.require_window(erased + anchored)
            rows = self._rows(model.encode(erased))
            span = known
            if self.safe == "anchor":
                span = self._gram(model, [*anchored, ""], run)
            tokens.append(rows)
            proxies.append(project_on_span(rows, span))
        matrix = solve_projected(torch.cat(tokens), torch.cat(proxies), free, self.strength_penalty)
        layers = tuple(entry.layer for entry in model.text_entries())
        return (Right(layers, matrix.float()),)

    def _gram(self, model: Model, prompts: Sequence[str], run: RunContext) -> Tensor:
        """Sum e eᵀ over the counted tokens of prompts, each prompt once: (d, d), float64."""
        # Once each: an anchor of many concepts would otherwise hold most of the energy, of which `slack`
        # is a share.
        prompts = list(dict.fromkeys(prompts))
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(prompts), 64):
            run.progress("reading words", start, len(prompts))
            total = total + gram(self._rows(model.encode(prompts[start : start + 64])))
        run.progress("reading words", len(prompts), len(prompts))
        return total

    def _rows(self, text: Text) -> Tensor:
        """Take the counted tokens of prompts, of every encoder: (rows, d), float64 on the CPU."""
        spans = [(row, span) for row in range(len(text)) for span in text.from_last_token(row)]
        n = 1 if self.positions == "last" else None
        return torch.cat([text.embeddings[row, span][:n] for row, span in spans]).double().cpu()


def free_directions(known: Tensor, slack: float) -> Tensor:
    """Find the directions in which the known embeddings have almost no energy: (d, k), orthonormal.

    Args:
        known: Σ e eᵀ over the known embeddings, (d, d).
        slack: the largest share of their energy that all these directions may hold together.

    Raises:
        ExpungeError: there is no such direction.
    """
    values, vectors = torch.linalg.eigh(known)
    # Eigenvalues rise, so the first ones are the directions that the known embeddings use least.
    energy = values.clamp(min=0).cumsum(0)
    held = energy / energy[-1]  # the last is exactly 1: a slack of 1 takes every direction
    free = vectors[:, held <= slack]
    if not free.shape[1]:
        raise ExpungeError(
            f"what is retained leaves no direction with a slack of {slack:g};"
            f" raise it above {float(held[0]):.2g}, or retain less"
        )
    return free


def project_on_span(rows: Tensor, span: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Project rows on the span of the embeddings that a Gram matrix was summed over: (n, d).

    Args:
        rows: (n, d).
        span: Σ e eᵀ, (d, d).
        tolerance: eigenvalues up to this share of the largest are none.
    """
    values, vectors = torch.linalg.eigh(span)
    # Relative, since eigenvalues grow with the number of tokens that were summed over.
    basis = vectors[:, values > tolerance * values[-1]]
    return rows @ basis @ basis.T


def solve_projected(tokens: Tensor, proxies: Tensor, free: Tensor, penalty: float) -> Tensor:
    """Solve for M = I + (C* − C) (XᵀX + s I)⁻¹ Xᵀ with X = N C, (d, d).

    Args:
        tokens: C, (n, d), a row a token.
        proxies: C*, (n, d).
        free: an orthonormal basis of the directions that N keeps, (d, k).
        penalty: s, at least 0; with 0, the pseudo-inverse of X solves it.
    """
    inside = tokens @ free  # X in the basis of N: a system of k unknowns, however many tokens there are
    left = (proxies - tokens).T @ inside
    eye = torch.eye(free.shape[1], dtype=torch.float64)
    system = inside.T @ inside + penalty * eye
    # Without a penalty and with fewer tokens than free directions this has no inverse; what lies below
    # 1e-12 of the largest eigenvalue is round-off of the product.
    solved = left @ torch.linalg.pinv(system, rtol=1e-12, hermitian=True)
    # The free basis on the right is what the known embeddings cannot feel.
    return torch.eye(len(free), dtype=torch.float64) + solved @ free.T
