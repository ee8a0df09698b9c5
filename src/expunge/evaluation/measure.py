"""Measuring: each image is drawn once, and each metric looks at it once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.base import fields, registry
from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.quiet import Progress, ignore_progress
from expunge.evaluation.cells import Cell
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.evaluation.sample import Sample
from expunge.evaluation.suite import Suite
from expunge.metric import Metric
from expunge.model import Model

CHUNK = 64
"""Images that are drawn and measured together."""


def make_metric(name: str, options: Mapping[str, Any]) -> Metric:
    """Make a metric by its name, with its options.

    Raises:
        ExpungeError: there is no such metric or option.
    """
    metric: Metric = fields.build(registry.get("metrics", name), options, name)
    return metric


def read_options(suite: Suite, name: str) -> dict[str, Any]:
    """Return the fields that a suite gives a metric; the CLIP is by default that of the suite's model.

    Args:
        suite: the suite.
        name: the metric's.
    """
    own: dict[str, Any] = {}
    asks = "model" in getattr(registry.get("metrics", name), "__dataclass_fields__", {})
    if asks and (registry.HERE / suite.model / "clip").is_dir():
        own["model"] = suite.model
    return {**own, **suite.options.get(name, {})}


def name_metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric | None]:
    """Return metrics under their names; None in the place of one that is still to be made.

    Raises:
        ExpungeError: there is no such metric (the nearest is named), or one is named twice.
        TypeError: one is neither a name nor a metric.
    """
    found: dict[str, Metric | None] = {}
    for one in metrics:
        if isinstance(one, str):
            registry.get("metrics", one)
        elif not isinstance(one, Metric):
            raise TypeError(f"a metric must be a name or a Metric, not {one!r}")
        name = one if isinstance(one, str) else registry.name_of("metrics", type(one))
        if name in found:
            raise ExpungeError(f"the metric {name} is named twice")
        found[name] = None if isinstance(one, str) else one
    return found


def metric_key(metric: Metric) -> str:
    """Return the name under which a metric's numbers are kept: it changes with all they hang on."""
    text = json.dumps(metric.feature_key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    cache: Cache,
    source: Source,
    original: Source | None,
    samples: Sequence[Sample],
    metrics: Mapping[str, Metric],
    progress: Progress = ignore_progress,
    label: str = "",
) -> tuple[Sample, ...]:
    """Return the samples with what metrics measure of them; draws only what a metric has not yet seen.

    Args:
        cache: where images and numbers are kept.
        source: what draws.
        original: what paired metrics compare with; None where `source` is the original itself, and
            paired metrics are passed over.
        samples: what to draw.
        metrics: by name.
        progress: told how many images are done.
        label: what progress calls it.
    """
    keys = {name: metric_key(m) for name, m in metrics.items() if original is not None or not m.paired}
    # By what their rows depend on: a judge and a score with one feature extractor measure together.
    by_key = {keys[name]: metrics[name] for name in keys}
    requests = [request for sample in samples for request in sample.requests]
    rows: dict[str, list[Tensor]] = {one: [] for one in by_key}
    progress(label, 0, 100 * len(requests))  # what is read and what is drawn is not yet known
    for start in range(0, len(requests), CHUNK):

        def tell(_: str, done: int, total: int, at: int = start) -> None:
            here = min(CHUNK, len(requests) - at)
            progress(label, 100 * at + 100 * here * done // max(total, 1), 100 * len(requests))

        # In chunks of a fixed size, so that memory does not grow with the suite.
        part = requests[start : start + CHUNK]
        with torch.inference_mode():
            for one, row in _measure_chunk(cache, source, original, part, by_key, tell):
                rows[one].append(row)
        progress(label, 100 * min(start + CHUNK, len(requests)), 100 * len(requests))
    lengths = [len(sample) for sample in samples]
    features = {name: torch.stack(rows[one]).split(lengths) for name, one in keys.items()}
    return tuple(
        dataclasses.replace(sample, features={name: parts[i] for name, parts in features.items()})
        for i, sample in enumerate(samples)
    )


def _measure_chunk(
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
    references_at = [original.address(request) for request in part] if original else [""] * len(part)
    known = [cache.read_scores(place) for place in places]

    def where(one: str, row: int) -> str:
        # A paired row depends on its reference, too: the original may be another one.
        return f"{one}:{references_at[row][:16]}" if metrics[one].paired else one

    new: list[dict[str, Tensor]] = [{} for _ in part]
    lacking = {
        one: [row for row in range(len(part)) if where(one, row) not in known[row]] for one in metrics
    }
    rows = sorted({row for missing in lacking.values() for row in missing})
    if rows:
        # Drawn as the cache holds them, in 8 bits: numbers do not tell a cached image from a new one.
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
            if measured.ndim != 2 or len(measured) != len(missing):
                raise TypeError(
                    f"the metric {type(metrics[one]).__name__} must measure {len(missing)} images as a"
                    f" tensor ({len(missing)}, width), not {tuple(measured.shape)}"
                )
            for row, numbers in zip(missing, measured, strict=True):
                new[row][where(one, row)] = numbers.float()
        for row in rows:
            # After every chunk: a run that is killed keeps what it has measured.
            cache.keep_scores(places[row], new[row])
    return [
        (one, {**known[row], **new[row]}[where(one, row)]) for row in range(len(part)) for one in metrics
    ]


def warn_of_cuts(model: Model, cells: Sequence[Cell]) -> None:
    """Warn of every prompt that is longer than the model's window, and say where it will be cut."""
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
