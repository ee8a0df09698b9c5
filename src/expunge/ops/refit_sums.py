"""The rows of a refit, gathered in any order and number, and the one M that they ask for.

    min_M  Σ w ‖M e − a‖² + Σ w ‖M r − r‖² + λ ‖M − I‖²

for rows e that are sent to goals a and rows r that stay. While they are fewer than the text is wide, all
that is solved for lies in their span (`row_span`). From then on

    M = λK + C K + P K,     K = (G + P + λI)⁻¹,     C = Σ w a eᵀ,  G = Σ w e eᵀ,  P = Σ w r rᵀ

with one Cholesky factorisation. Three things that leave M as it is spare most of the products of a wide
text: equal rows are added once, with the sum of their weights (a causal text encoder gives all prompts
that begin alike the same rows); rows with one goal are summed before they are multiplied by it, so that
C is as thin as the goals are few; and so is P while few rows stay. K, which the condition number needs
anyway, is then all that is left to compute.

Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 1–4; UCE (Gandikota et al., WACV 2024,
arXiv 2308.14761), eq. 7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expunge.ops.least_squares import CHUNK, add_gram, add_outer, invert, mirror
from expunge.ops.row_span import solve_in_span

FEW = 4
"""Goals, or rows that stay, are few while they are less than this part of the width."""


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Rows of the least squares."""

    rows: Tensor
    """e or r, (n, d)."""
    goals: Tensor | None
    """a, (n, d), where they are sent; None where they stay."""
    weights: Tensor
    """(n,), float64."""

    @property
    def scaled(self) -> Tensor:
        """The rows, each times the root of its weight, as errors are squared: (n, d), float64."""
        return self.rows.double() * self.weights.sqrt()[:, None]

    @property
    def scaled_goals(self) -> Tensor:
        """The goals, times the same: (n, d), float64."""
        goals = self.rows if self.goals is None else self.goals
        return goals.double() * self.weights.sqrt()[:, None]


@dataclass(eq=False)
class RefitSums:
    """The rows that one M is solved from, or, once they fill the space, their sums (d, d), float64."""

    pending: list[WeightedRows] = field(default_factory=list)
    """Rows that are in no sum yet: all of them, while they are fewer than d."""
    energy: float = 0.0
    """The trace of G, with rows that are sent where they are."""
    _limit: int = 0
    """The number of pending rows from which equal ones are looked for."""
    _width: int = 0
    _gram: Tensor | None = None
    """The sum over what is erased, on and below the diagonal alone; None while there are no sums."""
    _prior: Tensor | None = None
    """The same of what stays, where that is many rows."""
    _cross: Tensor | None = None
    """The sum C, where goals are many."""
    _kept: WeightedRows | None = None
    """What stays, while it is few rows; in no sum."""
    _aims: tuple[Tensor, Tensor] | None = None
    """Goals while they are few, and for each Σ w e over the rows that are sent there, float64."""

    @property
    def gram(self) -> Tensor:
        """G = Σ e eᵀ over what is erased."""
        self._sum()
        return mirror(self._made("_gram").clone())

    @property
    def cross(self) -> Tensor:
        """C = Σ a eᵀ."""
        self._sum()
        total = self._made("_cross").clone()
        if self._aims:
            add_outer(total, *self._aims)
        return total

    @property
    def prior(self) -> Tensor:
        """P = Σ r rᵀ over what is retained."""
        self._sum()
        total = self._made("_prior").clone()
        if self._kept:
            add_gram(total, self._kept.rows, self._kept.weights)
        return mirror(total)

    @property
    def rank(self) -> int | None:
        """How many rows are erased; None where all rows together are as many as the text is wide."""
        if self._gram is not None:
            return None
        self._compact()
        return sum(len(some.rows) for some in self.pending if some.goals is not None) or None

    def erase(self, rows: Tensor, goals: Tensor, weight: float = 1.0) -> None:
        """Send rows to goals.

        Args:
            rows: e, (n, d).
            goals: a, (n, d).
            weight: of each row.
        """
        self.energy += weight * float(rows.double().square().sum())
        rows, goals = rows.cpu(), goals.cpu()
        # A row that is sent where it is adds the same to C and G as it would to P.
        still = (rows == goals).all(1)
        if still.any():
            self.retain(rows[still], weight)
            rows, goals = rows[~still], goals[~still]
        if len(rows):
            self._add(WeightedRows(rows, goals, _even(rows, weight)))

    def retain(self, rows: Tensor, weight: float = 1.0) -> None:
        """Keep rows r, (n, d), where they go."""
        rows = rows.cpu()
        self._add(WeightedRows(rows, None, _even(rows, weight)))

    def factor(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Solve for P, (d, rank), and Q, (rank, d), of M = I + P Q, float64, where there is a rank.

        Args:
            ridge: λ, at least 0.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        self._compact()
        sent = [some for some in self.pending if some.goals is not None]
        kept = [some.scaled for some in self.pending if some.goals is None]
        erased, goals = (
            torch.cat(rows) for rows in zip(*((s.scaled, s.scaled_goals) for s in sent), strict=True)
        )
        return solve_in_span(erased, goals, torch.cat([erased[:0], *kept]), ridge)

    def right_factor(self, ridge: float, prior: Tensor | None = None) -> Tensor:
        """Solve for M, (d, d), float64.

        It costs d³ products, and as many again where rows are sent to many goals, or many stay.

        Args:
            ridge: λ, at least 0.
            prior: a sum (d, d) that is added to P; None for none.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        if prior is None and self.rank is not None:
            right, down = self.factor(ridge)
            matrix = right @ down
            # In place: at a width of 7680 an identity would take another half a gigabyte.
            matrix.diagonal().add_(1)
            return matrix
        self._sum()
        system = self._made("_gram").clone()
        if self._prior is not None:
            system += self._prior
        if self._kept:
            add_gram(system, self._kept.rows, self._kept.weights)
        mirror(system)
        if prior is not None:
            system += prior
        system.diagonal().add_(ridge)
        inverse = invert(system, ridge)
        del system  # half a gigabyte at a width of 7680
        matrix = ridge * inverse
        if self._aims:
            goals, sums = self._aims
            matrix.addmm_(goals.double().T, sums @ inverse)
        if self._kept:
            rows = self._kept.scaled
            matrix.addmm_(rows.T, rows @ inverse)
        dense = [some for some in (self._cross, prior) if some is not None]
        if self._prior is not None:
            dense.append(mirror(self._prior))
        if dense:
            # Their sum first: each product of two such matrices takes 2 d³ operations.
            matrix.addmm_(sum(dense[1:], start=dense[0]), inverse)
        return matrix

    def solve(self, ridge: float) -> Tensor:
        """Solve for M, (d, d), float32.

        Args:
            ridge: λ, at least 0.

        Raises:
            ExpungeError: the equations are singular; a larger ridge helps.
        """
        return self.right_factor(ridge).float()

    def _add(self, some: WeightedRows) -> None:
        """Keep rows as they are while they are few, and their sums from then on."""
        self.pending.append(some)
        self._width = some.rows.shape[1]
        count = sum(len(each.rows) for each in self.pending)
        if count < max(self._limit, 1 if self._gram is not None else self._width):
            return
        self._compact()
        count = sum(len(each.rows) for each in self.pending)
        # From there on sums no longer grow with the rows.
        if self._gram is not None or count >= self._width:
            self._sum()
            # In lots that are large enough for fast products.
            self._limit = max(1, CHUNK // self._width)
        else:
            # Not again before there are many new ones: it reads all of them.
            self._limit = max(self._width, count + self._width // 2)

    def _compact(self) -> None:
        """Merge equal rows among those that are pending."""
        kinds = (
            [s for s in self.pending if s.goals is not None],
            [s for s in self.pending if s.goals is None],
        )
        self.pending = [_merged(some) for some in kinds if some]

    def _sum(self) -> None:
        """Add what is pending to the sums."""
        self._compact()
        gram = self._made("_gram")
        for some in self.pending:
            if some.goals is None:
                self._keep(some)
            else:
                add_gram(gram, some.rows, some.weights)
                self._aim(some)
        self.pending.clear()

    def _keep(self, some: WeightedRows) -> None:
        """Add rows that stay: to the few there are, or, where they become many, to P."""
        kept = _merged([self._kept, some]) if self._kept else some
        few = self._prior is None and len(kept.rows) < self._width // FEW
        self._kept = kept if few else None
        if not few:
            add_gram(self._made("_prior"), kept.rows, kept.weights)

    def _aim(self, some: WeightedRows) -> None:
        """Add rows to the sums of their goals, or, where goals become many, to C."""
        if some.goals is None:
            raise TypeError("goals must be a tensor (n, d), not None")
        goals, places = _distinct(some.goals)
        sums = torch.zeros(len(goals), self._width, dtype=torch.float64)
        # In parts: whole lots in float64 are a gigabyte at a width of 7680.
        for part in torch.arange(len(places)).split(max(1, CHUNK // self._width)):
            sums.index_add_(0, places[part], some.rows[part].double() * some.weights[part, None])
        if self._aims:
            goals, places = _distinct(torch.cat([self._aims[0], goals]))
            both = torch.cat([self._aims[1], sums])
            sums = torch.zeros(len(goals), self._width, dtype=torch.float64).index_add_(0, places, both)
        few = self._cross is None and len(goals) < self._width // FEW
        self._aims = (goals, sums) if few else None
        if not few:
            add_outer(self._made("_cross"), goals, sums)

    def _made(self, name: str) -> Tensor:
        """Return the sum of this name, zeros where it was not needed yet."""
        if getattr(self, name) is None:
            setattr(self, name, torch.zeros(self._width, self._width, dtype=torch.float64))
        found: Tensor = getattr(self, name)
        return found


def _even(rows: Tensor, weight: float) -> Tensor:
    return torch.full((len(rows),), weight, dtype=torch.float64)


def _merged(some: Sequence[WeightedRows]) -> WeightedRows:
    """Join rows, each once, with the sum of its weights; of one kind: with goals or without."""
    rows, weights = torch.cat([s.rows for s in some]), torch.cat([s.weights for s in some])
    sent = [s.goals for s in some if s.goals is not None]
    goals = torch.cat(sent) if sent else None
    first, places = _group(rows, goals)
    if len(first) == len(rows):
        return WeightedRows(rows, goals, weights)
    total = torch.zeros(len(first), dtype=torch.float64).index_add_(0, places, weights)
    return WeightedRows(rows[first], None if goals is None else goals[first], total)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row once, and where each of the given ones stands among them."""
    first, places = _group(rows)
    return (rows if len(first) == len(rows) else rows[first]), places


def _group(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find equal rows, by a hash of their bytes.

    Args:
        parts: tensors (n, …); rows are equal where they are in all of them.

    Returns:
        The first of each kind, (k,), and the kind of each, (n,).
    """
    # As bytes: NumPy knows no bfloat16.
    raw = [part.contiguous().view(torch.uint8).numpy() for part in parts if part is not None]
    kinds: dict[bytes, int] = {}
    first: list[int] = []
    places: list[int] = []
    for index, of_row in enumerate(zip(*raw, strict=True)):
        digest = hashlib.blake2b(digest_size=16)
        for part in of_row:
            digest.update(part)
        kind = kinds.setdefault(digest.digest(), len(kinds))
        if kind == len(first):
            first.append(index)
        places.append(kind)
    return torch.tensor(first, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
