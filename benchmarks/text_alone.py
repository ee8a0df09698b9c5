"""Memory and time of a closed form when the text encoders alone are read, and when the whole model is.

A whole pipeline of the true shapes with random half-precision weights is written to a folder. Then UCE
erases a few concepts from it, each time in a process of its own: from `load`, the baseline, and from
`Checkpoint.text_model`, as `expunge erase` does. Peaks are of the whole process, imports among them.
Writes `benchmarks/results/text_alone.json`, two rows for each model and number format.

    python benchmarks/text_alone.py sdxl --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
from training_steps import MODELS, pipeline
from true_size import peak

import expunge
from expunge import Concept, Problem
from expunge.base import registry
from expunge.base.files import replacing
from expunge.checkpoints.checkpoint import Checkpoint

READ = ("whole", "text alone")


def write(model: str, folder: str) -> None:
    """The pipeline in half precision."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    pipeline(model).save_pretrained(folder)


def run(folder: str, read: str, dtype: torch.dtype, concepts: int) -> dict[str, float | str]:
    """Peak memory, seconds, and the edit's hash."""
    start, before = time.perf_counter(), time.process_time()
    whole = read == "whole"
    model = (
        expunge.load(folder, dtype=dtype) if whole else Checkpoint.find(folder).load_text_model(dtype)
    )
    loaded = time.perf_counter()
    problem = Problem(tuple(Concept(f"thing {i}", "sky") for i in range(concepts)))
    edit = expunge.erase(model, problem, registry.get("methods", "uce")(num_retain_words=20))
    return {
        "peak, GB": peak() / 1e9,
        "loading, s": loaded - start,
        "all, s": time.perf_counter() - start,
        "all, processor s": time.process_time() - before,
        "edit": edit.hash[:16],
    }


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--concepts", type=int, default=4)
    name = Path(__file__).parent / "results" / "text_alone.json"
    parser.add_argument("--to", type=Path, default=name)
    options = parser.parse_args()
    rows = json.loads(options.to.read_text()) if options.to.exists() else []
    key = {"model": options.model, "dtype": options.dtype}
    rows = [row for row in rows if key.items() - row.items()]
    spawned = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, spawned as pool:
        pool.apply(write, (options.model, folder))
        for read in READ:
            found = pool.apply(run, (folder, read, getattr(torch, options.dtype), options.concepts))
            row = {
                **key,
                "read": read,
                **{
                    k: round(value, 2) if isinstance(value, float) else value
                    for k, value in found.items()
                },
                "concepts": options.concepts,
                "threads": torch.get_num_threads(),
                "load": round(os.getloadavg()[0], 1),
                "torch": torch.__version__,
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    with replacing(options.to) as file:
        file.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
