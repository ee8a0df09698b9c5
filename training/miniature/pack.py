"""Packs what was trained into the folder that ships: the pipeline, the recogniser, what is known of them, and a card.

    python -m training.miniature.pack --work W --to src/expunge/miniature

    FOLDER/pipeline/      an ordinary diffusers folder in float16, files up to 16 MB; `expunge.json`: steps, guidance,
                          anchors, and all names by kind
    FOLDER/recogniser/    the judge: config.json, model.safetensors, held_out.json
    FOLDER/clip/          the image tower that goes with the text encoder, where it was trained
    FOLDER/concepts.json  objects with their names, design sets, super-categories, people and artists with their traits
    FOLDER/gates.json     what `training.miniature.gates` measured, where it did
    FOLDER/drawn.png      what it draws of the prompts that training looks at
    FOLDER/README.md      the card: gates and yardstick where they were measured, "not measured yet" elsewhere
    FOLDER/NOTICE         the licences of what it was trained on

Reads W/tokenizer, text_encoder, vae, unet.pt and recogniser.pt; gates.json, recogniser.json, people.png and artists.png where
they are there, and the drawings, on which the recogniser's thresholds are measured. All is written beside and moved.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from expunge.base.files import check_weights
from expunge.miniature.recogniser import Network, Thresholds, describe_config
from training.emoji.export import set_in
from training.miniature.card import load, write_card
from training.miniature.loop import read_stage
from training.miniature.recogniser import Names, Source, calibrate, write_weights
from training.miniature.sheets import sheet
from training.miniature.unet import GUIDANCE, PROMPTS, SCHEDULE, STEPS, Words, build, draw
from training.miniature.world import WORK, World, read_world

LARGEST = 16 * 2**20  # bytes of a file that is committed
ROOT = Path(__file__).parents[2]
PARTS = (
    "pipeline", "recogniser", "clip", "concepts.json", "gates.json", "README.md", "NOTICE",
    "drawn.png", "people.png", "artists.png",
)  # fmt: skip
DRAWING: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE,
    "anchors": {"object": "ground", "identity": "a person", "style": "art", "explicit": "an object"},
}


def names_of(world: World) -> dict[str, list[str]]:
    """All names by kind; a weapon may be erased as an object or as unsafe."""
    unsafe = [name for label in world.labels if label.group == "unsafe" for name in label.names]
    return {
        "object": [*(name for label in world.labels for name in label.names), *world.shapes, *world.kinds],
        "identity": [person.name for person in world.named],
        "style": [*(artist.name for artist in world.artists), *world.styles],
        "explicit": ["weapon", *unsafe],
    }


def concepts_of(world: World) -> dict[str, Any]:
    """What can be drawn, and what makes it."""
    return {
        "objects": {label.name: {"names": list(label.names), "group": label.group} for label in world.labels},
        "shapes": list(world.shapes),
        "design sets": list(world.styles),
        "super-categories": {kind: list(members) for kind, members in world.kinds.items()},
        "unsafe, implied": {"trained": list(world.implied), "held out": list(world.implied_held_out)},
        "in no suite": list(world.tuning),
        "people": [asdict(person) for person in world.named],
        "artists": [asdict(artist) for artist in world.artists],
    }


def averaged(work: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights of a stage's checkpoint.

    Raises:
        SystemExit: it has none yet.
    """
    return read_stage(work, name)["average"]


def pipeline(work: Path, name: str = "unet") -> StableDiffusionPipeline:
    """The pipeline as trained so far, in float32, with the averaged weights of the denoiser's checkpoint.

    Raises:
        SystemExit: a part is missing.
    """
    for part in ("tokenizer", "text_encoder", "vae"):
        if not (work / part).is_dir():
            raise SystemExit(f"There is no {work / part}: copy src/expunge/miniature/pipeline/{part} there.")
    weights = averaged(work, name)
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32)
    levels = range(sum(key.startswith("down_blocks.") and key.endswith("resnets.0.conv1.bias") for key in weights))
    channels = [len(weights[f"down_blocks.{k}.resnets.0.conv1.bias"]) for k in levels]
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    unet = build(vae.config.latent_channels, side, text_encoder.config.hidden_size, channels)
    unet.load_state_dict(weights)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_pipeline(pipe: StableDiffusionPipeline, work: Path, world: World, folder: Path) -> dict[str, int]:
    """Writes the diffusers folder, `pipe` then in float16; returns the parameters of its parts."""
    pipe.to(torch.float16).save_pretrained(folder, max_shard_size="15MB")
    # transformers reads weights in the format their config names; the other parts are read as float32.
    set_in(folder / "text_encoder" / "config.json", dtype="float32", torch_dtype=None)
    for part in ("vae", "unet"):
        set_in(folder / part / "config.json", _name_or_path=None)  # a folder of the training, of no use to anybody
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / file, folder / "tokenizer" / file)
    gates = load(work / "gates.json")  # a model is drawn as its gates were measured
    settings = DRAWING | ({"num_inference_steps": gates["steps"], "guidance_scale": gates["guidance"]} if gates else {})
    write(folder / "expunge.json", settings | {"names": names_of(world)})
    return {part: sum(p.numel() for p in getattr(pipe, part).parameters()) for part in ("text_encoder", "unet", "vae")}


