"""What FLUX.1's original code calls the denoiser's layers; Chroma's calls them alike."""

from __future__ import annotations

from expunge.families._lora import split_equally, split_single_block, swap_shift_and_scale

FLUX_LAYERS = (
    (r"context_embedder", r"txt_in"),
    (r"x_embedder", r"img_in"),
    (r"time_text_embed\.text_embedder\.linear_1", r"vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", r"vector_in.out_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_1", r"time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", r"time_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", r"guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", r"guidance_in.out_layer"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"proj_out", r"final_layer.linear"),
)
FLUX_FUSED_LAYERS = (
    (r"double_blocks\.(\d+)\.img_attn\.qkv",
     split_equally(r"transformer_blocks.\1.attn", "to_q to_k to_v")),
    (r"double_blocks\.(\d+)\.txt_attn\.qkv",
     split_equally(r"transformer_blocks.\1.attn", "add_q_proj add_k_proj add_v_proj")),
    (r"single_blocks\.(\d+)\.linear1",
     split_single_block(r"single_transformer_blocks.\1", "attn.to_q attn.to_k attn.to_v proj_mlp")),
    # norm_out is diffusers' AdaLayerNormContinuous, which chunks its output into scale, then shift.
    (r"final_layer\.adaLN_modulation\.1", (("norm_out.linear", swap_shift_and_scale),)),
)  # fmt: skip
