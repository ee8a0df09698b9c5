"""The training loop: AdamW on a few tensors, for many independent problems in one batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning

KEEP_EVERY = 25
"""After how many steps the state of unfinished training is saved."""


def minimise(
    parameters: Sequence[Tensor],
    losses: Callable[[int], Tensor | Iterable[Tensor]],
    *,
    max_train_steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    names: Sequence[str] = (),
) -> None:
    """Train parameters in place.

    Row b of every parameter belongs to problem b and to no other: its loss is `losses(step)[b]`, its
    gradient is clipped by its own norm, and AdamW treats every entry by itself. So n problems in one
    batch end where each would end alone. A problem whose loss diverges ends at its last sound state,
    with a warning; the others go on.

    Args:
        parameters: tensors (n, …).
        losses: returns the losses (n,) of a step, counted from 0; or parts of them, which sum to the
            losses. The graph of each part is freed before the next part is computed.
        max_train_steps: how many steps.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's, decoupled.
        max_grad_norm: the largest norm of one problem's gradient.
        names: of the problems, for the warning.

    Raises:
        ExpungeError: a loss diverges before any state was saved.
    """
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    sound: list[Tensor] = []
    history: list[list[float]] = [[] for _ in parameters[0]]
    stopped: set[int] = set()
    for parameter in parameters:
        parameter.requires_grad_()
    with torch.enable_grad():
        for step in range(max_train_steps):
            gradients: list[Tensor | None] = [None] * len(parameters)
            total: Tensor | None = None
            asked = losses(step)
            for loss in (asked,) if isinstance(asked, Tensor) else asked:
                total = _added(total, loss.detach().double().cpu())
                # Asking for these gradients alone leaves no trace on the network's own parameters.
                found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
                # Summed over parts here, so that one clipping sees the whole gradient.
                gradients = [_added(a, b) for a, b in zip(gradients, found, strict=True)]
                # Frees the graph before the generator builds the next part's.
                del loss, found
            if total is None:
                raise TypeError("a step of training needs a loss")
            for b, last in enumerate(total.tolist()):
                history[b].append(last)
                if b not in stopped and diverged(history[b]):
                    warn_diverged(step, bool(sound), "its change", names[b] if names else "")
                    stopped.add(b)
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                now = [parameter.detach().clone() for parameter in parameters]
                _put_back(now, sound, stopped)
                sound = now
            for parameter, gradient in zip(
                parameters, clip_gradients(gradients, max_grad_norm), strict=True
            ):
                parameter.grad = gradient
            optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    # The stopped problems went on in the batch, since a row cannot be left out; undo that.
    _put_back(parameters, sound, stopped)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _put_back(parameters: Sequence[Tensor], sound: Sequence[Tensor], rows: Iterable[int]) -> None:
    for row in rows:
        for parameter, before in zip(parameters, sound, strict=True):
            parameter[row] = before[row]


def warn_diverged(step: int, sound: bool, what: str, name: str = "", stacklevel: int = 3) -> None:
    """Warn that the loss diverges, and say which state counts.

    Args:
        step: in which it diverged, from 0.
        sound: whether there is a state to go back to.
        what: what is made from that state.
        name: of the problem.
        stacklevel: of the warning.

    Raises:
        ExpungeError: there is no such state.
    """
    who = f" of {name!r}" if name else ""
    says = f"training{who} broke off at step {step + 1}: the loss runs away"
    if not sound:
        raise ExpungeError(f"{says}; lower the rate")
    kept = (step - 1) // KEEP_EVERY * KEEP_EVERY
    says = f"{says}; {what} is that of step {kept}; lower the rate"
    warnings.warn(says, ExpungeWarning, stacklevel=stacklevel)


def diverged(losses: Sequence[float], window: int = 10) -> bool:
    """Tell whether training diverges: a loss is not finite, or the last ones are far above the first.

    Far is ten times for the mean of the last `window`, and a thousand times for the last one alone.

    >>> diverged([1.0] * 20), diverged([1.0, float("nan")]), diverged([1.0] * 10 + [20.0] * 10)
    (False, True, True)

    Args:
        losses: the losses so far.
        window: how many of the first and of the last are averaged.
    """
    first, last = losses[:window], losses[-window:]
    if not math.isfinite(losses[-1]) or losses[-1] > 1000 * max(first):
        return True
    return len(losses) >= 2 * window and sum(last) > 10 * sum(first)


def clip_gradients(gradients: Sequence[Tensor | None], max_grad_norm: float) -> list[Tensor | None]:
    """Scale gradients (n, …) down so that the norm of each row, over all tensors, is within a bound.

    Args:
        gradients: of each tensor; None where the loss does not depend on it.
        max_grad_norm: the bound.
    """
    squares = [g.square().flatten(1).sum(1) for g in gradients if g is not None]
    # 1e-6 as in PyTorch's own clipping: a zero gradient must not divide by zero.
    factor = (max_grad_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
    return [
        None if g is None else g * factor.reshape(-1, *(1,) * (g.ndim - 1)).to(g.dtype)
        for g in gradients
    ]


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Switch off gradients of parameters for the length of a block: activations need less memory."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
