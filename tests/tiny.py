"""Tiny pipelines of every family, of the real classes with random weights."""

import inspect
import re

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

import expunge
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


def merged(words, mark, letters):
    """A vocabulary of letters and whole words, those that stand behind a space marked, and its merges.

    A word's merges run from its first letter on; those of marked words come first, so that no other
    word's get in their way.
    """
    vocab = {piece: i for i, piece in enumerate(letters)}
    merges = []
    for begin in (mark, ""):
        for word in words:
            parts = [*begin, *word]
            while len(parts) > 1:
                if (parts[0], parts[1]) not in merges:
                    merges.append((parts[0], parts[1]))
                parts[:2] = [parts[0] + parts[1]]
                vocab.setdefault(parts[0], len(vocab))
    return vocab, merges


def gemma_tokenizer(words=WORDS):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [*special, "▁", "\n", *(chr(c) for c in range(33, 127))]
    vocab, merges = merged(words, "▁", letters)
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def gemma(width, tokenizer):
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return spread(Gemma2Model(config)).eval()


QWEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""A chat template after Qwen3's."""


def qwen_tokenizer(words=WORDS):
    letters = ["<|endoftext|>", "Ġ", "Ċ", *(chr(c) for c in range(33, 127))]
    vocab, merges = merged((*words, "user", "assistant", "system", "think"), "Ġ", letters)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = QWEN
    return tokenizer


def qwen(width, tokenizer, layers=3, kind=Qwen3ForCausalLM):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return spread(kind(config)).eval()


def flux2(seed=0, distilled=True):
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    spread(transformer)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        # As deep as the layers that the pipeline reads.
        text_encoder=qwen(16, tokenizer, layers=28),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        is_distilled=distilled,
    )
    pipe.default_sample_size = 8
    return pipe


MISTRAL = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}"
    "{% endfor %}[/{{ message.role }}]{% endfor %}"
)
"""A chat template in which a message is a list of parts."""


def mistral(width, tokenizer):
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    return spread(Mistral3ForConditionalGeneration(config)).eval()


def flux2_dev(seed=0):
    pipe = flux2(seed)
    tokenizer = pipe.tokenizer
    tokenizer.chat_template = MISTRAL
    config = {**pipe.transformer.config, "guidance_embeds": True}
    dev = Flux2Pipeline(
        scheduler=pipe.scheduler,
        vae=pipe.vae,
        text_encoder=mistral(16, tokenizer),
        tokenizer=tokenizer,
        transformer=spread(Flux2Transformer2DModel.from_config(config)).eval(),
    )
    dev.default_sample_size = 8
    return dev


def flux2_vae():
    found = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).eval()
    found.bn.running_mean.normal_(0, 0.3)
    found.bn.running_var.uniform_(0.5, 2)
    return found


def z_image(seed=0):
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=48,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    torch.nn.init.normal_(transformer.cap_pad_token)
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.uniform_(transformer.cap_embedder[0].weight, 0.5, 2)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen(48, tokenizer, kind=Qwen3Model),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    return pipe


def qwen_vl(width, tokenizer):
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
    )
    return spread(Qwen2_5_VLForConditionalGeneration(config)).eval()


def qwen_image(seed=0):
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 6, 6),
    )
    spread(transformer)
    torch.nn.init.uniform_(transformer.txt_norm.weight, 0.5, 2)
    video = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.9, 1.1, 1.3, 0.8],
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=video.eval(),
        text_encoder=qwen_vl(48, tokenizer),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    return pipe


def chroma(seed=0):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(32, tokenizer),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = 8
    return pipe


def umt5(width, tokenizer):
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4
    )
    return spread(UMT5EncoderModel(config)).eval()


def wan(seed=0, **options):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    video = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.9, 1.1, 1.3, 0.8],
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5(24, tokenizer),
        vae=video.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=spread(transformer).eval(),
        **options,
    )
    pipe.default_sample_size = 8
    return pipe


