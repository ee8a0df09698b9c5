"""The loop every stage trains in: a sitting at a time, checkpoints that a kill cannot spoil, one or more processes.

The rate warms up, and then stays: how many sittings there will be need not be known. `anneal` branches off a stage's
checkpoint and lets the rate fall to zero; the stage itself can go on from where it was, as if nothing had been.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.miniature.world import WORK

Notes = dict[str, Tensor | float]
LONGEST = 60.0  # seconds that one step is counted as at most
SEEDS = 1_000_003  # a step's seed is its number times this, plus the process's rank


def join() -> int:
    """This process's rank. Under `torchrun --nproc-per-node N` the N processes share every step."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def stage_parser(description: str | None, name: str, minutes: float) -> argparse.ArgumentParser:
    """The options that every stage has.

    Args:
        description: of the stage.
        name: of its checkpoint.
        minutes: of a sitting, where none are told.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="drawings, checkpoints and what is trained")
    parser.add_argument("--minutes", type=float, default=minutes, help="length of this sitting")
    parser.add_argument("--anneal", action="store_true", help="end in this sitting: the rate falls to zero over it")
    parser.add_argument("--name", default=name)
    parser.add_argument("--initial", help="the stage whose checkpoint to start from, to anneal a copy")
    return parser


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a stage's steps, or over the minutes of its annealing.

    Args:
        rate: the rate after the warm-up.
        warm_up: steps over which it rises from zero.
        anneal: minutes over which it falls to zero; none: it stays.
    """

    rate: float
    warm_up: int = 100
    anneal: float | None = None

    def at(self, step: int, minutes: float) -> float:
        """The rate at a step, `minutes` after the annealing began."""
        warm = min((step + 1) / self.warm_up, 1.0) if self.warm_up else 1.0
        left = 1.0 if self.anneal is None else max(1 - minutes / self.anneal, 0.0)
        return self.rate * warm * left


class Average:
    """Exponential moving average of a module's state, short at first: decay = min(top, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, top: float):
        self.top, self.steps = top, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.top, (1 + self.steps) / (10 + self.steps))
        now = module.state_dict()
        floating = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in floating], [now[name] for name in floating], 1 - decay)
        for name in now.keys() - floating:
            self.values[name].copy_(now[name])


@contextmanager
def holding(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the module has these weights and is not in training; behind it all is as it was."""
    training = module.training
    now = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(values)
    module.eval()
    try:
        yield
    finally:
        module.load_state_dict(now)
        module.train(training)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and Ctrl-C only make the function that is given say True, so that a step ends in peace."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def share(module: nn.Module, told: list[float]) -> list[float]:
    """Averages the gradients, and the numbers in `told`, over all processes."""
    if not dist.is_initialized():
        return told
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor(told)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, piece in zip(gradients, flat[: -len(told)].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))
    return flat[-len(told) :].tolist()


def write(state: dict[str, object], to: Path) -> None:
    """Writes beside and moves, so that what lies at `to` is always whole."""
    beside = to.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, to)


def read(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def read_stage(folder: Path, name: str) -> dict[str, Any]:
    """A stage's checkpoint.

    Raises:
        SystemExit: it has none yet.
    """
    state = read(folder / f"{name}.pt")
    if state is None:
        raise SystemExit(f"There is no {folder / name}.pt: train it first (training/miniature/README.md).")
    return state


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, Notes]],
    folder: Path,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    minutes: float,
    steps: int | None = None,
    start: str | None = None,
    clip: float = 1.0,
    every: float = 150.0,
    average: float = 0.999,
    sample: Callable[[int, dict[str, Tensor]], None] | None = None,
    sample_every: float = 600.0,
) -> dict[str, Tensor]:
    """Trains `module` for `minutes` of wall time from where its checkpoint is, and returns its averaged weights.

    `loss_of(step)` returns the loss and what to log. Torch's random numbers are seeded by the step, so a stage that
    was stopped goes on as it would have. `folder/name.pt` (weights-only) is written every `every` seconds and at the
    end, also when SIGTERM or Ctrl-C ask for one.

    Args:
        steps: at most so many in this sitting.
        start: the stage to begin from where `name` has no checkpoint yet; its steps count on.
        clip: the largest norm of a step's gradient.
        average: decay of the averaged weights.
        sample: called with the step and the averaged weights every `sample_every` seconds, in the first process.

    Raises:
        SystemExit: the loss is no longer a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.pt"
    rank = join()
    step, spent, annealed = 0, 0.0, 0.0
    ema = Average(module, average)
    state = read(checkpoint)
    if state is None and start:
        state = read(folder / f"{start}.pt")
        if state is None:
            raise SystemExit(f"{name}: there is no {folder / start}.pt to start from.")
        state["annealed"] = 0.0
    if state is not None:
        module.load_state_dict(state["module"])
        if state["optimiser"]:
            optimiser.load_state_dict(state["optimiser"])
        ema.values, ema.steps = state["average"], state["averaged"]
        step, spent, annealed = state["step"], state["spent"], state["annealed"]
        if rank == 0:
            print(f"{name}: goes on at step {step}, {spent / 60:.1f} minutes in", flush=True)
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)

    def save() -> None:
        if rank == 0:
            parts = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": ema.values,
            }
            write(
                {**parts, "averaged": ema.steps, "step": step, "spent": spent, "annealed": annealed},
                checkpoint,
            )

    began = last = saved = logged = sampled = time.monotonic()
    first = step
    running: dict[str, float] = {}
    with stopping() as asked:
        while True:
            for group in optimiser.param_groups:
                group["lr"] = schedule.at(step, annealed / 60)
            torch.manual_seed(step * SEEDS + rank)
            loss, notes = loss_of(step)
            if not torch.isfinite(loss):
                raise SystemExit(f"{name}: the loss is no longer a number at step {step}; the last checkpoint is kept.")
            loss.backward()
            now = time.monotonic()
            stop = (
                asked()
                or now - began > minutes * 60
                or (steps is not None and step + 1 - first >= steps)
                or (schedule.anneal is not None and annealed > schedule.anneal * 60)
            )
            # A machine that slept through a step did not train in that time.
            seconds, stop_share = share(module, [min(now - last, LONGEST), float(stop)])
            last, spent = now, spent + seconds
            annealed += seconds if schedule.anneal is not None else 0.0
            nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(module)
            step += 1
            for key, value in notes.items():
                old = running.get(key, float(value))
                running[key] = old + max(0.02, 1 / (step - first)) * (float(value) - old)
            if rank == 0 and (now - logged > 20 or stop_share > 0):
                line = f"{spent:.0f}s step {step} {spent and (now - began) / (step - first):.2f}s/step "
                line += " ".join(f"{key} {value:.4f}" for key, value in running.items())
                print(line, flush=True)
                logged = now
            if stop_share > 0:
                break
            if now - saved > every:
                save()
                saved = time.monotonic()
            if sample and rank == 0 and now - sampled > sample_every:
                sample(step, ema.values)
                sampled = time.monotonic()
    save()
    return ema.values


def write_json(report: dict[str, object], to: Path) -> None:
    """Writes a report beside and moves it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_suffix(".tmp")
    beside.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, to)


def write_model(module: Any, folder: Path, **options: Any) -> None:
    """Writes a model of diffusers or transformers beside and moves it; nothing of what lay there before stays."""
    beside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for path in (beside, old):
        shutil.rmtree(path, ignore_errors=True)
    module.save_pretrained(beside, **options)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
