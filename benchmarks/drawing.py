"""How fast the emoji model draws: 64x64 images, the model's own steps and guidance, on this machine.

Beside it in the same run: the diffusers pipeline's own call on the same prompts (the baseline), and
the limit, which is what the denoiser alone would allow: images a second = samples through the
U-Net a second / (2 * steps), 2 for the guided and the unguided prediction. Rounds of the three are
taken in turn, so that a busy moment hits all of them; the median over rounds counts.
Writes `benchmarks/results/drawing.json`. To reach: 2 images a second on two cores, with 20 steps.

    python benchmarks/drawing.py [--images 32] [--batch 1 8 32] [--steps 12 20] [--rounds 3]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import expunge
from expunge.base.files import replacing
from expunge.changes import find_layer
from expunge.model import Model
from expunge.ops.cached_layers import cache_outputs

NAMES = ("airplane", "cat", "ship", "pizza", "guitar", "house", "frog", "crown")


def prompts(n: int) -> list[str]:
    return [f"a photo of the {NAMES[i % len(NAMES)]}" for i in range(n)]


def draw(model: Model, n: int, batch: int) -> None:
    model.draw(expunge.Probe(tuple(prompts(n)), tuple(range(n))), batch_size=batch)


def call(model: Model, n: int, batch: int) -> None:
    """The baseline: the pipeline as diffusers calls it."""
    for start in range(0, n, batch):
        model.pipe(
            prompts(n)[start : start + batch],
            num_inference_steps=model.num_inference_steps,
            guidance_scale=model.guidance_scale,
            output_type="pt",
        )


@torch.inference_mode()
def denoise(model: Model, n: int, batch: int) -> None:
    """The limit: the passes through the denoiser that `draw` needs, and nothing else."""
    config, text = model.pipe.unet.config, model.encode(prompts(2 * batch))
    latents = torch.randn(2 * batch, config.in_channels, config.sample_size, config.sample_size)
    layers = [entry.layer.rpartition(".") for entry in model.text_entries()]
    for _ in range(n // batch):
        with cache_outputs([(find_layer(model.pipe, parent), name) for parent, _, name in layers]):
            for _ in range(model.num_inference_steps):
                model.predict(latents, 500, text)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="images a round")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="images drawn together")
    parser.add_argument("--steps", type=int, nargs="+", help="default: the model's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "drawing.json")
    options = parser.parse_args()

    model = expunge.load("emoji")
    model.pipe.set_progress_bar_config(disable=True)
    rows = []
    for steps, batch in itertools.product(options.steps or [model.num_inference_steps], options.batch):
        model.num_inference_steps = steps
        n = max(options.images if batch > 1 else options.images // 4, batch) // batch * batch
        ways = {
            "expunge": partial(draw, model, n, batch),
            "diffusers": partial(call, model, n, batch),
            "limit": partial(denoise, model, n, batch),
        }
        denoise(model, batch, batch)  # what is done once in a process is not counted
        taken = [{name: seconds(way) for name, way in ways.items()} for _ in range(options.rounds)]
        rate = {name: n / statistics.median(each[name] for each in taken) for name in ways}
        rows.append(
            {
                "num_inference_steps": steps,
                "batch": batch,
                "pictures": n,
                "images_a_second": {name: round(value, 2) for name, value in rate.items()},
                "samples_through_the_unet_a_second": round(
                    rate["limit"] * 2 * model.num_inference_steps, 1
                ),
                "of_the_limit": round(rate["expunge"] / rate["limit"], 3),
                "times_diffusers": round(rate["expunge"] / rate["diffusers"], 3),
            }
        )

    table = Table("steps", "batch", "images/s", "diffusers", "limit", "of the limit", "times diffusers")
    for row in rows:
        rate = row["images_a_second"]
        table.add_row(
            *(
                str(x)
                for x in (
                    row["num_inference_steps"],
                    row["batch"],
                    *rate.values(),
                    row["of_the_limit"],
                    row["times_diffusers"],
                )
            )
        )
    Console().print(table)
    report = {
        "rows": rows,
        "made with": {
            "guidance_scale": model.guidance_scale,
            "sampler": type(model.pipe.scheduler).__name__,
            "resolution": 64,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "versions": {name: version(name) for name in ("expunge", "torch", "diffusers")},
        },
    }
    options.to.parent.mkdir(exist_ok=True)
    with replacing(options.to) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
