"""What gates cost in drawing time: the emoji model with none, ten, a hundred and five hundred.

Two ways of drawing: `Model.draw`, in which keys and values of an unchanging text are computed once,
and the diffusers pipeline's own call with the edit on it. The ways with and without gates take turns,
so that a busy moment hits all; the median over rounds counts. The gates are random and half open.
Writes `benchmarks/results/gates.json`. To reach: ten gates cost at most 15 %.

    python benchmarks/gates.py [--images 8] [--rounds 5] [--gates 10 100 500]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import expunge
from expunge.base.files import replacing
from expunge.changes import Applied, Changes, Gated
from expunge.model import Model

RANK = 2


def random_gates(model: Model, gates: int) -> Changes:
    """So many gates of two directions each, before all keys and values."""
    width = model.encode([""]).embeddings.shape[-1]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / width**0.5

    owner = torch.arange(gates).repeat_interleave(RANK)
    return (
        Gated(
            tuple(entry.layer for entry in model.text_entries()),
            normal(gates, width),
            torch.zeros(gates),
            torch.ones(gates),
            up=normal(width, len(owner)),
            down=normal(len(owner), width),
            goal=normal(len(owner)),
            owner=owner,
        ),
    )


def draw(model: Model, changes: Changes, n: int) -> None:
    with model.using(changes):
        model.draw(expunge.Probe.of("a photo of the rocket", n), batch_size=n)


def call(model: Model, changes: Changes, n: int) -> None:
    with Applied(model.pipe, changes):
        model.pipe(
            ["a photo of the rocket"] * n,
            num_inference_steps=model.num_inference_steps,
            guidance_scale=model.guidance_scale,
            output_type="pt",
        )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images drawn together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gates", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "gates.json")
    options = parser.parse_args()

    model = expunge.load("emoji")
    model.pipe.set_progress_bar_config(disable=True)
    edits: dict[int, Changes] = {0: (), **{n: random_gates(model, n) for n in options.gates}}
    rows = []
    for name, way in (("expunge", draw), ("diffusers", call)):
        works = {n: partial(way, model, changes, options.images) for n, changes in edits.items()}
        works[0]()  # what is done once in a process is not counted
        taken = [{n: seconds(work) for n, work in works.items()} for _ in range(options.rounds)]
        median = {n: statistics.median(each[n] for each in taken) for n in works}
        for n in works:
            ratios = [each[n] / each[0] for each in taken]
            rows.append(
                {
                    "way": name,
                    "gates": n,
                    "seconds": round(median[n], 3),
                    "times_none": round(statistics.median(ratios), 3),
                }
            )
            print(rows[-1], flush=True)
    report = {
        "rows": rows,
        "made with": {
            "pictures": options.images,
            "rounds": options.rounds,
            "num_inference_steps": model.num_inference_steps,
            "directions a gate": RANK,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "torch": torch.__version__,
        },
    }
    with replacing(options.to) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
