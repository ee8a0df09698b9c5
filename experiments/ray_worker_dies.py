"""Spread work over a real Ray on this machine, kill a worker, and compare with the local result.

The work is what an erasure starts from: for every word, the latents of two images that the model
has half drawn. With `--method NAME` it is a whole erasure of the words by that method.
Writes `experiments/results/ray_worker_dies.json`, or `ray_worker_dies_NAME.json`.

    python experiments/ray_worker_dies.py [--method mace] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

import expunge
from expunge import Concept, Problem
from expunge.base import registry
from expunge.base.files import replacing
from expunge.model import Model
from expunge.runtime.context import RunContext

WORDS = ("elephant", "rocket", "guitar", "pizza", "turtle", "house", "butterfly", "bicycle")


def half_drawn(model: Model, where: str) -> dict[str, dict[str, torch.Tensor]]:
    """The latents of every word."""

    def make(names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        made = {}
        for name in names:
            text = model.encode([f"a photo of the {name}"] * 2)
            with torch.inference_mode():
                t, latents = model.denoise(text, [0, 1], until=5, num_inference_steps=10)
            made[name] = {"latents": latents, "t": torch.tensor(t)}
        return made

    return RunContext(ray=where).map_cached(make, WORDS, label="drawing")


def erased(model: Model, method: str, where: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every change of an edit that erases the words."""
    problem = Problem(tuple(Concept(word) for word in WORDS))
    edit = expunge.erase(model, problem, registry.get("methods", method)(), ray=where)
    return {str(i): change.tensors for i, change in enumerate(edit.changes)}


def kill_one(killed: list[int], finished: threading.Event) -> None:
    """SIGKILL the first worker that is seen at work, a moment after it has begun."""
    while not finished.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                at_work = "_make" in process.cmdline()[0]
            except (psutil.Error, IndexError):
                continue
            if at_work:
                time.sleep(1)
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return


def main() -> None:
    """Here, then on Ray with one worker killed; the same result, or an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", help="erase the words with this method")
    parser.add_argument("--workers", type=int, default=2, help="processors that Ray may use")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    name = "_".join(filter(None, ("ray_worker_dies", options.method)))
    to = options.to or Path(__file__).parent / "results" / f"{name}.json"
    model = expunge.load("emoji")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small: dict[str, Any] = {"num_cpus": options.workers, "object_store_memory": 200_000_000}
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **small)

    def work(where: str) -> dict[str, dict[str, torch.Tensor]]:
        return erased(model, options.method, where) if options.method else half_drawn(model, where)

    here = work("")
    killed: list[int] = []
    finished = threading.Event()
    killer = threading.Thread(target=kill_one, args=(killed, finished))
    killer.start()
    try:
        there = work("local")
    finally:
        finished.set()
        killer.join()
    record = {
        "what": f"{options.method} of the words"
        if options.method
        else "latents of two pictures of each word",
        "words": list(WORDS),
        "processors": options.workers,
        "threads": torch.get_num_threads(),
        "workers killed": len(killed),
        "equal to the last bit": here.keys() == there.keys()
        and all(torch.equal(here[n][k], there[n][k]) for n in here for k in here[n]),
        "largest difference": max(
            float((here[n][k].double() - there[n][k].double()).abs().max())
            for n in here
            for k in here[n]
        ),
        "versions": {name: version(name) for name in ("expunge", "torch", "diffusers", "ray")},
    }
    print(json.dumps(record, indent=1))
    assert killed, "no worker was seen at work"
    assert record["equal to the last bit"]
    with replacing(to) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
