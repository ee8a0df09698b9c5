"""How much of a concept is in a prompt: the cosine of its embedding with the concept's direction."""

from __future__ import annotations

from torch import Tensor


def measure_cosine(x: Tensor, direction: Tensor) -> Tensor:
    """Compute α = ⟨x, Π⟩ / (‖x‖ ‖Π‖) of each prompt and concept, (n, concepts), all tokens together.

    The norm of x is over the entries where Π is not 0: start tokens, and whatever else is the same with
    and without a concept, say nothing of it.

    Args:
        x: (n, tokens, in); at most as many tokens as the directions have.
        direction: Π, (concepts, tokens, in).
    """
    flat, rows = direction[:, : x.shape[1]].to(x).flatten(1), x.flatten(1)
    sizes = (rows.square() @ (flat != 0).to(rows).T).sqrt() * flat.norm(dim=1)
    return rows @ flat.T / sizes.clamp(min=1e-12)


def measure_presence(x: Tensor, direction: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """Compute ρ = σ((α − centre) / width) of each prompt and concept, (n, concepts).

    Args:
        x: (n, tokens, in), as in `measure_cosine`.
        direction: Π, (concepts, tokens, in).
        centre: (concepts,), the α at which ρ is a half.
        width: (concepts,), above 0.
    """
    return ((measure_cosine(x, direction) - centre.to(x)) / width.to(x)).sigmoid()
