"""Does a forecast order names as the images then change? On the shipped model, against its own images.

For each erased concept the forecast (`expunge.evaluation.forecast`) says how far every other name moves
where text enters. Then the edit is made, and the same prompts and seeds are drawn with and without it:
what is compared is the rank of a name's forecast with that of its images' mean pixel distance
(Spearman), over the names to be retained and over these and others that the model is known to draw.

Writes `experiments/results/forecast.json`.

    python experiments/forecast.py [--seeds 2] [--methods uce mace:emoji]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Problem
from expunge.base import registry
from expunge.base.files import replacing
from expunge.evaluation.cells import Cell
from expunge.evaluation.forecast import forecast
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Source
from expunge.evaluation.measure import make_metric, measure
from expunge.evaluation.sample import lay_out
from expunge.method import Method
from expunge.studio.knowledge import PLAIN_PROMPTS, Knowledge, of_model

FILE = Path(__file__).parent / "results" / "forecast.json"

ERASED = ("airplane", "cat", "flag of Japan", "twemoji style")
"""One or two of each kind."""


def rank(values: Tensor) -> Tensor:
    """Rank values from 0, equal ones at the mean of their places: (n,)."""
    less = (values[None] < values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return less + (same - 1) / 2


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two lists of n numbers, from -1 to 1."""
    x, y = rank(a.double()), rank(b.double())
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def choose(method: str) -> Method:
    """Return the method of "NAME" or "NAME:PRESET"."""
    name, _, preset = method.partition(":")
    cls = registry.get("methods", name)
    made: Method = cls.preset(preset) if preset else cls()
    return made


def change(
    cache: Cache, original: Source, edited: Source, names: list[str], known: Knowledge, seeds: int
) -> Tensor:
    """Draw each name's prompt with and without the edit; the mean pixel distance of each, (n,)."""
    prompts = [PLAIN_PROMPTS[one.kind if (one := known.find(n)) else "object"] for n in names]
    cells = [
        Cell("retained", name, prompt.replace("{}", name), tuple(range(seeds)), ())
        for name, prompt in zip(names, prompts, strict=True)
    ]
    samples = lay_out(original.model, cells)
    metric = {"pixel_distance": make_metric("pixel_distance", {})}
    found = measure(cache, edited, original, samples, metric)
    return torch.stack([sample.features["pixel_distance"].mean() for sample in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2, help="images of each name")
    parser.add_argument("--methods", nargs="+", default=["uce", "mace:emoji"])
    parser.add_argument("--erased", nargs="+", default=list(ERASED))
    parser.add_argument("--names", type=int, default=40, help="names beside the retained, evenly taken")
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, known, cache = expunge.load("emoji"), of_model("emoji"), Cache()
    original = Source(model)
    step = max(1, len(known.names) // options.names)
    asked = known.names[::step]
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        for erased in options.erased:
            concept = known.propose(erased)
            problem = Problem((concept,), tuple(known.stay([concept.name])))
            found = forecast(model, problem, choose(method), neighbours=asked, words=0)
            edit = expunge.erase(model, problem, choose(method))
            names = [move.name for move in found.moves]
            shares = torch.tensor([move.share for move in found.moves])
            moved = change(cache, original, Source(model, (edit,)), names, known, options.seeds)
            kept = torch.tensor([move.role == "retained" for move in found.moves])
            row = {
                "method": method,
                "exact": found.exact,
                "erased": concept.name,
                "names": len(names),
                "spearman": round(spearman(shares, moved), 3),
                "retained": int(kept.sum()),
                "spearman, retained": round(spearman(shares[kept], moved[kept]), 3),
                "moves": {
                    name: [round(share, 3), round(far, 4)]
                    for name, share, far in zip(names, shares.tolist(), moved.tolist(), strict=True)
                },
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "moves"}, flush=True)
    mean = {
        method: {
            key: round(sum(row[key] for row in rows if row["method"] == method) / len(options.erased), 3)
            for key in ("spearman", "spearman, retained")
        }
        for method in options.methods
    }
    told = {
        "what": "moves: [share forecast, mean pixel distance of the images]",
        "model": "emoji",
        "images of each name": options.seeds,
        "mean": mean,
        "rows": rows,
    }
    with replacing(options.results) as temporary:
        temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
