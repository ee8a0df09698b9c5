"""Noise as the families mix it in: keeping the variance, or on the straight line of a flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Diffusion:
    """Noise that keeps the variance: √ᾱ x + √(1 − ᾱ) ε, with ᾱ from the scheduler."""

    pipe: Any

    def log_snr(self) -> Tensor:
        signal = self._signal()
        return torch.log(signal) - torch.log1p(-signal)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        # The roots in float64: 1 − ᾱ begins below 1e-3, where half precision has few digits left.
        signal = self._signal()[t.cpu()].reshape(-1, 1, 1, 1).to(latents.device)
        return signal.sqrt().to(latents.dtype) * latents + (1 - signal).sqrt().to(latents.dtype) * noise

    def _signal(self) -> Tensor:
        """ᾱ, the variance of the signal at each time; (T,), float64."""
        # With `rescale_betas_zero_snr` the last one is 0 or nearly so, and its log SNR −∞.
        return self.pipe.scheduler.alphas_cumprod.detach().cpu().double()


class Flow:
    """Noise of flow matching: (1 − σ) x + σ ε with σ = t / 1000; the prediction is ε − x."""

    pipe: Any

    def log_snr(self) -> Tensor:
        # Time 0 has no noise at all; it counts as a half.
        sigma = torch.arange(self._times + 1, dtype=torch.float64).clamp_min(0.5) / self._times
        # log SNR = 2 log((1 − σ) / σ): amplitudes, so twice.
        return 2 * (torch.log1p(-sigma) - torch.log(sigma))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = (t.double() / self._times).reshape(-1, 1, 1, 1).to(latents.device, latents.dtype)
        return (1 - sigma) * latents + sigma * noise

    @property
    def _times(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps
