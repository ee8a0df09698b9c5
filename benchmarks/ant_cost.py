"""What ANT's single-concept run costs: denoiser evaluations a step, and the peak of memory.

*Evaluations*: points of one trajectory, predictions in one batch, against the plain form: a
trajectory each for the early and the late point, and every prediction a pass of its own. Both must
find the same loss.

*Memory*: masked training in place, its saliency maps included, against a second network for the
original and Adam on all weights, gradients multiplied by the mask; weights are random, of Stable
Diffusion 1.4's shapes at `--size 1` (0.86 billion), narrower below. Each runs in a process of its own;
counted is the peak over what was there before the network (a GPU's allocator, or the resident set).
Gradients are checkpointed, and trajectories have ten steps, in both; ours keeps its last good value from
the second step on, as it does from the 26th else. Writes `benchmarks/results/ant_cost.json`.

    python benchmarks/ant_cost.py [--size 0.25] [--latents 32] [--maps 10] [--dtype float32]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
import expunge.erasing.in_place_training as training_module
from expunge import Concept, Model, Problem
from expunge.base.files import replacing
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.parameters import select_parameters
from expunge.erasing.trajectories import TrainingConcept, TrajectorySample
from expunge.methods.ant import ANT
from expunge.ops.in_place import InPlace
from expunge.runtime.context import RunContext

CHANNELS = (320, 640, 1280, 1280)
"""Stable Diffusion 1.4's."""

METHOD = ANT.preset("explicit")
SHORT = dataclasses.replace(METHOD, trajectory_steps=10)
"""With as many steps as memory needs."""


def build(size: float, latents: int, dtype: torch.dtype) -> Model:
    """A pipeline of Stable Diffusion's classes: its denoiser at this size, the shipped text encoder."""
    import diffusers

    pipe = expunge.load("emoji", device="cpu").pipe
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet = diffusers.UNet2DConditionModel(
            sample_size=latents,
            in_channels=4,
            out_channels=4,
            block_out_channels=tuple(max(32, int(32 * round(size * c / 32))) for c in CHANNELS),
            layers_per_block=2,
            cross_attention_dim=pipe.text_encoder.config.hidden_size,
            attention_head_dim=8,
        ).to(dtype)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()  # where diffusers checkpoints; nothing here has dropout
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return expunge.load(pipe)


def resident() -> int:
    """The resident set, in bytes; resets its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak(before: int) -> int:
    """The peak of memory since `resident`, over `before`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") - before


def ours(model: Model, steps: int, maps: int) -> dict[str, Any]:
    """The method itself."""
    training_module.KEEP_EVERY = 1
    method = SHORT.replace(maps=maps, settle=0.0, max_train_steps=steps, batch_size=1, map_samples=2)
    changes = expunge.erase(model, Problem((Concept("weapon", ""),)), method).changes
    kept = sum(tensor.numel() for change in changes for tensor in change.tensors.values()) // 2
    return {"trained": kept}


def plain(model: Model, steps: int, maps: int) -> dict[str, Any]:
    """A second network, gradients of all weights, and Adam's state for all of them."""
    unet, original = model.pipe.unet, copy.deepcopy(model.pipe.unet)
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in unet.named_parameters()}
    adam = torch.optim.Adam(unet.parameters(), lr=METHOD.learning_rate, foreach=False)
    steering, subject = Steering(model, SHORT.trajectory_config), _subject(model)
    for _ in range(steps):
        sample = steering.draw_points([subject])
        model.pipe.unet = original
        targets = steering.predict_original(sample)
        model.pipe.unet = unet
        steering.compute_losses(sample, targets).mean().backward()
        for name, parameter in unet.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= mask[name]
        adam.step()
        adam.zero_grad()
    return {"trained": sum(p.numel() for p in unet.parameters())}


def _subject(model: Model) -> TrainingConcept:
    return TrainingConcept("weapon", model.encode(["weapon"]), RunContext(0).generator("training"))


