"""A CLIP for the metrics that need one: a shipped model's own, or one of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.base.modules import MAKING
from expunge.base.shipped import list_shipped
from expunge.emoji.clip import Clip


@dataclass(frozen=True, eq=False)
class Towers:
    """Both towers of a CLIP."""

    embed_images: Callable[[Tensor], Tensor]
    """(n, 3, height, width) in [0, 1] to (n, shared), each of length one."""
    embed_texts: Callable[[Sequence[str]], Tensor]
    """(n, shared), each of length one."""
    features: Callable[[Tensor], Tensor]
    """(n, width): the image tower's pooled output."""
    size: int
    """The side of the square images that it reads."""
    digest: str
    """The hash of its weights."""


@cache
def towers(model: str) -> Towers:
    """Load a shipped model's CLIP, such as "emoji", or one of transformers; each is loaded once.

    Args:
        model: the shipped model's name, or a folder or hub id for transformers.

    Raises:
        ExpungeError: its weights are missing.
    """
    from transformers.utils import logging

    # The bars of loading would stand between those of drawing.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return _shipped(registry.HERE / model) if model in list_shipped() else _transformers(model)
    finally:
        if shown:
            logging.enable_progress_bar()


def _shipped(folder: Path) -> Towers:
    if not (folder / "clip").is_dir():
        others = " or ".join(name for name in list_shipped() if (registry.HERE / name / "clip").is_dir())
        raise ExpungeError(
            f"the model {folder.name!r} has no CLIP of its own: name {others}, or a folder or hub id"
        )
    clip = Clip.load(folder)
    digest = hashlib.sha256()
    for file in sorted((folder / "clip").glob("*.safetensors")):
        digest.update(file.read_bytes())
    size: int = clip.image.config.image_size  # type: ignore[union-attr, assignment]

    def fitted(images: Tensor) -> Tensor:
        return resized(images.nan_to_num(), size)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        parts = fitted(images).split(64)  # activations of more would fill the memory
        return torch.cat([clip.image(pixel_values=part * 2 - 1).pooler_output for part in parts])

    return Towers(
        lambda images: clip.embed_images(fitted(images)),
        clip.embed_texts,
        features,
        size,
        digest.hexdigest(),
    )


def _transformers(model: str) -> Towers:
    from transformers import CLIPModel, CLIPTokenizer

    try:
        with MAKING:
            clip: Any = CLIPModel.from_pretrained(model, use_safetensors=True).eval()
        tokenizer = CLIPTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or ["?"])[0]
        raise ExpungeError(
            f"cannot load the CLIP {model}: {said}; name a folder that holds it"
        ) from error
    size = clip.config.vision_config.image_size
    # A hub id may point to other weights tomorrow, so the key holds what they are.
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    # The statistics that OpenAI's CLIP was trained with; later ones kept them.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        parts = ((resized(images.nan_to_num(), size) - mean) / std).split(32)
        return torch.cat([clip.vision_model(pixel_values=part).pooler_output for part in parts])

    @torch.inference_mode()
    def embed_images(images: Tensor) -> Tensor:
        return functional.normalize(clip.visual_projection(features(images)), dim=1)

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> Tensor:
        window = clip.config.text_config.max_position_embeddings
        ids = tokenizer(
            list(texts), padding=True, truncation=True, max_length=window, return_tensors="pt"
        )
        return functional.normalize(clip.text_projection(clip.text_model(**ids).pooler_output), dim=1)

    return Towers(embed_images, embed_texts, features, size, digest.hexdigest())


def resized(images: Tensor, size: int) -> Tensor:
    """Return images scaled to a square, bicubic with antialiasing, (n, 3, size, size) in [0, 1]."""
    if images.shape[2:] == (size, size):
        return images
    return functional.interpolate(
        images, (size, size), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)  # bicubic interpolation overshoots at edges
