"""Muon with AdamW beside it: the momentum of every weight matrix is orthogonalised before it is applied.

A convolution counts as the matrix (out, in * k * k). Vectors, and the layers named in `adamw`, are stepped by AdamW.
Updates are scaled to AdamW's usual size, so one learning rate serves both (Jordan et al. 2024; Liu et al. 2025).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

# Coefficients of the quintic iteration that drives all singular values towards one.
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAMW_SHARE = 0.3  # of the learning rate: vectors and first and last layers stand less than matrices


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V' of the singular value decomposition of `matrix` (rows, columns).

    A long matrix, as a convolution's, goes through its small Gram matrix: (X X')^(-1/2) X, two large products
    instead of ten.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    if x.shape[1] >= 4 * x.shape[0]:
        values, vectors = torch.linalg.eigh(x @ x.T)
        inverse_root = vectors * (values.clamp_min(0) + 1e-6 * values[-1] + 1e-20).rsqrt() @ vectors.T
        x = inverse_root @ x
    else:
        a, b, c = QUINTIC
        x = x / (x.norm() + 1e-7)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def orthogonalise_all(matrices: list[torch.Tensor], dtype: torch.dtype, steps: int = 5) -> list[torch.Tensor]:
    """The same of many matrices, those of one shape together: a GPU waits for kernels' starts, not for arithmetic."""
    a, b, c = QUINTIC
    same: dict[torch.Size, list[int]] = {}
    for k, matrix in enumerate(matrices):
        same.setdefault(matrix.shape, []).append(k)
    out = list(matrices)
    for shape, rows in same.items():
        x = torch.stack([matrices[k] for k in rows]).to(dtype)
        x = x if shape[0] <= shape[1] else x.mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x if shape[0] <= shape[1] else x.mT
        for k, result in zip(rows, x.to(matrices[0].dtype), strict=True):
            out[k] = result
    return out


class Muon(torch.optim.Optimizer):
    def __init__(
        self, module: nn.Module, lr: float, *, momentum: float = 0.95, weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99), adamw: tuple[str, ...] = (),
    ):  # fmt: skip
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim >= 2 and not any(part in name for part in adamw)
            (matrices if is_matrix else rest).append(parameter)
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__([{"params": matrices}], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        for other in self.adamw.param_groups:
            other["lr"] = ADAMW_SHARE * group["lr"]
        self.adamw.step()
        if parameters and parameters[0].is_cuda:
            self.step_together(parameters)
            return
        updates = []
        for k, parameter in enumerate(parameters):
            velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
            velocity.lerp_(parameter.grad, 1 - group["momentum"])
            if k % self.processes != self.rank:  # another process orthogonalises this one
                updates.append(torch.zeros_like(parameter))
                continue
            direction = parameter.grad.lerp(velocity, group["momentum"]).flatten(1)
            update = orthogonalise(direction) * (0.2 * max(direction.shape) ** 0.5)
            updates.append(update.reshape(parameter.shape))
        if self.processes > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            pieces = flat.split([p.numel() for p in parameters])
            updates = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def step_together(self, parameters: list[torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
        """The same step in few kernels, for one process on a GPU."""
        group = self.param_groups[0]
        gradients = [p.grad for p in parameters]
        velocities = [self.state[p].setdefault("velocity", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, velocities, group["momentum"])
        updates = orthogonalise_all([direction.flatten(1) for direction in directions], dtype)
        scaled = [
            (update * (0.2 * max(update.shape) ** 0.5)).view_as(parameter)
            for parameter, update in zip(parameters, updates, strict=True)
        ]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, scaled, alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
