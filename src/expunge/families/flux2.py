"""FLUX.2: klein 4B and 9B, and dev."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._flow import end
from expunge.families._llm import LanguageModelText
from expunge.families._lora import ALL, BaseModel, LoraNaming, split_equally, swap_shift_and_scale
from expunge.text import Text

LAYERS = {"Flux2KleinPipeline": (9, 18, 27), "Flux2Pipeline": (10, 20, 30)}
"""The hidden states of the text encoder that stand side by side, as the pipelines take them."""


class Flux2(LanguageModelText):
    """A language model (Qwen3 in klein, Mistral 3 in dev), and a transformer with joint attention.

    Three of the text encoder's hidden states, side by side, are the tokens; `context_embedder`, without
    a bias, is the one layer that reads them. There are 512, padding included: the denoiser has no mask,
    and the states of the padding, behind the prompt, know all of it. There is no pooled vector.

    Latents are the autoencoder's, four neighbours side by side, with mean 0 and variance 1.

    klein is distilled to 4 steps without guidance, and a guidance scale changes nothing; dev is told a
    guidance scale as FLUX.1-dev is; klein's base models contrast two predictions.
    """

    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    single_files = ("flux-2-dev",)
    single_file_key = "single_stream_modulation.lin.weight"
    most_tokens = 512
    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "cross-attention": "text and image attend to each other, and so each depends on the other",
        "guidance in one batch": "guidance is distilled into most of its models",
    }
    ldm_layers = (
        (r"context_embedder", r"txt_in"),
        (r"x_embedder", r"img_in"),
        (r"time_guidance_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
        (r"time_guidance_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
        (r"time_guidance_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
        (r"time_guidance_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
        (r"double_stream_modulation_img\.linear", r"double_stream_modulation_img.lin"),
        (r"double_stream_modulation_txt\.linear", r"double_stream_modulation_txt.lin"),
        (r"single_stream_modulation\.linear", r"single_stream_modulation.lin"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
        (r"proj_out", r"final_layer.linear"),
    )
    ldm_fused_layers = (
        (r"double_blocks\.(\d+)\.img_attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn", "to_q to_k to_v")),
        (r"double_blocks\.(\d+)\.txt_attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn", "add_q_proj add_k_proj add_v_proj")),
        (r"final_layer\.adaLN_modulation\.1", (("norm_out.linear", swap_shift_and_scale),)),
    )  # fmt: skip
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="FLUX.2",
        bases={
            "": BaseModel(
                "FLUX.2",
                "flux2",
                "flux-2",
                "https://github.com/black-forest-labs/flux2",
                1024,
            )
        },
        readers={
            "lora": {"diffusers": ALL, "comfyui": ALL},
            "kohya": {"diffusers": ALL, "comfyui": ALL},
        },
        words=(
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
            "to_qkv_mlp_proj",
            "linear_in",
            "linear_out",
            "time_guidance_embed",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        told = bool(pipe.transformer.config.guidance_embeds)
        distilled = bool(pipe.config.get("is_distilled", False))
        own = {"guidance_scale": 1.0, "num_inference_steps": 4} if distilled else {
            "guidance_scale": 4.0, "num_inference_steps": 50
        }  # fmt: skip
        settings = {**own, **(settings or {})}
        super().__init__(pipe, name, settings)
        self.told = told
        # A base model is neither: it alone pays for two predictions a step.
        self.contrasts: bool = not (told or distilled)
        self.takes_guidance: bool = not distilled
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 512))
        # The pipeline's argument of the same name: a shallower text encoder needs other layers.
        self.layers = tuple(settings.get("text_encoder_out_layers", LAYERS[type(pipe).__name__]))

    @cached_property
    def template(self) -> _text.Template:
        if "Klein" in type(self.pipe).__name__:
            said: list[dict[str, Any]] = [{"role": "user", "content": _text.MARK}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
            return _text.chat_template(self.pipe.tokenizer, said, **options)
        said = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("system", self.pipe.system_message), ("user", _text.MARK))
        ]
        return _text.chat_template(self.pipe.tokenizer, said, add_generation_prompt=False)

    def _read(self, prompts: list[str]) -> Text:
        # What stands for an image to dev's text encoder is taken out of prompts, as in the pipeline.
        said = [prompt.replace("[IMG]", "") for prompt in prompts] if self.told else prompts
        tokens = _text.tokenize_in(self.pipe.tokenizer, said, self.template, self.max_sequence_length)
        return Text(
            tuple(prompts),
            self._hidden(tokens, self.layers).to(self.device, self.dtype),
            tokens.content_mask.to(self.device),
            tokens.ids.to(self.device),
            eos_index=end(tokens)[:, None].to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        return self._guided(latents, torch.as_tensor(t), text, 1.0)

    def _guided(self, latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        n, _, height, width = latents.shape
        # The latents are (n, c, h, w) with neighbours already side by side in c: a token is one place.
        output = self.network(
            hidden_states=latents.flatten(2).mT,
            timestep=self._time(t, n) / self._times,
            guidance=torch.full((n,), guidance, device=self.device) if self.told else None,
            encoder_hidden_states=text.embeddings,
            txt_ids=self.pipe._prepare_text_ids(text.embeddings[:1]).to(self.device),
            img_ids=self.pipe._prepare_latent_ids(latents[:1]).to(self.device),
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, (height, width))

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        _, height, width = self._latent_shape
        # A shift fitted to steps and tokens, whose figures stand in the pipeline's module alone.
        measure = sys.modules[type(self.pipe).__module__].compute_empirical_mu
        mu = measure(image_seq_len=height * width, num_steps=steps)
        if getattr(scheduler.config, "use_flow_sigmas", False):
            scheduler.set_timesteps(steps, device=self.device, mu=mu)
        else:
            sigmas = np.linspace(1.0, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        # Halved, for a latent here is two by two of the autoencoder's.
        side = (self.sample_size or self.pipe.default_sample_size) // 2
        return self.network.config.in_channels, side, side

    @property
    def _pixels(self) -> tuple[int, int]:
        _, height, width = self._latent_shape
        scale = 2 * self.pipe.vae_scale_factor
        return height * scale, width * scale

    @property
    def latents_side(self) -> int:
        return 2 * super().latents_side

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (self.pipe._patchify_latents(latents) - mean) / deviation

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return self.pipe._unpatchify_latents(latents * deviation + mean)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and deviation of the autoencoder's latents, (1, channels, 1, 1)."""
        # The autoencoder has no scaling factor: a batch norm's running statistics stand for it.
        norm, config = self.pipe.vae.bn, self.pipe.vae.config
        mean, variance = (x.view(1, -1, 1, 1).to(like) for x in (norm.running_mean, norm.running_var))
        return mean, (variance + config.batch_norm_eps).sqrt()
