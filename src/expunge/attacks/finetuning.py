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
from expunge.erasing.image_training import train_on_images
from expunge.erasing.parameters import select_parameters
from expunge.erasing.reference_images import draw_each
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.runtime.context import RunContext

PROMPT = "a picture of {}"
"""What the images to train on are drawn and captioned with."""


@dataclass(frozen=True)
class Finetuning(Attack):
    """Train the cross-attentions of the erased model further, or a LoRA on them.

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
        "lora": {"max_train_steps": [50, 200, 500], "rank": 8, "learning_rate": 1e-3},
        "concept": {"max_train_steps": [10, 50, 200], "on": "concept", "num_images": 8},
        "images": {"num_images": [1, 4, 16], "on": "concept", "max_train_steps": 100},
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
    """AdamW's learning rate. A LoRA takes about ten times that of whole weights."""
    rank: int = bounded(0, at_least=0)
    """Train a LoRA of this rank on the cross-attentions; 0 trains their whole weights."""

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
            chosen = select_parameters(model, "cross-attention")
            if self.rank:
                chosen = {name: p for name, p in chosen.items() if p.ndim == 2}
            trained = stack.enter_context(InPlace(chosen))
            train_on_images(
                model,
                trained,
                captions,
                latents,
                run,
                max_train_steps=self.max_train_steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                rank=self.rank,
            )
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
