"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._flow import FlowModel, beside, end, shift, t5
from expunge.families._lora import ALL, BaseModel, LoraNaming, split_equally, swap_shift_and_scale
from expunge.text import Text

T5_TOKENS = 256
"""How many tokens of T5 the pipeline gives the denoiser."""


class SD3(FlowModel):
    """Two CLIP text encoders and a T5, and a transformer with joint attention (MMDiT).

    Tokens are CLIP's 77, both encoders' side by side and filled up with zeros to T5's width, and after
    them T5's 256: two parts of one text. The pooled vector is both CLIPs' pooled outputs side by side.
    Without T5 (`text_encoder_3=None`), its tokens are zeros, as in the pipeline.

    Unconditional is the empty prompt.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    most_tokens = T5_TOKENS
    # "v1" is what diffusers calls all that it does not know.
    single_files = ("sd3", "sd35_large", "sd35_medium", "v1")
    single_file_key = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
    ldm_layers = (
        (r"context_embedder", r"context_embedder"),
        (r"time_text_embed\.text_embedder\.linear_1", r"y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", r"y_embedder.mlp.2"),
        (r"time_text_embed\.timestep_embedder\.linear_1", r"t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", r"t_embedder.mlp.2"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        (
            r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj",
            r"joint_blocks.\1.context_block.mlp.fc1",
        ),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
        (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        (r"proj_out", r"final_layer.linear"),
    )
    ldm_fused_layers = (
        (r"joint_blocks\.(\d+)\.x_block\.attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn", "to_q to_k to_v")),
        (r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv",
         split_equally(r"transformer_blocks.\1.attn2", "to_q to_k to_v")),
        (r"joint_blocks\.(\d+)\.context_block\.attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn", "add_q_proj add_k_proj add_v_proj")),
        (r"final_layer\.adaLN_modulation\.1", (("norm_out.linear", swap_shift_and_scale),)),
        (r"x_embedder\.proj", (("pos_embed.proj", None),)),
    )  # fmt: skip
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="SD 3, 3.5",
        bases={
            variant: BaseModel("SD 3", "sd3", f"stable-diffusion-3-{variant or 'm'}")
            for variant in ("", "m", "5-medium", "5-large")
        },
        text_keys={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL},
            "kohya": {"comfyui": ALL, "forge": ALL, "sd-scripts": ALL},
        },
    )

    def _read(self, prompts: list[str]) -> Text:
        pipe, length = self.pipe, self.pipe.tokenizer.model_max_length
        first = _text.tokenize(pipe.tokenizer, prompts, length)
        second = _text.tokenize(pipe.tokenizer_2, prompts, length)
        states, pooled = _text.penultimate(pipe.text_encoder, first.ids)
        more, also_pooled = _text.penultimate(pipe.text_encoder_2, second.ids)
        third, t5_states = self._t5(prompts)
        parts = (length, T5_TOKENS)
        return Text(
            tuple(prompts),
            beside(torch.cat([states, more], -1), t5_states.to(states)).to(self.device, self.dtype),
            torch.cat([first.content_mask, third.content_mask], 1).to(self.device),
            torch.cat([first.ids, third.ids], 1).to(self.device),
            torch.cat([pooled, also_pooled], 1).to(self.device, self.dtype),
            # Two ends, one a part: where CLIP's and where T5's summary of the prompt stand.
            torch.stack([end(first), parts[0] + end(third)], 1).to(self.device),
            parts,
        )

    def _t5(self, prompts: Sequence[str]) -> tuple[_text.Tokens, Tensor]:
        """Encode with T5; without one, return zeros, each prompt with its end token first."""
        if self.pipe.text_encoder_3 is not None:
            return t5(self.pipe.tokenizer_3, self.pipe.text_encoder_3, prompts, T5_TOKENS)
        empty = torch.zeros(len(prompts), T5_TOKENS, dtype=torch.int64)
        # One token is real in each, so that the place of the end stays defined.
        mask = torch.zeros_like(empty).index_fill(1, torch.tensor([0]), 1)
        width = self.network.config.joint_attention_dim
        return _text.Tokens(empty, mask, empty > 0), torch.zeros(len(prompts), T5_TOKENS, width)

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        return self.network(
            hidden_states=latents,
            timestep=self._time(t, len(latents)),
            encoder_hidden_states=text.embeddings,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]

    @classmethod
    def infer_variant(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], prediction_type: str = ""
    ) -> str:
        """Tell apart SD 3 ("m"), 3.5 medium ("5-medium") and 3.5 large ("5-large").

        Args:
            config: the denoiser's configuration, or what `infer_config` makes of a single file.
            tensors: the names and shapes of a checkpoint's tensors.
            prediction_type: what the scheduler's configuration says.
        """
        # 3.5 alone normalises queries and keys; large has 38 blocks and medium 24.
        if not (config.get("qk_norm") or any(".ln_q." in name for name in tensors)):
            return "m"
        found = (re.search(r"(joint|transformer)_blocks\.(\d+)\.", name) for name in tensors)
        return "5-large" if len({block[2] for block in found if block}) > 30 else "5-medium"

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        # Published SD 3 schedulers shift by a constant of their own; dynamic ones need the image's size.
        extra = {}
        if scheduler.config.get("use_dynamic_shifting"):
            _, height, width = self._latent_shape
            patch = self.network.config.patch_size
            extra["mu"] = shift(scheduler.config, (height // patch) * (width // patch), 1.16)
        scheduler.set_timesteps(steps, device=self.device, **extra)
