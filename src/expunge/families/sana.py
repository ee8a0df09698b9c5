"""SANA and SANA-Sprint: a linear transformer in the latents of a deep autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.families import _text
from expunge.families._cross import CrossAttentionModel
from expunge.families._lora import ALL, BaseModel, LoraNaming, split_equally
from expunge.families._noise import Flow
from expunge.text import Text


class SprintSampler:
    """SANA-Sprint's sampler, at the times and in the latents that its denoiser is given.

    Its scheduler counts angles θ and mixes cos θ x + sin θ ε. With s = sin θ / (cos θ + sin θ), that is
    (1 − s) x + s ε but for the length: a flow at time s, whose prediction v = ε − x makes x = z − s v.
    Each step draws new noise; the last one ends in the clean image.

    Source: SANA-Sprint (Chen et al., 2025, arXiv 2503.09641), section 3.1.

    Args:
        angles: θ, falling, 0 at the end.
        times: how many a flow's time 1 is.
    """

    def __init__(self, angles: Tensor, times: int) -> None:
        sine, cosine = angles.sin(), angles.cos()
        self.levels = sine / (cosine + sine)
        self.timesteps = times * self.levels[:-1]
        # The denoiser's input for noise alone at the first angle, which is just below a right one.
        self.init_noise_sigma = float(1 / (cosine + sine)[0])
        self.taken = 0

    def step(
        self,
        output: Tensor,
        t: Tensor,
        latents: Tensor,
        generator: Sequence[torch.Generator] = (),
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Take a step, as diffusers' samplers do: (n, c, h, w).

        Args:
            output: v, (n, c, h, w).
            t: the timestep, which the order of the steps tells, too.
            latents: z, (n, c, h, w).
            generator: of each image.
            return_dict: False.
        """
        now, following = self.levels[self.taken : self.taken + 2]
        self.taken += 1
        clean = latents - now * output
        if self.taken == len(self.timesteps):
            return (clean,)
        noise = torch.cat([torch.randn((1, *clean.shape[1:]), generator=g) for g in generator])
        return ((1 - following) * clean + following * noise.to(clean),)


