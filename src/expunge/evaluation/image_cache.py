"""The image cache: every image is drawn once, and each metric looks at it once.

An image's address is the hash of everything it hangs on: the model's weights, configurations and
tokenizers, what was set on its parts, the edits, the prompt, the seed and the sampler. Beside it lie
the numbers that metrics took of it:

    pictures/ab/cdef….png             the image, 8 bits a channel, with the digest of its pixels
    pictures/ab/cdef….safetensors     one tensor a metric

Every file is written beside and moved into place, so that a run killed anywhere goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import check_writable, find_cache_folder, is_dir, is_file, replacing
from expunge.base.quiet import Progress, ignore_progress
from expunge.evaluation.image_source import BATCH, Request, Source

FOLDER = "pictures"
"""The folder of images; named as in earlier versions, so that what they have drawn is found."""


class Cache:
    """Images and their numbers on the disk.

    >>> cache = Cache()                                 # doctest: +SKIP
    >>> images = cache.draw(Source(model), requests)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: int | None = None,
        *,
        required: bool = True,
    ) -> None:
        """Open the cache; nothing is written yet.

        Args:
            folder: where it is; by default `EXPUNGE_CACHE`, or among the user's caches.
            limit: how many bytes it may hold, give or take a twentieth.
            required: whether the work needs it; otherwise what cannot be kept is drawn all the same.

        Raises:
            ExpungeError: it is required, and there is no folder for it, and none can be made.
        """
        self.folder: Path = Path(os.devnull) / FOLDER  # where nothing can be
        self.required = required
        self.trouble: str = ""
        """Why images cannot be kept; "" where they can."""
        try:
            self.folder = (find_cache_folder() if folder is None else Path(folder)) / FOLDER
            check_writable(self.folder / "ab" / "x.png")
        except ExpungeError as error:
            self.trouble = (
                f"the image cache cannot be kept ({error}): set EXPUNGE_CACHE to a folder that can be"
                " written"
            )
            if required and not is_dir(self.folder):
                raise ExpungeError(self.trouble) from None
        self.limit = limit
        self.drawn: int = 0
        """How many images had to be drawn so far."""
        self._fresh = 0  # bytes written since it was last pruned

    def path(self, address: str, ending: str = ".png") -> Path:
        """Return the file of an address."""
        return self.folder / address[:2] / f"{address[2:]}{ending}"

    def draw(
        self, source: Source, requests: Sequence[Request], progress: Progress = ignore_progress
    ) -> Tensor:
        """Return images (n, 3, height, width) in [0, 1], in steps of 1/255.

        They are read where they are there, and drawn where not. An image that contains nan or infinity
        comes back as nan.

        Args:
            source: what draws.
            requests: what to draw.
            progress: told how many of the missing ones are drawn.

        Raises:
            ExpungeError: the cache cannot be written.
        """
        addresses = [source.address(request) for request in requests]
        images: dict[str, Tensor] = {}
        missing: dict[tuple[int, float, str, bool], dict[str, Request]] = {}
        for address, request in zip(addresses, requests, strict=True):
            image = self._read(address, request)
            if image is not None:
                images[address] = image
            else:
                # A batch has one sampler and one way to its text.
                attacked = bool(request.text_hash)
                key = (request.num_inference_steps, request.guidance_scale, request.stand_in, attacked)
                missing.setdefault(key, {})[address] = request
        total = sum(map(len, missing.values()))
        if total and self.trouble and self.required:
            raise ExpungeError(self.trouble)  # now, and not when a batch is drawn
        done = 0
        for group in missing.values():
            items = list(group.items())
            for start in range(0, len(items), BATCH):
                part = items[start : start + BATCH]

                def tell(label: str, step: int, of: int, at: int = done, n: int = len(part)) -> None:
                    progress(label, round(100 * (at + n * step / of)), 100 * total)

                drawn = quantise(source.draw([request for _, request in part], tell))
                for (address, _), image in zip(part, drawn, strict=True):
                    if not self.trouble:
                        self._fresh += self._write(address, image)
                    images[address] = image
                # Not at every image: pruning looks at every file of the cache.
                if self.limit is not None and self._fresh > self.limit / 20:
                    self.prune(self.limit)
                done += len(part)
                self.drawn += len(part)
        return torch.stack([_float(images[address]) for address in addresses])

    def read_scores(self, address: str) -> dict[str, Tensor]:
        """Return the numbers that lie beside an image, by the key of their metric."""
        path = self.path(address, ".safetensors")
        try:
            return safetensors.torch.load(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError):
            path.unlink(missing_ok=True)
            return {}

    def keep_scores(self, address: str, scores: Mapping[str, Tensor]) -> None:
        """Save numbers beside an image, with those that are there."""
        # Read again: another process may have added its metrics meanwhile.
        merged = {**self.read_scores(address), **scores}
        # Cloned, for rows are views of one tensor, and safetensors refuses shared memory.
        tensors = {key: value.detach().float().cpu().clone() for key, value in merged.items()}
        with replacing(self.path(address, ".safetensors")) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))

    def prune(self, limit: int) -> int:
        """Remove what was used longest ago until the cache holds at most `limit` bytes.

        Returns:
            how many images went.
        """
        if self.trouble:
            return 0
        found: dict[Path, tuple[float, int]] = {}
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                state, stem = path.stat(), path.with_suffix("")
                used, size = found.get(stem, (0.0, 0))
                found[stem] = (max(used, state.st_mtime), size + state.st_size)
        total = sum(size for _, size in found.values())
        gone = self._fresh = 0
        # An image and its numbers go together, by whichever was used last.
        for stem, (_, size) in sorted(found.items(), key=lambda item: item[1][0]):
            if total <= limit:
                break
            for ending in (".png", ".safetensors"):
                stem.with_suffix(ending).unlink(missing_ok=True)
            total, gone = total - size, gone + 1
        return gone

    def _read(self, address: str, request: Request) -> Tensor | None:
        """A whole image (3, height, width), uint8, or nan-marked; None if it is to be drawn."""
        path = self.path(address)
        try:
            if not is_file(path):
                return None
        except ExpungeError:  # a folder that may not be searched, or whose name is too long
            if self.required:
                raise
            return None
        try:
            with Image.open(path) as file:
                file.load()
                array = np.asarray(file.convert("RGB"))
                # A PNG cut short, or one of another program, may well decode.
                if file.info.get("pixels") != _digest(array):
                    raise ValueError("its pixels are not those that were drawn")
                broken = file.info.get("broken") == "yes"
            with contextlib.suppress(OSError):  # a cache that may only be read
                os.utime(path)
        except (OSError, ValueError, SyntaxError) as error:
            warnings.warn(
                f"a cached image of {request.prompt!r}, seed {request.seed}, is damaged; drawn again",
                ExpungeWarning,
                stacklevel=3,
            )
            del error
            for ending in (".png", ".safetensors"):
                with contextlib.suppress(OSError):  # a cache that may only be read
                    self.path(address, ending).unlink(missing_ok=True)
            return None
        image = torch.from_numpy(array.copy()).permute(2, 0, 1)
        return torch.full(image.shape, -1, dtype=torch.int16) if broken else image

    def _write(self, address: str, image: Tensor) -> int:
        """Keep an image; returns how many bytes it takes."""
        broken = image.dtype == torch.int16
        # A PNG has no nan: such an image is kept black and marked.
        array = image.clamp(min=0).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        notes = PngImagePlugin.PngInfo()
        notes.add_text("pixels", _digest(array))
        if broken:
            notes.add_text("broken", "yes")
        with replacing(self.path(address)) as temporary:
            Image.fromarray(array).save(temporary, "PNG", pnginfo=notes)
            return temporary.stat().st_size


def quantise(images: Tensor) -> list[Tensor]:
    """Return images in 8 bits, as files hold them; one that contains nan becomes an int16 one of -1."""
    rounded = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    whole = images.isfinite().flatten(1).all(1)
    return [
        image if good else torch.full(image.shape, -1, dtype=torch.int16)
        for image, good in zip(rounded, whole.tolist(), strict=True)
    ]


def _float(image: Tensor) -> Tensor:
    """Back to [0, 1]; -1 stands for what was no number."""
    values = image.float() / 255
    return values.masked_fill(values < 0, float("nan"))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]
