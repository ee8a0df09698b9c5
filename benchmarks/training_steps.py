"""What training costs at true size: seconds a step and the peak of memory, of MACE and ANT.

Pipelines of the real classes, whole, with random weights of the true shapes in half precision; the
text is the shipped tokenizer's. Each row is an erasure in a process of its own, drawing and all, with
a few training steps: *mace*, its low-rank changes (the preset for objects); *ant-many*, low-rank
changes on all layers (the preset for identities); *ant-one*, half of all weights, by a saliency mask
(the preset for explicit content). Each with what saves memory and without. The peak is of the GPU's
allocator, or of the resident set on a CPU, weights and all; a step's seconds are the median between
two steps of the optimiser. Writes `benchmarks/results/training_steps.json`.

    python benchmarks/training_steps.py [--models sd14 sdxl] [--methods mace ant-many ant-one]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from true_size import SD14, SDXL, peak

import expunge
from expunge import Concept, Problem
from expunge.base import registry
from expunge.base.fields import leaves
from expunge.base.files import replacing
from expunge.checkpoints.offload import offload_idle_parts

TINY = {
    "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
AUTOENCODER = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"denoiser": TINY, "text": [(32, 2, 4, "quick_gelu")],
             "autoencoder": {"block_out_channels": [8, 8], "norm_num_groups": 4}},
    "sd14": {"denoiser": SD14, "text": [(768, 12, 12, "quick_gelu")], "autoencoder": AUTOENCODER},
    "sdxl": {"denoiser": SDXL, "text": [(768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu")],
             "autoencoder": AUTOENCODER},
}  # fmt: skip
"""The sizes of each; a text encoder's are its width, layers, heads and activation."""

METHODS: dict[str, dict[str, Any]] = {
    "mace": {"method": "mace", "preset": "object", "stages": ("suppress",), "masks": "none"},
    "ant-many": {"method": "ant", "preset": "identity", "fuse_prior": 0.0, "ridge": 100.0},
    "ant-one": {"method": "ant", "preset": "explicit", "maps": 2, "map_samples": 2, "settle": 0.0},
}
"""What is trained, one concept at a time."""

WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "turns": ("turns",),
    "checkpointing": ("gradient checkpointing", "turns"),
    "checkpointing, offload": ("gradient checkpointing", "offload"),
}
"""What saves memory; *turns*, in which text encoders and autoencoder leave, is what `load` does."""


def pipeline(name: str) -> Any:
    """A pipeline of these sizes with random weights."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    spec = MODELS[name]
    tokenizer = CLIPTokenizer.from_pretrained(registry.HERE / "emoji" / "pipeline" / "tokenizer")
    blocks = len(spec["autoencoder"]["block_out_channels"])
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**spec["denoiser"]).eval(),
        "vae": AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            latent_channels=4,
            **spec["autoencoder"],
        ).eval(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
    }
    for i, (width, layers, heads, activation) in enumerate(spec["text"]):
        config = CLIPTextConfig(
            vocab_size=max(49408, len(tokenizer)) if width > 100 else len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        kind = CLIPTextModelWithProjection if i else CLIPTextModel
        end = "_2" if i else ""
        parts |= {f"text_encoder{end}": kind(config).eval(), f"tokenizer{end}": tokenizer}
    if len(spec["text"]) > 1:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **extra)


def run(
    name: str,
    method: str,
    way: str,
    device: str,
    dtype: torch.dtype,
    fields: dict[str, Any],
    folder: str,
) -> dict[str, float]:
    """Seconds a step and peak memory of one erasure."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device if way == "plain" else "cpu"):
        pipe = pipeline(name)
    torch.set_default_dtype(torch.float32)
    if "offload" in WAYS[way]:
        pipe.enable_model_cpu_offload(device=device)
    elif "turns" in WAYS[way] and device != "cpu":
        offload_idle_parts(pipe, "unet", torch.empty(0, device=device).device)
    else:
        pipe.to(device)
    if "gradient checkpointing" in WAYS[way]:
        pipe.unet.enable_gradient_checkpointing()
    model, spec = expunge.load(pipe), {**METHODS[method], **fields, "batch_size": 1, "captions": ""}
    kind, preset = registry.get("methods", spec.pop("method")), spec.pop("preset")
    known = {field.name for field in leaves(kind)}  # what is grouped inside a method, too
    made = kind.preset(preset, **{key: value for key, value in spec.items() if key in known})
    ticks: list[float] = []

    def tick(*_: Any) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(tick)
    anchor = "sky" if method == "mace" else ""
    expunge.erase(model, Problem((Concept("airplane", anchor),)), made, work=folder)
    hook.remove()
    most = torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak()
    return {
        "weights, GB": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
        "seconds a step": statistics.median(b - a for a, b in itertools.pairwise(ticks)),
        "peak, GB": most / 1e9,
    }


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["sd14", "sdxl"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--steps", type=int, default=6, help="training steps; at least 2")
    parser.add_argument("--images", type=int, default=8, help="images or trajectories drawn first")
    parser.add_argument("--image-steps", type=int, default=50, help="denoising steps of each")
    name = Path(__file__).parent / "results" / "training_steps.json"
    parser.add_argument("--to", type=Path, default=name)
    options = parser.parse_args()
    fields = {
        "max_train_steps": options.steps,
        "num_images": options.images,
        "trajectories": options.images,
        "num_inference_steps": options.image_steps,
        "trajectory_steps": options.image_steps,
    }
    rows = json.loads(options.to.read_text()) if options.to.exists() else []
    dtype = getattr(torch, options.dtype)
    for model, method, way in (
        (model, method, way) for model in options.models for method in options.methods
        for way in options.ways if options.device != "cpu" or way in ("plain", "checkpointing")
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            given = (model, method, way, options.device, dtype, fields, f"{folder}/work")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(run, given)
        on_cpu = options.device == "cpu"
        row = {
            "model": model,
            "method": method,
            "way": way,
            **{key: round(value, 3) for key, value in found.items()},
            "dtype": options.dtype,
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(options.device),
            "pictures": [options.images, options.image_steps],
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            **{package: version(package) for package in ("expunge", "torch", "diffusers")},
        }
        print(json.dumps(row), flush=True)
        same = ("model", "method", "way", "device", "dtype")
        rows = [*(r for r in rows if any(r[key] != row[key] for key in same)), row]
        with replacing(options.to) as file:
            file.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
