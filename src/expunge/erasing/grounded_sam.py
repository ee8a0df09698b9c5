"""Masks of a named thing: GroundingDINO finds its boxes, SAM cuts it out of them.

Both come from transformers; images are prepared here, so that torchvision is not needed. Their
weights are read from the Hugging Face cache or fetched from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from expunge.base.errors import ExpungeError
from expunge.base.quiet import silence_libraries

DETECTOR = "IDEA-Research/grounding-dino-tiny"
SEGMENTER = "facebook/sam-vit-base"

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@dataclass(frozen=True, eq=False)
class GroundedSAM:
    """Both models, and when a box counts."""

    tokenizer: Any
    detector: Any
    """A `GroundingDinoForObjectDetection`."""
    segmenter: Any
    """A `SamModel`."""
    threshold: float = 0.3
    """The least score of a box, 0 to 1."""
    side: int = 800
    """The shorter side in pixels at which the detector looks at an image."""

    @classmethod
    @lru_cache(maxsize=1)  # once for all concepts
    def load(cls, detector: str = DETECTOR, segmenter: str = SEGMENTER) -> GroundedSAM:
        """Read both models.

        Raises:
            ExpungeError: weights are neither in the cache nor to be had.
        """
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection, SamModel

        name = detector
        try:
            with silence_libraries():
                tokenizer = AutoTokenizer.from_pretrained(detector)
                finder = GroundingDinoForObjectDetection.from_pretrained(detector, use_safetensors=True)
                name = segmenter
                cutter = SamModel.from_pretrained(segmenter, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise ExpungeError(
                f"grounded-sam needs {name}, which is neither in the Hugging Face cache nor could it be"
                " fetched; masks 'attention' need nothing more than the model"
            ) from error
        return cls(tokenizer, finder.eval(), cutter.eval())

    @torch.no_grad()
    def __call__(self, images: Tensor, thing: str) -> Tensor:
        """The masks of `thing` in images (n, 3, height, width) in [0, 1]: (n, height, width), bool.

        An image in which it is not found gets an empty mask.
        """
        return torch.stack([self._mask(image, self.boxes(image, thing)) for image in images])

    def boxes(self, image: Tensor, thing: str) -> Tensor:
        """Where `thing` is: (boxes, 4), left, top, right, bottom in parts of the sides."""
        height, width = image.shape[1:]
        scale = self.side / min(height, width)
        size = (round(height * scale), round(width * scale))
        given = _resized((image - MEAN) / DEVIATION, size)[None]
        words = self.tokenizer([f"{thing.lower().rstrip('.')}."], return_tensors="pt")
        found = self.detector(
            pixel_values=given, pixel_mask=torch.ones(1, *size, dtype=torch.int64), **words
        )
        scores = found.logits[0].sigmoid().amax(1)
        x, y, w, h = found.pred_boxes[0][scores > self.threshold].unbind(1)
        return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).clamp(0, 1)

    def _mask(self, image: Tensor, boxes: Tensor) -> Tensor:
        """The union of what SAM cuts out of each box."""
        height, width = image.shape[1:]
        if not len(boxes):
            return torch.zeros(height, width, dtype=torch.bool)
        side = self.segmenter.config.vision_config.image_size
        scale = side / max(height, width)
        h, w = round(height * scale), round(width * scale)
        given = pad(_resized((image - MEAN) / DEVIATION, (h, w)), (0, side - w, 0, side - h))
        corners = boxes * torch.tensor([w, h, w, h])
        found = self.segmenter(
            pixel_values=given[None], input_boxes=corners[None], multimask_output=False
        )
        whole = interpolate(found.pred_masks[0, :, :1].float(), (side, side), mode="bilinear")
        cut = interpolate(whole[..., :h, :w], (height, width), mode="bilinear")
        return (cut > 0).any(0)[0]


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]
