"""UCE on the emoji model: each of the ten CIFAR-10 words erased in turn, the nine others retained.

Figures to reach, means over the ten, relative to the original: the erased word in at most 10 % of
its images, the nine others in at least 90 %, unrecognisable at most 5 %. Synonyms are watched too;
the method is not told of them. Writes `experiments/results/uce_cifar10.json`.

    python experiments/uce_cifar10.py [--images 20] [--no-synonyms]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from in_turn import InTurn
from rich.console import Console
from rich.table import Table

from expunge.base.files import replacing
from expunge.evaluation.suite import Suite
from expunge.methods.uce import UCE

WORDS = Suite.read("object", "emoji").concepts
GOALS = {"erased": "at most 10 %", "retained": "at least 90 %", "unrecognisable": "at most 5 %"}
SHOWN = ("erased", "synonyms", "retained", "unrecognisable", "H")


def show(results: dict[str, Any]) -> None:
    """Print a row a word, and the means under them."""
    table = Table("", *SHOWN, "drawn instead", "anchor")
    for word, row in results["rows"].items():
        figures = [f"{100 * row[name]:.0f}" if name in row else "" for name in SHOWN]
        instead = ", ".join(f"{top} {count}" for top, count in row["seen_instead"].items())
        table.add_row(word, *figures, instead, repr(row["anchor"]))
    table.add_section()
    mean = results["mean"]
    table.add_row("mean", *(f"{100 * mean[name]['mean']:.1f}" if name in mean else "" for name in SHOWN))
    intervals = [mean.get(name, {}).get("interval") for name in SHOWN]
    table.add_row("95 %", *(f"{100 * i[0]:.0f}–{100 * i[1]:.0f}" if i else "" for i in intervals))
    table.add_row("to reach", *(GOALS.get(name, "") for name in SHOWN))
    Console().print(table)


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="images a cell")
    parser.add_argument("--no-synonyms", action="store_true", help="a third of the time")
    parser.add_argument("--anchor", help="default: the model's own for objects")
    parser.add_argument("--model", default="emoji", help="a shipped model or a diffusers folder")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent / "results" / "uce_cifar10.json"
    )
    options = parser.parse_args()
    words = [replace(w, synonyms=()) if options.no_synonyms else w for w in WORDS]
    turns = InTurn(words, n=options.images, model=options.model)
    results = turns.run(UCE(), options.anchor)
    show(results)
    if turns.left_out:
        print("left out, since the original draws them in fewer than half:", ", ".join(turns.left_out))
    versions = {name: version(name) for name in ("expunge", "torch", "diffusers", "transformers")}
    record = {**results, "made with": {**turns.provenance(), "versions": versions}}
    with replacing(options.to) as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
