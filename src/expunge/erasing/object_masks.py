"""Where in its images a concept is.

A mask (h, w) is 1 where it is and 0 elsewhere, in whatever size it was found.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.base import image_files
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.erasing.reference_images import Examples, folder_of
from expunge.model import Model
from expunge.ops.attention import grid, read_attention
from expunge.ops.otsu import otsu
from expunge.runtime.context import RunContext

SOURCES = ("attention", "none", "grounded-sam")
"""Where masks come from, unless from a folder."""

LOG_SNRS = (0.0, -1.0, -2.0)
"""The noise at which attention is looked at: the object's place is settled, its detail is not."""

SMALLEST = 16
"""The fewest pixels of a map that says where something is: coarser ones point anywhere."""


def find(source: str, model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """The masks of a concept's examples: (n, h, w), 0 or 1.

    Args:
        source: "attention": the model's own, thresholded. "none": everything. "grounded-sam": from
            GroundingDINO and SAM. Otherwise a folder of PNGs named as the images' files.
        model: the model that draws the concept.
        examples: its images.
        tokens: (1, tokens), bool, those of the examples' prompt that tell of the concept: its own, and
            the end and padding after it.
        run: for the noise.

    Raises:
        ExpungeError: a mask is missing, unreadable, of another shape than its image, wholly empty
            or wholly full; or the libraries or weights for it are missing.
    """
    if source == "none":
        return torch.ones(len(examples), 1, 1)
    if source == "attention":
        masks = from_attention(model, examples, tokens, run)
    elif source == "grounded-sam":
        from expunge.erasing.grounded_sam import GroundedSAM

        drawn = torch.cat([model.decode(one) for one in examples.latents.split(1)])
        masks = GroundedSAM.load()(drawn, examples.concept)
    elif not Path(source).is_dir():
        raise UnknownNameError("folder or other source of masks", source, SOURCES)
    else:
        masks = from_folder(source, model, examples)
    for i, mask in enumerate(masks):
        if not mask.any() or mask.all():
            what = "full" if mask.any() else "empty"
            raise ExpungeError(
                f"the mask of {examples.describe(i)} is {what} ({source}): use other masks or images,"
                " another seed, or masks 'none'"
            )
    return masks.float()


def from_attention(model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """The brighter part of where a concept's tokens are attended to: (n, h, w), bool.

    `attended`, split by Otsu's threshold.
    """
    seen = attended(model, examples, tokens, run)
    return seen > otsu(seen.flatten(1))[..., None]


@torch.no_grad()
def attended(model: Model, examples: Examples, tokens: Tensor, run: RunContext) -> Tensor:
    """How much each pixel attends to a concept's tokens: (n, h, w).

    A mean over heads, layers and levels of noise. The end and padding tokens tell of the whole
    prompt, and are attended to from all over the object; its own words, from some part of it.
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
        seen = (attention.float().mean(1) @ counted).unflatten(1, grid(pixels, height, width))
        return interpolate(seen[:, None], (height, width), mode="bilinear")[:, 0]

    total = torch.zeros(())
    for level in LOG_SNRS:
        t = (log_snr - level).abs().argmin().expand(len(examples)).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = model.add_noise(latents, noise, t)
        maps = read_attention(
            model.cross_attentions(),
            read,
            lambda: model.predict(noisy, t, text),  # noqa: B023
        )
        total = total + torch.stack([one for one in maps if one is not None]).mean(0).cpu()
    return total / len(LOG_SNRS)


def from_folder(folder: str | Path, model: Model, examples: Examples) -> Tensor:
    """Masks read from files named as the images' files are, white where the concept is.

    They lie as the images do, in a folder of the concept's own or in `folder`. (n, h, w), bool.
    """
    if not examples.files:
        raise ExpungeError("masks from a folder belong to images from a folder: set images_from too")
    place = folder_of(examples.concept, folder)
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
    """The mask of that name, though its ending be in capitals or its letters of another Unicode form."""
    exact = folder / f"{stem}.png"
    if exact.is_file():
        return exact
    wanted = unicodedata.normalize("NFC", stem)
    alike = (path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png")
    return next((p for p in alike if unicodedata.normalize("NFC", p.stem) == wanted), exact)
