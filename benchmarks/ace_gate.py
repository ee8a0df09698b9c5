"""ACE's closed form at Stable Diffusion 1.4's size: gates and directions of many flags.

30 prompts a concept, 32 key and value projections of the true shapes; random weights, token
embeddings given. To reach: one concept in a second, 50 in 20 s, on two cores. Each size is run in a
process of its own. Writes `benchmarks/results/ace_gate.json`.

    python benchmarks/ace_gate.py [--concepts 1 50]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from expunge.base.files import replacing
from expunge.changes import Gated
from expunge.erasing.gate_tokens import BANDS, GateTokens
from expunge.methods.ace import ACE
from expunge.methods.ace.closed_form import solve_gates
from expunge.ops.gates import Background

WIDTH, TOKENS, PROMPTS, SCALE = 768, 77, 30, 28.0
OUTPUTS = [out for out, n in ((320, 5), (640, 5), (1280, 6)) for _ in range(2 * n)]
METHOD = ACE.preset("gate")


def groups(concepts: int) -> dict[str, list[GateTokens]]:
    """Tokens of each concept about a mean of its own: one of the phrase, the rest behind the end."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, *(stop - start for start, stop in zip(BANDS, (*BANDS[1:], TOKENS - 7), strict=True))]
    neutral = torch.randn(WIDTH, generator=generator) * SCALE / WIDTH**0.5

    def group(size: int) -> GateTokens:
        mean = torch.randn(WIDTH, generator=generator) * SCALE / WIDTH**0.5
        rows = mean + torch.randn(PROMPTS * size, WIDTH, generator=generator) / 4
        means = rows.reshape(PROMPTS, size, WIDTH).mean(1) - neutral
        return GateTokens(rows, neutral.expand(len(rows), -1), means)

    return {str(i): [group(size) for size in sizes] for i in range(concepts)}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(out, WIDTH, generator=generator) / WIDTH**0.5 for out in OUTPUTS]
    return {str(i): weight for i, weight in enumerate(drawn)}


def gate(concepts: int) -> dict[str, float]:
    """Seconds for the gates and directions of so many concepts, and the memory beyond the inputs."""
    given, layers = groups(concepts), weights()
    generator = torch.Generator().manual_seed(2)
    general, retained = (
        torch.randn(n, WIDTH, generator=generator) * SCALE / WIDTH**0.5 for n in (3000, 1500)
    )
    before, start = peak(), time.perf_counter()
    background = Background(general, retained, METHOD.gate_ridge, METHOD.n_std)
    (change,) = solve_gates(METHOD, given, background, layers)
    seconds = time.perf_counter() - start
    assert isinstance(change, Gated)
    size = sum(t.numel() * t.element_size() for t in change.tensors.values())
    return {
        "seconds": seconds,
        "gates": len(change.centre),
        "directions": len(change.owner),
        "edit_mb": size / 1e6,
        "peak_mb": (peak() - before) / 1e6,
    }


def peak() -> int:
    """The largest memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(concepts: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(gate, (concepts,))


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "ace_gate.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for concepts in options.concepts:
        runs = [alone(concepts) for _ in range(options.repeat)]
        seconds = statistics.median(run["seconds"] for run in runs)
        rows.append({"concepts": concepts, **runs[0], "seconds": round(seconds, 3)})
        print(rows[-1], flush=True)
    record = {
        "rows": rows,
        "prompts a concept": PROMPTS,
        "matrices": len(OUTPUTS),
        "repeats": options.repeat,
        "made with": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "processor": platform.processor() or platform.machine(),
        },
    }
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
