"""Z-Image: base and turbo."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._flow import end, shift
from expunge.families._llm import LanguageModelText, filled
from expunge.families._lora import ALL, BaseModel, LoraNaming, split_equally
from expunge.text import Text, TextEntry


class ZImage(LanguageModelText):
    """A Qwen3, and a single-stream transformer in which text and image share every layer.

    Tokens are the language model's last hidden states but one, as many as the prompt has in its chat
    template, at most 512; the padding is never read. The norm in `cap_embedder` comes first; its linear
    layer is the one static entry. Two `context_refiner` blocks behind it see text only, and no time.

    Guidance of 1 is none, as everywhere here: the pipeline's own scale is less by one, so that its 0,
    the turbo model's, is 1.
    """

    pipelines = ("ZImagePipeline",)
    read_ahead = ("cap_embedder.0",)
    text_refiner = ("cap_embedder.1", "context_refiner.")
    most_tokens = 512
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other",
        "a prompt a row": "the tokens of all prompts of a batch are one row to its text layers",
        "guidance in one batch": "its denoiser takes latents and prompts as lists",
    }
    single_files = ("z-image-turbo",)
    single_file_key = "cap_embedder.0.weight"
    ldm_layers = (
        (r"layers\.(\d+)\.attention\.to_out\.0", r"layers.\1.attention.out"),
        (r"context_refiner\.(\d+)\.attention\.to_out\.0", r"context_refiner.\1.attention.out"),
        (r"noise_refiner\.(\d+)\.attention\.to_out\.0", r"noise_refiner.\1.attention.out"),
        (r"all_x_embedder\.2-1", r"x_embedder"),
        (r"all_final_layer\.2-1\.linear", r"final_layer.linear"),
        (r"all_final_layer\.2-1\.adaLN_modulation\.1", r"final_layer.adaLN_modulation.1"),
        (r"((?!.*\.attention\.to_[qkv]$).+)", r"\1"),
    )
    ldm_fused_layers = tuple(
        (rf"{of}\.(\d+)\.attention\.qkv", split_equally(rf"{of}.\1.attention", "to_q to_k to_v"))
        for of in ("layers", "context_refiner", "noise_refiner")
    )
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="Z-Image",
        bases={
            "": BaseModel(
                "Z-Image",
                "z_image",
                "Z-Image",
                "https://github.com/Tongyi-MAI/Z-Image",
                1024,
            )
        },
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL},
            "kohya": {"diffusers": ALL, "comfyui": ALL},
        },
        words=(
            "cap_embedder",
            "context_refiner",
            "noise_refiner",
            "feed_forward",
            "all_x_embedder",
            "all_final_layer",
            "norm_final",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        # Nothing in its files tells the turbo model, by far the most used one, from the base.
        settings = {"guidance_scale": 1.0, "num_inference_steps": 8, **(settings or {})}
        super().__init__(pipe, name, settings)
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 512))

    @cached_property
    def template(self) -> _text.Template:
        said = [{"role": "user", "content": _text.MARK}]
        options = {"add_generation_prompt": True, "enable_thinking": True}
        return _text.chat_template(self.pipe.tokenizer, said, **options)

    def text_entries(self) -> tuple[TextEntry, ...]:
        return (TextEntry("transformer.cap_embedder.1", "context"),)

    def _read(self, prompts: list[str]) -> Text:
        length = self.max_sequence_length
        tokens = _text.tokenize_in(
            self.pipe.tokenizer, prompts, self.template, length, padding="longest", side="right"
        )
        return Text(
            tuple(prompts),
            filled(self._ahead(self._hidden(tokens, [-2])), length),
            filled(tokens.content_mask, length).to(self.device),
            filled(tokens.ids, length).to(self.device),
            eos_index=end(tokens)[:, None].to(self.device),
            attention_mask=filled(tokens.mask.bool(), length).to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        with self._past():
            # Its time runs from 0, all noise, to 1, and it predicts x − ε: hence 1 − t and the sign.
            # Images and texts are lists of unequal lengths; each image has a frame axis of 1.
            outputs = self.network(
                list(latents[:, :, None]),
                (self._times - self._time(t, len(latents))) / self._times,
                [row[read] for row, read in zip(text.embeddings, text.read, strict=True)],
                return_dict=False,
            )[0]
        return -torch.stack(outputs).squeeze(2)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        _, height, width = self._latent_shape
        mu = shift(scheduler.config, height // 2 * (width // 2), 1.15)
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        usual = getattr(self.pipe, "default_sample_size", 1024 // self.pipe.vae_scale_factor)
        side = self.sample_size or usual
        return self.network.in_channels, side, side
