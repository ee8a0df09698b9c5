"""What attacks that begin with an image of the concept have in common."""

from __future__ import annotations

from torch import Tensor

from expunge.attack import Attack
from expunge.erasing.image_inputs import read_latents, require_image_input
from expunge.model import Model


class FromImage(Attack):
    """An attack that begins with what the original draws, or with the images of a folder."""

    images: str
    """A folder of images of the concept, of the size that the model draws; "": the original draws them.
    Each attack has the field itself, so that it stands last among its fields."""

    @classmethod
    def require(cls, model: Model) -> None:
        super().require(model)
        require_image_input(model)

    def check_inputs(self, model: Model) -> None:
        self.read_images(model)

    def read_images(self, model: Model) -> Tensor | None:
        """Return the latents of the folder's images, (n, c, h, w); None where the original draws them.

        Raises:
            ExpungeError: the folder has no images, or images of another size.
        """
        return read_latents(model, self.images) if self.images else None
