"""Drawing in bfloat16 against float32: how much faster, and whether the judge sees the same.

The emoji model draws the same prompts and seeds in both formats, in turn; the figure of speed is the
median of the rounds' ratios. The shipped detector then says what each image shows: of how many it
says the same, how many each format draws right, and how far images are apart.
Writes `benchmarks/results/autocast.json`.

    python benchmarks/autocast.py [--images 512] [--batch 64]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Probe
from expunge.base.files import replacing
from expunge.emoji.detector import Detector

SHOWN = 32  # words, each in several images


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="in each format")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "autocast.json")
    options = parser.parse_args()
    model, detector = expunge.load("emoji"), Detector.load()
    names = [name for name in detector.label_names if not name.startswith("flag")]
    words = names[:: len(names) // SHOWN][:SHOWN]
    formats = (None, torch.bfloat16)
    drawn: dict[Any, list[torch.Tensor]] = {one: [] for one in formats}
    shown: list[str] = []
    ratios = []
    model.draw(Probe.of("a cat", 1))  # what is done once in a process is not counted
    for start in range(0, options.images, options.batch):
        seeds = tuple(range(start, start + options.batch))
        asked = [words[seed % len(words)] for seed in seeds]
        shown += asked
        probe = Probe(tuple(f"a photo of the {word}" for word in asked), seeds)
        taken = {}
        for one in formats:
            before = time.perf_counter()
            with model.autocasting(one):
                drawn[one].append(model.draw(probe, batch_size=options.batch))
            taken[one] = time.perf_counter() - before
        ratios.append(taken[None] / taken[torch.bfloat16])
    exact, rounded = (torch.cat(drawn[one]) for one in formats)
    seen, other = detector(exact).top(), detector(rounded).top()
    n = len(seen)
    record = {
        "pictures": n,
        "times faster": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same label": round(sum(a == b for a, b in zip(seen, other, strict=True)) / n, 4),
        "drawn right": {
            "float32": round(sum(a == b for a, b in zip(seen, shown, strict=True)) / n, 4),
            "bfloat16": round(sum(a == b for a, b in zip(other, shown, strict=True)) / n, 4),
        },
        "mean distance of a pixel": round(float((exact - rounded).abs().mean()), 5),
        "made with": {
            "batch": options.batch,
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "versions": {name: version(name) for name in ("expunge", "torch", "diffusers")},
        },
    }
    print(json.dumps(record, indent=1))
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
