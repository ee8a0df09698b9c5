"""How long an erasure takes while a second job holds a core, beside alone, and how well that was told.

The same MACE edit of the emoji model, captions and all, is made in turn: alone, and with a loop that
never ends on one of two cores; with the threads that `expunge erase` chooses, and with as many as there
are cores, as PyTorch would, round after round. To reach: at most three times the time alone, and an
estimate within twice the outcome. All that else runs on the machine is in the figures, so the load is
written beside them, and the processor time that the edit itself took. Writes
`benchmarks/results/busy.json`.

    python benchmarks/busy.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.checkpoints.cost_estimate import count_operations, estimate_model
from expunge.checkpoints.pace import Pace
from expunge.erasing.caption_gram import read_captions
from expunge.methods.mace import MACE
from expunge.runtime.threads import SMALL, Threads

PROBLEM = Problem((Concept("rocket", "ground"), Concept("bicycle", "ground")), ("train",))
CAPTIONS = 200


def endless(core: int) -> None:
    """A job that never ends, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def second_job(core: int) -> Iterator[None]:
    """A second job for the length of a block."""
    process = multiprocessing.get_context("spawn").Process(target=endless, args=(core,), daemon=True)
    process.start()
    time.sleep(2)
    try:
        yield
    finally:
        process.terminate()
        process.join()


def once(model: expunge.Model, method: MACE, chosen: bool) -> dict[str, Any]:
    """One edit: its estimate, what is told of the rest a quarter of the way, and the outcome."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EXPUNGE_CACHE"] = cache  # so that the captions are read every time
        threads = Threads(small=count_operations(model) < SMALL)
        with threads if chosen else nullcontext():
            used = torch.get_num_threads()
            work = method.estimate_cost(PROBLEM, model.num_inference_steps)
            plan = estimate_model(model, work=work)
            foretold = plan.seconds(work)
            pace = Pace(model, plan.count_units(work), plan.unit_seconds, plan.overhead(work))
            told: list[tuple[float, float]] = []
            pace.listeners.append(lambda left, _: told.append((time.monotonic(), left)))
            start, ours = time.monotonic(), time.process_time()
            with pace:
                edit = expunge.erase(model, PROBLEM, method, progress=pace.progress)
                edit.save(Path(cache) / "edit.safetensors")
            end = time.monotonic()
            seconds = end - start
    again = next((at, left) for at, left in told if at - start >= seconds / 4)
    return {
        "threads": used,
        "seconds": round(seconds, 2),
        "processor seconds": round(time.process_time() - ours, 2),
        "estimate": round(foretold, 2),
        "estimate over outcome": round(foretold / seconds, 2),
        "told at a quarter over what was left": round(again[1] / (end - again[0]), 2),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Take turns; the file is written after every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "busy.json")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, set(cores))
    model = expunge.load("emoji", device="cpu")
    torch.set_num_threads(len(cores))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "captions.txt"
        lines.write_text("\n".join(read_captions("general")[:CAPTIONS]), encoding="utf-8")
        method = MACE.preset("emoji", captions=str(lines), num_images=2, max_train_steps=10)
        for _ in range(options.rounds):
            for chosen in (True, False):
                for busy in (False, True):
                    with second_job(cores[0]) if busy else nullcontext():
                        row = once(model, method, chosen)
                    name = f"{'chosen' if chosen else 'all'} threads, {'busy' if busy else 'alone'}"
                    found.setdefault(name, []).append(row)
                    print(name, row, flush=True)
            record: dict[str, Any] = {"runs": found}
            for kind in ("chosen", "all"):
                pairs = zip(*(found[f"{kind} threads, {w}"] for w in ("alone", "busy")), strict=False)
                ratios = [round(busy["seconds"] / alone["seconds"], 2) for alone, busy in pairs]
                record[f"busy over alone, {kind} threads"] = ratios
            record["made with"] = {
                "torch": torch.__version__,
                "cores": len(cores),
                "machine": platform.machine(),
            }
            with replacing(options.to) as file:
                file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
