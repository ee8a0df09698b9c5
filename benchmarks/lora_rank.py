"""What rank a MACE edit needs as a LoRA, and how long making one takes.

*Rank*: four objects erased from the emoji model (all three stages, with two images and two steps of
training: their number of directions hangs on neither), and four by the closed forms at SD 1.4's size,
random weights, the emoji text encoder's states turned to 768 numbers by a random matrix. For each rank
the directions are chosen in plain norm, as before, and by what they do to text; both are measured on the
erased prompts and on captions, as shares of the squared change.

*Time*: a change W M of all 140 layers of SDXL through which text enters, random weights, cut to rank 32:
layer by layer as before (some layers of each size, times how many there are) and by one decomposition
of M − I with the measuring of what is lost, in one process on one thread. Seconds are the processor's.

Writes `benchmarks/results/lora_rank.json`.

    python benchmarks/lora_rank.py [--part rank time]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from true_size import Given

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.changes import Right, WeightChange
from expunge.checkpoints.lora import Lora
from expunge.checkpoints.text_moments import TextMoments, read_text_moments
from expunge.checkpoints.weight_changes import group_by_place
from expunge.method import Method
from expunge.methods.mace import MACE
from expunge.model import Model
from expunge.runtime.context import RunContext
from expunge.text import Text

OBJECTS = ("airplane", "cat", "banana", "rocket")
RANKS = (8, 16, 32)


class Turned(Given):
    """A model at true size that reads with the emoji model's text encoder, turned to its width."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.reader = expunge.load("emoji")
        self.pipe.text_encoder, self.pipe.tokenizer = (
            self.reader.pipe.text_encoder,
            self.reader.pipe.tokenizer,
        )
        self.pipe.components = self.reader.pipe.components
        draw = torch.Generator().manual_seed(0)
        width = self.reader.weight(self.reader.text_entries()[0].layer).shape[1]
        self.turn = torch.randn(width, self.spec["width"], generator=draw) / width**0.5

    def encode(self, prompts: Sequence[str]) -> Text:
        text = self.reader.encode(prompts)
        return Text(text.prompts, text.embeddings @ self.turn, text.content_mask, text.ids)

    def count_tokens(self, prompt: str) -> int:
        return self.reader.count_tokens(prompt)

    def vocabulary(self) -> tuple[str, ...]:
        return self.reader.vocabulary()


def weights(model: Model) -> Callable[[str, str], Tensor]:
    """Random weights of the layers through which text enters, the same at every call."""

    def read(layer: str, _: str) -> Tensor:
        shape = dict(model.network.named_parameters())[f"{layer.partition('.')[2]}.weight"].shape
        draw = torch.Generator().manual_seed(sum(map(ord, layer)))
        return torch.randn(shape, generator=draw) / shape[1] ** 0.5

    return read


def in_plain_norm(known: Mapping[str, TextMoments]) -> dict[str, TextMoments]:
    """The same moments, which are measured, with the metric of plain norm, by which is chosen."""
    made: dict[int, TextMoments] = {}
    for one in known.values():
        plain = TextMoments(one.erased, one.retained)
        plain.__dict__["metric"] = torch.eye(len(one.retained), dtype=torch.float64)
        made.setdefault(id(one), plain)
    return {layer: made[id(one)] for layer, one in known.items()}


def by_rank(
    name: str,
    read: Callable[[str, str], Tensor],
    changes: Sequence[WeightChange],
    known: Mapping[str, TextMoments],
) -> list[dict[str, Any]]:
    """What is lost at every rank, chosen either way, and the rank that the default energy takes."""
    rows = []
    ways = {"norm": in_plain_norm(known), "text": known}
    for how, moments in ways.items():
        for rank in (*RANKS, *([None] if how == "text" else [])):
            lora = Lora.from_changes(
                read, group_by_place(changes), rank=rank, read_moments=partial(dict, moments)
            )
            lost = lora.loss
            row = {"edit": name, "layers": len(lora.factors), "chosen by": how, "rank": lora.rank,
                   "asked": rank or "energy 0.999", "erasure lost": lost.erasure,
                   "drift lost": lost.drift, "norm lost": lost.norm}  # fmt: skip
            rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            print(rows[-1], flush=True)
    return rows


