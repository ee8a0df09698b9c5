"""Forecast: how far other names will move with an erasure, before anything is changed or drawn.

Text enters the denoiser through linear layers W_ℓ alone. A closed form W̃_ℓ moves a token e there by
(W̃_ℓ − W_ℓ) e, and so the tokens of a name's prompt by

    d² = E_e eᵀ D e,      D = Σ_ℓ (W̃_ℓ − W_ℓ)ᵀ (W̃_ℓ − W_ℓ) / ‖W_ℓ‖²

where every layer counts in proportion to its own size. `Move.share` is d over that of the erased names.
The prompt is none that a method fits. How well the order of the shares is that of the images' changes:
`experiments/forecast.py`. Among names that are retained, whose moves are small and near one another, it
says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import Changes, WeightChange
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem, normalize_name
from expunge.runtime.context import RunContext

PROMPT = "a photo of the {}"
"""What a name is asked in: no method fits this wording. In wordings that the model has hardly seen, the
order of the shares says less of the images (`experiments/forecast.py`)."""

STAND_IN = "uce"
"""The closed form that stands for a method which trains."""

BATCH = 64
"""Prompts that are encoded together."""


@dataclass(frozen=True)
class Move:
    """How far a name moves where text enters the denoiser."""

    name: str
    role: Literal["retained", "neighbour", "word"]
    """Retained by the problem, asked for, or a word of the tokenizer."""
    share: float
    """As a share of the erased names' own move: 0 stays, 1 moves as far as they do."""


@dataclass(frozen=True)
class Forecast:
    """What an erasure is expected to move."""

    method: str
    """The method whose closed form was solved."""
    exact: bool
    """Whether that is the method itself: what it moves is then known, and only what the images make of
    it is not. Otherwise `STAND_IN` was solved in its place."""
    moves: tuple[Move, ...]
    """The furthest first."""

    def of(self, role: str) -> tuple[Move, ...]:
        """Return the moves of one role, the furthest first."""
        return tuple(move for move in self.moves if move.role == role)


def forecast(
    model: Model,
    problem: Problem,
    method: Method | str = STAND_IN,
    *,
    neighbours: Sequence[str] = (),
    words: int = 300,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Forecast:
    """Forecast what erasing a problem's concepts moves besides them. Nothing is changed or drawn.

    Cost: the closed form's (seconds for the shipped model), and the encoding of a short prompt for each
    name.

    Args:
        model: what would be erased from.
        problem: what to erase and to retain; the model chooses anchors that are left open.
        method: what would erase; where it trains, UCE's closed form is solved in its place.
        neighbours: further names to ask.
        words: how many of the tokenizer's words to ask, the most frequent first.
        seed: of the method.
        progress: told what is done.

    Raises:
        ExpungeError: there is no such method, or the model cannot read a name.
    """
    problem = problem.with_anchors(model.anchors)
    erased = [name for concept in problem.erase for name in concept.names]
    model.require_window([*erased, *problem.retain])
    model.require_words([*erased, *problem.retain])
    made: Method = registry.get("methods", method)() if isinstance(method, str) else method
    exact, changes = _solve(model, problem, made, RunContext(seed, progress))
    form = _quadratic_form(model, changes)

    asked: dict[str, tuple[str, Literal["retained", "neighbour", "word"]]] = {}
    taken = {normalize_name(name) for name in erased}
    for role, names in (
        ("retained", problem.retain),
        ("neighbour", neighbours),
        ("word", vocabulary_words(model, problem.erase)[:words]),
    ):
        for name in names:
            if (key := normalize_name(name)) not in taken:
                asked.setdefault(key, (name, role))  # type: ignore[arg-type]
    names = [name for name, _ in asked.values()]
    far = _distances(model, form, [*erased, *names], progress)
    own = far[: len(erased)].mean()
    if not own > 0:
        raise ExpungeError("this edit would move nothing, so there is nothing to forecast")
    shares = (far[len(erased) :] / own).tolist()
    moves = [Move(name, role, share) for (name, role), share in zip(asked.values(), shares, strict=True)]
    moves.sort(key=lambda move: -move.share)
    return Forecast(registry.name_of("methods", type(made)) if exact else STAND_IN, exact, tuple(moves))


def _solve(model: Model, problem: Problem, method: Method, run: RunContext) -> tuple[bool, Changes]:
    """Solve the method's closed form, or the stand-in's; say whether it is the method's own."""
    cost = method.estimate_cost(problem, 1)
    if cost is not None and cost.text_only:
        changes = tuple(method.fit(model, problem, run))
        if all(isinstance(change, WeightChange) for change in changes):
            return True, changes
    # What trains, and what is switched by the token it meets, is no one weight.
    stand_in: Method = registry.get("methods", STAND_IN)()
    return False, tuple(stand_in.fit(model, problem, run))


def _quadratic_form(model: Model, changes: Changes) -> Tensor:
    """D, (d, d), float64: what the changed entries do to a token, squared and summed."""
    entries = {entry.layer for entry in model.text_entries()}
    new: dict[str, Tensor] = {}
    for change in changes:
        for layer in change.layers:
            if layer in entries and isinstance(change, WeightChange):
                # Changes of one layer stack, as they do when an edit is applied.
                new[layer] = change.weight(new.get(layer, model.weight(layer)))
    form = torch.zeros(())
    for layer, weight in new.items():
        old = model.weight(layer).detach().double().cpu()
        difference = weight.detach().double().cpu() - old
        form = form + difference.T @ difference / old.square().sum()
    if form.ndim == 0:
        raise ExpungeError("this method changes no layer that text enters by: nothing can be forecast")
    return form


def _distances(model: Model, form: Tensor, names: Sequence[str], progress: Progress) -> Tensor:
    """Return d of each name, (n,): over the tokens that the denoiser reads of its prompt."""
    prompts = [PROMPT.replace("{}", name) for name in names]
    squares = []
    for start in range(0, len(prompts), BATCH):
        progress("asking its neighbours", start, len(prompts))
        text = model.encode(prompts[start : start + BATCH])
        e, read = text.embeddings.double().cpu(), text.read.cpu()
        values = ((e @ form) * e).sum(-1).clamp(min=0)
        squares.append((values * read).sum(1) / read.sum(1))
    progress("asking its neighbours", len(prompts), len(prompts))
    return torch.cat(squares).sqrt()
