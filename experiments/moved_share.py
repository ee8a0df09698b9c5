"""Does the share that an edit moved its concepts tell what is then drawn? On the shipped model.

`erase` measures how far each concept moved toward its anchor on held-out prompts, where text enters for
closed forms and gates and in the denoiser's predictions for trained edits, and calls an edit weak below
half of the way. Here edits are laid on at several strengths, the share is measured at each, and each
concept is drawn in a prompt of the suites: the share of images in which the detector's best label is the
concept stands beside how far it moved.

Writes `experiments/results/moved_share.json`: a row for each edit, strength and concept.

    python experiments/moved_share.py EDIT … [--strengths 0.25 0.5 0.75 1] [--images 4] [--concepts 6]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import expunge
from expunge import Edit, Probe
from expunge.base import registry
from expunge.base.fields import build
from expunge.base.files import replacing
from expunge.erasing.moved_share import WEAK, measure_moved
from expunge.metrics.detector import EmojiDetector
from expunge.model import Model

FILE = Path(__file__).parent / "results" / "moved_share.json"

PROMPT = "a photo of the {}"

BANDS = (0.0, 0.25, WEAK, 0.75, 10.0)


def find_label(detector: EmojiDetector, name: str) -> str:
    """Return the detector's label of a concept: "flag: France" of the flag of France; "" for none."""
    flag = "flag: " + name.removeprefix("flag of ").removeprefix("the ")
    return next((label for label in (name, flag) if detector.knows(label)), "")


def try_edit(
    model: Model, edit: Edit, strengths: Sequence[float], images: int, most: int
) -> list[dict[str, Any]]:
    """Measure and draw an edit's concepts at some strengths.

    Args:
        model: the original.
        edit: the edit.
        strengths: how much of it counts.
        images: how many of each concept.
        most: of how many concepts, the first ones that the detector knows.
    """
    record, detector = edit.record, EmojiDetector()
    method = build(registry.get("methods", record.method), dict(record.fields))
    concepts = [c for c in record.problem.erase if find_label(detector, c.name)][:most]
    if not method.reads_anchor:
        concepts = [dataclasses.replace(c, anchor="") for c in concepts]
    prompts = [PROMPT.format(c.name) for c in concepts for _ in range(images)]
    seeds = list(range(1000, 1000 + images)) * len(concepts)
    rows = []
    for strength in strengths:
        moved = measure_moved(model, edit.changes, concepts, method.measured_in or "text", strength)
        with model.using(edit, strength=strength):
            drawn = model.draw(Probe(tuple(prompts), tuple(seeds)))
        seen = detector.measure(drawn, prompts)
        broken = detector.find_broken(seen)
        for i, concept in enumerate(concepts):
            own = slice(i * images, (i + 1) * images)
            label = find_label(detector, concept.name)
            found = detector.score(seen[own], [label], (), "top1")
            rows.append(
                {
                    "method": record.method,
                    "edit": edit.hash[:12],
                    "measured in": method.measured_in,
                    "concept": concept.name,
                    "strength": strength,
                    "share": moved.get(concept.name),
                    "seen": float(found.mean()),
                    "unrecognisable": float(broken[own].float().mean()),
                    "images": images,
                }
            )
    return rows


def tabulate(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a method a row, a band of shares a column."""
    names = [f"{100 * a:.0f} to {100 * b:.0f} %" for a, b in itertools.pairwise(BANDS[:-1])]
    heads = ["method", "measured in", *names, f"over {100 * BANDS[-2]:.0f} %"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key in sorted({(row["method"], row["measured in"]) for row in rows}):
        cells = []
        for low, high in itertools.pairwise(BANDS):
            some = [r for r in rows if (r["method"], r["measured in"]) == key]
            some = [r for r in some if r["share"] is not None and low <= max(r["share"], 0) < high]
            n = sum(r["images"] for r in some)
            total = sum(r["seen"] * r["images"] for r in some)
            cells.append(f"{100 * total / n:.0f} % of {n}" if n else "–")
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return lines


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("edits", nargs="*", type=Path)
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--concepts", type=int, default=6)
    options = parser.parse_args()
    rows = json.loads(FILE.read_text("utf8")) if FILE.exists() else []
    model = expunge.load("emoji")
    for path in options.edits:
        start, edit = time.process_time(), Edit.load(path)
        found = try_edit(model, edit, options.strengths, options.images, options.concepts)
        rows = [row for row in rows if row["edit"] != edit.hash[:12]] + found
        print(f"{path.name}: {time.process_time() - start:.0f} processor s", flush=True)
        with replacing(FILE) as file:
            file.write_text(json.dumps(rows, indent=1) + "\n", "utf8")
    print("\n".join(tabulate(rows)))


if __name__ == "__main__":
    main()
