"""FID: the Fréchet distance on Inception features, against the original's images or real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.metric import Distance, SetDistance, read_images
from expunge.metrics._distances import frechet


@dataclass(frozen=True)
class Fid(Distance):
    """‖μ − μ₀‖² + tr(Σ + Σ₀ − 2 (Σ Σ₀)^½) of 2048 Inception features, as torch-fidelity computes them.

    Needs the package torch-fidelity and its weights: in torch's cache, or at `weights`. It is too large
    by about c/n for sets of n images, and thousands are usual: compare sets of one size.

    Source: Heusel et al., NeurIPS 2017.
    """

    weights: str = ""
    """The file of the weights; by default torch's cache, filled from the net where it can be."""
    against: str = ""
    """A folder of real images; by default what the original draws for the same prompts and seeds."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Inception's weights, who computes with them, and what is compared with."""
        from importlib.metadata import version

        _extractor(self.weights)
        return {
            "features": "inception-v3-compat, 2048, resized as TensorFlow 1 does",
            "torch-fidelity": version("torch-fidelity"),
            "weights": self.weights or "pt_inception-2015-12-05",
            "against": self.against or "the original's images",
        }

    @property
    def feature_key(self) -> Mapping[str, Any]:
        """Cache key of the rows."""
        # In the words of earlier versions: rows that they have kept are found by it.
        return {**super().feature_key, "against": self.against or "the original's pictures"}

    @torch.inference_mode()
    def measure(
        self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None
    ) -> Tensor:
        """Return 2048 Inception features, (n, 2048).

        Args:
            images: (n, 3, height, width) in [0, 1].
            prompts: not read.
            references: not read.
        """
        whole = (images.nan_to_num() * 255).round().to(torch.uint8)
        return torch.cat([_extractor(self.weights)(part)[0] for part in whole.split(32)])

    def distance(self, rows: Tensor, reference: Tensor) -> SetDistance:
        """Return the distance of two sets of rows, (n, width) and (m, width)."""
        return frechet(rows, reference)

    def load_real(self) -> Tensor | None:
        """Return the features of the images in `against`, (m, width), or None."""
        return self.measure(read_images(self.against, (299, 299)), ()) if self.against else None


@cache
def _extractor(weights: str) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ExpungeError("fid needs torch-fidelity: pip install 'expunge[metrics]'") from None
    try:
        if weights:  # torch-fidelity would run whatever code the file holds
            torch.load(weights, weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    except Exception as error:  # a download may fail in many ways
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExpungeError(
            f"fid cannot read Inception's weights ({said}); name their file with the option weights"
        ) from error
