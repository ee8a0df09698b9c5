"""PixArt-α and PixArt-Σ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._cross import CrossAttentionModel
from expunge.families._flow import end, t5
from expunge.families._lora import ALL, BaseModel, LoraNaming, split_equally
from expunge.families._noise import Diffusion
from expunge.text import Text


class PixArt(Diffusion, CrossAttentionModel):
    """A T5, and a transformer with cross-attention that predicts noise.

    Tokens are T5's: 120 of them in α and 300 in Σ (`max_sequence_length` in `expunge.json`), the padding
    never read. `caption_projection` makes of them what every key and value projection reads. The
    pipeline writes prompts in small letters before it reads them, and so they are here.

    Unconditional is the empty prompt.
    """

    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "a prompt a row": "its text layers are given padding that the denoiser does not read",
        "guidance in one batch": "it is given text ahead of layers that expunge applies itself",
    }
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    read_ahead = ("caption_projection",)
    most_tokens = 300
    ldm_layers = (
        (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_q", r"blocks.\1.cross_attn.q_linear"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.fc2"),
        (r"caption_projection\.linear_1", r"y_embedder.y_proj.fc1"),
        (r"caption_projection\.linear_2", r"y_embedder.y_proj.fc2"),
        (r"adaln_single\.emb\.timestep_embedder\.linear_1", r"t_embedder.mlp.0"),
        (r"adaln_single\.emb\.timestep_embedder\.linear_2", r"t_embedder.mlp.2"),
        (r"adaln_single\.linear", r"t_block.1"),
        (r"pos_embed\.proj", r"x_embedder.proj"),
        (r"proj_out", r"final_layer.linear"),
    )
    ldm_fused_layers = (
        (r"blocks\.(\d+)\.attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn1", "to_q to_k to_v")),
        (r"blocks\.(\d+)\.cross_attn\.kv_linear",
         split_equally(r"transformer_blocks.\1.attn2", "to_k to_v")),
    )  # fmt: skip
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="PixArt",
        bases={
            "": BaseModel(
                "PixArt",
                "pixart",
                "pixart-sigma",
                "https://github.com/PixArt-alpha/PixArt-sigma",
                1024,
            )
        },
        readers={"lora": {"comfyui": ALL}},
        words=(
            "adaln_single",
            "patch_embed",
            "caption_projection",
            "y_proj",
            "t_block",
            "cross_attn",
            "kv_linear",
            "q_linear",
            "resolution_embedder",
            "aspect_ratio_embedder",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = {"guidance_scale": 4.5, "num_inference_steps": 20, **(settings or {})}
        super().__init__(pipe, name, settings)
        alpha = type(pipe).__name__ == "PixArtAlphaPipeline"
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 120 if alpha else 300))

    @property
    def window(self) -> int:
        return self.max_sequence_length - 1  # less the end

    def count_tokens(self, prompt: str) -> int:
        return _text.count(self.pipe.tokenizer, self._cleaned([prompt])[0])

    def _read(self, prompts: list[str]) -> Text:
        tokens, states = t5(
            self.pipe.tokenizer,
            self.pipe.text_encoder,
            self._cleaned(prompts),
            self.max_sequence_length,
            masked=True,
        )
        return Text(
            tuple(prompts),
            self._ahead(states),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            eos_index=end(tokens)[:, None].to(self.device),
            attention_mask=tokens.mask.bool().to(self.device),
        )

    def _cleaned(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as the pipeline reads them: cleaned, where the libraries for it are there."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        # The pipeline warns at each call where they are missing; asked beforehand, it does not.
        clean = is_bs4_available() and is_ftfy_available()
        return list(self.pipe._text_preprocessing(list(prompts), clean_caption=clean))

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        n = len(latents)
        with self._past():
            output = self.network(
                latents,
                timestep=self._time(t, n),
                added_cond_kwargs=self._sizes(n),
                **self._asked(text, n),
                return_dict=False,
            )[0]
        # Half of what it answers may be the variance, which no sampler here asks.
        return output[:, : latents.shape[1]]

    def _sizes(self, n: int) -> dict[str, Tensor | None]:
        """The image's size and its height over its width, for a denoiser that is told them."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pipe.vae_scale_factor for side in self._latent_shape[1:])
        return {
            "resolution": torch.tensor([[height, width]]).repeat(n, 1).to(self.device, self.dtype),
            "aspect_ratio": torch.tensor([[height / width]]).repeat(n, 1).to(self.device, self.dtype),
        }
