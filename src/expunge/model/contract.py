"""What every family of models must answer: encode, predict, denoise, decode, and name its layers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from expunge.ops.attention import CrossAttention
from expunge.text import Text, TextEntry

if TYPE_CHECKING:
    from expunge.families._lora import FusedLayers, LayerRows, LoraNaming

ANCHORS = {
    "object": "sky",
    "identity": "a person",
    "style": "art",
    "explicit": "a person wearing clothes",
}
"""The default anchor of each kind of concept."""


class FamilyContract(ABC):
    """What a family of models must answer. `Model` adds what follows from the answers.

    Args:
        pipe: the diffusers pipeline.
        name: what reports and records call the model.
        settings: what `expunge.json` says beside it: anchors, steps, guidance, and a family's own.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """The diffusers pipeline classes of this family; single files are loaded as the first."""
    denoiser: ClassVar[str]
    """The name of the pipeline's denoiser: "unet" or "transformer"."""
    single_files: ClassVar[tuple[str, ...]] = ()
    """The kinds of single-file checkpoints of this family, as diffusers names them."""
    single_file_key: ClassVar[str] = ""
    """Part of a tensor's name by which a single-file checkpoint of this family is recognized."""
    most_tokens: ClassVar[int] = 77
    """The most tokens of a prompt that its longest text encoder reads."""
    text_refiner: ClassVar[tuple[str, ...]] = ()
    """Layers from the text entries on that see text alone, and no time, by how their names begin."""
    read_ahead: ClassVar[tuple[str, ...]] = ()
    """Layers of the denoiser between its text encoder and its text entries, in order: they see nothing
    but text. `encode` applies them, so that `Text.embeddings` is what the entries read, and `predict`
    passes them by."""
    ldm_layers: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Regular expressions of the denoiser's layers, and what the original code calls each of them."""
    ldm_fused_layers: ClassVar[FusedLayers] = ()
    """The original code's layers that are several here, or one with its rows in another order."""
    lora_naming: ClassVar[LoraNaming]
    """Which programs read LoRAs of this family, and how their metadata name its base models; by default
    diffusers alone. See `expunge.families._lora`."""
    missing_capabilities: ClassVar[Mapping[str, str]] = {}
    """What methods may need and this family lacks: {capability: reason}."""

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = settings or {}
        self.pipe = pipe
        self.name = name
        self.num_inference_steps: int = int(settings.get("num_inference_steps", 50))
        self.guidance_scale: float = float(settings.get("guidance_scale", 7.5))
        # A model may bring anchors that suit what it was trained on.
        self.anchors: dict[str, str] = {**ANCHORS, **settings.get("anchors", {})}
        self.stored: Callable[[str, str], Tensor] | None = None
        """Reads a parameter from the disk, by its layer's name and its own; None where all is loaded."""
        self.sample_size: int | None = settings.get("sample_size")
        """Height and width of the latents, where it is not the family's default."""
        self.autocast: torch.dtype | None = None
        """The dtype of `trajectory`'s predictions, where it is not that of the weights."""

    @property
    @abstractmethod
    def window(self) -> int:
        """The most tokens that a prompt may have, start, end and padding not counted."""

    @abstractmethod
    def count_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has before truncation, start, end and padding not counted."""

    @abstractmethod
    def knows(self, prompt: str) -> bool:
        """Whether the tokenizer has a token for any part of a prompt; if not, it reads as empty."""

    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Return the whole words that are one token, in the order of their ids."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Text:
        """Encode prompts as the denoiser reads them; equal prompts are encoded once.

        A prompt longer than the window is truncated, as by diffusers, with an ExpungeWarning.
        """

    def _encoded(self, prompts: Sequence[str]) -> Text:
        """Encode as `encode` does, with gradients where they are enabled."""
        raise NotImplementedError

    def encode_in_training(self, prompts: Sequence[str]) -> Text:
        """Encode as `encode` does, with gradients to the text encoders' parameters where enabled."""
        return self._encoded(prompts)

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        """Return the denoiser's raw prediction, (n, c, h, w).

        Args:
            latents: the noisy latents, (n, c, h, w).
            t: the timestep, one for all or (n,).
            text: n rows of encoded prompts.
        """

    @abstractmethod
    def trajectory(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Denoise n images from noise, step by step.

        Args:
            text: n rows of encoded prompts.
            seeds: the seed of each image's noise; row i starts from the noise of `seeds[i]`.
            num_inference_steps: number of denoising steps; by default the model's own.
            guidance_scale: scale of classifier-free guidance; by default the model's own.

        Yields:
            (t, latents) before every step, as `predict` takes them; at the end the clean latents, with
            t = 0.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents into images (n, 3, height, width), float32 in [0, 1]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, height, width), in [0, 1] and of the model's size, into clean latents.

        The inverse of `decode`, up to the autoencoder's error.

        Raises:
            ExpungeError: the images are of another size than the model draws.
        """

    @abstractmethod
    def log_snr(self) -> Tensor:
        """Return log(signal variance / noise variance) at each timestep 0, 1, …: (T,), float64.

        It falls with time; the last may be -inf. Timesteps of two models correspond if their log-SNR is
        the same.
        """

    @property
    def latents_side(self) -> int:
        """Height and width of the latents; of oblong ones, the square root of the product."""
        raise NotImplementedError

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add noise to clean latents, as they are at some timesteps: (n, c, h, w).

        Args:
            latents: the clean latents, (n, c, h, w).
            noise: standard normal, (n, c, h, w).
            t: the timesteps, (n,).
        """

    @abstractmethod
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Return the layers in which the image attends to text tokens, for `read_attention`."""

    @abstractmethod
    def text_entries(self) -> tuple[TextEntry, ...]:
        """Return the linear layers through which `Text.embeddings` enters the denoiser."""

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        """Return the linear layers through which `Text.pooled` enters, at the start of their input."""
        return ()

    @classmethod
    def ldm_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        """Return the name of a denoiser's layer in single files, which keep the model's original names.

        Args:
            layer: the layer's name inside the diffusers denoiser.
            config: the denoiser's configuration, or what `infer_config` returns for a single file.

        Returns:
            The name; None where the layer is part of a larger one there.
        """
        for pattern, name in cls.ldm_layers:
            if found := re.fullmatch(pattern, layer):
                return found.expand(name)
        return None

    @classmethod
    def find_ldm_layers(cls, name: str, config: Mapping[str, Any]) -> tuple[LayerRows, ...]:
        """Find the denoiser's layers that the original code calls `name`; inverts `ldm_layer_name`.

        Args:
            name: a layer's name in the original code, without the prefix of the denoiser.
            config: the denoiser's configuration, or what `infer_config` makes of a single file.

        Returns:
            each layer, and how its rows are selected from the original layer's; empty if there is none.
        """
        number = r"(\d+)"
        for pattern, original in cls.ldm_layers:
            # Escaping turned the group `\1` into `\\1`: there the block's number is looked for.
            wanted = re.escape(original).replace(r"\\1", number)
            if found := re.fullmatch(wanted, name):
                block = found[1] if found.groups() else ""
                # But for its number and escaped dots, the pattern is a plain name, filled in as text.
                return ((pattern.replace(number, block).replace("\\.", "."), None),)
        for pattern, parts in cls.ldm_fused_layers:
            if found := re.fullmatch(pattern, name):
                return tuple((found.expand(layer), pick) for layer, pick in parts)
        return ()

    @classmethod
    def infer_variant(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], prediction_type: str = ""
    ) -> str:
        """Tell apart the base models of a family, as keys of `lora_naming.bases`; "" is the usual one.

        Args:
            config: the denoiser's configuration, or what `infer_config` makes of a single file.
            tensors: the names of a checkpoint's tensors, as its files call them, and their shapes.
            prediction_type: what the scheduler's configuration says; "" if there is none.
        """
        return ""

    @classmethod
    def infer_config(cls, tensors: Sequence[str]) -> Mapping[str, Any]:
        """Return what the tensor names of a single file tell of the denoiser's configuration."""
        return {}

    @classmethod
    def kohya_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        """Return the name of a denoiser's layer in a LoRA of kohya's naming; None where it has none."""
        # kohya names layers as single files do, with dots made underscores.
        original = cls.ldm_layer_name(layer, config)
        return None if original is None else "lora_unet_" + original.replace(".", "_")
