"""Muon with AdamW beside it: the momentum of every weight matrix is orthogonalised before it is applied.

A convolution counts as the matrix (out, in * k * k). Vectors, and the layers named in `adamw`, are stepped by AdamW.
Updates are scaled to AdamW's usual size, so one learning rate serves both (Jordan et al. 2024; Liu et al. 2025).
The iteration runs in bfloat16 where the machine has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.miniature.fast import has_bfloat16

# Coefficients of the quintic iteration that drives all singular values towards one.
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAMW_SHARE = 0.3  # of the learning rate: vectors and first and last layers stand less than matrices


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V' of the singular value decomposition of each of `matrices` (n, rows, columns)."""
    a, b, c = QUINTIC
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Under `torch.distributed` each process orthogonalises its share of the matrices."""

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        adamw: tuple[str, ...] = (),
    ):
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim >= 2 and not any(part in name for part in adamw)
            (matrices if is_matrix else rest).append(parameter)
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.dtype = torch.bfloat16 if has_bfloat16() else torch.float32
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__([{"params": matrices}], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        for other in self.adamw.param_groups:
            other["lr"] = ADAMW_SHARE * group["lr"]
        self.adamw.step()
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        velocities = [self.state[p].setdefault("velocity", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        directions = [d.flatten(1) for d in torch._foreach_lerp(gradients, velocities, group["momentum"])]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, self._updates(directions, parameters), alpha=-group["lr"])

    def _updates(self, directions: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
        """The orthogonalised directions in the parameters' shapes; matrices of one shape go together."""
        same: dict[torch.Size, list[int]] = {}
        for k, direction in enumerate(directions):
            same.setdefault(direction.shape, []).append(k)
        updates = [torch.zeros_like(p) for p in parameters]
        for shape, rows in same.items():
            scale = 0.2 * max(shape) ** 0.5
            own = [k for n, k in enumerate(rows) if n % self.processes == self.rank]
            if own:
                together = orthogonalise(torch.stack([directions[k] for k in own]).to(self.dtype)).float() * scale
                for k, update in zip(own, together, strict=True):
                    updates[k].copy_(update.view_as(parameters[k]))
        if self.processes > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            pieces = flat.split([update.numel() for update in updates])
            updates = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        return updates

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
