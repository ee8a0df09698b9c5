"""Values without their part along a concept's: the change of AdaVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from expunge.changes.contract import OutputChange

CLOSED = 1e-4
"""The share below which a target has no say."""

MOST_NUMBERS = 2**24
"""How many numbers the systems that are solved at once may have together."""


@dataclass(frozen=True, eq=False)
class Projected(OutputChange):
    """v − δ(v) (v_tᵀ v / v_tᵀ v_t) v_t with δ(v) = top · σ(slope (cos(v, v_t) − centre)).

    v is a layer's output for one token, and v_t one of the target vectors. With an origin o, v − o and
    v_t − o take their places, and o is added again.

    Several targets are taken away together: with the shares s_k = σ(slope (cos(v, v_k) − centre)), the
    targets as the columns of T, and S the diagonal of (1 − s_k) / s_k · v_kᵀ v_k,

        v − top · T (Tᵀ T + S)⁻¹ Tᵀ v.

    For one target that is the formula above; where all shares are 1 and `top` is 1, it is the projection
    on the orthogonal complement of all targets; a target whose share is below 1e-4 has no say, and what
    two targets have in common is taken away once.
    """

    kind: ClassVar[str] = "projected"
    unfittable: ClassVar[str] = (
        "takes from each value its part along the concept's, more of it the more alike they are, which"
        " is not linear in the token, so no weights are fitted to it: use the edit where expunge"
        " applies it"
    )
    target: Tensor
    """(targets, out): v_t."""
    slope: float = field(kw_only=True)
    """How steeply the share rises with the cosine."""
    centre: float = field(kw_only=True)
    """The cosine at which the share is a half."""
    top: float = field(default=1.0, kw_only=True)
    """How much is taken away where the share is 1: 1 is the orthogonal complement, 2 the reflection."""
    origin: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(out,): what counts as no value at all; by default zeros."""

    def __post_init__(self) -> None:
        if self.origin is None:
            object.__setattr__(self, "origin", torch.zeros_like(self.target[0]))

    def fits(self, shape: torch.Size) -> bool:
        """Whether the layer's output is as wide as the targets."""
        out = shape[0]
        return len(shape) == 2 and self.target.shape[1:] == (out,) == self.origin.shape

    @property
    def label(self) -> str:
        """What `summarize` calls it, with the number of its targets."""
        return f"projected off {len(self.target)}"

    def change_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the output (…, tokens, out) without its part along open targets."""
        # The shares are steep: half precision would tell no two cosines near the centre apart.
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        origin = self.origin.to(wide)
        value, target = (wide - origin).flatten(0, -2), self.target.to(wide) - origin
        lengths = value.norm(dim=-1, keepdim=True) * target.norm(dim=-1)
        cosine = value @ target.T / lengths.clamp(min=1e-12)
        share = (self.slope * (cosine - self.centre)).sigmoid()
        is_open = share > CLOSED
        # Most tokens open nothing, and most prompts few of many targets: the rest needs no solving.
        rows, columns = is_open.any(1).nonzero()[:, 0], is_open.any(0).nonzero()[:, 0]
        if not len(rows):
            return output
        size = max(1, MOST_NUMBERS // len(columns) ** 2)
        taken = [
            self._along(value[part], target[columns], share[part][:, columns])
            for part in rows.split(size)
        ]
        changed = torch.zeros_like(value).index_add(0, rows, torch.cat(taken))
        return (wide - self.top * changed.view_as(wide)).to(output.dtype)

    def _along(self, value: Tensor, target: Tensor, share: Tensor) -> Tensor:
        """Compute T (Tᵀ T + S)⁻¹ Tᵀ v for each row.

        Args:
            value: (rows, out).
            target: (targets, out).
            share: (rows, targets).
        """
        sizes = target.square().sum(-1)
        # At 0 the penalty would be infinite, and at 1 equal targets would leave no unique solution.
        share = torch.where(share > CLOSED, share, 0).clamp(1e-6, 1 - 1e-6)
        gram = target @ target.T + torch.diag_embed((1 - share) / share * sizes)
        return torch.linalg.solve(gram, value @ target.T) @ target
