"""Looks: the numbers that metrics take of images, each image drawn once and looked at once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.quiet import Progress, quiet
from expunge.evaluation.image_cache import Cache, Request, Source
from expunge.evaluation.suite import Cell
from expunge.metric import Metric
from expunge.model import Model

CHUNK = 64


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured on the images of some cells."""

    cells: tuple[Cell, ...]
    requests: tuple[tuple[Request, ...], ...]
    """For each cell its images."""
    rows: Mapping[str, tuple[Tensor, ...]]
    """For each metric, for each cell: (images, width)."""


def make(name: str, options: Mapping[str, Any]) -> Metric:
    """A metric by its name, with its options.

    Raises:
        ExpungeError: there is no such metric or option.
    """
    metric: Metric = fields.build(registry.get("metrics", name), options, name)
    return metric


def key(metric: Metric) -> str:
    """The name under which a metric's numbers are kept: it changes with all they hang on."""
    text = json.dumps(metric.feature_key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def requests(
    model: Model, cells: Sequence[Cell], steps: int | None, guidance: float | None
) -> tuple[tuple[Request, ...], ...]:
    """The images of cells, with the sampler's settings filled in."""
    steps = steps or model.num_inference_steps
    default = model.guidance_scale if guidance is None else guidance
    return tuple(
        tuple(
            Request(
                cell.prompt,
                seed,
                steps,
                default if cell.guidance is None else cell.guidance,
                cell.stand_in,
            )
            for seed in cell.seeds
        )
        for cell in cells
    )


def measure(
    cache: Cache,
    source: Source,
    original: Source | None,
    cells: Sequence[Cell],
    asked: Sequence[Sequence[Request]],
    metrics: Mapping[str, Metric],
    progress: Progress = quiet,
    label: str = "",
) -> Measurements:
    """Measure the images of cells; draws only images that a metric has not yet seen.

    Args:
        cache: where images and numbers are kept.
        source: what draws.
        original: what paired metrics compare with; None where `source` is the original itself, and
            paired metrics are passed over.
        cells: what to look at.
        asked: for each cell its images, from `requests`.
        metrics: by name.
        progress: told how many images are done.
        label: what progress calls it.
    """
    keys = {name: key(m) for name, m in metrics.items() if original is not None or not m.paired}
    lookers = {keys[name]: metrics[name] for name in keys}
    flat = [request for group in asked for request in group]
    found: dict[str, list[Tensor]] = {one: [] for one in lookers}
    progress(label, 0, 100 * len(flat))  # what is read and what is drawn is not yet known
    for start in range(0, len(flat), CHUNK):

        def tell(_: str, done: int, total: int, at: int = start) -> None:
            here = min(CHUNK, len(flat) - at)
            progress(label, 100 * at + 100 * here * done // max(total, 1), 100 * len(flat))

        part = flat[start : start + CHUNK]
        with torch.inference_mode():
            for one, row in _chunk(cache, source, original, part, lookers, tell):
                found[one].append(row)
        progress(label, 100 * min(start + CHUNK, len(flat)), 100 * len(flat))
    lengths = [len(group) for group in asked]
    return Measurements(
        tuple(cells),
        tuple(tuple(group) for group in asked),
        {name: torch.stack(found[one]).split(lengths) for name, one in keys.items()},
    )


def _chunk(
    cache: Cache,
    source: Source,
    original: Source | None,
    part: Sequence[Request],
    metrics: Mapping[str, Metric],
    progress: Progress,
) -> list[tuple[str, Tensor]]:
    """The rows of a few images, (key, row) image after image; new ones are kept.

    `metrics` are given by their keys.
    """
    places = [source.address(request) for request in part]
    theirs = [original.address(request) for request in part] if original else [""] * len(part)
    known = [cache.scores(place) for place in places]

    def where(one: str, row: int) -> str:
        return f"{one}:{theirs[row][:16]}" if metrics[one].paired else one

    new: list[dict[str, Tensor]] = [{} for _ in part]
    lacking = {
        one: [row for row in range(len(part)) if where(one, row) not in known[row]] for one in metrics
    }
    rows = sorted({row for missing in lacking.values() for row in missing})
    if rows:
        images = dict(zip(rows, cache.draw(source, [part[r] for r in rows], progress), strict=True))
        paired = sorted({r for one, missing in lacking.items() if metrics[one].paired for r in missing})
        references = (
            dict(zip(paired, cache.draw(original, [part[r] for r in paired]), strict=True))
            if paired and original
            else {}
        )
        for one, missing in lacking.items():
            if not missing:
                continue
            measured = metrics[one].measure(
                torch.stack([images[r] for r in missing]),
                [part[r].prompt for r in missing],
                torch.stack([references[r] for r in missing]) if metrics[one].paired else None,
            )
            for row, numbers in zip(missing, measured, strict=True):
                new[row][where(one, row)] = numbers.float()
        for row in rows:
            cache.keep_scores(places[row], new[row])
    return [
        (one, {**known[row], **new[row]}[where(one, row)]) for row in range(len(part)) for one in metrics
    ]


def warn_of_cuts(model: Model, cells: Sequence[Cell]) -> None:
    """Say of every prompt that is longer than the model's window where it will be cut."""
    for prompt in dict.fromkeys(cell.prompt for cell in cells):
        if len(prompt) <= model.window or (n := model.count_tokens(prompt)) <= model.window:
            continue
        words = prompt.split()
        kept = next(
            count
            for count in range(len(words), -1, -1)
            if model.count_tokens(" ".join(words[:count])) <= model.window
        )
        shown = " ".join(words[max(kept - 3, 0) : kept])
        warnings.warn(
            f"{prompt[:40]!r}… has {n} tokens and the model reads {model.window}:"
            f" it will be cut after {'… ' * (kept > 3)}{shown!r}",
            ExpungeWarning,
            stacklevel=2,
        )


def require_known(names: Sequence[str]) -> None:
    """Check that all metrics exist before anything is drawn.

    Raises:
        ExpungeError: one does not; the nearest is named.
    """
    for name in names:
        registry.get("metrics", name)
    if len(set(names)) < len(names):
        raise ExpungeError(f"a metric is named twice among {', '.join(names)}")
