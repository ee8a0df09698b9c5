"""Somebody who trains the fortified model further, played while it is fortified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.training_target import compute_training_target
from expunge.runtime.context import Tensors
from expunge.text import Text


class Trainer:
    """A user who trains the weights on images, step by step beside the fortifying.

        θ' = θ − lr Σ sign ∇ E ‖prediction(z_t, t, c) − target(x, ε)‖²

    θ' is where the loss of fortifying is then taken, and its gradient there is applied to θ: to first
    order, θ moves to where the concept stays gone also after such steps. After `steps` of them the user
    begins anew at θ, in turn on images of other words, as somebody does who knows nothing of the
    erasure, and on images of the concepts.

    A sign is what Adam's first steps come to, so that lr compares to that of AdamW.

    Source: ours; first-order meta-learning is Finn et al., ICML 2017, arXiv 1703.03400, and its use
    against fine-tuning TAR (Tamirisa et al., ICLR 2025, arXiv 2408.00761).
    """

    def __init__(
        self,
        model: Model,
        trained: InPlace,
        sets: Sequence[tuple[Text, Tensor]],
        steps: int,
        learning_rate: float,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        """Begin at the weights as they are.

        Args:
            model: as it stands.
            trained: the weights.
            sets: what is trained on in turn: the text (n,) of n images, and their latents.
            steps: after how many the user begins anew; 0 for nobody.
            learning_rate: how far every weight moves in a step.
            batch_size: rows a step.
            generator: chooses images and noise.
        """
        self._model, self._trained, self._sets, self._steps = model, trained, sets, steps
        self._learning_rate, self._batch_size = learning_rate, batch_size
        self.generator: torch.Generator = generator
        self.done: Tensor = torch.zeros(1, dtype=torch.int64)
        """Steps that have been taken in all."""
        self.moved: list[Tensor] = [torch.zeros_like(value) for value in trained.values] if steps else []
        """How far the user has moved each weight."""

    def write(self) -> None:
        """Write the weights that the user has come to into the network."""
        self._trained.write(self.moved or None)

    def step(self) -> None:
        """Take a step from where the user is; then the network has the weights without the user's."""
        if not self._steps:
            return
        turn = int(self.done) // self._steps
        text, latents = self._sets[turn % len(self._sets)]
        n, levels = self._batch_size, self._model.log_snr()
        rows = torch.randint(len(latents), (n,), generator=self.generator)
        t = torch.randint(len(levels), (n,), generator=self.generator)
        x = latents[rows.to(latents.device)]
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        # Bounded, for a timestep of noise alone has an infinite log SNR.
        target = compute_training_target(self._model.prediction_type, x, noise, levels[t].clamp(-20, 20))
        self.write()
        at = t.to(x.device)
        predicted = self._model.predict(self._model.add_noise(x, noise, at), at, text[rows.tolist()])
        loss = (predicted.float() - target.float()).square().mean()
        for moved, gradient in zip(self.moved, self._trained.gradients(loss), strict=True):
            moved -= self._learning_rate * gradient.sign()
        self.done += 1
        if int(self.done) % self._steps == 0:
            for moved in self.moved:
                moved.zero_()
        self._trained.write()

    def state(self) -> Tensors:
        """Return what `resume` takes up; the generator is the caller's."""
        return {"user": self.done, **{f"user.{i}": moved for i, moved in enumerate(self.moved)}}

    def resume(self, state: Tensors) -> None:
        """Take up what `state` returned; the mapping may hold other tensors, too."""
        if "user" not in state:  # saved by an earlier version, which had none
            return
        self.done.copy_(state["user"])
        for i, moved in enumerate(self.moved):
            moved.copy_(state[f"user.{i}"])
