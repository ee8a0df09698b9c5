"""The emoji model's CLIP: scores how well an image and a text match.

Its text tower is the pipeline's text encoder; its image tower and the two projections are in `clip/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.base.files import check_weights
from expunge.base.modules import MAKING

HERE = Path(__file__).parent


class Clip:
    """Scores images against texts by the cosine similarity of their projections.

    >>> clip = Clip.load()                                  # doctest: +SKIP
    >>> clip.score(images, ["a cat", "a rocket"]).shape   # doctest: +SKIP
    torch.Size([8, 2])

    Args:
        tokenizer: CLIP's.
        text: the text encoder.
        image: the image encoder.
        projections: of both encoders' pooled states into the common space, by name.
    """

    tokenizer: Any
    text: nn.Module
    image: nn.Module
    projections: dict[str, Tensor]

    def __init__(
        self, tokenizer: Any, text: nn.Module, image: nn.Module, projections: dict[str, Tensor]
    ) -> None:
        self.tokenizer, self.text, self.image, self.projections = tokenizer, text, image, projections

    @classmethod
    def load(cls, folder: str | Path = HERE) -> Clip:
        """Read the CLIP from `folder`, which holds `clip/` and `pipeline/`.

        Raises:
            ExpungeError: a file is missing or broken.
        """
        from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

        folder = Path(folder)
        check_weights(folder / "clip")
        check_weights(folder / "pipeline")
        # float32 on the CPU: the files hold float16, in which convolutions there are slow or missing.
        pipeline, towers = folder / "pipeline", {"dtype": torch.float32, "local_files_only": True}
        try:
            with MAKING:
                return cls(
                    CLIPTokenizer.from_pretrained(pipeline / "tokenizer"),
                    CLIPTextModel.from_pretrained(pipeline / "text_encoder", **towers).eval(),
                    CLIPVisionModel.from_pretrained(folder / "clip", **towers).eval(),
                    {
                        k: v.float()
                        for k, v in load_file(folder / "clip" / "projections.safetensors").items()
                    },
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise ExpungeError(
                f"cannot load the CLIP in {folder}: {str(error).splitlines()[0]}"
            ) from error

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (n, 256), each of length one."""
        # The text tower has no positions beyond these.
        window = self.tokenizer.model_max_length
        ids = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=window, return_tensors="pt"
        ).input_ids
        pooled = self.text(input_ids=ids).pooler_output
        return nn.functional.normalize(pooled @ self.projections["text_projection"].T, dim=1)

    @torch.inference_mode()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, 64, 64) in [0, 1]: (n, 256), each of length one."""
        # 64 at a time: the attention of thousands of images at once would not fit the memory.
        pooled = torch.cat(
            [self.image(pixel_values=part * 2 - 1).pooler_output for part in images.split(64)]
        )
        return nn.functional.normalize(pooled @ self.projections["picture_projection"].T, dim=1)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return cosine similarities, (images, texts), in [-1, 1]."""
        return self.embed_images(images) @ self.embed_texts(texts).T
