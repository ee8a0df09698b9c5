"""Guidance away from concepts while drawing: the change of safe latent diffusion."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.changes.contract import PredictionChange
from expunge.changes.presence import measure_presence
from expunge.changes.strength import scale_difference

LATENTS, TIME, TEXT = ("sample", "hidden_states"), "timestep", "encoder_hidden_states"
"""What denoisers call the latents, the timestep and the text that they are given."""

POOLED = ("pooled_projections", "text_embeds")
"""What they call the vector of the whole prompt; the second lies in SDXL's `added_cond_kwargs`."""

SAME = 1e-2
"""How far a row may be from the empty prompt's embedding, as a share, to be one: half precision."""


@dataclass(frozen=True, eq=False)
class Guided(PredictionChange):
    """ε(c) − γ, where γ leads the prompt's prediction away from the unsafe text's.

    With ε(c), ε(∅) and ε(s) the predictions for the prompt, for none and for the unsafe text, entry by
    entry, and ν the momentum, 0 at the first step,

        γ = μ (ε(s) − ε(∅)) + momentum_scale · ν,      ν ← β ν + (1 − β) γ,
        μ = bound(|φ|) where ε(c) − ε(s) < threshold, else 0,      φ = scale (ε(c) − ε(s)),

    and bound is min(1, ·) or max(1, ·). At times above `until`, ν grows, and γ is not yet subtracted.
    Guidance then makes ε(∅) + g (ε(c) − γ − ε(∅)) of it, whatever its scale g.

    Rows whose text is the empty prompt's are ε(∅) and stay. Where they are the first half of the batch
    and the prompts the second, of the same latents, as in guidance, ε(∅) is taken from there; else it
    is predicted. With a `presence`, only prompts that are found to hold a concept are led away.

    ε is what the network predicts; a difference counts times `noise_scale` at its time, which makes it
    one of noise.
    """

    kind: ClassVar[str] = "guided"
    unfittable: ClassVar[str] = (
        "compares predictions of the denoiser with one another at every step, which no weight does: draw"
        " with expunge, or with diffusers and `edit.apply(pipe)`"
    )
    text: Tensor
    """The unsafe text's embedding, (1, tokens, in)."""
    empty: Tensor
    """The embedding of no prompt, (1, tokens, in)."""
    noise_scale: Tensor
    """(T,), dε/dprediction at each timestep."""
    scale: float = field(kw_only=True)
    """How large a difference of noise brings the full guidance: 1/scale."""
    threshold: float = field(kw_only=True)
    """The difference up to which an entry counts as unsafe."""
    momentum_scale: float = field(kw_only=True)
    momentum_beta: float = field(kw_only=True)
    until: float = field(kw_only=True)
    """The time from which on γ is subtracted."""
    at_most: bool = field(default=True, kw_only=True)
    """Whether bound is min(1, ·), or else max(1, ·)."""
    pooled: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """The vectors of the unsafe text and of no prompt, (2, width); (2, 0) where the model has none."""
    presence: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(names, tokens, in); none of them leads every prompt away."""
    centre: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(names,), as in `changes.presence`."""
    width: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(names,)"""

    def __post_init__(self) -> None:
        absent = {
            "pooled": torch.zeros(2, 0),
            "presence": torch.zeros(0, *self.text.shape[1:]),
            "centre": torch.zeros(0),
            "width": torch.zeros(0),
        }
        for name, value in absent.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def fits(self, shape: torch.Size) -> bool:
        """Whether the layers read embeddings as wide as the text's, and the tensors agree."""
        texts = (self.text.shape, self.empty.shape)
        alike = texts[0] == texts[1] and self.presence.shape[1:] == texts[0][1:]
        n = len(self.presence)
        return (
            len(shape) == 2
            and self.text.ndim == 3
            and self.text.shape[-1] == shape[1]
            and alike
            and self.centre.shape == self.width.shape == (n,)
            and self.pooled.ndim == 2
        )

    def steer(
        self, prompt: Tensor, unsafe: Tensor, none: Tensor, momentum: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute γ, 0 where it is too early, and the next momentum: as the predictions each.

        Args:
            prompt: ε(c), (n, c, h, w).
            unsafe: ε(s).
            none: ε(∅).
            momentum: ν.
            t: the time of each row, (n,).
        """
        # Schedulers of flows have fractions of timesteps, and their first may be T itself.
        index = t.round().long().clamp(0, len(self.noise_scale) - 1)
        in_noise = self.noise_scale.to(prompt)[index.to(prompt.device)].reshape(-1, 1, 1, 1)
        difference = in_noise * (prompt - unsafe)
        size = (self.scale * difference).abs()
        bounded = size.clamp(max=1) if self.at_most else size.clamp(min=1)
        mu = torch.where(difference < self.threshold, bounded, 0)
        gamma = mu * (unsafe - none) + self.momentum_scale * momentum
        next_momentum = self.momentum_beta * momentum + (1 - self.momentum_beta) * gamma
        late = (t <= self.until).to(prompt).reshape(-1, 1, 1, 1)
        return late * gamma, next_momentum

    def is_prompt(self, text: Tensor) -> Tensor:
        """Tell which rows are not the empty prompt's, (n,), bool.

        Args:
            text: (n, tokens, in), as the denoiser is given it.
        """
        if text.shape[1] != self.empty.shape[1]:  # a prompt longer than usual is none that is empty
            return torch.ones(len(text), dtype=torch.bool, device=text.device)
        empty = self.empty.to(text.device)
        return (text.float() - empty).flatten(1).norm(dim=1) > SAME * empty.norm()

    def find_prompts(self, text: Tensor) -> Tensor:
        """Find the rows that are led away, (n,), bool: not empty, and, if asked, with a concept in them.

        Args:
            text: as in `is_prompt`.
        """
        found = self.is_prompt(text)
        if len(self.presence):
            given = text[:, : self.presence.shape[1]].float()
            rho = measure_presence(given, self.presence, self.centre, self.width)
            found = found & (rho >= 0.5).any(1)
        return found

    def make_hook(self, strength: float) -> Callable[..., Any]:
        """Return the forward hook of a denoiser that subtracts γ; it keeps the momentum of a run."""
        return _Steering(self, strength)


class _Steering:
    """The forward hook of a denoiser, with the momentum of the run it is in.

    A run ends where the time rises, or comes a second time at its first step, or where the prompts
    change: nothing tells a denoiser that another image has begun.
    """

    def __init__(self, change: Guided, strength: float) -> None:
        self.change, self.strength = change, strength
        self.momentum: Tensor | None = None
        self.first = self.last = 0.0
        self.prompts: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # By name, whichever way the pipeline gave its arguments.
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        latents_name = next(name for name in LATENTS if name in given)
        text = given[TEXT]
        prompts = self.change.find_prompts(text)
        if not bool(prompts.any()):
            return output
        predicted = output[0]
        n = len(predicted)
        rows = prompts.nonzero()[:, 0]
        unsafe = self._predict(module, given, rows, n, 0)
        half = n // 2
        # Guidance: the same latents twice, first with no prompt, then with the prompts.
        latents = given[latents_name]
        guided = (
            n % 2 == 0
            and not bool(self.change.is_prompt(text[:half]).any())
            and bool((rows >= half).all())
            and torch.equal(latents[:half], latents[half:])
        )
        none = predicted[rows - half] if guided else self._predict(module, given, rows, n, 1)
        t = torch.as_tensor(given[TIME], device=predicted.device).float().expand(n)[rows]
        before = predicted[rows]
        with torch.autocast(predicted.device.type, enabled=False):
            wide = torch.promote_types(before.dtype, torch.float32)
            momentum = self._resume(text[rows], before, float(t[0]))
            gamma, after = self.change.steer(
                before.to(wide), unsafe.to(wide), none.to(wide), momentum.to(wide), t
            )
            self.momentum = after.detach()
            led = scale_difference(before, (before.to(wide) - gamma).to(before.dtype), self.strength)
        # Not in place: the output may be part of a graph.
        changed = predicted.index_copy(0, rows, led)
        if isinstance(output, tuple):
            return (changed, *output[1:])
        return type(output)(changed)

    def _resume(self, text: Tensor, predicted: Tensor, t: float) -> Tensor:
        """Return the momentum of the run, and 0 where one begins.

        Args:
            text: of the rows that are led away.
            predicted: their predictions.
            t: the time.
        """
        begins = (
            self.momentum is None
            or self.prompts is None
            or t > self.last
            or t == self.last == self.first
            or self.prompts.shape != text.shape
            or not torch.equal(self.prompts, text)
        )
        if begins or self.momentum is None:
            self.first, self.prompts = t, text.detach()
            self.momentum = torch.zeros_like(predicted)
        self.last = t
        return self.momentum

    def _predict(self, module: nn.Module, given: Any, rows: Tensor, n: int, which: int) -> Tensor:
        """Predict for another text in the place of the rows' own.

        Args:
            module: the denoiser.
            given: its arguments, by name.
            rows: of the batch.
            n: the rows of the batch.
            which: 0 for the unsafe text, 1 for none.
        """
        text, k = given[TEXT], len(rows)
        other = (self.change.text, self.change.empty)[which].to(text)
        arguments = {name: _pick(value, rows, n) for name, value in given.items()}
        arguments[TEXT] = other.expand(k, -1, -1)
        if self.change.pooled.shape[1]:
            vector = self.change.pooled[which].to(text).expand(k, -1)
            if POOLED[0] in arguments:
                arguments[POOLED[0]] = vector
            elif POOLED[1] in (more := arguments.get("added_cond_kwargs") or {}):
                arguments["added_cond_kwargs"] = {**more, POOLED[1]: vector}
        # Not the module itself: its hooks, this one among them, are for the pipeline's own call.
        found: Tensor = module.forward(**arguments)[0]
        return found


def _pick(value: Any, rows: Tensor, n: int) -> Any:
    """Pick rows of every tensor in a value that has one row for each of the batch.

    Args:
        value: a tensor, something that holds tensors, or anything else, which stays.
        rows: the rows.
        n: the rows of the batch.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == n else value
    if isinstance(value, dict):
        return {name: _pick(one, rows, n) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pick(one, rows, n) for one in value)
    return value
