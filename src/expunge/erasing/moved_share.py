"""How far an edit moved its concepts toward their anchors, in prompts that it was not made with.

With f what a layer, or the whole denoiser, makes of a prompt before the edit and f' after it, e a prompt
of the concept and a the same prompt with the anchor in the concept's place,

    share = Σ ⟨f'(e) − f(e), f(a) − f(e)⟩ / Σ ‖f(a) − f(e)‖²,

1 where the concept has become its anchor, 0 where nothing happened; s · share at strength s of weights.

An edit of the layers that text enters through is measured there, at no cost: over the concept's last
token, or over what follows it, whichever went further, since methods move one or the other or both. An
edit that is trained on predictions is measured in these, on a short trajectory of the original; where
its method knows no anchor, the way is that to the empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from expunge.changes import Changes, InputChange, OutputChange, WeightChange, find_layer
from expunge.changes.strength import scale_difference
from expunge.erasing.prompt_templates import HELD_OUT, assemble_anchor_prompts, assemble_prompts
from expunge.model import Model
from expunge.problem import Concept
from expunge.text import Text

WEAK = 0.5
"""An edit that moved a concept by less than this share of the way is called weak."""

UNSURE = 0.8
"""Below this share of the way in predictions a concept is often still drawn."""

FOLLOWING = 8
"""How many of the tokens behind a concept's last are looked at; those behind them are padding."""

STEPS = 4
"""How many steps the trajectories have, at which predictions are compared."""


def count_predictions(concepts: int) -> int:
    """Count the predictions that `measure_moved` makes of so many concepts where it looks at these."""
    images = len(HELD_OUT["object"])
    return concepts * images * STEPS * 4  # drawn, and predicted for concept, anchor and edit


def measure_moved(
    model: Model,
    changes: Changes,
    concepts: Sequence[Concept],
    measured_in: Literal["text", "predictions"],
    strength: float = 1.0,
) -> dict[str, float]:
    """Measure how far changes move concepts toward their anchors, by name.

    Of "text" it costs four short prompts a concept; of "predictions", `count_predictions`.

    Args:
        model: the original.
        changes: what was found to erase the concepts.
        concepts: the concepts, with their anchors; "" is the empty prompt.
        measured_in: where to look.
        strength: how much of the changes counts.

    Returns:
        The share of the way, rounded to three digits. A concept is left out where it and its anchor are
        the same to the model, or no change is where the measurement looks.
    """
    found = {}
    for concept in concepts:
        erased = assemble_prompts(concept, HELD_OUT[concept.kind])
        anchored = assemble_anchor_prompts(concept, HELD_OUT[concept.kind]) * len(concept.names)
        texts = model.encode(erased), model.encode(anchored)
        if measured_in == "text":
            pairs = _pair_entries(model, changes, *texts, strength)
        else:
            first = list(range(len(HELD_OUT[concept.kind])))  # of the first name
            pairs = _pair_predictions(model, changes, texts[0][first], texts[1][first], strength)
        sums: dict[str, list[float]] = {}
        for where, moved, way in pairs:
            total = sums.setdefault(where, [0.0, 0.0])
            total[0] += float((moved.double() * way.double()).sum())
            total[1] += float(way.double().square().sum())
        shares = [went / whole for went, whole in sums.values() if whole > 0]
        if shares:
            found[concept.name] = round(max(shares), 3)
    return found


