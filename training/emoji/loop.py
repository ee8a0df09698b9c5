"""The training loop every stage shares: a schedule by wall time, EMA, checkpoints, resume, a progress bar."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_arithmetic() -> None:
    """TF32, and kernels chosen by trial, on a GPU; on a CPU no time for numbers next to zero."""
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True


def parse(parser: argparse.ArgumentParser, on_gpu: dict[str, object]) -> argparse.Namespace:
    """The command line; with `--preset gpu` the defaults are `on_gpu`, and what is given beside it still counts."""
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu", help=f"gpu: {on_gpu}")
    known, _ = parser.parse_known_args()
    if known.preset == "gpu":
        parser.set_defaults(**on_gpu)
    return parser.parse_args()


def rate_at(progress: float, *, warm_up: float = 0.02, decay_from: float = 0.3) -> float:
    """The share of the top learning rate at `progress` in [0, 1]: warm-up, constant, linear to zero."""
    if progress < warm_up:
        return max(progress / warm_up, 0.01)
    return 1.0 if progress < decay_from else max((1 - progress) / (1 - decay_from), 0.0)


def join() -> int:
    """This process's rank. Under `torchrun --nproc-per-node N` the N processes share every step."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def share(module: nn.Module, spent: float) -> float:
    """Averages the gradients, and the time spent, over all processes."""
    if not dist.is_initialized():
        return spent
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([spent])]) / dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, piece in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))
    return flat[-1].item()


@contextmanager
def resumable(name: str) -> Iterator[None]:
    """Ctrl-C ends a stage with one sentence and exit code 130; the last checkpoint stays as it is."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the last checkpoint is kept, and the same command continues from it")
        raise SystemExit(130) from None


class Average:
    """Exponential moving average of a module's parameters, short at first: decay = min(top, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, top: float = 0.999):
        self.top, self.steps = top, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.top, (1 + self.steps) / (10 + self.steps))
        now = module.state_dict()
        if next(iter(now.values())).is_cuda:  # all at once: hundreds of small kernels take longer than the step
            floating = [name for name, value in now.items() if value.is_floating_point()]
            torch._foreach_lerp_([self.values[k] for k in floating], [now[k] for k in floating], 1 - decay)
            now = {name: value for name, value in now.items() if not value.is_floating_point()}
        for name, value in now.items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int, float], tuple[torch.Tensor, dict[str, float | torch.Tensor]]],
    folder: Path,
    optimiser: torch.optim.Optimizer,
    *,
    minutes: float,
    clip: float = 1.0,
    every: float = 60.0,
    average: float = 0.999,
    session: float | None = None,
    watch: int = 1,
) -> dict[str, torch.Tensor]:
    """Trains `module` for `minutes` of wall time, over any number of sessions, and returns its averaged weights.

    `loss_of(step, progress)` returns the loss and what to log. A checkpoint is written every `every` seconds to
    `folder/name.pt` (weights-only); an interrupted run continues from it. `session` ends this session after so many
    minutes, wherever the schedule is. The loss is looked at every `watch` steps: on a GPU each look waits for it.
    """
    checkpoint = folder / f"{name}.pt"
    rank, rate = join(), optimiser.param_groups[0]["lr"]
    step, spent = 0, 0.0
    ema = Average(module, average)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device())
        module.load_state_dict(state["module"])
        if state["optimiser"]:  # what was carried from elsewhere comes without
            optimiser.load_state_dict(state["optimiser"])
        ema.values, ema.steps = state["average"], state["step"]
        step, spent = state["step"], state["spent"]

    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)

    def save() -> None:
        if rank:
            return
        state = {
            "module": module.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": ema.values,
        }
        torch.save({**state, "step": step, "spent": spent}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    total, last, saved, logged = minutes * 60, time.monotonic(), spent, 0.0
    until = total if session is None else min(total, spent + session * 60)
    running: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    log = None if rank else (folder / f"{name}.log").open("a")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        resumable(name),
        Progress(*columns, TextColumn("{task.fields[note]}"), disable=bool(rank)) as bar,
    ):
        task = bar.add_task(name, total=total, completed=spent, note="")
        while spent < until:
            for group in optimiser.param_groups:
                group["lr"] = rate * rate_at(spent / total)
            loss, notes = loss_of(step, spent / total)
            look = step % watch == 0
            if look and not torch.isfinite(loss):
                raise SystemExit(f"{name}: the loss is no longer a number at step {step}; the last checkpoint is kept.")
            loss.backward()
            spent = share(module, spent)
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(module)
            step += 1
            now = time.monotonic()
            spent, last = spent + now - last, now
            if not look:
                continue
            for key, value in notes.items():
                running[key] = 0.98 * running.get(key, float(value)) + 0.02 * float(value)
            note = f"step {step} " + " ".join(f"{key} {value:.4f}" for key, value in running.items())
            bar.update(task, completed=spent, note=note)
            if log and spent - logged > 15:
                log.write(f"{spent:.0f}s {note}\n")
                log.flush()
                logged = spent
            if spent - saved > every:
                save()
                saved = spent
    save()
    return ema.values
