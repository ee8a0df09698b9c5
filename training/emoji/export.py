"""Puts the trained parts together as an ordinary diffusers folder: float16 safetensors, shards under 16 MB."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.unet import SCHEDULE, build, latent_shape

DRAWING = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "anchors": {"object": "ground", "identity": "a flag", "style": "art", "explicit": "an object"},
}


def pipeline(work: Path, name: str = "unet") -> StableDiffusionPipeline:
    """The pipeline as trained so far, in float32, with the averaged weights of the denoiser."""
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder")
    weights = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")["average"]
    vae = AutoencoderKL.from_pretrained(work / "vae")
    levels = sum(key.startswith("down_blocks.") and key.endswith("resnets.0.conv2.bias") for key in weights)
    channels = tuple(weights[f"down_blocks.{k}.resnets.0.conv2.bias"].numel() for k in range(levels))
    unet = build(text_encoder.config.hidden_size, latent_shape(vae)[:2], channels)
    unet.load_state_dict(weights)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver++", solver_order=2),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/emoji/work"))
    parser.add_argument("--name", default="unet")
    parser.add_argument("--to", type=Path, default=Path("src/expunge/emoji/pipeline"))
    options = parser.parse_args()
    beside = options.to.with_name(options.to.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline(options.work, options.name).to(torch.float16).save_pretrained(beside, max_shard_size="15MB")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(options.work / "tokenizer" / name, beside / "tokenizer" / name)
    (beside / "expunge.json").write_text(json.dumps(DRAWING, indent=2) + "\n")
    shutil.rmtree(options.to, ignore_errors=True)
    beside.rename(options.to)


if __name__ == "__main__":
    main()
