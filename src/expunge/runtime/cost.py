"""What a method costs, counted in calls of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a method costs, counted in calls of the model."""

    prompts: int = 0
    """Prompts that the text encoders read."""
    predictions: int = 0
    """Forward passes of the denoiser, of one image each."""
    gradients: int = 0
    """Forward passes with a backward pass."""
    captions: str = ""
    """The captions of a prior, as `caption_gram.read_captions_for` takes them; "" for none."""
    products: int = 0
    """The cost of its equations, in float64 products of two matrices as wide as the text embeddings."""

    @property
    def text_only(self) -> bool:
        """Whether the text encoders are enough, so that nothing else need be loaded."""
        return not (self.predictions or self.gradients)
