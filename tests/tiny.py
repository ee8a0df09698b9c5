"""Tiny pipelines of every family, of the real classes with random weights."""

import re

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from conftest import WORDS, tiny_pipeline, tiny_tokenizer
from expunge.base import registry


def clip(width, projected=True, projection=16):
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection,
        initializer_factor=3.0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer(length=512):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS)]
    pieces += [chr(c) for c in range(33, 127)]
    vocab = [(piece, 0.0 if i < 3 else -float(2 + i % 7)) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def t5(width, tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        initializer_factor=1.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def vae(channels=4, **options):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        **options,
    ).eval()


def sdxl(seed=0, zeros=True):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 16,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(32, projected=False),
        text_encoder_2=clip(16),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def sd3(seed=0, with_t5=True, **scheduler):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(24),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(16),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5(48, tokenizer) if with_t5 else None,
        tokenizer_3=tokenizer if with_t5 else None,
    )


def flux(seed=0, told=True):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=told,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=told),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(24, projected=False),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5(32, tokenizer),
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    return pipe


def ldm_vae(key):
    """What the first code calls a tensor of the autoencoder."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"),
                         ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
                         ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")):  # fmt: skip
        key = key.replace(ours, theirs)
    return "first_stage_model." + key


def single_file(pipe, path):
    """Write a Stable Diffusion as a single file, as from the first code."""
    family = registry.get("families", "stable_diffusion")
    state = {"model_ema.decay": torch.zeros(())}
    for key, tensor in pipe.unet.state_dict().items():
        layer, _, parameter = key.rpartition(".")
        name = family.ldm_layer_name(layer, pipe.unet.config)
        state[f"model.diffusion_model.{name}.{parameter}"] = tensor
    for key, tensor in pipe.vae.state_dict().items():
        attention = "attentions" in key and tensor.ndim == 2
        state[ldm_vae(key)] = tensor[..., None, None].contiguous() if attention else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        stem = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{stem}"] = tensor
    save_file(state, path, {"format": "pt", "modelspec.title": "tiny"})


PIPELINES = {"stable_diffusion": tiny_pipeline, "sdxl": sdxl, "sd3": sd3, "flux": flux}
"""How to make a tiny pipeline of every family."""
