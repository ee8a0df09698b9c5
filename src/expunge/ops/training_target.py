"""What a denoiser is trained to predict, from clean latents and noise."""

from __future__ import annotations

from torch import Tensor


def compute_training_target(kind: str, latents: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """Return the target of a denoiser's prediction.

        epsilon ε      v_prediction √ᾱ ε − √(1 − ᾱ) x      sample x      flow_prediction ε − x

    Args:
        kind: the scheduler's `prediction_type`; "flow_prediction" for flows, which have none.
        latents: x, (n, c, h, w).
        noise: ε, (n, c, h, w).
        log_snr: of each row's timestep, (n,).

    Raises:
        KeyError: no such kind.
    """
    signal = log_snr.to(latents).sigmoid()[:, None, None, None]  # ᾱ
    return {
        "epsilon": lambda: noise,
        "v_prediction": lambda: signal.sqrt() * noise - (1 - signal).sqrt() * latents,
        "sample": lambda: latents,
        "flow_prediction": lambda: noise - latents,
    }[kind]()
