"""Truncate a layer's changes to factors of small rank, and measure what is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.changes import Dense, LowRank, Right, WeightChange
from expunge.checkpoints.weight_changes import compose_linear, compose_low_rank
from expunge.ops.low_rank import compress, draw_probes, factor_shared, measure_rounding_noise, truncate

if TYPE_CHECKING:
    from expunge.checkpoints.text_moments import TextMoments


@dataclass(frozen=True)
class TruncationLoss:
    """What of an edit is lost in factors of small rank, as shares."""

    norm: float = 0.0
    """‖Δ − B D‖ / ‖Δ‖ over all layers."""
    erasure: float | None = None
    """Σ ‖(Δ − B D) e‖² / Σ ‖Δ e‖² over the erased prompts' tokens e; None where no text was read."""
    drift: float | None = None
    """The same over captions and retained prompts: the part of the edit's side effects that is lost."""


@dataclass(eq=False)
class _SharedFactors:
    """Factors of R − I for all layers that have the same input and the same `Right` changes."""

    right: Tensor
    """R, (d, d), the product of the `Right` changes."""
    up: Tensor
    """P, (d, n), with R − I ≈ P Q."""
    down: Tensor
    """Q, (n, d)"""
    moments: Tensor
    """Q S Qᵀ, (n, n), with S the second moment of the layers' input."""


