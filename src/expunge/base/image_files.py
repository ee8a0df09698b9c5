"""Read and write images as files."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def to_pil(image: Tensor, width: int | None = None) -> Image.Image:
    """Return an image (3, height, width) in [0, 1] as a PIL image, enlarged to `width` pixels."""
    array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    result = Image.fromarray(array)
    if width is None or width <= result.width:
        return result
    return result.resize((width, result.height * width // result.width), Image.Resampling.LANCZOS)


ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""The endings of the image files that are read from a folder."""


def make_grid(images: Tensor, columns: int | None = None, width: int = 192, gap: int = 4) -> Image.Image:
    """Return a grid of images on white.

    Args:
        images: (n, 3, height, width), in [0, 1].
        columns: how many images stand side by side; by default about twice as many as rows.
        width: the least width of an image, in pixels; smaller ones are enlarged.
        gap: pixels between two images.
    """
    tiles = [to_pil(image, width) for image in images]
    if columns is None:
        columns = math.ceil(math.sqrt(2 * len(tiles))) if len(tiles) > 3 else len(tiles)
    rows = math.ceil(len(tiles) / columns)
    w, h = tiles[0].width + gap, tiles[0].height + gap
    sheet = Image.new("RGB", (columns * w + gap, rows * h + gap), "white")
    for i, one in enumerate(tiles):
        sheet.paste(one, (gap + i % columns * w, gap + i // columns * h))
    return sheet


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, background: str = "white"
) -> Tensor:
    """Read an image file as a tensor (3, height, width), float32 in [0, 1], as a viewer shows it.

    It is rotated as its EXIF data says, 16 bits a channel become 8, and transparent pixels show the
    background. Of an animation the first frame is read, with an ExpungeWarning.

    Args:
        path: the file.
        size: height and width to resize to, in pixels; None keeps those of the file.
        background: the colour behind transparent pixels, by its name.

    Raises:
        ExpungeError: the file is missing, is not an image, or has more pixels than can be read safely.
    """
    import numpy as np
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken files and then raises
            with Image.open(path) as opened:
                frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
                image = _flatten(_rotate(opened), background)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ExpungeError(f"cannot read {path}: it has more than {most} million pixels") from None
    except MemoryError:
        raise ExpungeError(f"cannot read {path}: it does not fit into the memory") from None
    except ExpungeError as error:
        raise ExpungeError(f"cannot read {path}: {error}") from None
    except Exception as error:  # Pillow raises many kinds of error for broken files
        known = isinstance(error, OSError) and error.strerror
        what = error.strerror if isinstance(error, OSError) and known else "it is not a whole image"
        raise ExpungeError(f"cannot read {path}: {what}") from None
    if frames > 1:
        warnings.warn(
            f"{path} is an animation: the first of its {frames} frames is read",
            ExpungeWarning,
            stacklevel=2,
        )
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _rotate(image: Image.Image) -> Image.Image:
    """Return the image rotated as its EXIF data says."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF data is broken, not the image
        return image


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Return an image of any mode as RGB, with the background behind transparent pixels."""
    import numpy as np

    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        array = np.asarray(image).astype(np.int64)
        if not 0 <= array.min() <= array.max() <= 65535:
            raise ExpungeError("its channels have more than 16 bits, of which none is white")
        alpha = (
            None if clear is None else Image.fromarray(np.uint8(255) * (array != clear).astype(np.uint8))
        )
        image = Image.fromarray(((array * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
        if alpha is None:
            return image
        image.putalpha(alpha)
    elif image.mode == "F":
        raise ExpungeError("its pixels are floating-point numbers, of which none is white")
    elif image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper()).convert("RGBA")
    elif image.mode in ("RGBA", "LA", "PA") or clear is not None:
        if isinstance(clear, tuple) and max(clear) > 255:  # given in 16 bits; the pixels have 8 by now
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = image.convert("RGBA")
    else:
        return image.convert("RGB")
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image).convert("RGB")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image; the ending of the name decides the format.

    Raises:
        ExpungeError: the ending is not an image format, or the file cannot be written.
    """
    check_ending(path)
    with replacing(path) as temporary:
        image.save(temporary)


def save_unique(image: Image.Image, folder: str | Path, name: str) -> Path:
    """Write an image as a PNG file, with a number added where another image has the name already.

    Args:
        image: the image.
        folder: the folder to write to.
        name: the file's name without its ending.

    Returns:
        The file; an earlier one if that holds the very same image.

    Raises:
        ExpungeError: the file cannot be written.
    """
    number = 1
    while (path := Path(folder) / f"{name}{f'-{number}' if number > 1 else ''}.png").exists():
        if _holds(path, image):
            return path
        number += 1
    save_image(image, path)
    return path


def _holds(path: Path, image: Image.Image) -> bool:
    """Whether a file holds exactly this image."""
    try:
        with Image.open(path) as there:
            return (
                there.mode == image.mode
                and there.size == image.size
                and (there.tobytes() == image.tobytes())
            )
    except Exception:  # not an image, or a broken one
        return False


def check_ending(path: str | Path) -> None:
    """Check that a file name ends in an image format.

    Raises:
        ExpungeError: it does not.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ExpungeError(f"{path} should end in .png, .jpg or .webp, or in / for a folder")
