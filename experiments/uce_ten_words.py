"""UCE on the emoji model: each of the ten CIFAR-10 words erased in turn, the nine others retained.

Twenty pictures a cell of "a photo of the WORD", the same seeds before and after; relative to the
original, and a word that the original draws right in fewer than half of its pictures is left out.
Writes `experiments/results/uce_ten_words.json`: what was drawn, by what, and what was seen.

    python experiments/uce_ten_words.py [--n 20]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import expunge
from expunge import Concept, Probe, Problem
from expunge.emoji.detector import Detector
from expunge.files import replacing
from expunge.methods.uce import UCE

WORDS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LABELS = {"truck": ("delivery truck",)}
"""The detector's labels that count as a word, where they are not the word itself."""
NEAR = {"cat": ("cat face",), "ship": ("sailboat",)}
"""The labels too near to a word to count for or against it."""


def seen(tops: Sequence[str], word: str) -> float:
    """The share of pictures recognised as a word; those too near to say are left out."""
    told = [top for top in tops if top not in NEAR.get(word, ())]
    return sum(top in LABELS.get(word, (word,)) for top in told) / max(len(told), 1)


def run(method: UCE, n: int, seed: int = 0) -> dict[str, Any]:
    """Every word erased in turn; the figures as they go into the results file."""
    model, detector = expunge.load("emoji"), Detector.load()
    probe = Probe.of([f"a photo of the {word}" for word in WORDS], n, seed)

    def look() -> dict[str, list[str]]:
        tops = detector(model.draw(probe)).top()
        return {word: tops[i * n : (i + 1) * n] for i, word in enumerate(WORDS)}

    original = look()
    before = {word: seen(original[word], word) for word in WORDS}
    judged = [word for word in WORDS if before[word] >= 0.5]
    rows: dict[str, dict[str, Any]] = {}
    for erased in judged:
        problem = Problem((Concept(erased),), tuple(word for word in WORDS if word != erased))
        edit = expunge.erase(model, problem, method, seed=seed)
        with model.using(edit):
            after = look()
        others = [word for word in judged if word != erased]
        kept = {word: min(1.0, seen(after[word], word) / before[word]) for word in others}
        rows[erased] = {
            "erased": seen(after[erased], erased) / before[erased],
            "retained": sum(kept.values()) / len(kept),
            "unrecognisable": sum(tops.count("unrecognisable") for tops in after.values()) / len(probe),
            "each_retained": kept,
            "seen_instead": Counter(after[erased]).most_common(3),
            "seconds": edit.record.seconds,
            "edit": edit.hash,
        }
        print(
            f"{erased:12} erased {rows[erased]['erased']:.2f}  retained {rows[erased]['retained']:.2f}"
            f"  unrecognisable {rows[erased]['unrecognisable']:.2f}  {rows[erased]['seen_instead']}",
            flush=True,
        )
    return {
        "experiment": "uce_ten_words",
        "method": dataclasses.asdict(method),
        "anchor": edit.record.problem.erase[0].anchor,
        "pictures_a_cell": n,
        "first_seed": seed,
        "steps": model.num_inference_steps,
        "guidance_scale": model.guidance_scale,
        "sampler": type(model.pipe.scheduler).__name__,
        "versions": edit.record.versions,
        "original": before,
        "left_out": [word for word in WORDS if word not in judged],
        "mean": {
            name: sum(row[name] for row in rows.values()) / len(rows)
            for name in ("erased", "retained", "unrecognisable")
        },
        "rows": rows,
    }


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="pictures a cell")
    results = run(UCE(), parser.parse_args().n)
    print(json.dumps(results["mean"]))
    with replacing(Path(__file__).parent / "results" / "uce_ten_words.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
