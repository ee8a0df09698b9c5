"""Pictures as files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from expunge.errors import ExpungeError
from expunge.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def image(picture: Tensor, width: int | None = None) -> Image.Image:
    """A picture (3, height, width) in [0, 1] as an image, smoothly enlarged to `width` pixels."""
    array = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    result = Image.fromarray(array)
    if width is None or width <= result.width:
        return result
    return result.resize((width, result.height * width // result.width), Image.Resampling.LANCZOS)


ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""The picture files that are found in a folder."""


def grid(pictures: Tensor, columns: int | None = None, width: int = 192, gap: int = 4) -> Image.Image:
    """Pictures (n, 3, height, width) side by side, each at least `width` pixels wide, on white."""
    images = [image(picture, width) for picture in pictures]
    if columns is None:
        columns = math.ceil(math.sqrt(2 * len(images))) if len(images) > 3 else len(images)
    rows = math.ceil(len(images) / columns)
    w, h = images[0].width + gap, images[0].height + gap
    sheet = Image.new("RGB", (columns * w + gap, rows * h + gap), "white")
    for i, one in enumerate(images):
        sheet.paste(one, (gap + i % columns * w, gap + i // columns * h))
    return sheet


def read(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture file as a tensor (3, height, width), float32 in [0, 1]; resized if `size` says so.

    Raises:
        ExpungeError: the file is missing or is no picture.
    """
    import numpy as np
    import torch

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        what = (
            error.strerror if isinstance(error, OSError) and error.strerror else "it is no whole picture"
        )
        raise ExpungeError(f"cannot read {path}: {what}") from None
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def save(picture: Image.Image, path: str | Path) -> None:
    """Write an image; the ending of the name decides the format.

    Raises:
        ExpungeError: the ending is no picture format, or the file cannot be written.
    """
    check_ending(path)
    with replacing(path) as temporary:
        picture.save(temporary)


def check_ending(path: str | Path) -> None:
    """Check that a file name ends in a picture format.

    Raises:
        ExpungeError: it does not.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ExpungeError(f"{path} should end in .png, .jpg or .webp, or in / for a folder")
