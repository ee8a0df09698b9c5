"""Fuse many low-rank changes into one weight that does to each concept's words what its own does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from expunge.base.errors import ExpungeWarning
from expunge.changes import Change, Changes, LowRank, Right
from expunge.erasing.caption_gram import compute_prior, read_captions_for
from expunge.erasing.prompt_templates import assemble_retained_prompts
from expunge.model import Model
from expunge.ops.least_squares import apply_floor, gram, multiply_by_gram, solve_fusion
from expunge.ops.low_rank import balance
from expunge.problem import Problem
from expunge.runtime.context import RunContext, Tensors


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that are computed when they are asked for, and not stored."""

    names: Collection[str]
    make: Callable[[str], Tensor]

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def retained_gram(
    model: Model,
    problem: Problem,
    run: RunContext,
    *,
    captions_from: str,
    weighs: bool,
    domain_weight: float,
) -> Tensor:
    """Compute E_captions + ω E_retained of Σ_positions e eᵀ: (d, d), float64.

    Args:
        model: whose text encoder reads.
        problem: names and prompts to retain, each read in four prompts; and what is erased.
        run: is told how far it is.
        captions_from: where the captions come from, as in `caption_gram.read_captions_for`; "" for none.
        weighs: whether the sum will have any weight; if not, captions are not read.
        domain_weight: ω.
    """
    # Asked of the model, since its configuration names the width differently in every family.
    width = model.encode([""]).embeddings.shape[-1]
    # Without numbers of its own: at a width of 7680 zeros take half a gigabyte.
    total = torch.zeros((), dtype=torch.float64).expand(width, width)
    if problem.retain and not (weighs and domain_weight):
        warnings.warn(
            "the retained weigh nothing: raise domain_weight, and the weight of the prior",
            ExpungeWarning,
            stacklevel=5,
        )
    elif problem.retain:
        prompts = assemble_retained_prompts(problem.retain)
        for start in range(0, len(prompts), 64):
            e = model.encode(prompts[start : start + 64]).embeddings
            # A mean over prompts, as the prior is one over captions: ω then compares the two.
            total = total + domain_weight * gram(e.flatten(0, 1).cpu()) / len(prompts)
    if weighs and captions_from:
        captions = read_captions_for(model, captions_from, problem.erase)
        total = total + compute_prior(model, captions, run).mean
    return total


def fuse(
    factors: Mapping[str, Tensors],
    rows: Mapping[str, Tensor],
    *,
    matrix: Tensor,
    whole: Tensor,
    prior: Tensor,
    ridge: float,
    floor: float = 0.0,
) -> tuple[Tensor, dict[str, Tensors]]:
    """Solve for M₂, and replace each D by D G K: together they act on each concept alone.

    The equation is that of `ops.least_squares.solve_fusion`.

    Args:
        factors: for each concept B and D of every layer: `LAYER.up` (out, rank), `LAYER.down` (rank, d).
        rows: for each concept the embeddings of all tokens of its prompts, (n, d).
        matrix: M, (d, d), by which the weights were refined; the identity where they were not.
        whole: Σ e eᵀ over all the rows.
        prior: P, (d, d), already weighted.
        ridge: λ.
        floor: the least λ, as in `ops.least_squares.apply_floor`.
    """
    downs = {
        name: [(key, tensor) for key, tensor in tensors.items() if key.endswith(".down")]
        for name, tensors in factors.items()
    }
    # All concepts' factors of all layers are solved for in one stack.
    # An empty stack to begin with: without factors M₂ alone is solved for.
    moved = [torch.zeros(0, len(whole), dtype=torch.float64)]
    moved += [
        multiply_by_gram(torch.cat([d for _, d in some]), rows[name]) for name, some in downs.items()
    ]
    ridge = apply_floor(ridge, floor, whole)
    matrix, solved = solve_fusion(matrix, whole, prior, ridge, torch.cat(moved))
    # In the order in which they were stacked: concept by concept, layer by layer.
    answers = iter(solved.split([len(d) for some in downs.values() for _, d in some]))
    return matrix, {
        name: {**tensors, **{key: next(answers) for key, _ in downs[name]}}
        for name, tensors in factors.items()
    }


def assemble_changes(
    layers: Sequence[str], matrix: Tensor | None, factors: Mapping[str, Tensors], scale: float = 1.0
) -> Changes:
    """Make one right factor of all layers, and one low-rank change a layer; column i is concept i's.

    Args:
        layers: the layers that change.
        matrix: M or M₂, (d, d); None where there is none.
        factors: as in `fuse`; the edit holds them in half precision.
        scale: what B D is multiplied by.
    """
    changes: list[Change] = [] if matrix is None else [Right(tuple(layers), matrix.float())]
    for layer in layers if factors else ():
        up = torch.cat([tensors[f"{layer}.up"] for tensors in factors.values()], 1)
        down = torch.cat([tensors[f"{layer}.down"] for tensors in factors.values()])
        # Half precision halves the file; balanced, the product loses next to nothing.
        halves = (x.half() for x in balance(scale * up.double(), down.double()))
        changes.append(LowRank((layer,), *halves))
    return tuple(changes)
