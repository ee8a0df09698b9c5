"""An image of the concept taken back to the noise that it would be drawn from, and drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.attack import Access
from expunge.attacks._from_image import FromImage
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.image_inputs import draw_with_images
from expunge.model import Model
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class DDIMInversion(FromImage):
    """Draw from the latent that an image of the concept inverts to, with the same prompt.

        x̂ = the clean image that the prediction at z_t stands for,    ε̂ its noise
        z_s = a_s x̂ + b_s ε̂    for the next noisier s, up to noise

    with (a, b) = (√ᾱ, √(1 − ᾱ)), or (1 − σ, σ) in a flow. The image is what the original draws for the
    same prompt and seed, or one of a folder's, in turn; it is inverted through the model under attack,
    with the prompt and without guidance, and drawn with the suite's guidance.

    Guidance is the guard against a trivial path: without it, any model draws back any image from its own
    inversion, whatever it knows of it. And the prompt is the suite's: no text is searched.

    Cost: `steps` passes of the denoiser and two drawings an image.

    Source: DDIM (Song et al., ICLR 2021, arXiv 2010.02502), eq. 13 backwards; the latents of an erased
    concept as a way around erasure: Rusanovsky et al., 2024, arXiv 2411.19211.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {"steps": [12, 50]}}

    access: ClassVar[Access] = "weights"

    steps: int = bounded(50, at_least=0)
    """Steps of the inversion; 0 changes nothing."""
    images: str = ""
    """A folder of images of the concept, of the size that the model draws; by default the original
    draws them."""

    @property
    def changes_nothing(self) -> bool:
        return not self.steps

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        def begin(clean: Tensor, noise: Tensor, scheduler: Any, text: Text) -> tuple[Tensor, Tensor]:
            if not self.steps:
                return noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
            # Inverted latents keep the variance; samplers such as Euler's begin from scaled ones.
            latents = invert(model, clean, text, self.steps)
            return latents * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps

        yield draw_with_images(model, edit, begin, self.read_images(model))


def invert(model: Model, clean: Tensor, text: Text, steps: int) -> Tensor:
    """Take clean latents back to noise, (n, c, h, w), by a deterministic sampler run backwards.

    Args:
        model: as it stands, with the edit applied.
        clean: (n, c, h, w).
        text: n rows.
        steps: from the clean image to noise.
    """
    levels = model.log_snr()
    times = torch.linspace(0, len(levels) - 1, steps + 1).round().long()
    z = clean
    for here, there in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        t = torch.full((len(z),), here, device=z.device)
        a, b = read_scales(model, levels[here])
        x, noise = split_prediction(model.prediction_type, z, model.predict(z, t, text), a, b)
        a, b = read_scales(model, levels[there])
        z = a * x + b * noise
    return z


def read_scales(model: Model, log_snr: Tensor) -> tuple[float, float]:
    """Return what multiplies clean latents and noise at a log-SNR of log(a² / b²)."""
    if model.prediction_type == "flow_prediction":
        sigma = float(torch.sigmoid(-log_snr / 2))  # (1 − σ) / σ is the root of the ratio
        return 1 - sigma, sigma
    signal = float(log_snr.sigmoid())
    return signal**0.5, (1 - signal) ** 0.5


def split_prediction(
    kind: str, z: Tensor, predicted: Tensor, a: float, b: float
) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise that a prediction stands for, of z = a x + b ε.

    Args:
        kind: the scheduler's `prediction_type`; "flow_prediction" for flows.
        z: (n, c, h, w).
        predicted: like z: ε; a ε − b x; x; or ε − x.
        a: what multiplies x.
        b: what multiplies ε.
    """
    small = 1e-6  # a or b is 0 at one end, where what it multiplies cannot be told
    if kind == "epsilon":
        return (z - b * predicted) / max(a, small), predicted
    if kind == "v_prediction":
        return a * z - b * predicted, b * z + a * predicted
    if kind == "sample":
        return predicted, (z - a * predicted) / max(b, small)
    return z - b * predicted, z + a * predicted
