"""Puts the trained parts together: an ordinary diffusers folder, and beside it the picture tower of the CLIP.

Float16 safetensors, shards under 16 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from training.emoji.unet import SCHEDULE, build, latent_shape
from training.emoji.world import WORK

DRAWING = {
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "anchors": {"object": "ground", "identity": "a flag", "style": "art", "explicit": "an object"},
}


def averaged(work: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The mean of the averaged weights of some checkpoints; a name may carry its weight, as in `unet:4`."""
    mean: dict[str, torch.Tensor] = {}
    weights = [float(name.partition(":")[2] or 1) for name in names]
    for name, weight in zip(names, weights, strict=True):
        file = work / f"{name.partition(':')[0]}.pt"
        for key, value in torch.load(file, weights_only=True, map_location="cpu")["average"].items():
            mean[key] = mean.get(key, 0) + weight / sum(weights) * value.float()
    return mean


def pipeline(work: Path, *names: str) -> StableDiffusionPipeline:
    """The pipeline as trained so far, in float32, with the averaged weights of the denoiser's checkpoints."""
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder")
    weights = averaged(work, names or ("unet",))
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


def set_in(config: Path, **values: object) -> None:
    """Sets entries of a config file; None takes one out."""
    settings = {**json.loads(config.read_text()), **values}
    kept = {name: value for name, value in settings.items() if name not in values or value is not None}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def write_pipeline(work: Path, names: Sequence[str], folder: Path) -> None:
    pipeline(work, *names).to(torch.float16).save_pretrained(folder, max_shard_size="15MB")
    # transformers reads weights in the format their config names; the other parts are read as float32.
    set_in(folder / "text_encoder" / "config.json", dtype="float32")
    set_in(folder / "vae" / "config.json", _name_or_path=None)  # a folder of the training, of no use to anybody
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / file, folder / "tokenizer" / file)
    (folder / "expunge.json").write_text(json.dumps(DRAWING, indent=2) + "\n")


def write_clip(work: Path, folder: Path) -> None:
    CLIPVisionModel.from_pretrained(work / "clip").to(torch.float16).save_pretrained(folder)
    set_in(folder / "config.json", dtype="float32")
    projections = load_file(work / "clip" / "projections.safetensors")
    save_file({name: value.half() for name, value in projections.items()}, folder / "projections.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument(
        "--name",
        nargs="+",
        default=["unet"],
        help="the denoiser's checkpoint; of several the mean, NAME:WEIGHT",
    )
    parser.add_argument("--to", type=Path, default=Path("src/expunge/emoji"))
    options = parser.parse_args()
    beside = options.to / ".new"
    shutil.rmtree(beside, ignore_errors=True)
    write_pipeline(options.work, options.name, beside / "pipeline")
    write_clip(options.work, beside / "clip")
    for part in ("pipeline", "clip"):
        shutil.rmtree(options.to / part, ignore_errors=True)
        (beside / part).rename(options.to / part)
    beside.rmdir()


if __name__ == "__main__":
    main()
