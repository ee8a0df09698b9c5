"""How long the rest of some work takes, from what has been measured of it so far."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, quiet
from expunge.model import Model

KINDS = ("prompts", "predictions", "gradients")
"""What is counted: prompts read, predictions of one image each, and predictions with gradients."""

ENOUGH = 0.5
"""Seconds of a kind of work after which its own pace is believed, not the foretold one."""

FREQUENT = 0.2
"""Seconds between two looks at the clock that are worth telling of."""

Listener = Callable[[float, float], None]
"""Told the seconds that are left, and the share that is done."""


@dataclass
class Counted:
    """One kind of work."""

    total: float
    """How much there will be."""
    foretold: float
    """Seconds for one, as foretold."""
    done: float = 0.0
    last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=64))
    """Of the last calls, how much each did and the seconds until the next began."""

    @property
    def measured(self) -> float | None:
        """Seconds for one, as measured; None before there is enough of it."""
        if sum(seconds for _, seconds in self.last) < ENOUGH:
            return None
        each = sorted(seconds / n for n, seconds in self.last)
        # A closed form that is solved after a call is no part of it.
        most = 8 * each[len(each) // 2]
        return sum(min(s, most * n) for n, s in self.last) / sum(n for n, _ in self.last)


class Pace:
    """Counts what a model is asked while a `with` block runs, and says how long the rest takes.

    Prompts are counted at the first text encoder and predictions at the denoiser, so a method has
    nothing to tell. What has not been met yet is foretold, and taken to be as much slower or faster
    than foretold as that which has been measured.

    Args:
        model: the model that is asked.
        totals: how much there will be of each of `KINDS`.
        foretold: the seconds for one of each.
        beside: the seconds for what is neither: equations, and saving.
        tell: hears progress, as `progress` does.
        clock: says the time.
    """

    def __init__(
        self,
        model: Model,
        totals: dict[str, float],
        foretold: dict[str, float],
        beside: float = 0.0,
        tell: Progress = quiet,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.beside, self.tell, self.clock = model, beside, tell, clock
        self.kinds = {kind: Counted(totals.get(kind, 0.0), foretold.get(kind, 0.0)) for kind in KINDS}
        self.listeners: list[Listener] = []
        self.label, self.share = "", 0.0
        """What the work says it is doing, and how much of that is done."""
        self._started: dict[str, tuple[float, dict[str, float]]] = {}
        self._since: tuple[str, float, float] | None = None
        self._said = float("-inf")
        self._hooks: list[Any] = []

    def __enter__(self) -> Pace:
        encoders = sorted(name for name in self.model.pipe.components if name.startswith("text_encoder"))
        first = next((e for n in encoders if (e := self.model.pipe.components[n]) is not None), None)
        for part, hear in ((first, self._hear_prompts), (self._denoiser(), self._hear_denoiser)):
            if isinstance(part, nn.Module):
                self._hooks.append(part.register_forward_pre_hook(hear, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def left(self) -> float:
        """Seconds until the end, as far as can be told."""
        pace = self._slowness()
        seconds = self.beside * pace
        for one in self.kinds.values():
            each = one.measured
            seconds += max(0.0, one.total - one.done) * (one.foretold * pace if each is None else each)
        return seconds

    @property
    def done(self) -> float:
        """The share of the work that is done, in time: 0 to 1."""
        kinds = self.kinds.values()
        each = [(one, one.foretold if one.measured is None else one.measured) for one in kinds]
        past = sum(min(one.done, one.total) * seconds for one, seconds in each)
        return past / max(past + self.left(), 1e-9)

    def progress(self, label: str, done: int, total: int) -> None:
        """What a run tells; passed on."""
        self.label, self.share = label, done / total if total else 1.0
        if label not in self._started:
            self._started[label] = done, {kind: one.done for kind, one in self.kinds.items()}
            if 0 < done <= total:  # an earlier command has done this
                for kind in ("predictions", "gradients"):
                    self.kinds[kind].total *= 1 - done / total
        else:
            self._learn(label, done, total)
        self.tell(label, done, total)
        self._announce()

    def _learn(self, label: str, done: int, total: int) -> None:
        """Work that ends early, as hardening may, shows in the first pieces: expect it of the rest."""
        before, counts = self._started[label]
        pieces = done - before
        trained = self.kinds["gradients"].done - counts["gradients"]
        if pieces < 1 or trained <= 0 or total - before <= 0:
            return
        for kind in ("predictions", "gradients"):
            one = self.kinds[kind]
            needed = (one.done - counts[kind]) * (total - before) / pieces
            one.total = min(one.total, counts[kind] + needed)

    def _slowness(self) -> float:
        """How much longer things take than was foretold."""
        known = [(one, one.measured) for one in self.kinds.values() if one.measured and one.foretold]
        foretold = sum(one.foretold * one.done for one, _ in known)
        measured = sum((each or 0.0) * one.done for one, each in known)
        return measured / foretold if foretold and measured else 1.0

    def _denoiser(self) -> Any:
        return getattr(self.model.pipe, self.model.denoiser, None)

    def _hear_prompts(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._count("prompts", given, named)

    def _hear_denoiser(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._count("gradients" if torch.is_grad_enabled() else "predictions", given, named)

    def _count(self, kind: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = (x for x in (*given, *named.values()) if isinstance(x, Tensor) and x.ndim)
        n, now = float(next(tensors).shape[0]), self.clock()
        if self._since is not None:
            before, count, start = self._since
            self.kinds[before].last.append((count, now - start))
        self._since = kind, n, now
        self.kinds[kind].done += n
        self._announce()

    def _announce(self) -> None:
        now = self.clock()
        if now - self._said >= FREQUENT:
            self._said = now
            for listener in self.listeners:
                listener(self.left(), self.done)


@contextlib.contextmanager
def _timed(found: dict[str, float], kind: str, n: int, clock: Callable[[], float]) -> Iterator[None]:
    start = clock()
    yield
    found[kind] = (clock() - start) / n


def measured(
    model: Model, batch: int = 4, clock: Callable[[], float] = time.monotonic
) -> dict[str, float]:
    """The seconds that a prompt, a prediction and one with gradients take this model, here and now.

    Each is done once to warm up and once by the clock. Kinds that the model cannot do, for want of a
    denoiser in memory, are left out.

    Args:
        model: the model; it is left as it was.
        batch: images at once.
    """
    from expunge.erasing.caption_gram import read_captions
    from expunge.ops.least_squares import gram

    found: dict[str, float] = {}
    some = list(read_captions("general")[: 4 * batch])
    model.encode(some[:1])
    with _timed(found, "prompts", len(some), clock):
        gram(model.encode(some).embeddings.flatten(0, 1).cpu())
    shape = getattr(model, "_latent_shape", None)
    if shape is None or any(p.is_meta for p in model.network.parameters()):
        return found
    text = model.encode([""] * batch)
    latents = torch.zeros(batch, *shape, device=model.device, dtype=model.dtype)
    t = torch.full((batch,), len(model.log_snr()) // 2, device=model.device)
    with torch.no_grad():
        model.predict(latents, t, text)
        with _timed(found, "predictions", batch, clock):
            float(model.predict(latents, t, text).sum())
    from dataclasses import replace

    from expunge.ops.finetune import frozen

    with torch.enable_grad(), frozen(model.parameters()):
        for _ in range(2):
            embeddings = text.embeddings.detach().clone().requires_grad_()
            with _timed(found, "gradients", batch, clock):
                answer = model.predict(latents, t, replace(text, embeddings=embeddings))
                (gradient,) = torch.autograd.grad(answer.square().sum(), embeddings)
                float(gradient.sum())
    return found


def lines(
    pace: Pace,
    say: Callable[[str], None],
    first: float = 3.0,
    every: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Listener:
    """A listener that says how long is left after some seconds, and now and then from then on.

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
        say(f"{doing}about {said(left)} left in all, {100 * done:.0f} % done")

    return tell


def said(seconds: float) -> str:
    """A time in words, no finer than it can be known.

    >>> said(0.2), said(47), said(130), said(4000)
    ('1 s', '47 s', '2 min', '1.1 h')
    """
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
