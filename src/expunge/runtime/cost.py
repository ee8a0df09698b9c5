"""How much a method asks of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """How much a method asks of a model."""

    prompts: int = 0
    """Prompts to read."""
    predictions: int = 0
    """Predictions of the denoiser, for one image each."""
    gradients: int = 0
    """Predictions with gradients."""
    captions: str = ""
    """Where the captions of a prior come from, as `prior.captions_for` takes it; "" for none."""
    products: int = 0
    """What its equations cost, in products of two matrices as wide as the text embeddings, float64."""

    @property
    def text_only(self) -> bool:
        """Whether the text encoders are enough."""
        return not (self.predictions or self.gradients)