def write_sheet(pipe: StableDiffusionPipeline, work: Path, path: Path) -> None:
    """Writes what the model draws of the prompts that training looks at, with their seed: nothing is picked."""
    images = draw(pipe.unet, pipe.vae, Words(work), PROMPTS)
    sheet(images, [prompt or "(the empty prompt)" for prompt in PROMPTS], 8, scale=2).save(path)


def network_of(weights: dict[str, Tensor], names: Names) -> tuple[Network, tuple[int, ...]]:
    """The recogniser's network with its weights, and its widths.

    Raises:
        SystemExit: it was trained for another world.
    """
    blocks = sum(key.endswith(".body.0.weight") for key in weights)  # the first and the last keep the width
    widths = tuple(len(weights[f"body.{3 + k}.body.0.weight"]) for k in range(blocks - 1))
    network = Network(names.sizes, widths)
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise SystemExit(
            "The recogniser's checkpoint is of another world, or another network: train it anew."
        ) from None
    return network.eval(), widths


def write_recogniser(work: Path, name: str, world: World, folder: Path) -> int:
    """Writes the judge, its thresholds measured where the drawings are there; returns its parameters."""
    names = Names.of(world)
    network, widths = network_of(averaged(work, name), names)
    thresholds = Thresholds()
    if (work / "objects.npy").exists() and (work / "people.npy").exists():
        thresholds = calibrate(network, Source(world, work, 2021, None))
    folder.mkdir(parents=True)
    write_weights(network.state_dict(), folder / "model.safetensors")
    artists = {artist.name: (artist.palette, artist.technique) for artist in world.artists}
    write(folder / "config.json", describe_config(names, artists, widths, thresholds))
    if (work / f"{name}.json").exists():
        shutil.copy(work / f"{name}.json", folder / "held_out.json")
    return sum(p.numel() for p in network.parameters())


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def notice() -> str:
    """What NOTICE says of the emoji sets and of the miniature model."""
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    return text[text.index("The emoji model\n") :]


def check_sizes(folder: Path) -> int:
    """The folder's bytes.

    Raises:
        SystemExit: a file is larger than `LARGEST`.
    """
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > LARGEST:
            raise SystemExit(f"{path.name} has {size:,} bytes; a file that is committed has at most {LARGEST:,}.")
    return sum(sizes.values())


def pack(work: Path, to: Path, name: str = "unet", recogniser: str = "recogniser") -> int:
    """Packs `work` into `to`, leaving its other files as they are; returns the bytes written.

    Raises:
        SystemExit: a part is missing or does not fit, or a file is too large. `to` is then as it was.
    """
    world, beside = read_world(), to / ".new"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        pipe = pipeline(work, name)
        beside.mkdir(parents=True)
        write_sheet(pipe, work, beside / "drawn.png")
        counts = write_pipeline(pipe, work, world, beside / "pipeline")
        counts["recogniser"] = write_recogniser(work, recogniser, world, beside / "recogniser")
        if (work / "clip").is_dir():
            shutil.copytree(work / "clip", beside / "clip")
        write(beside / "concepts.json", concepts_of(world))
        for file in ("gates.json", "people.png", "artists.png"):
            if (work / file).exists():
                shutil.copy(work / file, beside / file)
        write_card(beside, counts)
        (beside / "NOTICE").write_text(notice(), encoding="utf-8")
        check_weights(beside)
        total = check_sizes(beside)
        for path in beside.rglob("*.safetensors"):
            path.chmod(0o644)  # the libraries write them for their owner alone
        for part in PARTS:
            old = to / part
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            if (beside / part).exists():
                (beside / part).rename(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where what was trained lies")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="such as src/expunge/miniature")
    parser.add_argument("--name", default="unet", help="the denoiser's stage")
    parser.add_argument("--recogniser", default="recogniser", help="the recogniser's stage")
    options = parser.parse_args(arguments)
    total = pack(options.work, options.to, options.name, options.recogniser)
    print(f"{options.to}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
