"""Pictures as files."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

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


MAX_PIXELS = 64_000_000
"""The largest image that is read: 8000 × 8000. A small file can claim more than memory holds."""


def read(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file as people see it: turned as its EXIF data say, transparent parts white.

    Args:
        path: the file; of an animation, the first frame is read.
        size: (height, width) to resize to; None keeps the file's own.

    Returns:
        (3, height, width), float32 in [0, 1]; 16-bit images keep their precision.

    Raises:
        ExpungeError: the file is missing, is no whole image, is larger than `MAX_PIXELS`, or its numbers
            have no known range.
    """
    import numpy as np
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(path) as opened:
                if math.prod(opened.size) > MAX_PIXELS:
                    raise _too_large(path, " × ".join(map(str, opened.size)) + " pixels")
                opened.load()
                picture = _as_seen(opened, path)
    except Image.DecompressionBombError:
        raise _too_large(path, "far too many pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        if isinstance(error, ExpungeError):
            raise
        what = (
            error.strerror if isinstance(error, OSError) and error.strerror else "it is no whole picture"
        )
        raise ExpungeError(f"cannot read {path}: {what}") from None
    if size is not None and picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    if picture.mode == "F":  # grey, in [0, 1]
        return torch.from_numpy(np.array(picture)).clamp(0, 1).expand(3, -1, -1).clone()
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _as_seen(opened: Image.Image, path: str | Path) -> Image.Image:
    """An opened image upright: in mode RGB, or where it is grey of 16 bits in F, from 0 to 1."""
    picture = ImageOps.exif_transpose(opened)
    mode = picture.mode
    if mode.startswith("I"):  # 16 bits a pixel, however Pillow keeps them; converting would clip at 255
        import numpy as np

        values = np.asarray(picture, dtype=np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ExpungeError(
                f"cannot read {path}: its values go beyond 16 bits; save it with 8 bits a channel"
            )
        return Image.fromarray((values / 65535).astype(np.float32))
    if mode == "F":
        raise ExpungeError(
            f"cannot read {path}: its values are fractions; save it with 8 bits a channel"
        )
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _too_large(path: str | Path, what: str) -> ExpungeError:
    return ExpungeError(
        f"cannot read {path}: {what}; images of up to {MAX_PIXELS // 10**6} million are read"
    )


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
    if Path(path).suffix.lower() not in ENDINGS:
        raise ExpungeError(f"{path} should end in .png, .jpg or .webp, or in / for a folder")
