"""ACE's first stage: gates and directions in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Changes, Damped, Gated
from expunge.erasing.gate_tokens import GateTokens
from expunge.methods.ace.settings import ATTENTION_REDUCTIONS, ACESettings
from expunge.ops.gates import Background, find_directions, fit_affine, fit_gate, stack_root

FACTORS = ("direction", "centre", "slope", "up", "down", "toward", "goal")
"""The tensors of a `Gated` change that say how it acts; the others say whose they are."""


def solve_gates(
    settings: ACESettings,
    tokens: Mapping[str, Sequence[GateTokens]],
    background: Background | Mapping[str, Background],
    weights: Mapping[str, Tensor],
    shared: Sequence[int] = (),
    damping: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Changes:
    """Solve for gates and directions: one `Gated` change of all layers, or one a layer.

    Args:
        settings: how gates and directions are fitted.
        tokens: for each concept the tokens of its gates.
        background: what the gates stay closed on; for all concepts, or for each its own.
        weights: W of each layer, (out, d).
        shared: of how many concepts, one after the other, each set of directions is; by default one.
        damping: g of each layer, (out,), for each concept, where it comes from attention.
    """
    flat = [group for members in tokens.values() for group in members]
    of = [name for name, members in tokens.items() for _ in members]
    closed_on = [background[n] if isinstance(background, Mapping) else background for n in of]
    gates = [
        fit_gate(g.rows, ground, margin=settings.margin, retain_openness=settings.retain_openness)
        for g, ground in zip(flat, closed_on, strict=True)
    ]
    switch = {
        name: torch.stack([getattr(one, name) for one in gates]).float().cpu()
        for name in ("direction", "centre", "slope")
    }
    whole = settings.gate_on == "prompt"
    if settings.reduction == "damped" or settings.reduction in ATTENTION_REDUCTIONS:
        found = {
            layer: _damping(weight, flat)
            if damping is None
            else torch.stack([damping[name][layer] for name in of])
            for layer, weight in weights.items()
        }
        # Literally, m is 0 or 1 on a token, however many of a concept's gates open there.
        numbers = {name: i for i, name in enumerate(tokens)}
        concepts = torch.tensor([numbers[name] for name in of])
        own = {} if damping is None else {"concept": concepts}
        return tuple(
            Damped((layer,), **_clone({**switch, **own}), damping=g, whole=whole)
            for layer, g in found.items()
        )
    roots = (
        # With one root for all layers, one set of directions serves keys and values everywhere.
        {tuple(weights): stack_root(list(weights.values()))}
        if settings.reduction == "shared"
        else {(layer,): weight for layer, weight in weights.items()}
    )
    members = iter(tokens.values())
    together = [
        [group for one in islice(members, n) for group in one] for n in shared or [1] * len(tokens)
    ]
    if settings.directions == "gate":
        together = [[group] for group in flat]
    changes = []
    for layers, root in roots.items():
        factors = [_factors(settings, root, members) for members in together]
        up, down, toward, goal = zip(*factors, strict=True)
        # Where gates of one owner overlap, the change subtracts its directions once.
        owner = [i for i, one in enumerate(down) for _ in one]
        concept = [i for i, members in enumerate(together) for _ in members]
        changes.append(
            Gated(
                layers,
                **_clone(switch),
                up=torch.cat(up, 1).float().cpu(),
                down=torch.cat(down).float().cpu(),
                toward=torch.cat(toward).float().cpu(),
                goal=torch.cat(goal).float().cpu(),
                owner=torch.tensor(owner),
                concept=torch.tensor(concept),
                whole=whole,
            )
        )
    return tuple(changes)


def _factors(
    settings: ACESettings, root: Tensor, groups: Sequence[GateTokens]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for up, down, toward and goal of some gates: U Uᵀ W (e − G e − g), G e + g near e_anchor.

    Args:
        settings: energy, rank and the ridge of G.
        root: a root of Σ WᵀW, or W itself, (n, d).
        groups: the tokens of the gates.
    """
    differences = torch.cat([g.differences for g in groups])
    up, down = find_directions(root, differences, energy=settings.energy, rank=settings.rank)
    rows, neutral = (torch.cat([getattr(g, n) for g in groups]) for n in ("rows", "neutral"))
    # Each gate weighs the same, however many tokens it has.
    weights = torch.cat([torch.full((len(g.rows),), 1 / len(g.rows)) for g in groups]).to(rows)
    line, goal = fit_affine(rows, neutral.double() @ down.T, weights, settings.goal_ridge)
    return up, down, line, goal


def _damping(weight: Tensor, groups: Sequence[GateTokens]) -> Tensor:
    """Return g of each gate, (gates, out): the difference's share in a channel, 1 in the largest."""
    carried = torch.stack([(g.differences @ weight.double().T).abs().mean(0) for g in groups])
    return (carried / carried.amax(1, keepdim=True)).float().cpu()


def _clone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy tensors: several changes are made of one gate, and an edit's file holds no shared memory."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def split(gated: Gated, counts: Sequence[int]) -> list[Gated]:
    """Split a change into one for each concept.

    Args:
        gated: the gates of several concepts, one after the other.
        counts: how many gates each has.
    """
    parts, start = [], 0
    for n in counts:
        gates = slice(start, start + n)
        first = int(gated.concept[start])
        # Directions belong to sets, gates to concepts of a set: both are numbered anew from 0.
        mine = torch.isin(gated.owner, gated.concept[gates])
        parts.append(
            dataclasses.replace(
                gated,
                direction=gated.direction[gates],
                centre=gated.centre[gates],
                slope=gated.slope[gates],
                up=gated.up[:, mine],
                down=gated.down[mine],
                toward=gated.toward[mine],
                goal=gated.goal[mine],
                owner=gated.owner[mine] - first,
                concept=gated.concept[gates] - first,
            )
        )
        start += n
    return parts


def join(parts: Sequence[Gated]) -> Gated:
    """Join the gates of several changes in one: the inverse of `split`."""
    counts = torch.tensor([int(part.concept.max()) + 1 for part in parts])
    starts = (counts.cumsum(0) - counts).tolist()
    joined: Any = {n: torch.cat([getattr(p, n) for p in parts], int(n == "up")) for n in FACTORS}
    for name in ("owner", "concept"):
        joined[name] = torch.cat([getattr(p, name) + s for p, s in zip(parts, starts, strict=True)])
    return dataclasses.replace(parts[0], **joined)


def check_memory(gates: int, rank: int, width: int, free: int | None = None) -> None:
    """Check that there is memory for so many gates beside the model.

    Args:
        gates: how many.
        rank: directions a gate.
        width: of the text embeddings.
        free: the bytes that are free; by default what the system reports.

    Raises:
        ExpungeError: there is not.
    """
    n = gates * rank
    # Four factors (n, d) and three products (n, n), in float64.
    needed = 8 * (4 * n * width + 3 * n * n)
    if free is None:
        free = _free_memory()
    if needed > free:
        raise ExpungeError(
            f"{gates} gates of {rank} directions need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are"
            " free: erase fewer concepts at once, or lower the rank"
        )


def _free_memory() -> int:
    """Return the bytes of memory available; a very large number where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**62
