"""Masks of a named thing: GroundingDINO finds its boxes, SAM segments it within them.

Both models come from transformers; images are prepared here, so that torchvision is not needed. The
models' weights are read from the Hugging Face cache or fetched from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from expunge.base.errors import ExpungeError
from expunge.base.modules import MAKING
from expunge.base.quiet import silence_libraries

DETECTOR = "IDEA-Research/grounding-dino-tiny"
SEGMENTER = "facebook/sam-vit-base"

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@dataclass(frozen=True, eq=False)
class GroundedSAM:
    """Both models, and the score from which a box counts."""

    tokenizer: Any
    detector: Any
    """A `GroundingDinoForObjectDetection`."""
    segmenter: Any
    """A `SamModel`."""
    threshold: float = 0.3
    """The least score of a box, 0 to 1."""
    side: int = 800
    """The shorter side of the images that the detector is given, in pixels."""

    @classmethod
    @lru_cache(maxsize=1)  # read once for all concepts
    def load(cls, detector: str = DETECTOR, segmenter: str = SEGMENTER) -> GroundedSAM:
        """Read both models.

        Raises:
            ExpungeError: weights are neither in the cache nor can they be fetched.
        """
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection, SamModel

        name = detector
        try:
            with MAKING, silence_libraries():
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
        """Find the masks of a thing in images.

        Args:
            images: (n, 3, height, width), in [0, 1].
            thing: its name.

        Returns:
            (n, height, width), bool; empty in an image in which the thing is not found.
        """
        return torch.stack([self._mask(image, self.boxes(image, thing)) for image in images])

    def boxes(self, image: Tensor, thing: str) -> Tensor:
        """Find the boxes of a thing: (boxes, 4), left, top, right, bottom as shares of the sides."""
        height, width = image.shape[1:]
        scale = self.side / min(height, width)
        size = (round(height * scale), round(width * scale))
        given = _resized((image - MEAN) / DEVIATION, size)[None]
        # GroundingDINO was trained on lower-case phrases that end in a full stop.
        words = self.tokenizer([f"{thing.lower().rstrip('.')}."], return_tensors="pt")
        found = self.detector(
            pixel_values=given, pixel_mask=torch.ones(1, *size, dtype=torch.int64), **words
        )
        scores = found.logits[0].sigmoid().amax(1)
        x, y, w, h = found.pred_boxes[0][scores > self.threshold].unbind(1)
        return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).clamp(0, 1)

    def _mask(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Segment what is in each box with SAM, and unite the masks: (height, width), bool."""
        height, width = image.shape[1:]
        if not len(boxes):
            return torch.zeros(height, width, dtype=torch.bool)
        side = self.segmenter.config.vision_config.image_size
        scale = side / max(height, width)
        h, w = round(height * scale), round(width * scale)
        # SAM takes squares: the longer side fills one, the rest is padded below and right.
        given = pad(_resized((image - MEAN) / DEVIATION, (h, w)), (0, side - w, 0, side - h))
        corners = boxes * torch.tensor([w, h, w, h])
        found = self.segmenter(
            pixel_values=given[None], input_boxes=corners[None], multimask_output=False
        )
        whole = interpolate(found.pred_masks[0, :, :1].float(), (side, side), mode="bilinear")
        # The padding is cut off before the mask takes the image's size, or it would shift.
        cut = interpolate(whole[..., :h, :w], (height, width), mode="bilinear")
        return (cut > 0).any(0)[0]


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]
