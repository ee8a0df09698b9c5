"""How much of ANT's objective a low-rank change can learn, by rank, steps and trajectories.

A change of keys and values does the same to a word at every noise and in every place of the image;
the objective asks for something that depends on both. For "turtle", which no suite reports, changes are
trained with the preset `emoji-object` but for what is said, and the loss is taken on trajectories and
noises that were not trained on, as a share of the loss before training. Writes
`experiments/results/ant_fit.json`.

    python experiments/archive/ant_fit.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Model, Problem
from expunge.base.files import replacing
from expunge.changes import find_layer
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.parameters import select_layers
from expunge.erasing.trajectories import TrainingConcept
from expunge.methods.ant import ANT
from expunge.ops.low_rank import use_own_factors
from expunge.runtime.context import RunContext

sys.path.insert(0, str(Path(__file__).parents[1]))  # the experiments that are kept alive

from tune import objects

HERE = Path(__file__).parents[1]

TRIED: tuple[dict[str, Any], ...] = (
    {"rank": 4, "max_train_steps": 60},
    {"rank": 16, "max_train_steps": 60},
    {"rank": 16, "max_train_steps": 200},
    {"rank": 16, "max_train_steps": 200, "trajectories": 16},
    {"rank": 64, "max_train_steps": 200, "trajectories": 16},
    {"rank": 16, "max_train_steps": 200, "trajectories": 16, "learning_rate": 0.01},
    {"rank": 16, "max_train_steps": 200, "trajectories": 16, "negative_guidance": 3.0},
    {"rank": 16, "max_train_steps": 200, "trajectories": 16, "negative_guidance": 0.25},
)
FRESH, POINTS = 24, 60
"""Trajectories that were not trained on, and how many points of them are looked at."""


def left(model: Model, problem: Problem, method: ANT) -> float:
    """The share of the loss that is left after training, on fresh trajectories."""
    run = RunContext()
    (concept,) = problem.erase
    # The change as it is trained, before any fusion.
    method = method.replace(through_fusion=False)
    sums = method.low_rank.sum_grams(method, model, problem, run)
    factors = method.low_rank.train(method, model, problem, run, *sums)[concept.name]
    layers = select_layers(model, "text")
    modules = [find_layer(model.pipe, layer) for layer in layers]
    ups, downs = ([factors[f"{layer}.{side}"][None] for layer in layers] for side in ("up", "down"))
    steering = Steering(model, method.trajectory_config)
    text = model.encode(method.prompts(model, concept))
    subject = TrainingConcept(concept.name, text, run.generator("fresh"))
    with torch.no_grad():
        kept = steering.store_trajectories(subject, FRESH)
        picked = [steering.pick_points([subject], [kept]) for _ in range(POINTS)]
        before = sum(float(steering.compute_losses(*one)) for one in picked)
        with use_own_factors(modules, ups, downs):
            after = sum(float(steering.compute_losses(*one)) for one in picked)
    return after / before


def main() -> None:
    """Train, measure, write."""
    model, problem = expunge.load("emoji"), objects()[0]
    rows = []
    for fields in TRIED:
        method = ANT.preset("emoji-object", **fields)
        rows.append({**fields, "left": round(left(model, problem, method), 3)})
        print(rows[-1], flush=True)
    with replacing(HERE / "results" / "ant_fit.json") as file:
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
