"""Looks: the numbers that metrics take of pictures, each picture drawn once and looked at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge import fields, registry
from expunge.cache import Cache, Request, Source
from expunge.errors import ExpungeError, ExpungeWarning
from expunge.metric import Metric
from expunge.model import Model
from expunge.run import Progress, quiet
from expunge.suite import Cell

CHUNK = 32


@dataclass(frozen=True, eq=False)
class Looks:
    """What was measured on the pictures of some cells."""

    cells: tuple[Cell, ...]
    requests: tuple[tuple[Request, ...], ...]
    """For each cell its pictures."""
    rows: Mapping[str, tuple[Tensor, ...]]
    """For each metric, for each cell: (pictures, width)."""


def make(name: str, options: Mapping[str, Any]) -> Metric:
    """A metric by its name, with its options.

    Raises:
        ExpungeError: there is no such metric or option.
    """
    metric: Metric = fields.build(registry.get("metrics", name), options)
    return metric


def key(name: str, metric: Metric) -> str:
    """The name under which a metric's numbers are kept: it changes with all they hang on."""
    text = json.dumps([name, dataclasses.asdict(metric), metric.provenance], sort_keys=True, default=str)
    return f"{name}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def requests(
    model: Model, cells: Sequence[Cell], steps: int | None, guidance: float | None
) -> tuple[tuple[Request, ...], ...]:
    """The pictures of cells, with the sampler's settings filled in."""
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


def look(
    cache: Cache,
    source: Source,
    original: Source | None,
    cells: Sequence[Cell],
    asked: Sequence[Sequence[Request]],
    metrics: Mapping[str, Metric],
    progress: Progress = quiet,
    label: str = "",
) -> Looks:
    """Measure the pictures of cells; draws only pictures that a metric has not yet seen.

    Args:
        cache: where pictures and numbers are kept.
        source: what draws.
        original: what paired metrics compare with; None where `source` is the original itself, and
            paired metrics are passed over.
        cells: what to look at.
        asked: for each cell its pictures, from `requests`.
        metrics: by name.
        progress: told how many pictures are done.
        label: what progress calls it.
    """
    used = {name: m for name, m in metrics.items() if original is not None or not m.paired}
    keys = {name: key(name, metric) for name, metric in used.items()}
    flat = [request for group in asked for request in group]
    found: dict[str, list[Tensor]] = {name: [] for name in used}
    for start in range(0, len(flat), CHUNK):

        def tell(_: str, done: int, total: int, at: int = start) -> None:
            here = min(CHUNK, len(flat) - at)
            progress(label, 100 * at + 100 * here * done // max(total, 1), 100 * len(flat))

        part = flat[start : start + CHUNK]
        with torch.inference_mode():
            for name, row in _chunk(cache, source, original, part, used, keys, tell):
                found[name].append(row)
        progress(label, 100 * min(start + CHUNK, len(flat)), 100 * len(flat))
    lengths = [len(group) for group in asked]
    return Looks(
        tuple(cells),
        tuple(tuple(group) for group in asked),
        {name: torch.stack(rows).split(lengths) for name, rows in found.items()},
    )


def _chunk(
    cache: Cache,
    source: Source,
    original: Source | None,
    part: Sequence[Request],
    metrics: Mapping[str, Metric],
    keys: Mapping[str, str],
    progress: Progress,
) -> list[tuple[str, Tensor]]:
    """The rows of a few pictures, (metric, row) picture after picture; new ones are kept."""
    places = [source.address(request) for request in part]
    theirs = [original.address(request) for request in part] if original else [""] * len(part)
    known = [cache.scores(place) for place in places]

    def where(name: str, row: int) -> str:
        return f"{keys[name]}:{theirs[row][:16]}" if metrics[name].paired else keys[name]

    new: list[dict[str, Tensor]] = [{} for _ in part]
    lacking = {
        name: [row for row in range(len(part)) if where(name, row) not in known[row]] for name in metrics
    }
    rows = sorted({row for missing in lacking.values() for row in missing})
    if rows:
        pictures = dict(zip(rows, cache.draw(source, [part[r] for r in rows], progress), strict=True))
        paired = sorted({r for n, missing in lacking.items() if metrics[n].paired for r in missing})
        references = (
            dict(zip(paired, cache.draw(original, [part[r] for r in paired]), strict=True))
            if paired and original
            else {}
        )
        for name, missing in lacking.items():
            if not missing:
                continue
            measured = metrics[name].measure(
                torch.stack([pictures[r] for r in missing]),
                [part[r].prompt for r in missing],
                torch.stack([references[r] for r in missing]) if metrics[name].paired else None,
            )
            for row, numbers in zip(missing, measured, strict=True):
                new[row][where(name, row)] = numbers.float()
        for row in rows:
            cache.keep_scores(places[row], new[row])
    return [
        (name, {**known[row], **new[row]}[where(name, row)])
        for row in range(len(part))
        for name in metrics
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
