"""Estimate how long the rest of some work takes, from what has been measured of it so far."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, ignore_progress
from expunge.erasing.caption_gram import read_captions
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.least_squares import gram

KINDS = ("prompts", "predictions", "gradients")
"""The units that are counted: prompts, predictions of one image each, and those with gradients."""

MIN_SECONDS = 0.5
"""The seconds of a kind of unit after which its measured time replaces the estimated one."""

MIN_INTERVAL = 0.2
"""The least number of seconds between two calls of the listeners."""

Listener = Callable[[float, float], None]
"""Called with the seconds that are left, and the share of the work that is done."""


@dataclass
class UnitCount:
    """The units of one kind: how many there are, and how long they take."""

    total: float
    """The number of units there will be."""
    estimated: float
    """Seconds of one unit, as estimated before the work."""
    done: float = 0.0
    """The number of units that are done."""
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=64))
    """For the most recent calls their units, and the seconds until the next call."""

    @property
    def measured(self) -> float | None:
        """Seconds of one unit, as measured; None before enough was measured."""
        if sum(seconds for _, seconds in self.recent) < MIN_SECONDS:
            return None
        each = sorted(seconds / n for n, seconds in self.recent)
        # An equation that is solved between two calls is no part of the first: cut off beyond 8 medians.
        most = 8 * each[len(each) // 2]
        return sum(min(s, most * n) for n, s in self.recent) / sum(n for n, _ in self.recent)


class Pace:
    """Counts what is asked of a model while a `with` block runs, and estimates how long the rest takes.

    Prompts are counted at the first text encoder and predictions at the denoiser, so that methods need
    not report anything. Kinds that have not been measured yet are expected to be as much slower or
    faster than estimated as those that have been.

    Args:
        model: the model.
        totals: the number of units there will be, by `KINDS`.
        unit_seconds: the estimated seconds of one unit, by `KINDS`.
        overhead: the estimated seconds outside of the model: equations, and saving.
        tell: called with the progress that `progress` is called with.
        clock: returns the time in seconds.
    """

    model: Model
    overhead: float
    tell: Progress
    clock: Callable[[], float]
    label: str
    share: float

    def __init__(
        self,
        model: Model,
        totals: dict[str, float],
        unit_seconds: dict[str, float],
        overhead: float = 0.0,
        tell: Progress = ignore_progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.overhead, self.tell, self.clock = model, overhead, tell, clock
        self.kinds: dict[str, UnitCount] = {
            kind: UnitCount(totals.get(kind, 0.0), unit_seconds.get(kind, 0.0)) for kind in KINDS
        }
        self.listeners: list[Listener] = []
        self.label, self.share = "", 0.0
        """The label of the current stage, and the share of it that is done."""
        self._started: dict[str, tuple[float, dict[str, float]]] = {}
        self._since: tuple[str, float, float] | None = None
        self._announced = float("-inf")
        self._hooks: list[Any] = []

    def __enter__(self) -> Pace:
        # All text encoders read the same prompts, so that one of them counts.
        encoders = sorted(name for name in self.model.pipe.components if name.startswith("text_encoder"))
        first = next((e for n in encoders if (e := self.model.pipe.components[n]) is not None), None)
        denoiser = getattr(self.model.pipe, self.model.denoiser, None)
        for part, hook in ((first, self._count_prompts), (denoiser, self._count_predictions)):
            if isinstance(part, nn.Module):
                self._hooks.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def left(self) -> float:
        """Return the seconds until the end, as far as they are known."""
        # What has not been measured is assumed to be as far off as what has.
        slowness = self._compute_slowness()
        seconds = self.overhead * slowness
        for one in self.kinds.values():
            each = one.measured
            seconds += max(0.0, one.total - one.done) * (
                one.estimated * slowness if each is None else each
            )
        return seconds

    @property
    def done(self) -> float:
        """The share of the work's time that has passed, 0 to 1."""
        kinds = self.kinds.values()
        each = [(one, one.estimated if one.measured is None else one.measured) for one in kinds]
        past = sum(min(one.done, one.total) * seconds for one, seconds in each)
        return past / max(past + self.left(), 1e-9)

    def progress(self, label: str, done: int, total: int) -> None:
        """Take the progress of a run, and pass it on.

        Args:
            label: the name of the stage.
            done: the number of its steps that are done.
            total: the number of its steps.
        """
        self.label, self.share = label, done / total if total else 1.0
        if label not in self._started:
            self._started[label] = done, {kind: one.done for kind, one in self.kinds.items()}
            if 0 < done <= total:  # an interrupted command did these steps
                for kind in ("predictions", "gradients"):
                    self.kinds[kind].total *= 1 - done / total
        else:
            self._learn(label, done, total)
        self.tell(label, done, total)
        self._announce()

    def _learn(self, label: str, done: int, total: int) -> None:
        """Expect as few units of a stage's other steps as its first steps took, which may end early."""
        before, counts = self._started[label]
        steps = done - before
        trained = self.kinds["gradients"].done - counts["gradients"]
        if steps < 1 or trained <= 0 or total - before <= 0:
            return
        for kind in ("predictions", "gradients"):
            one = self.kinds[kind]
            # Only ever fewer: the first steps may include work that is done once.
            needed = (one.done - counts[kind]) * (total - before) / steps
            one.total = min(one.total, counts[kind] + needed)

    def _compute_slowness(self) -> float:
        """How many times longer units take than estimated."""
        known = [(one, one.measured) for one in self.kinds.values() if one.measured and one.estimated]
        estimated = sum(one.estimated * one.done for one, _ in known)
        measured = sum((each or 0.0) * one.done for one, each in known)
        return measured / estimated if estimated and measured else 1.0

    def _count_prompts(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._count("prompts", args, kwargs)

    def _count_predictions(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._count("gradients" if torch.is_grad_enabled() else "predictions", args, kwargs)

    def _count(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the rows of a call, whose time ends when the next call begins."""
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim)
        n, now = float(next(tensors).shape[0]), self.clock()
        if self._since is not None:
            before, count, start = self._since
            self.kinds[before].recent.append((count, now - start))
        self._since = kind, n, now
        self.kinds[kind].done += n
        self._announce()

    def _announce(self) -> None:
        now = self.clock()
        if now - self._announced >= MIN_INTERVAL:
            self._announced = now
            for listener in self.listeners:
                listener(self.left(), self.done)


def time_model(
    model: Model, batch_size: int = 4, clock: Callable[[], float] = time.monotonic
) -> dict[str, float]:
    """Time a prompt, a prediction, and a prediction with gradients.

    Each is run once to warm up and once by the clock. Predictions are left out where the denoiser is
    not in memory.

    Args:
        model: the model; it is left as it was.
        batch_size: the number of images at once.
        clock: returns the time in seconds.

    Returns:
        the seconds of one unit, by `KINDS`.
    """
    found: dict[str, float] = {}
    some = list(read_captions("general")[: 4 * batch_size])
    model.encode(some[:1])  # the first call of a network allocates and compiles
    with _timed(found, "prompts", len(some), clock):
        gram(model.encode(some).embeddings.flatten(0, 1).cpu())
    shape = getattr(model, "_latent_shape", None)
    if shape is None or any(p.is_meta for p in model.network.parameters()):
        return found
    text = model.encode([""] * batch_size)
    latents = torch.zeros(batch_size, *shape, device=model.device, dtype=model.dtype)
    # Any time will do, since a prediction costs the same at all of them.
    t = torch.full((batch_size,), len(model.log_snr()) // 2, device=model.device)
    with torch.no_grad():
        model.predict(latents, t, text)
        with _timed(found, "predictions", batch_size, clock):
            # Reading a number waits for an accelerator to finish.
            float(model.predict(latents, t, text).sum())
    with torch.enable_grad(), frozen(model.parameters()):
        for _ in range(2):
            embeddings = text.embeddings.detach().clone().requires_grad_()
            with _timed(found, "gradients", batch_size, clock):
                output = model.predict(latents, t, replace(text, embeddings=embeddings))
                (gradient,) = torch.autograd.grad(output.square().sum(), embeddings)
                float(gradient.sum())
    return found


def make_printer(
    pace: Pace,
    say: Callable[[str], None],
    first: float = 3.0,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Listener:
    """Make a listener that prints how long is left, after some seconds and then now and again.

    Args:
        pace: the pace whose label and share are printed.
        say: prints a line.
        first: the seconds before the first line, above 0.
        every: the seconds between two lines, above 0.
        clock: returns the time in seconds.

    Raises:
        ExpungeError: the times are not above 0.
    """
    if not (first > 0 and every > 0):
        raise ExpungeError(f"times between lines must be above 0, not {first:g} and {every:g}")
    at = clock() + first

    def tell(left: float, done: float) -> None:
        nonlocal at
        if (now := clock()) < at:
            return
        at = now + every
        doing = f"{pace.label}, {100 * pace.share:.0f} %; " if pace.label else ""
        say(f"{doing}about {format_duration(left)} left in all, {100 * done:.0f} % done")

    return tell


def format_duration(seconds: float) -> str:
    """Format an estimated time, no finer than it can be known.

    >>> format_duration(0.2), format_duration(47), format_duration(130), format_duration(4000)
    ('1 s', '47 s', '2 min', '1.1 h')
    """
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _timed(found: dict[str, float], kind: str, n: int, clock: Callable[[], float]) -> Iterator[None]:
    start = clock()
    yield
    found[kind] = (clock() - start) / n
