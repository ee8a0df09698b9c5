"""Sluice, ours: one matrix takes all concepts to their anchors, behind gates; seconds, no images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Gated
from expunge.erasing.caption_gram import read_captions
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.gate_backgrounds import (
    encode_retained,
    keep_separable,
    read_backgrounds,
    read_prompts,
    retained_phrasings,
)
from expunge.erasing.gate_tokens import GateTokens, read_tokens
from expunge.erasing.neighbours import count_neighbours, make_neighbours
from expunge.erasing.pooled_gates import pad_gates
from expunge.erasing.prompt_templates import TEMPLATES, assemble_retained_prompts, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.ops.gates import Background, Gate, fit_gates
from expunge.ops.least_squares import gram, outer, solve_right_factor
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text

THIN = 3
"""Of the thirty phrasings of a kind every third is read: half of these have words behind the concept."""

MOST_ROWS = 32
"""How many tokens of a gate the matrix is solved from, evenly taken: those of the padding are many, and
much the same."""

LEAST_GAP = 0.1
"""How far a gate's tokens stand from those that stay, in units of the way to their mean: below it, a
gate says too little of a concept."""


@dataclass(frozen=True)
class Sluice(Method):
    """One matrix M takes every concept to its anchor; gates let tokens through to it.

        x' = x + S (M − 1) x,        S = max_y max_i σ(slope_i (w_i · y − centre_i)),   y in x's prompt

    *The matrix.* With e the tokens of gate i, a those of the same prompts with the anchor in the
    concept's place, v tokens of general words and of the anchors, in units of a token's mean square,

        min_M  Σ_i b_i mean_i ‖M e − a‖² + κ E ‖M v − v‖² + λ ‖M − 1‖².

    A weight edit (UCE, MACE) has to choose between strong here and harmless elsewhere, since it acts on
    every token. Behind gates M may be strong. All concepts share it, so that it does not matter which of
    them a gate takes a token for. The budget b_i is 1; for `rounds` it grows where a gate's tokens stay
    far from their anchors.

    *The gates.* A concept's gate reads the last token of its name, which in a causal encoder has read
    those before it, and opens the whole prompt: all that a prompt says of the name is moved, and nothing
    where the name is not. It is half open between the farthest token that must stay and the concept's
    nearest. Among those that stay are everyday captions and *neighbours*: names made of an erased name's
    own words ("Abrel Bolvane" beside "Abrel Crendle"), so that a gate opens on all words together. With
    `opens` "token" each token is asked for itself, and the words behind a name, the end and bands of the
    padding have gates of their own.

    Exact as an edit of its own. As plain weights, `export` fits the nearest and says what that costs.

    Where a vector of the whole prompt enters too, it gets a matrix and gates of its own in the same way.

    Ours. Taken over: the least squares of UCE (arXiv 2308.14761), the gates of this project's ACE.

    Cost: encodes a few hundred short prompts and two for each neighbour; one Cholesky factorisation for
    each kind of concept and each round, of the text's width, and no pass over the layers.

    Source: this project, `docs/explanation/our-method.md`.
    """

    citation: ClassVar[str] = (
        "Sluice: one matrix behind a gate for each concept. This project's own method, 2026;"
        " docs/explanation/our-method.md."
    )
    stronger: ClassVar[str] = "a smaller ridge, a smaller retain_scale or a smaller margin"
    presets: ClassVar[Presets] = read_presets(__file__)
    strength_field: ClassVar[str] = "ridge"

    ridge: float = bounded(0.002, above=0)
    """λ, pull of M to the identity, in units of a token's mean square. Larger erases less."""
    retain_scale: float = bounded(0.5, at_least=0)
    """κ, weight of general words and anchors in M, in all. They count where a gate is open that should
    not be, and for the other words of a prompt. Larger erases less."""
    rounds: int = bounded(0, at_least=0)
    """How often the budget b goes anew to the gates whose tokens stay farthest from their anchors. Off:
    it was measured, and takes more from the others than it gives (`docs/explanation/our-method.md`)."""
    energy: float = bounded(0.99, above=0, at_most=1)
    """The share of what M does to the concepts that its directions keep; fewer make a smaller edit."""
    neighbours: int = bounded(4, at_least=0)
    """Made-up names for each word of a name of several words, which gates stay closed on; for people
    and styles."""
    margin: float = bounded(0.4, above=0, at_most=0.95)
    """Where between what stays (0) and the concept (1) a gate is half open. Smaller opens wider."""
    retain_openness: float = bounded(0.01, above=0, at_most=0.4)
    """How far a gate is open on the nearest token that stays."""
    gate_ridge: float = bounded(1.0, above=0)
    """How much of a sphere the spread of what stays is taken for: smaller parts near words best, larger
    holds best against perturbations."""
    n_std: float = bounded(4.0, at_least=0)
    """How many standard deviations above the mean of general tokens still count as closed."""
    max_overlap: float = bounded(0.9, above=0, at_most=1)
    """How far into the concept, whose own mean is at 1, a retained prompt may lie; beyond, it cannot
    stay while the concept goes, and that is an error."""
    num_retain_words: int = bounded(200, at_least=1)
    """How many of the tokenizer's own words gates stay closed on."""
    captions: str = "general"
    """Everyday captions on which gates stay closed, too: "general", which ship, a text file, or a data
    set of the hub; "" leaves them out."""
    num_captions: int = bounded(200, at_least=0)
    """How many of them are drawn."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default ten of its kind."""
    opens: Literal["prompt", "token"] = "prompt"
    """What a gate opens. "prompt": a name's last token, which has read those before it, opens the whole
    prompt to the matrix. "token": each token is asked for itself, and those behind a name, the end and
    the padding have gates of their own."""
    gate_on: ClassVar[str] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    def templates_for(self, concept: Concept) -> tuple[str, ...]:
        """Return the phrasings that a concept is erased in."""
        return self.templates or TEMPLATES[concept.kind][::THIN]

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        read = sum(len(self.templates_for(c)) * (len(c.names) + 1) for c in problem.erase)
        staying = len(problem.retain) + len({c.anchor for c in problem.erase})
        staying += count_neighbours(problem.erase, self.neighbours)
        kinds = len({c.kind for c in problem.erase})
        said = self.num_captions if self.captions else 0
        prompts = read + len(retained_phrasings(problem)) * staying + self.num_retain_words * kinds
        return Cost(prompts + said, products=40 + 20 * kinds + 8 * self.rounds)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        retained = encode_retained(model, problem)
        tokens, vectors = read_tokens(self, model, problem, retained)
        grounds = read_backgrounds(self, model, problem, retained, run)
        near, said = self._read_neighbours(model, problem, run), self._read_captions(model, problem, run)
        closed_on = self._widen({n: ground.tokens for n, ground in grounds.items()}, near[0], said[0])
        whole = {n: ground.vectors for n, ground in grounds.items() if ground.vectors}
        whole = self._widen(whole, near[1], said[1])
        if self.opens == "prompt":
            # Only the first of a concept's groups has a gate: it alone is asked whether it stands clear.
            phrases = {name: members[:1] for name, members in tokens.items()}
            keep_separable(self, model, problem, phrases, closed_on, retained)
        else:
            tokens = keep_separable(self, model, problem, tokens, closed_on, retained)
        own = {name: retained[name] for name in dict.fromkeys(c.anchor or "" for c in problem.erase)}
        # Of what is retained the anchors alone: the matrix must not move what it leads to.
        anchors = torch.cat([text.embeddings[text.read] for text in own.values()]).double()
        layers = tuple(entry.layer for entry in model.text_entries())
        changes = [self._solve(layers, tokens, closed_on, anchors)]
        return (*changes, *self._solve_vectors(model, vectors, whole, list(own.values())))

    def _solve(
        self,
        layers: tuple[str, ...],
        tokens: Mapping[str, Sequence[GateTokens]],
        closed_on: Mapping[str, Background],
        anchors: Tensor,
    ) -> Gated:
        """Solve for the matrix and the gates of some layers.

        Args:
            layers: which.
            tokens: of each concept those that the matrix moves, by group, the phrase's own first.
            closed_on: what each concept's gates stay closed on.
            anchors: tokens of the anchors, (m, d).
        """
        groups = [thin_rows(group) for members in tokens.values() for group in members]
        general = torch.cat([b.general for b in {id(b): b for b in closed_on.values()}.values()])
        matrix = solve_shared(groups, general, anchors, self.ridge, self.retain_scale, self.rounds)
        up, down = shorten(matrix, groups, self.energy)
        if self.opens == "prompt":
            tokens = {name: [take_last(members[0])] for name, members in tokens.items()}
        gates = self._fit_gates(tokens, closed_on)
        return Gated(
            layers,
            gates.direction.float(),
            gates.centre.float(),
            gates.slope.float(),
            up=up.float(),
            down=down.float(),
            goal=torch.zeros(len(down)),
            # One owner of all gates and directions: a token that opens several is moved once.
            owner=torch.zeros(len(down), dtype=torch.int64),
            concept=torch.zeros(len(gates.centre), dtype=torch.int64),
            whole=self.opens == "prompt",
        )

    def _solve_vectors(
        self,
        model: Model,
        vectors: Mapping[str, GateTokens],
        closed_on: Mapping[str, Background],
        anchors: Sequence[Text],
    ) -> list[Gated]:
        """Solve for the same before the layers that read a vector of the whole prompt."""
        # A concept whose vector is its anchor's has nothing to take away there.
        some = {name: [group] for name, group in vectors.items() if group.differs and name in closed_on}
        if not some:
            return []
        pooled = [text.pooled for text in anchors if text.pooled is not None]
        one = replace(self, opens="token")  # a vector is a prompt's only one
        found = []
        for entry in model.pooled_entries():
            narrow = one._solve((entry.layer,), some, closed_on, torch.cat(pooled).double())
            # What the layer is given behind the vector, such as SDXL's sizes, is no part of a concept.
            found.append(pad_gates(narrow, model.weight(entry.layer).shape[1]))
        return found

    def _read_neighbours(self, model: Model, problem: Problem, run: RunContext) -> tuple[Tensor, Tensor]:
        """Read the neighbours; see `_read`."""
        words = sample_words(model, problem.erase, self.num_retain_words, run.generator("words"))
        generator = run.generator("neighbours")
        made = make_neighbours(problem, words, self.neighbours, generator) if self.neighbours else []
        prompts = assemble_retained_prompts(made, retained_phrasings(problem))
        return self._read(model, prompts, "reading neighbours", run)

    def _read_captions(self, model: Model, problem: Problem, run: RunContext) -> tuple[Tensor, Tensor]:
        """Read everyday captions that hold no erased name; see `_read`."""
        if not (self.captions and self.num_captions):
            return self._read(model, [], "", run)
        said = [c for c in read_captions(self.captions) if not problem.find_name(c)]
        order = torch.randperm(len(said), generator=run.generator("captions"))
        chosen = [said[i] for i in order[: self.num_captions].tolist()]
        return self._read(model, chosen, "reading captions", run)

    def _read(
        self, model: Model, prompts: Sequence[str], label: str, run: RunContext
    ) -> tuple[Tensor, Tensor]:
        """Read those prompts that the model reads whole.

        Returns:
            Their tokens, few of the padding, and the vectors of whole prompts, where there are any:
            (n, d) each, float64 on the CPU; n may be 0.
        """
        nothing = torch.zeros(0, dtype=torch.float64)
        fit = [p for p in prompts if model.count_tokens(p) <= model.window and model.knows(p)]
        if not fit:
            return nothing, nothing
        tokens, vectors = read_prompts(model, fit, label, run)
        return tokens.double().cpu(), nothing if vectors is None else vectors.double().cpu()

    def _widen(
        self, closed_on: Mapping[str, Background], near: Tensor, said: Tensor
    ) -> dict[str, Background]:
        """Return backgrounds with captions among general tokens, neighbours among those retained."""

        def widen(old: Background) -> Background:
            return Background(
                torch.cat([old.general, said]) if len(said) else old.general,
                torch.cat([old.retained, near]) if len(near) else old.retained,
                self.gate_ridge,
                self.n_std,
                torch.cat([old.shut, near]) if len(near) else old.shut,
            )

        # One wider background for each of the old ones: concepts of a kind share theirs.
        wider = {key: widen(b) for key, b in {id(b): b for b in closed_on.values()}.items()}
        return {name: wider[id(b)] for name, b in closed_on.items()}

    def _fit_gates(
        self, tokens: Mapping[str, Sequence[GateTokens]], closed_on: Mapping[str, Background]
    ) -> Gate:
        """Solve for the gates of all concepts, those of one background together.

        A gate whose tokens do not stand clear of those that stay is left out, as that of the words
        behind a name often does not; a concept's first gate, on its own tokens, always stays.
        """
        together: dict[int, list[tuple[Tensor, bool]]] = {}
        grounds = {id(b): b for b in closed_on.values()}
        for name, members in tokens.items():
            own = together.setdefault(id(closed_on[name]), [])
            own.extend((group.rows, i == 0) for i, group in enumerate(members))
        found = []
        for key, some in together.items():
            rows, first = zip(*some, strict=True)
            gates = fit_gates(
                rows, grounds[key], margin=self.margin, retain_openness=self.retain_openness
            )
            gaps = math.log(1 / self.retain_openness - 1) / (self.margin * gates.slope)
            keep = torch.tensor(first) | (gaps >= LEAST_GAP)
            found.append(Gate(*(part[keep] for part in gates)))
        # The order of gates says nothing, since all of them open the same matrix.
        return Gate(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def take_last(group: GateTokens) -> GateTokens:
    """Take the last of a phrase's tokens in each prompt."""
    last = torch.tensor(group.sizes).cumsum(0) - 1
    return GateTokens(group.rows[last], group.neutral[last], group.differences)


def thin_rows(group: GateTokens) -> GateTokens:
    """Take at most `MOST_ROWS` of a gate's tokens, evenly."""
    step = -(-len(group.rows) // MOST_ROWS)
    return GateTokens(group.rows[::step], group.neutral[::step], group.differences)


def solve_shared(
    groups: Sequence[GateTokens],
    general: Tensor,
    anchors: Tensor,
    ridge: float,
    retain_scale: float,
    rounds: int,
) -> Tensor:
    """Solve for M, (d, d), float64, of all gates' tokens.

        min_M  Σ_i b_i mean_i ‖M e − a‖² + κ (E ‖M v − v‖² over general and over anchors)/2 + λ ‖M − 1‖²

    with λ in units of the mean ‖e‖². After each round b_i is multiplied by the root of what is left of
    the way to the anchor, ‖M e − a‖² / ‖e − a‖², over its mean, between ½ and 2; its own mean stays 1.

    Args:
        groups: of each gate the tokens e and those of the anchor, a.
        general: v, (n, d).
        anchors: v, (m, d).
        ridge: λ.
        retain_scale: κ.
        rounds: how often the budget b is set anew.
    """
    size = torch.stack([g.rows.double().square().sum(1).mean() for g in groups]).mean()
    prior = (gram(general) / len(general) + gram(anchors) / len(anchors)) * (retain_scale / 2)
    budget = torch.ones(len(groups), dtype=torch.float64)
    for done in range(rounds + 1):
        roots = [(b / len(g.rows)) ** 0.5 for b, g in zip(budget.tolist(), groups, strict=True)]
        e = torch.cat([r * g.rows.double() for r, g in zip(roots, groups, strict=True)])
        a = torch.cat([r * g.neutral.double() for r, g in zip(roots, groups, strict=True)])
        matrix = solve_right_factor(outer(a, e), gram(e), prior, ridge * float(size))
        if done < rounds:
            budget = budget * measure_left(matrix, groups)
            budget /= budget.mean()  # what one gate gets, others give
    return matrix


def measure_left(matrix: Tensor, groups: Sequence[GateTokens]) -> Tensor:
    """Measure by what each gate's budget grows: √(left / mean left), between ½ and 2, (gates,)."""
    left = []
    for g in groups:
        e, a = g.rows.double(), g.neutral.double()
        left.append((e @ matrix.T - a).square().sum() / (e - a).square().sum().clamp(min=1e-12))
    shares = torch.stack(left)
    # Bounded, so that a concept that cannot be moved does not take all.
    return (shares / shares.mean().clamp(min=1e-12)).sqrt().clamp(0.5, 2)


def shorten(matrix: Tensor, groups: Sequence[GateTokens], energy: float) -> tuple[Tensor, Tensor]:
    """Find directions that hold what M − 1 does to the concepts: U, (d, r), and Uᵀ (1 − M), (r, d).

    U are the leading left singular vectors of (M − 1) E, E the gates' tokens as columns, each gate
    weighing the same.

    Args:
        matrix: M.
        groups: the tokens of each gate.
        energy: the share of ‖(M − 1) E‖² to keep.
    """
    change = torch.eye(len(matrix), dtype=torch.float64) - matrix
    e = torch.cat([g.rows.double() / len(g.rows) ** 0.5 for g in groups])
    moved = e @ change.T
    values, vectors = torch.linalg.eigh(moved.T @ moved)
    kept = values.flip(0).clamp(min=0).cumsum(0)
    # 1e-9 below, so that a share of 1 does not ask for directions of round-off alone.
    r = min(int((kept < energy * (1 - 1e-9) * kept[-1]).sum()) + 1, len(kept))
    up = vectors.flip(1)[:, :r].contiguous()
    return up, up.T @ change