def ranks() -> list[dict[str, Any]]:
    """Both edits."""
    problem = Problem(tuple(Concept(name, "sky") for name in OBJECTS))
    emoji = expunge.load("emoji")
    method = MACE.preset("emoji", max_train_steps=2, num_images=2, num_inference_steps=2, masks="none")
    edit = expunge.erase(emoji, problem, method)
    fixed = [change for change in edit.changes if isinstance(change, WeightChange)]
    rows = by_rank(
        "emoji, mace", lambda layer, _: emoji.weight(layer), fixed, read_text_moments(emoji, problem)
    )
    large = Turned("sd14")
    closed: Method = MACE.preset("emoji", stages=("refine", "fuse"))
    found = [
        change for change in closed.fit(large, problem, RunContext()) if isinstance(change, WeightChange)
    ]
    return rows + by_rank(
        "sd14, mace refine and fuse", weights(large), found, read_text_moments(large, problem)
    )


def before(weight: Tensor, change: WeightChange, rank: int) -> None:
    """One layer cut in plain norm from its own decomposition, as the first edition did."""
    original = weight.double()
    delta = change.weight(original) - original
    wide = delta.shape[0] < delta.shape[1]
    _, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)
    leading = vectors.flip(1)[:, :rank]
    up, down = (leading, leading.T @ delta) if wide else (delta @ leading, leading.T)
    float((delta - up @ down).square().sum())
    float(delta.square().sum())


def measure_times() -> dict[str, Any]:
    """Seconds of either way at SDXL's size."""
    large = Turned("sdxl")
    read = weights(large)
    layers = tuple(entry.layer for entry in large.text_entries())
    problem = Problem(tuple(Concept(name, "sky") for name in OBJECTS))
    closed: Method = MACE.preset("emoji", stages=("refine", "fuse"))
    (right,) = [c for c in closed.fit(large, problem, RunContext()) if isinstance(c, Right)]
    change = Right(layers, right.matrix)
    sizes: dict[tuple[int, ...], list[str]] = {}
    for layer in layers:
        sizes.setdefault(tuple(read(layer, "").shape), []).append(layer)
    old, timed = 0.0, 0
    for some in sizes.values():
        weight, start = read(some[0], ""), time.process_time()
        for _ in range(2):
            before(weight, change, 32)
        old += (time.process_time() - start) / 2 * len(some)
        timed += 2
    known = read_text_moments(large, problem)
    start = time.process_time()
    lora = Lora.from_changes(read, group_by_place([change]), rank=32, read_moments=lambda: known)
    new = time.process_time() - start
    return {"layers": len(layers), "rank": lora.rank, "before, processor s": round(old, 1),
            "layers timed before": timed, "now, processor s": round(new, 1),
            "ratio": round(old / new, 1),
            "erasure lost": round(lora.loss.erasure or 0, 6), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("rank", "time"), default=["rank", "time"])
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "lora_rank.json")
    options = parser.parse_args()
    found = json.loads(options.to.read_text("utf8")) if options.to.exists() else {}
    torch.set_num_threads(1)
    # Models of two widths with one text encoder: what is kept of one must not be found by the other.
    with tempfile.TemporaryDirectory() as folder:
        if "time" in options.part:
            os.environ["EXPUNGE_CACHE"] = f"{folder}/time"
            found["time"] = measure_times()
            print(found["time"], flush=True)
        if "rank" in options.part:
            os.environ["EXPUNGE_CACHE"] = f"{folder}/rank"
            found["rank"] = ranks()
    found["versions"] = {name: version(name) for name in ("expunge", "torch", "diffusers")}
    with replacing(options.to) as file:
        file.write_text(json.dumps(found, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
