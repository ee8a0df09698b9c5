"""MACE's changes of many concepts on the emoji model: trained in one batch against one by one.

Latents, token embeddings and masks are there before the clock starts, for both. Pairs are run in
turn, the order within them alternating; the figure is the median of their ratios. In float32 and in
float64 both must end at the same changes. Writes `benchmarks/results/mace_loras.json`.

    python benchmarks/mace_loras.py [--concepts 16] [--steps 20] [--pairs 5]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Concept, Model
from expunge.base.files import replacing
from expunge.methods.mace import MACE
from expunge.methods.mace.suppression import SuppressionData, train_on_attention
from expunge.runtime.context import RunContext

WORDS = (
    "airplane automobile bird cat deer dog frog horse ship truck rocket apple banana tree house key"
    " clock book guitar crown"
).split()

RUN = RunContext(0)


def learn(
    model: Model, method: MACE, lessons: Sequence[SuppressionData]
) -> tuple[dict[str, Any], float]:
    """The changes, and how long they took."""
    fresh = [
        dataclasses.replace(lesson, generator=RUN.generator("training", lesson.concept))
        for lesson in lessons
    ]
    start = time.perf_counter()
    found = train_on_attention(method, model, fresh, torch.eye(fresh[0].text.embeddings.shape[-1]), RUN)
    return found, time.perf_counter() - start


def one_by_one(
    model: Model, method: MACE, lessons: Sequence[SuppressionData]
) -> tuple[dict[str, Any], float]:
    """The same, a batch of one at a time."""
    found: dict[str, Any] = {}
    seconds = 0.0
    for lesson in lessons:
        one, took = learn(model, method, [lesson])
        found, seconds = found | one, seconds + took
    return found, seconds


def difference(some: Mapping[str, Any], others: Mapping[str, Any]) -> float:
    """The largest ‖Δ(BD)‖ / ‖BD‖ of a concept."""

    def product(tensors: Mapping[str, Tensor]) -> Tensor:
        ups = [key for key in tensors if key.endswith(".up")]
        down = {key: tensors[key.removesuffix("up") + "down"] for key in ups}
        return torch.cat([(tensors[key].double() @ down[key].double()).flatten() for key in ups])

    pairs = [(product(some[name]), product(others[name])) for name in some]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "mace_loras.json")
    options = parser.parse_args()

    model = expunge.load("emoji", device="cpu")
    method = MACE(learning_rate=1e-4, max_train_steps=options.steps, num_images=options.images)
    concepts = [Concept(word, "ground") for word in WORDS[: options.concepts]]
    lessons = [method.prepare(model, concept, RUN) for concept in concepts]
    ways = {"batched": learn, "one by one": one_by_one}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Any] = {}
    warm = dataclasses.replace(method, max_train_steps=1)
    for function in ways.values():
        function(model, warm, lessons)
    for pair in range(options.pairs):
        for way in sorted(ways, reverse=bool(pair % 2)):
            found[way], took = ways[way](model, method, lessons)
            seconds[way].append(took)
    float32 = difference(found["batched"], found["one by one"])

    model.pipe.to(torch.float64)
    doubled = [
        dataclasses.replace(
            lesson,
            text=dataclasses.replace(lesson.text, embeddings=lesson.text.embeddings.double()),
            latents=lesson.latents.double(),
            masks=lesson.masks.double(),
        )
        for lesson in lessons
    ]
    float64 = difference(*(way(model, method, doubled)[0] for way in ways.values()))
    ratios = [a / b for a, b in zip(seconds["one by one"], seconds["batched"], strict=True)]
    record = {
        "concepts": len(lessons),
        "steps": options.steps,
        "seconds": seconds,
        "times faster": statistics.median(ratios),
        "ratios": ratios,
        "largest relative difference": {"float32": float32, "float64": float64},
        "made with": {
            **{name: version(name) for name in ("expunge", "torch", "diffusers")},
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
    }
    print(json.dumps(record, indent=1))
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