class Sana(Flow, CrossAttentionModel):
    """A Gemma-2, and a transformer with cross-attention, trained by flow matching.

    Prompts stand behind an instruction to the language model, which asks for details of the image; of
    its tokens the denoiser reads the first alone. There are 300 in all, the padding never read. Gemma is
    causal and has no end token, so the prompt's last token carries the whole prompt. What the key and
    value projections read is `caption_norm(caption_projection(states))`.

    Unconditional is the empty prompt without the instruction, as in the pipeline.

    SANA-Sprint draws in two steps, is told the guidance scale, and answers in one pass. Its denoiser is
    given a flow's latents and times (`SprintSampler`), so all that trains on SANA trains on it.
    """

    missing_capabilities: ClassVar[Mapping[str, str]] = {
        "a prompt a row": "its text layers are given padding that the denoiser does not read",
        "guidance in one batch": "it is given text ahead of layers that expunge applies itself",
    }
    pipelines = ("SanaPipeline", "SanaSprintPipeline")
    read_ahead = ("caption_projection", "caption_norm")
    single_files = ("sana",)
    single_file_key = "cross_attn.kv_linear.weight"
    most_tokens = 600
    ldm_layers = (
        (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn.proj"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_q", r"blocks.\1.cross_attn.q_linear"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.conv_inverted", r"blocks.\1.mlp.inverted_conv.conv"),
        (r"transformer_blocks\.(\d+)\.ff\.conv_depth", r"blocks.\1.mlp.depth_conv.conv"),
        (r"transformer_blocks\.(\d+)\.ff\.conv_point", r"blocks.\1.mlp.point_conv.conv"),
        (r"caption_projection\.linear_1", r"y_embedder.y_proj.fc1"),
        (r"caption_projection\.linear_2", r"y_embedder.y_proj.fc2"),
        (r"caption_norm", r"attention_y_norm"),
        (r"time_embed\.emb\.timestep_embedder\.linear_1", r"t_embedder.mlp.0"),
        (r"time_embed\.emb\.timestep_embedder\.linear_2", r"t_embedder.mlp.2"),
        (r"time_embed\.linear", r"t_block.1"),
        (r"patch_embed\.proj", r"x_embedder.proj"),
        (r"proj_out", r"final_layer.linear"),
    )
    ldm_fused_layers = (
        (r"blocks\.(\d+)\.attn\.qkv",
         split_equally(r"transformer_blocks.\1.attn1", "to_q to_k to_v")),
        (r"blocks\.(\d+)\.cross_attn\.kv_linear",
         split_equally(r"transformer_blocks.\1.attn2", "to_k to_v")),
    )  # fmt: skip
    lora_naming: ClassVar[LoraNaming] = LoraNaming(
        title="SANA",
        bases={
            "": BaseModel(
                "SANA",
                "sana",
                "sana",
                "https://github.com/NVlabs/Sana",
                1024,
            )
        },
        readers={"lora": {"diffusers": ALL}},
        words=(
            "patch_embed",
            "caption_projection",
            "caption_norm",
            "attention_y_norm",
            "y_proj",
            "t_block",
            "cross_attn",
            "kv_linear",
            "q_linear",
            "conv_inverted",
            "conv_depth",
            "conv_point",
            "inverted_conv",
            "depth_conv",
            "point_conv",
        ),
    )

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        sprint = bool(pipe.transformer.config.guidance_embeds)
        steps = 2 if sprint else 20
        settings = {"guidance_scale": 4.5, "num_inference_steps": steps, **(settings or {})}
        super().__init__(pipe, name, settings)
        self.contrasts: bool = not sprint
        self.max_sequence_length: int = int(settings.get("max_sequence_length", 300))
        # The pipeline holds its instruction as the default of an argument, and nowhere else.
        asked = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"]
        self._instruction = "\n".join(asked.default)

    @property
    def window(self) -> int:
        return self.max_sequence_length - 2  # less the start and what the instruction ends with

    def count_tokens(self, prompt: str) -> int:
        template = _text.Template(self._instruction)
        return _text.own_tokens(self.pipe.tokenizer, prompt.lower().strip(), template)

    def unconditional(self, n: int) -> Text:
        with torch.no_grad():
            return self._instructed([""], "")[[0] * n]

    def _read(self, prompts: list[str]) -> Text:
        return self._instructed(prompts, self._instruction)

    def _instructed(self, prompts: list[str], instruction: str) -> Text:
        """The prompts behind an instruction: its first token, and the last ones of the whole."""
        tokenizer, length = self.pipe.tokenizer, self.max_sequence_length
        # Less two, as in the pipeline: the start token and a blank, which the prompt's share counts.
        more = len(tokenizer.encode(instruction)) - 2 if instruction else 0
        said = [prompt.lower().strip() for prompt in prompts]
        template = _text.Template(instruction)
        tokens = _text.tokenize_in(tokenizer, said, template, length + more, side="right")
        states = []
        for ids, mask in zip(tokens.ids.split(64), tokens.mask.split(64), strict=True):
            encoder = self.pipe.text_encoder
            device = encoder.device
            states.append(encoder(ids.to(device), attention_mask=mask.to(device))[0])
        # The start token, and the last `length` − 1 of the padded whole.
        taken = [0, *range(more + 1, more + length)]
        read = tokens.mask[:, taken].bool()
        place = torch.arange(length)
        end = torch.where(read, place + 1, 0).amax(1, keepdim=True).clamp_max(length - 1)
        return Text(
            tuple(prompts),
            self._ahead(torch.cat(states)[:, taken]),
            tokens.content_mask[:, taken].to(self.device),
            tokens.ids[:, taken].to(self.device),
            eos_index=end.to(self.device),
            attention_mask=read.to(self.device),
        )

    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        # At the guidance scale that it draws at: a distilled denoiser has no prediction without one.
        return self._guided(latents, torch.as_tensor(t), text, self.guidance_scale)

    def _guided(self, latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        n, config = len(latents), self.network.config
        told: dict[str, Any] = {}
        scale = config.timestep_scale
        if not self.contrasts:
            scale = 1 / self._times
            told["guidance"] = torch.full((n,), guidance * config.guidance_embeds_scale).to(latents)
        with self._past():
            output = self.network(
                latents,
                timestep=self._time(t, n) * scale,
                **self._asked(text, n),
                **told,
                return_dict=False,
            )[0]
        # Half of what it answers may be the variance, which no sampler here asks.
        return output[:, : latents.shape[1]]

    @property
    def prediction_type(self) -> str:
        # Sprint's scheduler says "trigflow", which is what its pipeline makes of a flow's prediction.
        return "flow_prediction"

    def _sampler(self, steps: int) -> Any:
        if getattr(self.pipe.scheduler.config, "prediction_type", "") != "trigflow":
            return super()._sampler(steps)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        # The pipeline's arguments of these names, whose defaults stand in its signature alone.
        asked = inspect.signature(type(self.pipe).__call__).parameters
        between = asked["intermediate_timesteps"].default if steps == 2 else None
        scheduler.set_timesteps(
            steps,
            device=self.device,
            max_timesteps=asked["max_timesteps"].default,
            intermediate_timesteps=between,
        )
        return SprintSampler(scheduler.timesteps, self._times)
