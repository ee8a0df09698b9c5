"""Find where in its images a concept is.

A mask (h, w) is 1 where the concept is and 0 elsewhere; its size is that of what it was found in.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.base import image_files
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.erasing.reference_images import Examples, find_folder
from expunge.model import Model
from expunge.ops.attention import infer_grid, read_attention
from expunge.ops.otsu import otsu
from expunge.runtime.context import RunContext

SOURCES = ("attention", "none", "grounded-sam")
"""Where masks come from, unless from a folder."""

LOG_SNRS = (0.0, -1.0, -2.0)
"""The noise levels at which attention is read: the object's place is settled there, its detail is
not."""

SMALLEST = 16
"""The fewest pixels of a map that locates anything: in coarser ones attention falls anywhere."""


def find_masks(source: str, model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """Find the masks of a concept's examples: (n, h, w), 0 or 1.

    Args:
        source: "attention": the model's own, thresholded; "none": everywhere; "grounded-sam": from
            GroundingDINO and SAM; otherwise a folder of PNGs named as the images' files.
        model: the model that draws the concept.
        examples: its images.
        tokens: (1, tokens), bool, the tokens of the examples' prompt that carry the concept: its
            phrase's, and the end and padding after it.
        run: its seed, for the noise.

    Raises:
        ExpungeError: a mask is missing, unreadable, of another shape than its image, wholly empty
            or wholly full; or the libraries or weights for it are missing.
    """
    if source == "none":
        return torch.ones(len(examples), 1, 1)
    if source == "attention":
        masks = masks_from_attention(model, examples, tokens, run)
    elif source == "grounded-sam":
        from expunge.erasing.grounded_sam import GroundedSAM

        drawn = torch.cat([model.decode(one) for one in examples.latents.split(1)])
        masks = GroundedSAM.load()(drawn, examples.concept)
    elif not Path(source).is_dir():
        raise UnknownNameError("folder or other source of masks", source, SOURCES)
    else:
        masks = masks_from_folder(source, model, examples)
    for i, mask in enumerate(masks):
        if not mask.any() or mask.all():
            what = "full" if mask.any() else "empty"
            raise ExpungeError(
                f"the mask of {examples.describe(i)} is {what} ({source}): use other masks or images,"
                " another seed, or masks 'none'"
            )
    return masks.float()


def masks_from_attention(model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """Threshold the attention to a concept's tokens by Otsu's method: (n, h, w), bool.

    Args:
        model: the model that draws the concept.
        examples: its images.
        tokens: as in `find_masks`.
        run: its seed.
    """
    seen = measure_attention(model, examples, tokens, run)
    return seen > otsu(seen.flatten(1))[..., None]


@torch.no_grad()
def measure_attention(model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """Measure how much each pixel attends to a concept's tokens: (n, h, w).

    A mean over heads, layers and noise levels. The end and padding tokens carry the whole prompt, and
    are attended to from all over the object; its own words, from some part of it.

    Args:
        model: the model that draws the concept.
        examples: its images.
        tokens: as in `find_masks`.
        run: its seed.
    """
    latents = examples.latents
    height, width = latents.shape[-2:]
    text = model.encode([examples.prompt] * len(examples))
    counted = tokens[0].to(latents.device, torch.float32)
    log_snr, generator = model.log_snr(), run.generator("masks", examples.concept)

    def read(attention: Tensor) -> Tensor | None:
        pixels = attention.shape[2]
        if pixels < min(SMALLEST, height * width):
            return None
        seen = (attention.float().mean(1) @ counted).unflatten(1, infer_grid(pixels, height, width))
        # Layers see the image in different sizes; the mean needs one.
        return interpolate(seen[:, None], (height, width), mode="bilinear")[:, 0]

    total = torch.zeros(())
    for level in LOG_SNRS:
        # The timestep nearest to the noise level, on whichever schedule.
        t = (log_snr - level).abs().argmin().expand(len(examples)).to(latents.device)
        # Drawn on the CPU, so that masks are the same on every device.
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = model.add_noise(latents, noise, t)
        maps = read_attention(
            model.cross_attentions(),
            read,
            lambda: model.predict(noisy, t, text),  # noqa: B023
        )
        total = total + torch.stack([one for one in maps if one is not None]).mean(0).cpu()
    return total / len(LOG_SNRS)


def masks_from_folder(folder: str | Path, model: Model, examples: Examples) -> Tensor:
    """Read masks from files named as the images' files, white where the concept is: (n, h, w), bool.

    Args:
        folder: holds the masks, or a folder of the concept's name with them.
        model: not needed; masks are of the size of their images.
        examples: the images, read from files.

    Raises:
        ExpungeError: the images are no files, or a mask is missing or of another size than its image.
    """
    if not examples.files:
        raise ExpungeError("masks from a folder belong to images from a folder: set images_from too")
    place = find_folder(examples.concept, folder)
    masks = []
    for file in examples.files:
        path = _named(place, Path(file).stem)
        if not path.is_file():
            raise ExpungeError(f"the mask of {file} is missing: there is no {path}")
        # What a mask leaves transparent is not the concept.
        mask, image = image_files.read_image(path, background="black"), image_files.read_image(file)
        if mask.shape != image.shape:
            sizes = [" × ".join(map(str, p.shape[:0:-1])) for p in (mask, image)]
            raise ExpungeError(f"the mask {path} is {sizes[0]} pixels, its image {sizes[1]}")
        masks.append(mask.mean(0) > 0.5)
    return torch.stack(masks)


def _named(folder: Path, stem: str) -> Path:
    """Find the mask of a name, with an ending in capitals or letters in another Unicode form, too."""
    exact = folder / f"{stem}.png"
    if exact.is_file():
        return exact
    wanted = unicodedata.normalize("NFC", stem)
    alike = (path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png")
    return next((p for p in alike if unicodedata.normalize("NFC", p.stem) == wanted), exact)
