"""MACE's closed forms at Stable Diffusion 1.4's size, against the same equations layer by layer.

A hundred concepts, 30 prompts each, 32 key and value projections of the true shapes; random weights,
token embeddings given. Ours: `MACE.refine`, `MACE.fuse`, and the 32 new weights. The baseline: for
each matrix by itself, in float32, the values and both sums are accumulated by batched products over
all positions of all prompts, then one inverse; it is run on a few concepts, and what grows with
their number is scaled up. Each is run in a process of its own, so that its peak memory is its own.
On those few, both stages are also compared with a plain float64 reading of the equations.
Writes `benchmarks/results/mace_closed_form.json`.

    python benchmarks/mace_closed_form.py [--concepts 100] [--baseline 5]
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.base.files import replacing
from expunge.changes import LowRank, Right
from expunge.methods.mace import MACE
from expunge.methods.mace.prompt_sums import AnchorGroup, PromptSums
from expunge.ops.least_squares import gram
from expunge.text import Text

WIDTH, TOKENS, PROMPTS = 768, 77, 30
OUTPUTS = [out for out, n in ((320, 5), (640, 5), (1280, 6)) for _ in range(2 * n)]
METHOD = MACE(ridge=1.0, refine_prior=1.0, fuse_prior=1.0)


def texts(concepts: int) -> tuple[AnchorGroup, list[Tensor]]:
    """Prompts of one anchor and of each concept, with phrases of one to four tokens."""
    generator = torch.Generator().manual_seed(0)

    def text(concept: int, phrase: int) -> Text:
        ids = torch.full((PROMPTS, TOKENS), 1)
        own = torch.zeros(PROMPTS, TOKENS, dtype=torch.bool)
        for row in range(PROMPTS):
            words = [10 + row, 50, 51, *(100 + 10 * concept + i for i in range(phrase)), 52]
            ids[row, : len(words) + 1] = torch.tensor([0, *words])
            own[row, 1 : len(words) + 1] = True
        embeddings = torch.randn(PROMPTS, TOKENS, WIDTH, generator=generator)
        return Text(("",) * PROMPTS, embeddings, own, ids)

    read = {str(i): text(i, 1 + i % 4) for i in range(concepts)} | {"anchor": text(-1, 1)}
    group = AnchorGroup(
        lambda names: read[names[0]], ["anchor"], {str(i): [str(i)] for i in range(concepts)}
    )
    return group, [torch.randn(out, WIDTH, generator=generator) for out in OUTPUTS]


def factors(concepts: int) -> dict[str, dict[str, Tensor]]:
    """A change of rank one for each concept and matrix."""
    generator = torch.Generator().manual_seed(1)

    def change(i: int) -> dict[str, Tensor]:
        tensors = {}
        for layer, out in enumerate(OUTPUTS):
            tensors[f"{layer}.up"] = torch.randn(out, 1, generator=generator) / 100
            tensors[f"{layer}.down"] = torch.randn(1, WIDTH, generator=generator)
        return tensors

    return {str(i): change(i) for i in range(concepts)}


def prior() -> Tensor:
    """A Gram as that of a thousand captions' mean."""
    rows = torch.randn(4 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    return rows.T @ rows * (TOKENS / len(rows))


def ours(concepts: int) -> dict[str, float]:
    """Seconds for the sums, both stages, and the new weights."""
    (group, weights), trained, kept = texts(concepts), factors(concepts), prior()
    start, before = time.perf_counter(), peak()
    sums = PromptSums.of([group])
    matrix = METHOD.refine(sums, kept)
    middle = time.perf_counter()
    matrix, fused = METHOD.fuse([group], sums, kept, matrix, trained)
    right = Right((), matrix.float())
    for layer, weight in enumerate(weights):
        up = torch.cat([tensors[f"{layer}.up"] for tensors in fused.values()], 1)
        down = torch.cat([tensors[f"{layer}.down"] for tensors in fused.values()]).float()
        LowRank((), up, down).weight(right.weight(weight))
    end = time.perf_counter()
    return {"refine": middle - start, "fuse": end - middle, "total": end - start,
            "peak_mb": (peak() - before) / 1e6}  # fmt: skip


def baseline(concepts: int) -> dict[str, float]:
    """Seconds that grow with the concepts, and seconds that do not."""
    (group, weights), trained, kept = texts(concepts), factors(concepts), prior().float()
    goals, growing, fixed = group.read(group.anchored).embeddings, 0.0, 0.0
    before = peak()
    for layer, weight in enumerate(weights):
        current = weight
        for stage in ("refine", "fuse"):
            start = time.perf_counter()
            left, right = torch.zeros_like(weight), torch.zeros(WIDTH, WIDTH)
            for name, prompts in group.erased.items():
                # The contexts are a view of nearly all positions; which ones does not change the cost.
                e = group.read(prompts).embeddings
                if stage == "refine":
                    values = goals @ weight.T
                else:
                    change = trained[name][f"{layer}.up"] @ trained[name][f"{layer}.down"]
                    values = e @ (current + change).T
                left += torch.bmm(values.mT, e).sum(0)
                right += torch.bmm(e.mT, e).sum(0)
            middle = time.perf_counter()
            left += weight @ kept + METHOD.ridge * current
            right += kept + METHOD.ridge * torch.eye(WIDTH)
            current = left @ torch.inverse(right)
            growing += middle - start
            fixed += time.perf_counter() - middle
    return {"growing": growing, "fixed": fixed, "peak_mb": (peak() - before) / 1e6}


def error(concepts: int) -> dict[str, float]:
    """The largest ‖W* − plain W*‖ / ‖plain W* − W‖ of a matrix of each shape, after each stage."""
    (group, weights), trained, kept = texts(concepts), factors(concepts), prior()
    ridge, anchored = METHOD.ridge, group.read(group.anchored).embeddings.double()
    rows = {name: group.read(some).embeddings.double() for name, some in group.erased.items()}
    sums = PromptSums.of([group])
    first = METHOD.refine(sums, kept)
    second, fused = METHOD.fuse([group], sums, kept, first, trained)
    found = {"refine": 0.0, "fuse": 0.0}
    for layer in (0, 10, 20):
        weight = weights[layer].double()
        left, right = weight @ kept + ridge * weight, kept + ridge * torch.eye(WIDTH).double()
        for i, e in enumerate(rows.values()):
            phrase = 1 + i % 4  # four positions stand before it; what follows is aligned after it
            erased = torch.cat([e[:, :4], e[:, 4 + phrase :]], 1).flatten(0, 1)
            goals = torch.cat([anchored[:, :4], anchored[:, 5 : TOKENS + 1 - phrase]], 1).flatten(0, 1)
            left, right = left + weight @ goals.T @ erased, right + erased.T @ erased
        refined = torch.linalg.solve(right, left, left=False)
        left = weight @ kept + ridge * refined
        right = sums.whole + kept + ridge * torch.eye(WIDTH).double()
        ours = weight @ second
        for name, e in rows.items():
            up, down = (trained[name][f"{layer}.{part}"].double() for part in ("up", "down"))
            left = left + (refined + up @ down) @ gram(e.flatten(0, 1))
            ours = ours + up @ fused[name][f"{layer}.down"]
        plain = torch.linalg.solve(right, left, left=False)
        for stage, a, b in (("refine", weight @ first, refined), ("fuse", ours, plain)):
            found[stage] = max(found[stage], float((a - b).norm() / (b - weight).norm()))
    return found


def peak() -> int:
    """The largest memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function: Callable[[int], dict[str, float]], concepts: int) -> dict[str, float]:
    """What a function answers in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (concepts,))


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--baseline", type=int, default=5, help="concepts the baseline is run on")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent / "results" / "mace_closed_form.json"
    )
    options = parser.parse_args()
    runs = [alone(ours, options.concepts) for _ in range(options.repeat)]
    plain = alone(baseline, options.baseline)
    wrong = alone(error, options.baseline)
    seconds = statistics.median(run["total"] for run in runs)
    scaled = plain["growing"] * options.concepts / options.baseline + plain["fixed"]
    record: dict[str, Any] = {
        "concepts": options.concepts,
        "prompts a concept": PROMPTS,
        "matrices": len(OUTPUTS),
        "ours": runs,
        "seconds": seconds,
        "beyond the inputs, MB": max(run["peak_mb"] for run in runs),
        "baseline": {"concepts": options.baseline, **plain, "seconds scaled": scaled},
        "times faster": scaled / seconds,
        "relative error": wrong,
        "made with": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "processor": platform.processor() or platform.machine(),
        },
    }
    print(json.dumps(record, indent=1))
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
