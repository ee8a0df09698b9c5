"""Where in its pictures a concept is.

A mask (h, w) is 1 where it is and 0 elsewhere, in whatever size it was found.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge import pictures
from expunge.errors import ExpungeError
from expunge.examples import Examples, folder_of
from expunge.model import Model
from expunge.ops.attention import grid, read_attention
from expunge.ops.otsu import otsu
from expunge.run import Run

SOURCES = ("attention", "none", "grounded-sam")
"""Where masks come from, unless from a folder."""

LOG_SNRS = (0.0, -1.0, -2.0, -3.0)
"""The noise at which attention is looked at: the object's place is settled, its detail is not."""


def find(source: str, model: Model, examples: Examples, phrase: Tensor, run: Run) -> Tensor:
    """The masks of a concept's examples: (n, h, w), 0 or 1.

    Args:
        source: "attention": the model's own, thresholded. "none": everything. "grounded-sam": from
            GroundingDINO and SAM. Otherwise a folder of PNGs named as the pictures' files.
        model: the model that draws the concept.
        examples: its pictures.
        phrase: (1, tokens), the concept's tokens in the examples' prompt.
        run: for the noise.

    Raises:
        ExpungeError: a mask is missing, unreadable, of another shape than its picture, wholly empty
            or wholly full; or the libraries or weights for it are missing.
    """
    if source == "none":
        return torch.ones(len(examples), 1, 1)
    if source == "attention":
        masks = from_attention(model, examples, phrase, run)
    elif source == "grounded-sam":
        from expunge.grounded_sam import GroundedSAM

        drawn = torch.cat([model.decode(one) for one in examples.latents.split(1)])
        masks = GroundedSAM.load()(drawn, examples.concept)
    else:
        masks = from_folder(source, model, examples)
    for i, mask in enumerate(masks):
        if not mask.any() or mask.all():
            what = "full" if mask.any() else "empty"
            raise ExpungeError(
                f"the mask of {examples.describe(i)} is {what} ({source}): use other masks or pictures,"
                " another seed, or masks 'none'"
            )
    return masks.float()


@torch.no_grad()
def from_attention(model: Model, examples: Examples, phrase: Tensor, run: Run) -> Tensor:
    """The brighter part of what a concept's tokens attend to: (n, h, w), bool.

    Their maps, averaged over heads, layers and levels of noise, are split by Otsu's threshold.
    """
    latents = examples.latents
    height, width = latents.shape[-2:]
    text = model.encode([examples.prompt] * len(examples))
    tokens = phrase.to(latents.device, torch.float32)
    log_snr, generator = model.log_snr(), run.generator("masks", examples.concept)

    def attended(attention: Tensor) -> Tensor:
        size = grid(attention.shape[2], height, width)
        seen = (attention.float().mean(1) @ tokens[0]).unflatten(1, size)
        return interpolate(seen[:, None], (height, width), mode="bilinear")

    total = torch.zeros(())
    for level in LOG_SNRS:
        t = (log_snr - level).abs().argmin().expand(len(examples)).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = model.add_noise(latents, noise, t)
        maps = read_attention(
            model.cross_attentions(),
            attended,
            lambda: model.predict(noisy, t, text),  # noqa: B023
        )
        total = total + torch.stack(maps).mean(0).cpu()
    seen = total.flatten(1)
    return (seen > otsu(seen)).unflatten(1, (height, width))


def from_folder(folder: str | Path, model: Model, examples: Examples) -> Tensor:
    """Masks read from files named as the pictures' files are, white where the concept is.

    They lie as the pictures do, in a folder of the concept's own or in `folder`. (n, h, w), bool.
    """
    if not examples.files:
        raise ExpungeError("masks from a folder belong to pictures from a folder: set pictures_from too")
    place = folder_of(examples.concept, folder)
    masks = []
    for file in examples.files:
        path = place / f"{Path(file).stem}.png"
        if not path.is_file():
            raise ExpungeError(f"the mask of {file} is missing: there is no {path}")
        mask, picture = pictures.read(path), pictures.read(file)
        if mask.shape != picture.shape:
            sizes = [" × ".join(map(str, p.shape[:0:-1])) for p in (mask, picture)]
            raise ExpungeError(f"the mask {path} is {sizes[0]} pixels, its picture {sizes[1]}")
        masks.append(mask.mean(0) > 0.5)
    return torch.stack(masks)
