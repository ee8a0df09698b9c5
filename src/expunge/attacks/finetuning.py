"""The erased model trained further: on other things, as its users do, or on the concept itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from expunge.attack import Attack
from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.parameters import select_parameters
from expunge.erasing.reference_images import draw_each
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.in_place import InPlace
from expunge.ops.training_target import compute_training_target
from expunge.runtime.context import RunContext

PROMPT = "a picture of {}"
"""What the images to train on are drawn and captioned with."""


@dataclass(frozen=True)
class Finetuning(Attack):
    """Train the cross-attentions of the erased model further, with the loss that it was made with.

        min E ‖prediction(z_t, t, c) − target(x, ε)‖²,     z_t = √ᾱ_t x + √(1 − ᾱ_t) ε

    x are images that the original draws, c their captions. `others` trains on words that are not
    erased, as somebody does who knows nothing of the erasure; `concept` on a few images of what is
    erased. With `edit` after, the original is trained and the edit applied to the result: then the
    question is whether an edit fits a fine-tune of its base.

    Gates and other hooks stay in place while the weights under them are trained. An edit that holds
    whole weights (Dense) replaces what was trained in them before it.

    Cost: one image drawn for each caption, and a forward and backward pass of `batch_size` rows a step.

    Source: ours; that benign training undoes erasures is Suriyakumar et al., 2024, arXiv 2409.17358
    (and others after it).
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"max_train_steps": [50, 200, 500]},
        "concept": {"max_train_steps": [10, 50, 200], "on": "concept", "num_images": 8},
        "before": {"max_train_steps": [50, 200, 500], "edit": "after"},
    }

    needs: ClassVar[tuple[str, ...]] = ("cross-attention",)

    on: Literal["others", "concept"] = "others"
    """Train on images of other words, or of the erased concepts."""
    edit: Literal["before", "after"] = "before"
    """Whether the edit is applied before the training, or after it to a trained original."""
    max_train_steps: int = bounded(200, at_least=0)
    """Training steps; 0 changes nothing."""
    num_images: int = bounded(64, at_least=1)
    """Images to train on; of the erased concepts, so many of each."""
    batch_size: int = bounded(8, at_least=1)
    """Rows a step."""
    learning_rate: float = bounded(1e-4, above=0)
    """AdamW's learning rate."""

    @property
    def changes_nothing(self) -> bool:
        return not self.max_train_steps

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        if self.changes_nothing:
            with model.using(edit):
                yield model
            return
        captions, latents = self.draw_training_images(model, edit, run)
        with contextlib.ExitStack() as stack:
            if self.edit == "before":
                # Ahead of `InPlace`: what is trained are then the weights that the edit left.
                stack.enter_context(model.using(edit))
            trained = stack.enter_context(InPlace(select_parameters(model, "cross-attention")))
            self.train(model, trained, captions, latents, run)
            if self.edit == "after":
                stack.enter_context(model.using(edit))
            yield model

    def draw_training_images(
        self, model: Model, edit: Edit, run: RunContext
    ) -> tuple[list[str], torch.Tensor]:
        """Draw what is trained on: captions, and clean latents (n, c, h, w), one for each.

        Args:
            model: the original; it draws without the edit.
            edit: says what is erased.
            run: its seed chooses words and noise.

        Raises:
            ExpungeError: the tokenizer knows no words beside the erased ones.
        """
        erased = edit.record.problem.erase
        if self.on == "concept":
            names = [concept.name for concept in erased for _ in range(self.num_images)]
        else:
            names = sample_words(model, erased, self.num_images, run.generator("finetuning words"))
            if not names:
                raise ExpungeError("the tokenizer knows no word to train on beside the erased ones")
        captions = [PROMPT.format(name) for name in names]
        with torch.no_grad():
            return captions, draw_each(model, f"finetuning on {self.on}", captions, run)

    def train(
        self,
        model: Model,
        trained: InPlace,
        captions: list[str],
        latents: torch.Tensor,
        run: RunContext,
    ) -> None:
        """Train the parameters in place.

        Args:
            model: as it stands, with the edit or without.
            trained: its parameters.
            captions: n.
            latents: (n, c, h, w).
            run: its seed draws batches, times and noise.
        """
        generator, levels = run.generator("finetuning"), model.log_snr()
        with torch.no_grad():
            # The text encoder is not trained, so that captions are encoded once.
            text = model.encode(captions)
        # Without `foreach`: its fused sums would hold copies of all parameters at once.
        optimiser = torch.optim.AdamW(trained.values, lr=self.learning_rate, foreach=False)
        with frozen(model.parameters()):
            # Frozen but for what is trained: activations of the rest need not be kept.
            for parameter in trained.parameters.values():
                parameter.requires_grad_()
            for step in range(self.max_train_steps):
                run.progress("finetuning", step, self.max_train_steps)
                rows = torch.randint(len(captions), (self.batch_size,), generator=generator)
                t = torch.randint(len(levels), (self.batch_size,), generator=generator)
                noise = torch.randn((self.batch_size, *latents.shape[1:]), generator=generator)
                x, noise = latents[rows.to(latents.device)], noise.to(latents)
                # Bounded, for a timestep of noise alone has an infinite log SNR.
                target = compute_training_target(
                    model.prediction_type, x, noise, levels[t].clamp(-20, 20)
                )
                with torch.enable_grad():
                    z = model.add_noise(x, noise, t.to(x.device))
                    predicted = model.predict(z, t.to(x.device), text[rows.tolist()])
                    loss = (predicted.float() - target.float()).square().mean()
                    gradients = trained.gradients(loss)
                for value, gradient in zip(trained.values, gradients, strict=True):
                    value.grad = gradient
                optimiser.step()
                # The optimiser works on float32 copies; the model reads its own half-precision weights.
                trained.write()
        run.progress("finetuning", self.max_train_steps, self.max_train_steps)
