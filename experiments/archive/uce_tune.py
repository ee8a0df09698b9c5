"""Choose UCE's defaults on concepts that no suite erases.

Each field is tried by itself, from the defaults as they stand; six words are erased in turn, and
four more are watched that the method is never told of. Writes `experiments/results/uce_tune.json`.

    python experiments/archive/uce_tune.py [--only ridge anchor] [--base ridge=1 num_retain_words=1000]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expunge.base.files import replacing
from expunge.evaluation.cells import SuiteConcept
from expunge.methods.uce import UCE

sys.path.insert(0, str(Path(__file__).parents[1]))  # the experiments that are kept alive

from in_turn import InTurn

WORDS = tuple(
    SuiteConcept(name) for name in ("elephant", "rocket", "guitar", "pizza", "turtle", "house")
)
BYSTANDERS = tuple(SuiteConcept(name) for name in ("butterfly", "bicycle", "strawberry", "camera"))

TRIED: dict[str, tuple[Any, ...]] = {
    "ridge": (2.0, 10.0, 50.0, 200.0, 1000.0),
    "retain_scale": (0.2, 1.0, 5.0),
    "retain_words_scale": (0.0, 0.2, 1.0, 5.0),
    "num_retain_words": (200, 500, 2000),
    "positions": ("last-and-after", "last"),
    "templates": ((), ("{}",), ("{}", "an image of the {}", "the {} in a picture")),
    "anchor": (None, "", "an object", "a picture", "sky", "ground"),
}
SHOWN = ("erased", "retained", "beside", "unrecognisable", "H")


def settings(base: UCE, only: list[str]) -> Iterator[tuple[str, UCE, str | None]]:
    """(what is tried, the method, the anchor); the base itself comes first."""
    yield "as it stands", base, None
    for field, values in TRIED.items():
        for value in values if not only or field in only else ():
            if field == "anchor":
                if value is not None:
                    yield f"anchor {value!r}", base, value
            elif value != getattr(base, field):
                yield f"{field} {value}", dataclasses.replace(base, **{field: value}), None


def parse_base(texts: list[str]) -> UCE:
    """The defaults with some fields set: FIELD=VALUE, the value as JSON or as a bare word."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return UCE(**{name: value(text) for name, _, text in (t.partition("=") for t in texts)})


def main() -> None:
    """Try them all; the table grows as it goes, the file is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="images a cell")
    parser.add_argument("--only", nargs="*", default=[], choices=tuple(TRIED), help="fields to try")
    parser.add_argument("--base", nargs="*", default=[], help="FIELD=VALUE, where to start from")
    parser.add_argument("--model", default="emoji", help="a shipped model or a diffusers folder")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parents[1] / "results" / "uce_tune.json"
    )
    options = parser.parse_args()
    turns = InTurn(WORDS, BYSTANDERS, n=options.images, seed=5000, model=options.model)
    versions = {name: version(name) for name in ("expunge", "torch", "diffusers", "transformers")}
    record: dict[str, Any] = {"made with": {**turns.provenance(), "versions": versions}, "tried": {}}
    table = Table("", *SHOWN, "seconds")
    for title, method, anchor in settings(parse_base(options.base), options.only):
        results = turns.run(method, anchor)
        record["tried"][title] = {"method": results["method"], "anchor": anchor, "mean": results["mean"]}
        figures = [f"{100 * results['mean'][name]['mean']:.0f}" for name in SHOWN]
        seconds = sum(row["seconds"] for row in results["rows"].values()) / len(results["rows"])
        table.add_row(title, *figures, f"{seconds:.1f}")
        print(title, dict(zip(SHOWN, figures, strict=True)), flush=True)
        with replacing(options.to) as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
    Console().print(table)


if __name__ == "__main__":
    main()
