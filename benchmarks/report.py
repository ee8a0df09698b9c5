"""How long a report of 10,000 images takes that are drawn and scored already, and how much memory.

Drawing is not what is measured, so it is done quickly: the images are those of thirteen words with
noise of their own, put in a cache where an erasure's drawings would lie. Everything after that is
real: the full object suite on several edits, in a process of its own that finds all images and
scores in the cache.
Writes `benchmarks/results/report.json`. To reach: under 60 s and under 2 GB.

    python benchmarks/report.py [--edits 3] [--suite object]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.base.quiet import ignore_progress
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.methods.uce import UCE

RESULT = Path(__file__).parent / "results" / "report.json"
WORDS = "airplane automobile bird cat deer dog frog horse ship truck aircraft plane jet".split()


def stand_in(
    images: dict[str, Tensor], requests: Sequence[Request], _: object = ignore_progress
) -> Tensor:
    """An image for each request: its word's, or the ship's, with noise of its own."""
    noise = torch.Generator().manual_seed(requests[0].seed)
    ship = images["a photo of the ship"]
    drawn = torch.stack([images.get(request.prompt, ship) for request in requests])
    return (drawn + 0.03 * torch.randn(drawn.shape, generator=noise)).clamp(0, 1)


def judged(folder: Path, suite: str) -> Cache:
    """The suite's report on the edits in the folder, its images and numbers in the cache there."""
    cache = Cache(folder / "cache")
    edits = [expunge.Edit.load(path) for path in sorted(folder.glob("*.safetensors"))]
    evaluate(expunge.load("emoji"), edits, [suite], full=True, cache=cache).save(folder / "report")
    return cache


def fill(folder: Path, suite: str, edits: int) -> int:
    """Make edits and a cache in which everything about them is known; how many images there are."""
    model = expunge.load("emoji")
    problem = Problem((Concept("airplane", "sky"),))
    for k in range(edits):
        expunge.erase(model, problem, UCE(ridge=5.0 * 10**k, num_retain_words=50)).save(
            folder / f"{k}.safetensors"
        )
    prompts = [f"a photo of the {word}" for word in WORDS]
    images = dict(zip(prompts, model.draw(expunge.Probe(tuple(prompts), tuple(range(13)))), strict=True))
    Source.draw = lambda self, requests, progress=ignore_progress: stand_in(images, requests)  # type: ignore
    return judged(folder, suite).drawn


def main() -> None:
    """Fill a cache, then report again from it, in a process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edits", type=int, default=3)
    parser.add_argument("--suite", default="object")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.again:
        start = time.monotonic()
        drawn = judged(options.again, options.suite).drawn
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            json.dumps(
                {"drawn": drawn, "seconds": round(time.monotonic() - start, 1), "GB": round(peak, 2)}
            )
        )
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images = fill(folder, options.suite, options.edits)
        command = [sys.executable, __file__, "--again", place, "--suite", options.suite]
        again = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result = {
        "pictures": images,
        "again": again,
        "to reach": {"seconds": 60, "GB": 2},
        "made with": {"edits": options.edits, "suite": options.suite, "machine": platform.machine(),
                      "cores": torch.get_num_threads(), "torch": torch.__version__},
    }  # fmt: skip
    with replacing(RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    Console().print(result)


if __name__ == "__main__":
    main()
