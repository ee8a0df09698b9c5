"""A noise level on latents of another size, against images themselves."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from expunge.ops.noise_level import shift_log_snr


@pytest.mark.parametrize("times", [2, 4])
def test_a_coarse_image_is_hidden_alike(times):
    """The mean over pixels of a noisy large image is as noisy as the small one was."""
    torch.manual_seed(0)
    level, side = 0.7, 16
    small = torch.randn(200, 1, side, side)
    large = interpolate(small, scale_factor=times)
    shifted = torch.tensor(shift_log_snr(level, side, side * times))
    noisy = large + torch.randn_like(large) * (-shifted / 2).exp()
    left = avg_pool2d(noisy, times) - small
    assert float(-left.var().log()) == pytest.approx(level, abs=0.05)


def test_where_it_stays():
    assert shift_log_snr(1.12, 64, 64) == shift_log_snr(1.12, 0, 8) == 1.12
    assert shift_log_snr(shift_log_snr(-0.3, 64, 96), 96, 64) == pytest.approx(-0.3)