def _pair_entries(
    model: Model, changes: Changes, erased: Text, anchored: Text, strength: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield which tokens, f'(e) − f(e) and f(a) − f(e), of every changed layer that reads text."""
    changed = {layer for change in changes for layer in change.layers}
    parts = [
        (row, place, goal)
        for row in range(len(erased))
        for place, goal in zip(erased.from_last_token(row), anchored.from_last_token(row), strict=True)
    ]
    for entry in model.text_entries():
        if entry.layer not in changed:
            continue
        before, after = _run_layer(model, entry.layer, changes, erased.embeddings, strength)
        # The anchor's goal is the original's: an edit may move the anchor itself.
        goals, _ = _run_layer(model, entry.layer, (), anchored.embeddings, strength)
        for row, place, goal in parts:
            # As far as both prompts go: of the longer phrase less padding is left.
            n = min(place.stop - place.start, goal.stop - goal.start, 1 + FOLLOWING)
            e, a = slice(place.start, place.start + n), slice(goal.start, goal.start + n)
            moved, way = after[row, e] - before[row, e], goals[row, a] - before[row, e]
            # What the denoiser does not read moves no image, however far it went.
            read = erased.read[row, e].cpu()
            yield "last", moved[:1], way[:1]
            yield "following", moved[1:][read[1:]], way[1:][read[1:]]


def measure_drift(model: Model, changes: Changes, prompts: Sequence[str]) -> float:
    """Measure how far changes move prompts, as a share of their norm: (Σ ‖f' − f‖² / Σ ‖f‖²)^½.

    f is what the changed layers that read text make of every token that the denoiser reads.

    Args:
        model: the original.
        changes: what moves them.
        prompts: the prompts.
    """
    text = model.encode(prompts)
    changed = {layer for change in changes for layer in change.layers}
    moved = whole = 0.0
    for entry in model.text_entries():
        if entry.layer in changed:
            before, after = _run_layer(model, entry.layer, changes, text.embeddings, 1.0)
            read = text.read.cpu()
            moved += float((after - before)[read].double().square().sum())
            whole += float(before[read].double().square().sum())
    return (moved / whole) ** 0.5 if whole else 0.0


def read_bias(model: Model, layer: str) -> Tensor | None:
    """Return a linear layer's bias, (out,), from the disk where the denoiser is; None without one."""
    bias: Tensor | None = getattr(find_layer(model.pipe, layer), "bias", None)
    if bias is None:
        return None
    return (model.stored(layer, "bias") if model.stored is not None else bias).detach()


def _run_layer(
    model: Model, layer: str, changes: Changes, x: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Return what a linear layer makes of x (n, tokens, in) without changes and with them, on the CPU.

    Of a model whose denoiser is on the disk, the layer's parameters alone are read. The order is that in
    which `Applied` has them: parameters, inputs, outputs.
    """
    weight = model.weight(layer).float()
    bias = read_bias(model, layer)
    bias = bias if bias is None else bias.to(weight)
    x = x.to(weight)
    plain = torch.nn.functional.linear(x, weight, bias)
    own = [change for change in changes if layer in change.layers]
    if not own:
        return plain.cpu(), plain.cpu()
    for change in own:
        if isinstance(change, WeightChange) and change.parameter == "weight":
            weight = scale_difference(weight, change.weight(weight), strength)
        elif isinstance(change, WeightChange) and bias is not None:
            bias = scale_difference(bias, change.weight(bias), strength)
        elif isinstance(change, InputChange):
            x = scale_difference(x, change.change_input(x), strength)
    output = torch.nn.functional.linear(x, weight, bias)
    for change in own:
        if isinstance(change, OutputChange):
            output = scale_difference(output, change.change_output(x, output), strength)
    return plain.cpu(), output.cpu()


def _pair_predictions(
    model: Model, changes: Changes, erased: Text, anchored: Text, strength: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield f'(e) − f(e) and f(a) − f(e) of the predictions on trajectories of the original."""
    with torch.no_grad():
        seeds = range(len(erased))
        # Without guidance, at half the cost: it does not matter how points were reached.
        drawn = model.trajectory(erased, seeds, num_inference_steps=STEPS, guidance_scale=1.0)
        # The last point is the finished image, for which nothing is predicted.
        points = list(drawn)[:-1]
        before = [model.predict(z, t, erased) for t, z in points]
        goals = [model.predict(z, t, anchored) for t, z in points]
        with model.using(changes, strength=strength):
            # At the same points: along a trajectory of its own the edit's predictions would not compare.
            after = [model.predict(z, t, erased) for t, z in points]
    for old, goal, new in zip(before, goals, after, strict=True):
        yield "predictions", new - old, goal - old
