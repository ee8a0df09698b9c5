"""Does ANT's saliency mask settle? The weights that are left after each map, for both halves.

The text of the paper keeps the half of each tensor with the largest gradients in every map, its released
code the smallest. Both are taken of the same maps, on the shipped model, for one word. Writes
`experiments/results/ant_mask.json`.

    python experiments/archive/ant_mask.py [--word airplane] [--maps 100]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.parameters import select_parameters
from expunge.erasing.saliency import _add_map
from expunge.erasing.trajectories import TrainingConcept
from expunge.methods.ant import ANT
from expunge.ops.finetune import frozen
from expunge.ops.saliency import HALVES, Intersection, settled
from expunge.ops.trajectory import Objective
from expunge.runtime.context import RunContext

FILE = Path(__file__).parents[1] / "results" / "ant_mask.json"


class Both(Intersection):
    """Every half of the same gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.each = {half: Intersection(half) for half in HALVES}

    def add(self, name: str, gradient: Tensor) -> None:
        for one in self.each.values():
            one.add(name, gradient)

    def done(self) -> None:
        for one in self.each.values():
            one.done()


def counts(word: str, maps: int, method: ANT) -> tuple[dict[str, Sequence[int]], int]:
    """For each half how many weights are left after each map; and how many there are."""
    model = expunge.load("emoji")
    problem = Problem((Concept(word),))
    prompts = method.prompts(model, problem.erase[0])
    course = dataclasses.replace(method.trajectory_config, objective=Objective(method.negative_guidance))
    steering, parameters, both = (
        Steering(model, course),
        select_parameters(model, method.weights.part),
        Both(),
    )
    text = model.encode(prompts)
    with frozen(model.parameters()):
        for parameter in parameters.values():
            parameter.requires_grad_()
        for i in range(maps):
            at = i % len(prompts)
            one = TrainingConcept(prompts[at], text[[at]], RunContext(0).generator("saliency", str(i)))
            _add_map(steering, one, parameters, both, method.weights.map_samples, method.batch_size)
            print(i + 1, {half: found.counts[-1] for half, found in both.each.items()}, flush=True)
    total = sum(p.numel() for p in parameters.values())
    return {half: found.counts for half, found in both.each.items()}, total


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--word", default="airplane")
    parser.add_argument("--maps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    method = ANT.preset("emoji-masked")
    weights = method.weights
    found, total = counts(options.word, options.maps, method)
    rows = {}
    for half, left in found.items():
        when = next((n for n in range(1, len(left) + 1) if settled(left[:n], weights.settle)), None)
        shares = {
            str(n): round(left[n - 1] / total, 5) for n in (1, 5, 10, 20, 50, 100) if n <= len(left)
        }
        rows[half] = {"share left after maps": shares, "settled after": when, "counts": list(left)}
    record = {"word": options.word, "part": weights.part, "weights": total, "settle": weights.settle,
              "halves": rows}  # fmt: skip
    with replacing(FILE) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
    for half, row in rows.items():
        print(half, row["share left after maps"], "settled after", row["settled after"])


if __name__ == "__main__":
    main()
