"""Tiny pipelines of every family, of the real classes with random weights."""

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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from conftest import WORDS, tiny_pipeline, tiny_tokenizer


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


PIPELINES = {"stable_diffusion": tiny_pipeline, "sdxl": sdxl, "sd3": sd3, "flux": flux}
"""How to make a tiny pipeline of every family."""