@dataclass(eq=False)
class Truncator:
    """Truncates the changes of layers, and adds up the loss over them.

    Layers are truncated nearest in what the change does to text, where the second moment of their input
    is known, and nearest in norm elsewhere.
    """

    rank: int | None
    """The rank of each layer; None for the smallest that keeps the energy."""
    energy: float
    """The share of each layer's squared change to keep where no rank is given."""
    read_moments: Callable[[], Mapping[str, TextMoments]]
    """Reads the second moments of the layers' input; called once, when the first layer is truncated."""
    groups: dict[tuple[Any, ...], _SharedFactors] = field(default_factory=dict)
    probes: dict[tuple[Any, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0] * 6)
    """‖(Δ − B D) Z‖² and ‖Δ Z‖² in turn, for the plain norm, the erased and the retained prompts."""
    complete: bool = True
    """Whether the second moments were known of every layer that was truncated."""
    exact: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    """The layers whose factors are exact, with B and D."""
    widened: dict[tuple[Any, ...], TextMoments] = field(default_factory=dict)

    @cached_property
    def moments(self) -> Mapping[str, TextMoments]:
        """The second moments of the layers' input, by the layers' names."""
        return self.read_moments()

    def truncate(
        self, layer: str, weight: Tensor, changes: Sequence[WeightChange]
    ) -> tuple[Tensor, Tensor]:
        """Find factors of a layer's change.

        Args:
            layer: the layer's name.
            weight: its weight before the changes.
            changes: its changes, in order.

        Returns:
            B, (out, r), and D, (r, in · kernel size), float64.
        """
        low = [change for change in changes if isinstance(change, LowRank)]
        if len(low) == len(changes) and (
            self.rank is None or self.rank >= sum(change.up.shape[1] for change in low)
        ):
            up = torch.cat([change.up.double() for change in low], 1)
            down = torch.cat([change.down.double() for change in low])
            self.exact.append((layer, up, down))
            return up, down
        # Without forming Δ, which a decomposition would take long for in every layer.
        if weight.ndim == 2 and all(isinstance(change, (Right, LowRank)) for change in changes):
            return self._truncate_linear(layer, weight, changes)
        original = weight.double()
        after = original
        for change in changes:
            after = change.weight(after)
        delta = (after - original).flatten(1)
        metric = self._metric(layer, delta.shape[1])
        dense = [change.value for change in changes if isinstance(change, Dense)]
        # A dense weight in half precision differs everywhere by rounding, which would take full rank.
        floor = (
            measure_rounding_noise(original.flatten(1), metric, _rounding_unit(dense[-1]))
            if dense
            else 0.0
        )
        up, down = truncate(delta, self.rank, self.energy, metric, floor)
        self._add_loss(layer, delta.shape[1], lambda z: delta @ z, (up, down))
        return up, down

    def compute_loss(self) -> TruncationLoss:
        """Compute the loss over all layers. To be called once, after the last layer."""
        if not self.groups and not self.probes:  # every layer was exact
            return TruncationLoss()
        for layer, up, down in self.exact:
            self._add_loss(layer, down.shape[1], partial(_apply, up, down), None)
        missed, total = self.sums[0::2], self.sums[1::2]
        # Squares add up over layers; a change that does nothing to text has no share to lose.
        shares = [m / t if t else 0.0 for m, t in zip(missed, total, strict=True)]
        known = self.complete and total[1] > 0
        return TruncationLoss(shares[0] ** 0.5, *(shares[1:] if known else (None, None)))

    def _truncate_linear(
        self, layer: str, weight: Tensor, changes: Sequence[WeightChange]
    ) -> tuple[Tensor, Tensor]:
        """Truncate W R + B D − W by the shared factors of R − I and by small matrices alone."""
        inputs = weight.shape[1]
        metric = self._metric(layer, inputs)
        rights = [change for change in changes if isinstance(change, Right)]
        group = self._share_factors(layer, rights, inputs, metric)
        own = compose_low_rank(changes, inputs) if len(rights) < len(changes) else None
        w = weight.to(_compute_dtype(weight))
        up, down, moments = (w @ group.up.to(w)).double(), group.down, group.moments
        if own:
            own_up, own_down = own
            seen = own_down if metric is None else own_down @ metric
            mixed = seen @ group.down.T
            moments = torch.cat([
                torch.cat([moments, mixed.T], 1), torch.cat([mixed, seen @ own_down.T], 1),
            ])  # fmt: skip
            up, down = torch.cat([up, own_up], 1), torch.cat([down, own_down])
        up, down = compress(up, down, moments, self.rank, self.energy)

        def apply(z: Tensor) -> Tensor:
            # Δ Z without Δ, which may be too large to hold for every layer.
            output = w @ self._apply_right(group, z).to(w)
            if own:
                output = output + (own[0] @ (own[1] @ z)).to(output)
            return output

        self._add_loss(layer, inputs, apply, (up, down))
        return up, down

    def _apply_right(self, group: _SharedFactors, z: Tensor) -> Tensor:
        """(R − I) Z, computed once for all layers of a group."""
        key = ("moved", id(group), id(z))
        if key not in self.probes:
            self.probes[key] = (group.right @ z - z,)
        return self.probes[key][0]

    def _share_factors(
        self, layer: str, rights: Sequence[Right], inputs: int, metric: Tensor | None
    ) -> _SharedFactors:
        """The factors of R − I, decomposed once for all layers of a group."""
        key = (*map(id, rights), inputs, id(self.moments.get(layer)))
        if key not in self.groups:
            right, _, _ = compose_linear(rights, inputs)
            unit = max((_rounding_unit(change.matrix) for change in rights), default=0.0)
            # More directions than the rank, since each layer's weight turns and stretches them.
            most = None if self.rank is None else max(4 * self.rank, 64)
            if rights:
                up, down = factor_shared(right, most, self.energy, metric, unit)
            else:
                up, down = right[:, :0], right[:0]
            seen = down if metric is None else down @ metric
            self.groups[key] = _SharedFactors(right, up, down, seen @ down.T)
        return self.groups[key]

    def _metric(self, layer: str, inputs: int) -> Tensor | None:
        moments = self._moments_of(layer, inputs)
        return moments.metric if moments else None

    def _moments_of(self, layer: str, inputs: int) -> TextMoments | None:
        """A layer's second moments in its own width; None where no text enters it."""
        found = self.moments.get(layer)
        if found is None:
            return None
        key = ("moments", id(found), inputs)
        if key not in self.widened:
            self.widened[key] = found.widen(inputs)
        return self.widened[key]

    def _add_loss(
        self,
        layer: str,
        inputs: int,
        apply: Callable[[Tensor], Tensor],
        factors: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Add a layer to the sums.

        Args:
            layer: the layer's name.
            inputs: the number of its inputs.
            apply: gives Δ Z of a matrix Z, (inputs, n).
            factors: B and D; None where they are exact, so that nothing is lost.
        """
        moments = self._moments_of(layer, inputs)
        if moments is None and factors:
            self.complete = False
        key = (id(moments), inputs)
        if key not in self.probes:
            # One seed for all layers: equal exports measure equal losses.
            draw = torch.Generator().manual_seed(0)
            some = (None, moments.erased, moments.retained) if moments else (None,)
            self.probes[key] = tuple(draw_probes(each, inputs, draw) for each in some)
        for i, z in enumerate(self.probes[key]):
            wanted = apply(z).double()
            self.sums[2 * i + 1] += float(wanted.square().sum())
            if factors:
                up, down = factors
                self.sums[2 * i] += float((wanted - up @ (down @ z)).square().sum())


def _apply(up: Tensor, down: Tensor, z: Tensor) -> Tensor:
    return up @ (down @ z)


def _rounding_unit(value: Tensor) -> float:
    """Half the distance of 1 to the next number of a tensor's dtype."""
    return torch.finfo(value.dtype).eps / 2


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with a weight: float32 for large ones, where float64 would take long."""
    return torch.float64 if weight.numel() <= 1 << 16 else torch.float32
