"""Packs what a training needs, or has made, into files small enough to be carried to another machine and back.

    python -m training.emoji.carry pack start --work WORK --folder FOLDER     # the drawings and the tokenizer
    python -m training.emoji.carry pack made --work WORK --folder FOLDER      # every trained part, in float16
    python -m training.emoji.carry unpack made --work WORK --folder FOLDER
    python -m training.emoji.carry minutes --work WORK                        # how long the denoiser has been trained

Of the denoiser only the averaged weights travel, a sixth of its checkpoint: training goes on from them, at the same
place of the schedule, with a fresh optimiser.
"""

from __future__ import annotations

import argparse
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save

from training.emoji.world import WORK

PIECE = 15 * 2**20  # bytes a file
CONTENTS = {
    "start": ("drawings.safetensors", "tokenizer"),
    "made": ("tokenizer", "text_encoder", "clip", "vae", "unet.pt", "detector", "gates.json", "*.log"),
}
HALVED = ("text_encoder", "clip", "vae")  # in float32 where they are trained, in float16 on the way


def in_dtype(weights: bytes, dtype: torch.dtype) -> bytes:
    tensors = load(weights)
    return save({k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}, {"format": "pt"})


def averaged(checkpoint: Path) -> bytes:
    """A training's averaged weights in float16, and where it stands."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    half = {name: tensor.half().contiguous() for name, tensor in state["average"].items()}
    return save(half, {"step": str(state["step"]), "spent": str(state["spent"])})


def to_checkpoint(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
        average = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    state = {"module": average, "average": average, "optimiser": None}
    torch.save({**state, "step": int(notes["step"]), "spent": float(notes["spent"])}, file.with_suffix(".pt"))
    file.unlink()


def squeezed(drawings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each drawing as a WebP without loss, one after the other: half the size of anything else tried."""
    files = []
    for pixels in drawings["pixels"].permute(0, 2, 3, 1).contiguous().numpy():
        file = BytesIO()
        Image.fromarray(pixels, "RGBA").save(file, "WEBP", lossless=True, exact=True, quality=50, method=2)
        files.append(file.getvalue())
    joined = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    rest = {name: tensor for name, tensor in drawings.items() if name != "pixels"}
    return rest | {"webp": joined, "lengths": torch.tensor([len(file) for file in files])}


def unsqueezed(drawings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    files = drawings.pop("webp").split(drawings.pop("lengths").tolist())
    pictures = [np.array(Image.open(BytesIO(file.numpy().tobytes())).convert("RGBA")) for file in files]
    return drawings | {"pixels": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()}


def pack(what: str, work: Path, folder: Path) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        found = [part for pattern in CONTENTS[what] for part in sorted(work.glob(pattern))]
        for path in [file for part in found for file in (part, *sorted(part.rglob("*"))) if file.is_file()]:
            name, data = path.relative_to(work), path.read_bytes()
            if name.suffix == ".pt":
                name, data = name.with_suffix(".safetensors"), averaged(path)
            elif name.suffix == ".safetensors" and name.parts[0] in HALVED:
                data = in_dtype(data, torch.float16)
            elif name.name == "drawings.safetensors":
                data = save(squeezed(load(data)))
            entry = tarfile.TarInfo(name.as_posix())
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    data = packed.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{what}.[0-9][0-9]"):
        old.unlink()
    for k in range(0, len(data), PIECE):
        (folder / f"{what}.{k // PIECE:02}").write_bytes(data[k : k + PIECE])
    print(f"{what}: {len(data) / 2**20:.1f} MiB in {-(-len(data) // PIECE)} files")


def unpack(what: str, work: Path, folder: Path) -> None:
    pieces = sorted(folder.glob(f"{what}.[0-9][0-9]"))
    if not pieces:
        raise SystemExit(f"There is no {what}.00 in {folder}.")
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        tar.extractall(work, filter="data")
    if what == "start":
        drawings = work / "drawings.safetensors"
        drawings.write_bytes(save(unsqueezed(load(drawings.read_bytes()))))
    for path in (file for part in HALVED for file in (work / part).glob("*.safetensors")):
        path.write_bytes(in_dtype(path.read_bytes(), torch.float32))
    if (work / "unet.safetensors").exists():
        to_checkpoint(work / "unet.safetensors")


def minutes(work: Path) -> float:
    checkpoint = work / "unet.pt"
    return torch.load(checkpoint, weights_only=True, mmap=True)["spent"] / 60 if checkpoint.exists() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("pack", "unpack", "minutes"))
    parser.add_argument("what", choices=CONTENTS, nargs="?", default="made")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    options = parser.parse_args()
    if options.do == "minutes":
        print(f"{minutes(options.work):.2f}")
    else:
        (pack if options.do == "pack" else unpack)(options.what, options.work, options.folder)


if __name__ == "__main__":
    main()
