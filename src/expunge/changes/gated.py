"""Changes behind gates, which open for some text tokens and stay closed for the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from expunge.changes.contract import InputChange, OutputChange


@dataclass(frozen=True, eq=False)
class TokenGates:
    """Gates on text tokens: s_i(x) = σ(slope_i (direction_i · x − centre_i)), between 0 and 1."""

    direction: Tensor
    """(gates, in)"""
    centre: Tensor
    """(gates,): the value of direction · x at which each is half open."""
    slope: Tensor
    """(gates,): how steep each is there."""
    whole: bool = field(default=False, kw_only=True)
    """One value for a whole prompt, the largest of its tokens', instead of one for each token."""

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates' values on tokens x (…, tokens, in): (…, tokens, gates), in [0, 1]."""
        return self.logits(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        """Return slope (direction · x − centre), (…, tokens, gates), before the logistic function."""
        direction, centre, slope = (t.to(x) for t in (self.direction, self.centre, self.slope))
        values = slope * (x @ direction.T - centre)
        return values.amax(-2, keepdim=True).expand_as(values) if self.whole else values

    def _has_width(self, width: int) -> bool:
        """Whether the gates read inputs of this width, and their tensors agree in number."""
        n = self.direction.shape[0]
        shapes = (self.direction.shape, self.centre.shape, self.slope.shape)
        return shapes == ((n, width), (n,), (n,))


@dataclass(frozen=True, eq=False)
class Gated(TokenGates, InputChange):
    """x − Σ_k a_k(x) · up_k (down_k · x − toward_k · x − goal_k): some directions moved to a goal.

    Direction k belongs to a concept c, which is as open as its most open gate: S_k = max s_i over
    the gates of c. Where several concepts are open at once, what their directions share is divided
    between them, most of it to the concept whose gate is most certain,

        a_k = S_k w_k / (w_k + Σ_{l of others} w_l |down_k · up_l|),     w = S (S / (1 − S))^sharpness,

    so that nothing is subtracted twice: if the overlaps down_k · up_l are the inner products of
    unit vectors, those of one concept orthogonal, then the eigenvalues of Σ a_k up_k down_k lie in
    [0, 1] whatever the gates (its row sums, weighted by w, are at most 1). Where all gates are
    closed nothing changes. Several changes of a layer follow one another: the second reads what the
    first returned.
    """

    kind: ClassVar[str] = "gated"
    sharpness: ClassVar[float] = 0.2
    up: Tensor
    """(in, directions)"""
    down: Tensor
    """(directions, in)"""
    goal: Tensor
    """(directions,): what down · x becomes where the gate is open."""
    owner: Tensor
    """(directions,), int64: the concept of each direction."""
    toward: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(directions, in): the part of the goal that depends on x; by default 0."""
    concept: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(gates,), int64: the concept of each gate, counted from 0; by default one for each gate."""

    def __post_init__(self) -> None:
        if self.concept is None:
            object.__setattr__(self, "concept", torch.arange(len(self.centre)))
        if self.toward is None:
            object.__setattr__(self, "toward", torch.zeros_like(self.down))

    def fits(self, shape: torch.Size) -> bool:
        """Whether all tensors agree with each other and with the width of the layer's input."""
        n = self.owner.shape[0]
        gates = self.direction.shape[0]
        # A direction of a concept without gates would never be opened.
        owned = torch.isin(self.owner, self.concept)
        return (
            len(shape) == 2
            and self._has_width(shape[1])
            and self.concept.shape == (gates,)
            and bool(((self.concept >= 0) & (self.concept < gates)).all())
            and (self.up.shape, self.down.shape) == ((shape[1], n), (n, shape[1]))
            and (self.toward.shape, self.goal.shape) == (self.down.shape, (n,))
            and bool(owned.all())
        )

    @property
    def label(self) -> str:
        """What `summarize` calls it, with the number of its gates."""
        return f"gated by {self.direction.shape[0]}"

    def change_input(self, x: Tensor) -> Tensor:
        """Return the tokens with the directions of open gates moved: x (…, tokens, in), same shape."""
        # Gates are steep: half precision would open them for the wrong tokens.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        up, down, toward, goal = (t.to(wide) for t in (self.up, self.down, self.toward, self.goal))
        owner, concept = self.owner.to(x.device), self.concept.to(x.device)
        logits = self.logits(wide)
        closed = torch.full_like(logits, -torch.inf)
        widest = closed.scatter_reduce(-1, concept.expand_as(logits), logits, "amax")[..., owner]
        # log w = log S + sharpness · logit(S), since S / (1 − S) = exp(logit).
        weight = torch.nn.functional.logsigmoid(widest) + self.sharpness * widest
        # Only ratios of weights matter; without the clamp a closed concept's would be 0 / 0.
        weight = (weight - weight.amax(-1, keepdim=True)).clamp(min=-60).exp()
        # Directions of one concept are orthogonal and never share.
        overlap = (down @ up).abs() * (owner[:, None] != owner)
        share = widest.sigmoid() * weight / (weight + weight @ overlap.T)
        return (wide - (share * (wide @ (down - toward).T - goal)) @ up.T).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Damped(TokenGates, OutputChange):
    """y ⊙ Π_c (1 − max_i s_i(x) g_i), i over the gates of concept c: damps channels of a layer's output.

    Several open gates of one concept damp a channel once, by the strongest of them.
    """

    kind: ClassVar[str] = "damped"
    unfittable: ClassVar[str] = (
        "turns channels down, which no input could do, so no weights are fitted to it: make the edit"
        " with reduction 'shared'"
    )
    damping: Tensor
    """g, (gates, out), each between 0 (unchanged) and 1 (silent)."""
    concept: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(gates,), int64: the concept of each gate, counted from 0; by default one for each gate."""

    def __post_init__(self) -> None:
        if self.concept is None:
            object.__setattr__(self, "concept", torch.arange(len(self.centre)))

    def fits(self, shape: torch.Size) -> bool:
        """Whether all tensors agree with each other and with the layer's weight, (out, in)."""
        n = self.direction.shape[0]
        return (
            len(shape) == 2
            and self._has_width(shape[1])
            and self.damping.shape == (n, shape[0])
            and self.concept.shape == (n,)
        )

    def change_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the output (…, tokens, out) with the channels of open gates damped."""
        # Gates are steep: half precision would open them for the wrong tokens.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gates, damping = self.gates(wide), self.damping.to(wide)
        concept = self.concept.to(x.device)
        for c in concept.unique().tolist():
            # One gate after the other: all at once would need gates · out numbers for every token.
            most = torch.zeros(())
            for i in (concept == c).nonzero()[:, 0].tolist():
                most = torch.maximum(most.to(wide), gates[..., i, None] * damping[i])
            output = output * (1 - most).to(output.dtype)
        return output
