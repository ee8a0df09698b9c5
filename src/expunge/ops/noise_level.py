"""Translate a noise level to latents of another size."""

from __future__ import annotations

import math


def shift_log_snr(log_snr: float, meant_for: int, side: int) -> float:
    """Shift a log-SNR that was chosen on latents of one size, for those of another.

    A coarse image is a mean over pixels. With r times as many of them a side, the noise in that mean
    falls by r, the image stays: what was hidden at a log-SNR of λ is hidden at λ − 2 ln r. So where an
    image's layout ends and its detail begins, a window for training or a step to turn at, moves to
    more noise on larger latents.

    >>> shift_log_snr(1.12, meant_for=64, side=64)
    1.12
    >>> round(shift_log_snr(1.12, meant_for=64, side=128), 3)  # SDXL
    -0.266

    Args:
        log_snr: ln(α² / σ²).
        meant_for: height and width of the latents it was chosen on; 0 for any, where it stays.
        side: height and width of the latents it is wanted for.

    Source: Hoogeboom et al., simple diffusion, ICML 2023, arXiv 2301.11093, section 3.1; the sizes
        are of latents here, not of images.
    """
    return log_snr - 2 * math.log(side / meant_for) if meant_for else log_snr
