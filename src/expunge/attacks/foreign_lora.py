"""A LoRA that has nothing to do with the concept, laid on the erased model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from expunge.attack import Attack
from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.changes import Changes, LowRank, check_fit
from expunge.checkpoints.lora import read_lora, read_lora_info
from expunge.edit import Edit
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.image_training import train_on_images
from expunge.erasing.parameters import select_parameters
from expunge.erasing.reference_images import draw_each
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.runtime.context import RunContext

PROMPT = "a picture of {}"
"""What the images are drawn and captioned with."""


@dataclass(frozen=True)
class ForeignLoRA(Attack):
    """Lay an unrelated LoRA on the erased model, as its users do with LoRAs of the original.

    The LoRA is a file's, or one that is trained here on the original: images of one word under the
    caption of another, as when somebody teaches a model their own thing. Neither word is erased. It is
    applied after the edit, on the weights that the edit has left.

    Cost: for one that is trained here, `num_images` drawings and `max_train_steps` passes forward and
    back of 4 rows; then no more than drawing.

    Source: ours; that LoRAs and fine-tunes laid on erased models undo erasures is reported by
    Suriyakumar et al., 2024, arXiv 2409.17358, among others.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"strength": [0.5, 1.0]}}

    needs: ClassVar[tuple[str, ...]] = ("cross-attention",)

    strength: float = bounded(1.0, above=0)
    """The LoRA's strength."""
    file: str = ""
    """A LoRA file for the same base; by default one is trained."""
    rank: int = bounded(8, at_least=1)
    """The rank of the one that is trained."""
    max_train_steps: int = bounded(100, at_least=1)
    """Its training steps."""
    num_images: int = bounded(8, at_least=1)
    """Images that it is trained on."""
    learning_rate: float = bounded(1e-3, above=0)
    """AdamW's learning rate."""

    def check_inputs(self, model: Model) -> None:
        if self.file:
            self.read_file(model)

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        lora = self.read_file(model) if self.file else self.train_lora(model, edit, run)
        # Read or trained before the edit lies on the model: it is the original's LoRA.
        with model.using(edit), model.using(lora, strength=self.strength):
            yield model

    def read_file(self, model: Model) -> Changes:
        """Read the LoRA's file as changes.

        Raises:
            ExpungeError: it is no LoRA, or one of another base.
        """
        try:
            found: Changes = read_lora(self.file, type(model.pipe), dict(model.network.config))
            check_fit(model.pipe, found)
        except ExpungeError as error:
            base = read_lora_info(self.file).base
            made_for = f" (it says that it is for {base})" if base else ""
            raise ExpungeError(
                f"the LoRA {self.file} does not fit this model, {type(model).__name__}{made_for}:"
                f" {error}"
            ) from None
        return found

    def train_lora(self, model: Model, edit: Edit, run: RunContext) -> tuple[LowRank, ...]:
        """Train a LoRA on the original: images of one word, captioned with another.

        Args:
            model: the original.
            edit: says what is erased.
            run: its seed chooses the words.

        Raises:
            ExpungeError: the tokenizer knows no two words beside the erased ones.
        """
        words = sample_words(model, edit.record.problem.erase, 2, run.generator("foreign LoRA"))
        if len(words) < 2:
            raise ExpungeError("the tokenizer knows no two words to train on beside the erased ones")
        shown, said = ([PROMPT.format(word)] * self.num_images for word in words)
        with torch.no_grad():
            latents = draw_each(model, "a foreign LoRA", shown, run)
        chosen = select_parameters(model, "cross-attention")
        with InPlace({name: p for name, p in chosen.items() if p.ndim == 2}) as trained:
            return train_on_images(
                model,
                trained,
                said,
                latents,
                run,
                max_train_steps=self.max_train_steps,
                batch_size=4,
                learning_rate=self.learning_rate,
                rank=self.rank,
                label="training a foreign LoRA",
            )