def spread(module, scale=0.3):
    """Weights large enough that a tiny language model tells words apart."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    return module


def pixart(seed=0, alpha=False, **scheduler):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        tokenizer=tokenizer,
        text_encoder=spread(t5(24, tokenizer)),
        vae=vae(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(**scheduler),
    )


def sana_sprint(seed=0):
    return sana(seed, SanaSprintPipeline, SCMScheduler(prediction_type="trigflow", sigma_data=0.5))


def sana(seed=0, cls=SanaPipeline, scheduler=None):
    torch.manual_seed(seed)
    asked = inspect.signature(cls.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer((*WORDS, *re.findall(r"[A-Za-z]+", " ".join(asked))))
    transformer = SanaTransformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=24,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=scheduler is not None,
    )
    return cls(
        tokenizer=tokenizer,
        text_encoder=gemma(24, tokenizer),
        vae=deep_vae(),
        transformer=transformer.eval(),
        scheduler=scheduler
        or DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def deep_vae():
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    ).eval()


PIPELINES = {
    "stable_diffusion": tiny_pipeline,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "flux2": flux2,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "wan": wan,
}
"""How to make a tiny pipeline of every family."""

VARIANTS = {"sana_sprint": sana_sprint}
"""Pipelines of families that have another one, and keep the contract in a way of their own."""

SETTINGS = {
    "pixart": {"max_sequence_length": 32},
    "sana": {"max_sequence_length": 32},
    "sana_sprint": {"max_sequence_length": 32},
    "flux2": {"max_sequence_length": 64},
    "z_image": {"max_sequence_length": 64},
    "qwen_image": {"max_sequence_length": 192},
    "chroma": {"max_sequence_length": 32},
    "wan": {"max_sequence_length": 32},
}
"""What makes a family's models fast: few tokens."""

SIZE = {"height": 16, "width": 16}

CALLS = {
    "flux": lambda guidance: {"guidance_scale": guidance, **SIZE},
    "flux2": lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 64, **SIZE},
    # Its own scale is less by one.
    "z_image": lambda guidance: {"guidance_scale": guidance - 1, "max_sequence_length": 64, **SIZE},
    "qwen_image": lambda guidance: {"true_cfg_scale": guidance, "negative_prompt": "", **SIZE},
    "chroma": lambda guidance: {"guidance_scale": guidance, "max_sequence_length": 32, **SIZE},
    "wan": lambda guidance: {
        "guidance_scale": guidance,
        "max_sequence_length": 32,
        "num_frames": 1,
        "height": 64,
        "width": 64,
    },
    "pixart": lambda guidance: {
        "guidance_scale": guidance,
        "max_sequence_length": 32,
        "use_resolution_binning": False,
    },
    "sana": lambda guidance: {
        "guidance_scale": guidance,
        "max_sequence_length": 32,
        "use_resolution_binning": False,
        "height": 32,
        "width": 32,
    },
}
"""What a family's pipeline is called with to draw at a guidance, where it is more than that."""


def loaded(source, family):
    """A family's tiny model, set up to be fast."""
    model = expunge.load(source)
    for name, value in SETTINGS.get(family, {}).items():
        setattr(model, name, value)
    return model


def drawn_by_diffusers(pipe, family, prompt, seeds, steps, guidance, **more):
    """The images that a pipeline itself draws of a prompt, one a seed."""
    pipe.set_progress_bar_config(disable=True)
    if family == "sana_sprint":
        # Two steps have a time of their own in between, which other numbers refuse.
        family, more = "sana", {"intermediate_timesteps": 1.3 if steps == 2 else None, **more}
    call = CALLS.get(family, lambda guidance: {"guidance_scale": guidance})(guidance)
    if "negative_prompt" in call:
        call["negative_prompt"] = [""] * len(seeds)
    found = pipe(
        prompt=[prompt] * len(seeds),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **{**call, **more},
    )
    # Of a video the frame in the middle.
    return found.images if hasattr(found, "images") else found.frames[:, found.frames.shape[1] // 2]
