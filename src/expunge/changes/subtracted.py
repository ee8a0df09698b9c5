"""Prompts without the concepts that they hold: the change of Semantic Surgery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from expunge.changes.contract import InputChange
from expunge.changes.presence import measure_presence


@dataclass(frozen=True, eq=False)
class Subtracted(InputChange):
    """x − Σ_c a_c Δ_c over the concepts c that the prompt x is found to hold.

    x is all that a layer is given of one prompt, Δ_c a direction of the same shape, and Π_c the
    direction by which c is found:

        α_c = ⟨x, Π_c⟩ / (‖x‖ ‖Π_c‖),     ρ_c = σ((α_c − centre_c) / width_c),     found: ρ_c ≥ threshold

    with the norm of x over the entries where Π_c is not 0. Of one concept that is found a = ρ. Of
    several, a solves Σ_k ⟨Δ_c, Δ_k⟩ a_k = ρ_c ⟨Δ_c, Δ_c⟩ over those found: along each concept's
    direction as much is subtracted as for it alone, so that what two have in common goes once.

    A prompt with fewer tokens than Δ is compared with as many of Δ's first.
    """

    kind: ClassVar[str] = "subtracted"
    direction: Tensor
    """Δ, (concepts, tokens, in); of one token where the layer is given vectors of whole prompts."""
    centre: Tensor
    """(concepts,): the α at which ρ is a half."""
    width: Tensor
    """(concepts,), above 0: how gradually ρ rises there."""
    threshold: float = field(default=0.5, kw_only=True)
    """The ρ from which on a concept counts as found."""
    presence: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """Π, as `direction`, which it is by default."""

    def __post_init__(self) -> None:
        if self.presence is None:
            object.__setattr__(self, "presence", self.direction.clone())

    def fits(self, shape: torch.Size) -> bool:
        """Whether the tensors agree in number, and with the width of the layer's input."""
        n = len(self.direction)
        return (
            len(shape) == 2
            and self.direction.ndim == 3
            and self.direction.shape[-1] == shape[1]
            and self.presence.shape == self.direction.shape
            and self.centre.shape == self.width.shape == (n,)
        )

    @property
    def label(self) -> str:
        """What `summarize` calls it, with the number of its concepts."""
        return f"subtracted by {len(self.direction)}"

    def measure_presence(self, x: Tensor) -> Tensor:
        """Return ρ of each prompt and concept, (n, concepts), for x (n, tokens, in)."""
        return measure_presence(x, self.presence, self.centre, self.width)

    def change_input(self, x: Tensor) -> Tensor:
        """Return the prompts without what is found in them: x (…, tokens, in), same shape."""
        # Presence is steep: half precision would miss what is near the centre.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        tokens, width = self.direction.shape[1:]
        if tokens == 1:
            prompts = wide.reshape(-1, 1, width)
        else:
            prompts = wide.reshape(-1, *wide.shape[-2:])[:, :tokens]
        rho = self.measure_presence(prompts)
        found = (rho >= self.threshold).to(rho)
        if not bool(found.any()):
            return x
        flat = self.direction[:, : prompts.shape[1]].to(wide).flatten(1)
        # Float64: names of one concept may be nearly one direction.
        gram = (flat @ flat.T).double()
        sizes = gram.diagonal()
        # The row and column of a concept that is not found are those of the identity.
        both = found[:, :, None] * found[:, None, :]
        system = both * gram + torch.diag_embed(torch.where(found > 0, 1e-8 * sizes, 1.0))
        amount = torch.linalg.solve(system, found * rho * sizes)
        taken = (amount.to(flat) @ flat).reshape(prompts.shape)
        if tokens != 1 and prompts.shape[1] < wide.shape[-2]:
            rest = wide.shape[-2] - prompts.shape[1]
            taken = torch.nn.functional.pad(taken, (0, 0, 0, rest))
        return (wide - taken.reshape(wide.shape)).to(x.dtype)