def evaluations(model: Model) -> dict[str, Any]:
    """Rows and passes through the denoiser in one step of either form, and both losses."""
    counted = {"rows": 0, "passes": 0}
    predict = model.predict

    def count(latents: Tensor, t: Any, text: Any) -> Tensor:
        counted["rows"] += len(latents)
        counted["passes"] += 1
        return predict(latents, t, text)

    steering, results = Steering(model, METHOD.trajectory_config), {}
    with InPlace(select_parameters(model, "denoiser")) as trained, torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in trained.values:
            value += 0.01 * torch.randn(value.shape, generator=generator).to(value)
        trained.write()
        model.predict = count  # type: ignore[method-assign]
        sample = steering.draw_points([_subject(model)])
        with trained.off():
            targets = steering.predict_original(sample)
        results["one pass"] = {**counted, "loss": float(steering.compute_losses(sample, targets))}
        counted.update(rows=0, passes=0)
        results["plain"] = {"loss": _plain_loss(model, steering, sample, trained), **counted}
        del model.predict
    pair = [results[form]["loss"] for form in ("one pass", "plain")]
    return {**results, "relative difference": abs(pair[0] - pair[1]) / pair[1]}


def _plain_loss(model: Model, steering: Steering, sample: TrajectorySample, trained: InPlace) -> float:
    """Each point from a trajectory of its own, each prediction a pass; guidance 1 in the predictions."""
    subject, predictions = _subject(model), {}
    torch.randint(1, (), generator=subject.generator)
    seed = int(torch.randint(2**31, (), generator=subject.generator))
    empty = model.encode([""])
    for when, met in (("late", sample.late), ("early", sample.early)):
        assert met is not None
        scheduler = copy.deepcopy(model.pipe.scheduler)
        scheduler.set_timesteps(len(steering.timesteps))
        latents = torch.randn(met.latents.shape, generator=torch.Generator().manual_seed(seed))
        latents = latents.to(met.latents)
        for t in scheduler.timesteps[: steering.timesteps.index(int(met.t))]:
            without, prompted = (model.predict(latents, t, text) for text in (empty, sample.text))
            guided = without + METHOD.trajectory_guidance * (prompted - without)
            latents = scheduler.step(guided, t, latents).prev_sample
        for name, text in ((when, sample.text), (f"{when} empty", empty)):
            predictions[name] = model.predict(latents, met.t, text)
            with trained.off():
                predictions[f"original {name}"] = model.predict(latents, met.t, text)
    p, eta = predictions, METHOD.negative_guidance
    without, early = p["original late empty"], p["original early empty"]
    terms = (
        (1.0, p["late"], without - eta * (p["original late"] - without)),
        (METHOD.preserve, p["early"], early + eta * (p["original early"] - early)),
        (METHOD.unconditional_late, p["late empty"], without),
        (METHOD.unconditional_early, p["early empty"], early),
    )
    return sum(weight * float((a - b).square().mean()) for weight, a, b in terms)


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=float, default=0.25, help="width, as a share of SD 1.4's")
    parser.add_argument("--latents", type=int, default=32, help="the latents' side; SD 1.4's is 64")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--maps", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results" / "ant_cost.json")
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.only:
        torch.zeros(1).to("cuda" if torch.cuda.is_available() else "cpu")
        import diffusers  # noqa: F401  what it takes is not the network's

        expunge.load("emoji", device="cpu")
        before = resident()
        model = build(options.size, options.latents, dtype)
        found = {"ours": ours, "plain": plain}[options.only](model, options.steps, options.maps)
        weights = sum(p.numel() * p.element_size() for p in model.pipe.unet.parameters())
        print(json.dumps({**found, "weights": weights, "peak": peak(before)}))
        return
    memory: dict[str, Any] = {}
    for way in ("ours", "plain"):
        command = [sys.executable, __file__, "--only", way, *sys.argv[1:]]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        memory[way] = json.loads(said.splitlines()[-1])
    small = build(0.1, 16, torch.float32)
    small.pipe.unet.eval()
    record = {
        "size": options.size,
        "latents": options.latents,
        "dtype": options.dtype,
        "maps": options.maps,
        "evaluations": evaluations(small),
        "bytes": memory,
        "share": memory["ours"]["peak"] / memory["plain"]["peak"],
        "made with": {
            **{name: version(name) for name in ("expunge", "torch", "diffusers")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
    }
    print(json.dumps(record, indent=1))
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
