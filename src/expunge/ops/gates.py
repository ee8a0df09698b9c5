"""Solve for gates and their directions: what a gate opens on, and what it takes away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError

CLEAR = 0.3
"""The gap between background and concept that a gate needs, in units of the distance of their means."""


def find_directions(
    weight: Tensor, differences: Tensor, *, energy: float = 1.0, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """Find the directions in which rows differ most to a layer: up (d, r) and down (r, d), float64.

    With D the rows as columns and W D = U S Vᵀ its thin singular value decomposition, and U_r, S_r,
    V_r the leading r of them,

        up = D V_r S_r⁻¹,     down = U_rᵀ W,     W up down x = U_r U_rᵀ W x,     down up = 1:

    what `up down` takes from an input x is what the projector on the leading left singular vectors
    takes from the layer's output. For several layers, let W be a root of Σ W_lᵀ W_l (`stack_root`).

    >>> up, down = find_directions(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> (up @ down).abs().round().tolist()
    [[1.0, 0.0], [0.0, 0.0]]

    Args:
        weight: W, (out, d).
        differences: Dᵀ, (n, d).
        energy: the share of ‖W D‖² to keep, above 0 to 1.
        rank: the most directions; 0 for no limit.

    Raises:
        ExpungeError: the layer sees no difference.

    Source: ACE (arXiv 2504.11850) leaves the reduction open; this one is ours.
    """
    weight, columns = weight.double(), differences.double().T
    # Few prompts, many channels: the thin decomposition costs as much as there are prompts.
    u, s, vt = torch.linalg.svd(weight @ columns, full_matrices=False)
    if not len(s) or not s[0] > 0:
        raise ExpungeError("the layer sees no difference, so there is no direction")
    kept = s.square().cumsum(0) / s.square().sum()
    seen = int((s > 1e-6 * s[0]).sum())
    # 1e-9 below, so that a share of 1 does not ask for directions of round-off alone.
    r = min(int((kept < energy * (1 - 1e-9)).sum()) + 1, seen, rank or seen)
    # down up = 1 follows, since Uᵀ W D V S⁻¹ = 1.
    return columns @ vt[:r].T / s[:r], u[:, :r].T @ weight


def fit_affine(rows: Tensor, answers: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Fit the affine map from rows to answers: its matrix (r, d) and offset (r,), float64.

        min_{G, g} Σ_i w_i ‖G x_i + g − y_i‖² / Σ_i w_i + λ σ² ‖G‖²

    with σ² the rows' mean variance. A large λ leaves the mean of the answers.

    >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    >>> line, at = fit_affine(x, y, torch.ones(2), 0.0)
    >>> line.tolist(), at.tolist()
    ([[2.0]], [1.0])

    Args:
        rows: (n, d).
        answers: (n, r).
        weights: (n,), above 0.
        ridge: λ, at least 0.
    """
    x, y, w = rows.double(), answers.double(), weights.double() / weights.double().sum()
    middle, mean = w @ x, w @ y
    # Centred, so that the ridge pulls on the slope and never on the offset.
    x, y = x - middle, y - mean
    spread = (w[:, None] * x).T @ x
    sphere = spread.diagonal().mean().clamp(min=1e-12) * torch.eye(len(spread)).to(spread)
    lower = torch.linalg.cholesky(spread + ridge * sphere)
    line = torch.cholesky_solve((w[:, None] * x).T @ y, lower).T
    return line, mean - line @ middle


def stack_root(weights: list[Tensor]) -> Tensor:
    """Compute a root R (d, d) of Σ WᵀW, so that ‖R x‖² = Σ ‖W x‖² for every x; float64.

    Args:
        weights: W of every layer, (out, d).
    """
    gram = sum((w.double().T @ w.double() for w in weights), torch.zeros((), dtype=torch.float64))
    # A root of the sum replaces dozens of layers by one d × d matrix, with the same lengths.
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


class Background:
    """Tokens that gates should stay closed on, and the spread of them.

    Args:
        general: (n, d), tokens of prompts of all sorts.
        retained: (m, d), tokens that must stay as they are; m may be 0.
        ridge: λ, how much of a sphere the spread Σ of the tokens is taken for, in units of σ², its
            mean variance. Small values part the concept from these tokens best, large values hold
            best against perturbations.
        n_std: k, how many standard deviations above the mean of `general` count as closed.
        shut: (j, d), every token that must stay, where `retained` holds only those that a direction is
            solved with.
    """

    general: Tensor
    retained: Tensor
    n_std: float

    def __init__(
        self,
        general: Tensor,
        retained: Tensor,
        ridge: float,
        n_std: float,
        shut: Tensor | None = None,
    ) -> None:
        self.general, self.retained, self.n_std = general.double(), retained.double(), n_std
        self.shut: Tensor = self.retained if shut is None else shut.double()
        # Both kinds count alike in the spread: a gate must not open on either.
        rows = torch.cat([self.general, self.retained])
        self.mean: Tensor = rows.mean(0)
        self.spread: Tensor = (rows - self.mean).T @ (rows - self.mean) / len(rows)
        self.ridges: list[float] = [ridge / 10**i for i in range(5)]
        # Factorised when first needed: all concepts share them, and most need the first alone.
        self.lowers: list[Tensor] = []

    def direction(self, rows: Tensor) -> Tensor:
        """Solve for w ∝ (Σ + λ σ² 1)⁻¹ (mean of rows − mean), (d,), with w · (that difference) = 1.

        Where w does not separate the rows clearly from the background, λ is lowered, tenfold at a time.

        Args:
            rows: (n, d), the tokens to open on.
        """
        difference = rows.double().mean(0) - self.mean
        found = []
        for i in range(len(self.ridges)):
            solved = torch.cholesky_solve(difference[:, None], self.lower(i))[:, 0]
            way = solved / (solved @ difference).clamp(min=1e-12)
            found.append((self.start(way, rows) - self.edge(way), way))
            if found[-1][0] >= CLEAR:
                return way
        return max(found, key=lambda one: one[0])[1]

    def lower(self, i: int) -> Tensor:
        """Return the Cholesky factor of Σ + λ σ² 1 with the i-th λ, factorised when first asked for."""
        for ridge in self.ridges[len(self.lowers) : i + 1]:
            self.lowers.append(self._lower(ridge))
        return self.lowers[i]

    def _lower(self, ridge: float) -> Tensor:
        """Factorise Σ + λ σ² 1 by Cholesky."""
        sphere = self.spread.diagonal().mean().clamp(min=1e-12) * torch.eye(len(self.mean)).to(self.mean)
        return torch.linalg.cholesky(self.spread + ridge * sphere)

    def start(self, direction: Tensor, rows: Tensor) -> float:
        """Measure how far along a direction the rows begin: their 5 % quantile."""
        return float(((rows.double() - self.mean) @ direction).quantile(0.05))

    def edge(self, direction: Tensor) -> float:
        """Measure how far along a direction tokens still count as closed; the concept's mean is at 1."""
        general = self.general @ direction - self.mean @ direction
        # A quantile would need more words than are read; mean and deviation settle early.
        edge = float(general.mean() + self.n_std * general.std())
        # General prompts may hold a name of the concept; what is retained may not.
        return max(min(edge, 0.5), self.reach(direction, self.retained))

    def reach(self, direction: Tensor, rows: Tensor) -> float:
        """Measure how far along a direction the farthest of some rows is."""
        return float((rows.double() @ direction).max() - self.mean @ direction) if len(rows) else 0.0


class Gate(NamedTuple):
    """s(x) = σ(slope (direction · x − centre)), in float64."""

    direction: Tensor
    """(d,)"""
    centre: Tensor
    """()"""
    slope: Tensor
    """()"""


def fit_gate(rows: Tensor, background: Background, *, margin: float, retain_openness: float) -> Gate:
    """Solve for the gate of some tokens.

    Along w (`Background.direction`), the background ends at `edge` and the concept begins at `start`,
    its 5 % quantile. The gate is half open at edge + margin · (start − edge), and open by
    `retain_openness` = o at the edge:

        s(x) = σ(slope (w · x − centre)),     slope = logit(1 − o) / (margin (start − edge))

    Args:
        rows: (n, d), the tokens to open on.
        background: those to stay closed on.
        margin: above 0, below 1; small values open wider, for synonyms and perturbed tokens, too.
        retain_openness: o, above 0, below ½.

    Source: MACE's and ACE's papers set no gate in closed form; the mean + k · std is ours.
    """
    direction = background.direction(rows)
    edge = max(background.edge(direction), background.reach(direction, background.shut))
    # Where the two touch, the gate is as steep as a twentieth of the way to the concept's mean makes it.
    start = max(background.start(direction, rows), edge + 0.05)
    centre = edge + margin * (start - edge)
    slope = math.log(1 / retain_openness - 1) / (margin * (start - edge))
    # Directions were measured from the background's mean; a gate is given the token itself.
    offset = float(direction @ background.mean)
    places = torch.tensor([centre + offset, slope], dtype=torch.float64)
    return Gate(direction, places[0], places[1])


def fit_gates(
    groups: Sequence[Tensor], background: Background, *, margin: float, retain_openness: float
) -> Gate:
    """Solve for the gates of many groups of tokens at once: `fit_gate` of each, one above the other.

    Backgrounds are read once for all gates, which is what a gate costs where hundreds are solved.

    Args:
        groups: the tokens to open on, (n, d) each.
        background: as in `fit_gate`.
        margin: as in `fit_gate`.
        retain_openness: as in `fit_gate`.

    Returns:
        directions (gates, d), centres (gates,) and slopes (gates,), float64.
    """
    differences = torch.stack([rows.double().mean(0) for rows in groups]) - background.mean
    ways = torch.zeros_like(differences)
    starts, edges = (torch.full((len(groups),), x, dtype=torch.float64) for x in (-math.inf, 0.0))
    open_ = torch.arange(len(groups))
    for i in range(len(background.ridges)):
        solved = torch.cholesky_solve(differences[open_].T, background.lower(i)).T
        tried = solved / (solved * differences[open_]).sum(1, keepdim=True).clamp(min=1e-12)
        edge = _edges(tried, background)
        start = torch.stack([
            ((groups[g].double() - background.mean) @ way).quantile(0.05)
            for g, way in zip(open_.tolist(), tried, strict=True)
        ])  # fmt: skip
        better = start - edge > starts[open_] - edges[open_]
        ways[open_[better]] = tried[better]
        starts[open_[better]], edges[open_[better]] = start[better], edge[better]
        # Those that are clear stay as they are; for the others the ridge is lowered.
        open_ = open_[start - edge < CLEAR]
        if not len(open_):
            break
    edges = torch.maximum(edges, _reaches(ways, background.shut, background.mean))
    starts = torch.maximum(starts, edges + 0.05)
    steps = margin * (starts - edges)
    centres = edges + steps + ways @ background.mean
    return Gate(ways, centres, math.log(1 / retain_openness - 1) / steps)


def _edges(ways: Tensor, background: Background) -> Tensor:
    """Measure `Background.edge` of many directions, (gates, d)."""
    along = background.general @ ways.T - ways @ background.mean
    edges = (along.mean(0) + background.n_std * along.std(0)).clamp(max=0.5)
    return torch.maximum(edges, _reaches(ways, background.retained, background.mean))


def _reaches(ways: Tensor, rows: Tensor, mean: Tensor) -> Tensor:
    """Measure `Background.reach` of many directions, (gates, d), over rows in parts."""
    if not len(rows):
        return torch.zeros(len(ways), dtype=torch.float64)
    parts = rows.split(8192)
    return torch.stack([(part @ ways.T).amax(0) for part in parts]).amax(0) - ways @ mean
