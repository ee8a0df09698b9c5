"""Images gone wrong: slightly, as a model draws them, and badly, so that nothing can be recognised.

Every function takes and returns images (n, 3, 64, 64) in [0, 1] unless it says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64


def rough(n: int, channels: int, cells: int) -> Tensor:
    """Smooth random fields (n, channels, 64, 64), normal before a `cells` x `cells` grid of them is enlarged."""
    return F.interpolate(torch.randn(n, channels, cells, cells), size=(SIDE, SIDE), mode="bicubic")


def bend(images: Tensor, by: Tensor, cells: int = 6) -> Tensor:
    """Each image shifted, turned, scaled and rippled by about `by` (n,) of its width."""
    n = len(images)
    by = by.view(n, 1, 1)
    theta = torch.eye(2, 3) + torch.randn(n, 2, 3) * by.clamp(max=0.05)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grid = grid + (rough(n, 2, cells) * by.unsqueeze(-1)).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def weather(images: Tensor) -> Tensor:
    """Light wear that changes nothing one would name: ripples, blur, noise, contrast, brightness, tint."""
    n = len(images)

    def some(share: float, top: float) -> Tensor:
        return (torch.rand(n) < share) * torch.rand(n) * top

    x = bend(images, some(0.5, 0.02))
    blur = some(0.4, 0.8).view(n, 1, 1, 1)
    x = x + blur * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
    x = x + some(0.4, 0.08).view(n, 1, 1, 1) * torch.randn_like(x)
    contrast = 1 + (torch.rand(n, 1, 1, 1) - 0.5) * 0.2
    return ((x - 0.5) * contrast + 0.5 + torch.randn(n, 3, 1, 1) * 0.02).clamp(0, 1)


# -- broken beyond recognition ------------------------------------------------------------------------------------


def noise(images: Tensor) -> Tensor:
    """Coloured noise of a random coarseness, around a random colour."""
    n = len(images)
    cells = int(torch.tensor([8, 16, 32, 64])[torch.randint(4, ())])
    strength = 0.1 + 0.3 * torch.rand(n, 1, 1, 1)
    return (torch.rand(n, 3, 1, 1) + rough(n, 3, cells) * strength).clamp(0, 1)


def blobs(images: Tensor) -> Tensor:
    """Flat patches of three random colours."""
    n = len(images)
    first, second, third = torch.rand(3, n, 3, 1, 1)
    field = rough(n, 2, 5)
    x = torch.where(field[:, :1] > 0.3, first, second)
    return torch.where(field[:, 1:] > 0.6, third, x)


def blend(images: Tensor) -> Tensor:
    """Four images laid over one another, none with more than 0.6 of the weight."""
    weights = torch.rand(len(images), 4) + 0.3
    weights = weights / weights.sum(1, keepdim=True)
    layers = [w.view(-1, 1, 1, 1) * images.roll(k, 0) for k, w in enumerate(weights.T)]
    return torch.stack(layers).sum(0)


def shuffle(images: Tensor, patch: int = 8) -> Tensor:
    """The image cut into squares and put together in a random order."""
    squares = F.unfold(images, patch, stride=patch)  # (n, 3 * patch * patch, squares)
    order = torch.rand(len(images), 1, squares.shape[-1]).argsort(-1)
    return F.fold(squares.gather(2, order.expand_as(squares)), SIDE, patch, stride=patch)


def smear(images: Tensor) -> Tensor:
    """A heavy blur: five by five cells, enlarged."""
    return F.interpolate(F.adaptive_avg_pool2d(images, 5), size=(SIDE, SIDE), mode="bilinear")


def melt(images: Tensor) -> Tensor:
    """A heavy ripple."""
    return bend(images, 0.3 + 0.3 * torch.rand(len(images)))


KINDS = {f.__name__: f for f in (noise, blobs, blend, shuffle, smear, melt)}


def muddle(latents: Tensor) -> Tensor:
    """Latents (n, c, h, w) of unit variance as a denoiser has them before it knows what it draws.

    Four latents mixed, weakened and noised; at the far end noise alone.
    """
    n = len(latents)
    keep, grain = torch.rand(2, n, 1, 1, 1)
    keep = keep * 0.8
    return keep * blend(latents) + grain * (1 - keep.square()).sqrt() * torch.randn_like(latents)
