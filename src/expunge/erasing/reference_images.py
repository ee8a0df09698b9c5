"""Images of a concept, drawn by the model or read from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.base import image_files
from expunge.base.errors import ExpungeError
from expunge.model import Model
from expunge.problem import normalize_name
from expunge.runtime.context import RunContext


@dataclass(frozen=True, eq=False)
class Examples:
    """Images of one concept, as latents."""

    concept: str
    """Its name."""
    prompt: str
    """The prompt of the images."""
    latents: Tensor
    """(n, c, h, w), clean."""
    files: tuple[str, ...] = ()
    """The files that the images were read from, if any."""

    def __len__(self) -> int:
        return len(self.latents)

    def describe(self, i: int) -> str:
        """Name image i in a message."""
        return self.files[i] if self.files else f"image {i + 1} of {self.concept!r}"


@torch.no_grad()
def draw_examples(
    model: Model,
    concept: str,
    prompt: str,
    n: int,
    run: RunContext,
    num_inference_steps: int | None = None,
) -> Examples:
    """Draw n examples of a concept; their seeds follow from the run's seed and the concept's name.

    Args:
        model: draws them.
        concept: its name.
        prompt: of the images.
        n: how many.
        run: its seed.
        num_inference_steps: by default the model's own.
    """
    steps = num_inference_steps or model.num_inference_steps
    latents = _latents(model, [prompt] * n, run.generator("examples", concept), steps)
    return Examples(concept, prompt, latents)


@torch.no_grad()
def draw_each(
    model: Model, label: str, prompts: Sequence[str], run: RunContext, batch: int = 16
) -> Tensor:
    """Draw one image of each prompt; their seeds follow from the run's seed and the label.

    Args:
        model: draws them.
        label: what is drawn, for the seeds and the progress.
        prompts: of the images.
        run: its seed.
        batch: how many are drawn together.

    Returns:
        The latents, (n, c, h, w).
    """
    # One generator for all batches: seeds, and so images, do not depend on the batch's size.
    generator, steps = run.generator("examples", label), model.num_inference_steps
    parts = []
    for start in range(0, len(prompts), batch):
        run.progress(f"drawing {label}", start, len(prompts))
        parts.append(_latents(model, prompts[start : start + batch], generator, steps))
    return torch.cat(parts)


def _latents(model: Model, prompts: Sequence[str], generator: torch.Generator, steps: int) -> Tensor:
    """Draw an image of each prompt in one batch: (n, c, h, w)."""
    # A seed an image, so that an image does not depend on how many are drawn with it.
    seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
    return model.denoise(model.encode(prompts), seeds, until=steps, num_inference_steps=steps)[1]


def read_examples(model: Model, concept: str, prompt: str, folder: str | Path) -> Examples:
    """Read all images of a concept from `folder/concept`, or from `folder` if there is no such folder.

    Args:
        model: encodes them.
        concept: its name.
        prompt: what they show.
        folder: holds them.

    Raises:
        ExpungeError: there are no images, or one is unreadable or of another size than the model draws.
    """
    place = find_folder(concept, folder)
    # Sorted, since a folder lists files in any order, and training picks images by their number.
    files = sorted(path for path in place.glob("*") if path.suffix.lower() in image_files.ENDINGS)
    if not files:
        raise ExpungeError(f"{place} has no images of {concept!r} (.png, .jpg or .webp)")
    latents = []
    for path in files:
        try:
            # One at a time, so that an error can name its file.
            latents.append(model.encode_images(image_files.read_image(path)[None]))
        except ExpungeError as error:
            message = str(error)
            raise ExpungeError(message if str(path) in message else f"{path}: {message}") from None
    return Examples(concept, prompt, torch.cat(latents), tuple(map(str, files)))


def find_folder(concept: str, folder: str | Path) -> Path:
    """Find the folder of a concept's files: one of its name within `folder`, or `folder` itself.

    The folder's name may be the concept's in another spelling, such as a file system makes of it.

    Raises:
        ExpungeError: there is no such folder, or several have the concept's name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExpungeError(f"there is no folder {folder}")
    # The exact name first: only without it do other spellings count, of which there may be several.
    if (own := folder / concept).is_dir():
        return own
    alike = sorted(
        p for p in folder.iterdir() if normalize_name(p.name) == normalize_name(concept) and p.is_dir()
    )
    if len(alike) > 1:
        names = ", ".join(ascii(path.name) for path in alike)
        raise ExpungeError(f"{folder} has several folders that are called {concept!r}: {names}")
    return alike[0] if alike else folder
