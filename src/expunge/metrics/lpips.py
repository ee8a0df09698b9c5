"""LPIPS: how far an image looks from the original's of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.metric import Metric


@dataclass(frozen=True)
class Lpips(Metric):
    """The learned perceptual distance: 0 for the same image, as torchmetrics computes it.

    Needs the package torchmetrics with torchvision, and the network's weights in torch's cache.

    Source: Zhang et al., CVPR 2018.
    """

    higher_is_better: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    network: Literal["alex", "vgg", "squeeze"] = "alex"
    """Whose features are compared."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The network and who computes with it."""
        from importlib.metadata import version

        _distance(self.network)
        return {"network": self.network, "torchmetrics": version("torchmetrics")}

    @torch.inference_mode()
    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return the learned distance from the reference, (n, 1).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: what the original drew, as `images`.

        Raises:
            TypeError: there are no references.
        """
        if references is None:
            raise TypeError("references must be a tensor of images, not None")
        # One pair at a time: torchmetrics averages over what it is given.
        distance, rows = _distance(self.network), []
        for one, other in zip(images.nan_to_num(), references.nan_to_num(), strict=True):
            rows.append(distance(one[None], other[None]).reshape(1))
        return torch.stack(rows)


@cache
def _distance(network: str) -> Any:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError:
        raise ExpungeError("lpips needs torchmetrics: pip install 'expunge[metrics]'") from None
    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).eval()
    except Exception as error:  # torchvision may be missing, a download may fail
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExpungeError(
            f"lpips needs torchvision and its {network} weights in torch's cache ({said}):"
            " pip install 'expunge[metrics]', and let it fetch them once"
        ) from error
