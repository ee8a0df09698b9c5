r"""The measurement behind each of ACE's choices, on concepts that no suite erases.

Each field is tried by itself, from the preset as it stands; those of the closed form with gates alone,
those of hardening with it. Words are erased in turn, with the synonyms that the method is not told of,
and four more are watched that it is never told of. With `--attack`, each edit is also attacked on its
own word. Writes `experiments/results/ace_choices.json`.

    python experiments/archive/ace_choices.py --attack 0.1 0.2 [--images 4] [--words rocket bicycle]
    python experiments/archive/ace_choices.py --only reduction energy
    python experiments/archive/ace_choices.py --gates --only reduction --attack 0.2 --images 2 \
        --words rocket bicycle rabbit doughnut --to experiments/results/ace/attention.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

import expunge
from expunge import Concept, Model, Probe, Problem
from expunge.attacks.embedding import Embedding
from expunge.base.files import replacing
from expunge.changes import Changes
from expunge.erasing import gate_backgrounds as backgrounds
from expunge.evaluation.cells import SuiteConcept
from expunge.methods.ace import ACE
from expunge.runtime.context import RunContext

sys.path.insert(0, str(Path(__file__).parents[1]))  # the experiments that are kept alive

from in_turn import InTurn, Looks

WORDS = (
    SuiteConcept("rocket", synonyms=("spaceship",)),
    SuiteConcept("bicycle", synonyms=("bike",)),
    SuiteConcept("honeybee", synonyms=("bee", "bumblebee")),
    SuiteConcept("rabbit", synonyms=("bunny",)),
    SuiteConcept("doughnut", synonyms=("donut",)),
    SuiteConcept("house", synonyms=("home",)),
)
BYSTANDERS = tuple(SuiteConcept(name) for name in ("butterfly", "helicopter", "strawberry", "camera"))

CLOSED: dict[str, tuple[Any, ...]] = {
    "reduction": ("layer", "damped", "attention", "attention-by-head"),
    "projections": ("keys", "values"),
    "gate_on": ("phrase", "prompt"),
    "directions": ("gate",),
    "goal_ridge": (1.0, 100.0),
    "energy": (0.5, 0.8, 1.0),
    "num_retain_words": (200,),
    "margin": (0.2, 0.6, 0.8),
    "gate_ridge": (0.01, 10.0),
}
HARDENED: dict[str, tuple[Any, ...]] = {
    "radius": (0.1, 0.4),
    "learning_rate": (0.001, 0.01),
    "anchor_hold_weight": (0.0,),
    "goal_ridge": (10.0,),
}
SHOWN = ("erased", "synonyms", "retained", "beside", "unrecognisable", "H")


TEXTS: dict[Any, tuple[Tensor, Tensor | None]] = {}
FOUND: dict[Any, Changes] = {}


@dataclass(frozen=True)
class Remembering(ACE):
    """ACE that erases once, however often it is asked, and reads general words once (`remember`)."""

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        key = (self, problem, run.seed)
        if key not in FOUND:
            FOUND[key] = super().fit(model, problem, run)
        return FOUND[key]


def remember() -> None:
    """Let ACE's backgrounds read general words once."""
    read = backgrounds.read_prompts

    def read_once(
        model: Model, prompts: Sequence[str], label: str, run: RunContext
    ) -> tuple[Tensor, Tensor | None]:
        key = tuple(prompts)
        if key not in TEXTS:
            TEXTS[key] = read(model, prompts, label, run)
        return TEXTS[key]

    backgrounds.read_prompts = read_once


def settings(base: ACE, only: list[str], gates: bool) -> Iterator[tuple[str, ACE]]:
    """(what is tried, the method); each base comes before what is tried on it."""
    for start, tried in (("gates alone", CLOSED), ("hardened", HARDENED))[: 1 if gates else 2]:
        method = dataclasses.replace(base, stages=("gate",) if tried is CLOSED else ("gate", "harden"))
        yield start, method
        for field, values in tried.items():
            for value in values if not only or field in only else ():
                yield f"{start}, {field} {value}", dataclasses.replace(method, **{field: value})


def attacked(turns: InTurn, method: ACE, radius: float, n: int) -> dict[str, float]:
    """The share of each word's images in which it is seen, before, erased, and under attack."""
    found = {}
    for word in turns.words:
        others = tuple(other.name for other in turns.words if other is not word)
        edit = expunge.erase(turns.model, Problem((Concept(word.name),), others), method)
        probe = Probe.of(f"a photo of the {word.name}", n, turns.seed)
        hard = Embedding(radius=radius).run(turns.model, edit, probe, RunContext())
        with turns.model.using(edit):
            tops = turns.detector(turns.model.draw(hard)).top()
        found[word.name] = float(turns.right(Looks({word.name: tops}, {}), word.name).nanmean())
    return found


def main() -> None:
    """Try them all; the table grows as it goes, the file is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="images a cell")
    parser.add_argument(
        "--words", nargs="*", default=["rocket", "bicycle"], help="words to erase in turn"
    )
    fields = tuple(dict.fromkeys((*CLOSED, *HARDENED)))
    parser.add_argument("--only", nargs="*", default=[], choices=fields, help="fields to try")
    parser.add_argument("--gates", action="store_true", help="gates alone, without hardening")
    parser.add_argument("--rows", nargs="*", default=[], help="titles of rows to try alone")
    parser.add_argument("--damping", type=float, default=4.0, help="how far QᵀΔAttn turns channels down")
    parser.add_argument("--preset", default="emoji", help="where to start from")
    parser.add_argument("--attack", type=float, nargs="*", default=[], help="radii to attack with")
    parser.add_argument("--model", default="emoji", help="a shipped model or a diffusers folder")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parents[1] / "results" / "ace_choices.json"
    )
    options = parser.parse_args()
    words = tuple(word for word in WORDS if not options.words or word.name in options.words)
    turns = InTurn(words, BYSTANDERS, n=options.images, seed=5000, model=options.model)
    versions = {name: version(name) for name in ("expunge", "torch", "diffusers", "transformers")}
    record: dict[str, Any] = {"made with": {**turns.provenance(), "versions": versions}, "tried": {}}
    table = Table("", *SHOWN, *(f"at {radius:g}" for radius in options.attack), "seconds")
    remember()
    base = Remembering.preset(options.preset, damping=options.damping)
    for title, method in settings(base, options.only, options.gates):
        if options.rows and title not in options.rows:
            continue
        results = turns.run(method)
        row: dict[str, Any] = {"method": results["method"], "mean": results["mean"]}
        row["attacked"] = {
            str(radius): attacked(turns, method, radius, options.images) for radius in options.attack
        }
        record["tried"][title] = row
        figures = [f"{100 * results['mean'].get(name, {'mean': 0})['mean']:.0f}" for name in SHOWN]
        asr = [f"{100 * sum(x.values()) / len(x):.0f}" for x in row["attacked"].values()]
        seconds = sum(one["seconds"] for one in results["rows"].values()) / len(results["rows"])
        table.add_row(title, *figures, *asr, f"{seconds:.1f}")
        print(title, dict(zip(SHOWN, figures, strict=True)), asr, f"{seconds:.1f} s", flush=True)
        with replacing(options.to) as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
    Console().print(table)


if __name__ == "__main__":
    main()
