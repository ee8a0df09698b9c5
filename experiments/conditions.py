"""Does it stay gone? UCE and ACE on three words, under four conditions that nobody has to attack for.

Every edit is judged on its word's own prompt, unattacked and under each condition, the original under
the same condition beside it. The budgets are the fewest that say something, and the images few: a first
look, and no figure to compare methods by. Writes `results/conditions-quick.json` after every edit and
condition, and goes on from there when it is started again; `--table` prints what is there.

    python experiments/conditions.py [--words airplane cat ship] [--images 8]
    python experiments/conditions.py --table
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge.base.files import replacing
from expunge.edit import Edit
from expunge.evaluation.experiment import Experiment
from expunge.fingerprint import hash_for_images

HERE = Path(__file__).parent
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "uce", "title": "uce"},
    {"name": "ace", "preset": "emoji", "title": "ace"},
)
CONDITIONS: dict[str, dict[str, Any]] = {
    "quantisation": {"format": ["nf4"]},
    "wording": {"kind": ["long", "negated"]},
    "image_to_image": {"strength": [0.7]},
    "finetuning": {"max_train_steps": [50], "num_images": 16},
}
"""Each with its budgets; the cheapest first, so that a run that is cut short has most of the table."""


def make_table(record: Mapping[str, Any]) -> str:
    """Return the results as Markdown: a row for each condition, edit and budget, shares in per cent."""
    lines = ["| condition | edit | before | under it | difference | original | |", "|" + "---|" * 7]
    for name, edit in record["edits"].items():
        for condition, one in edit["conditions"].items():
            for budget, seen in one["seen"].items():
                change, control = one["difference"][budget], one["control"][budget]
                bounds = f"({100 * change['low']:+.0f} to {100 * change['high']:+.0f})"
                shares = [one["pre-ASR"], seen, change, control]
                cells = [f"{100 * share['value']:.0f}" for share in shares]
                cells[2] += f" {bounds}"
                said = "" if control["holds"] else "says nothing"
                lines.append(f"| {condition}, {budget} | {name} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def read_record(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier run has written, if it was run as this one is; else an empty record."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(found.get(key) == value for key, value in settings.items()):
            return found
    return {**settings, "edits": {}}


def main() -> None:
    """Erase, judge under each condition, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--words", nargs="+", default=["airplane", "cat", "ship"])
    parser.add_argument("--images", type=int, default=8, help="images of each word")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--edits", type=Path, default=HERE / "conditions.work" / "edits")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "conditions-quick.json")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    if options.table:
        print(make_table(json.loads(options.to.read_text(encoding="utf-8"))))
        return
    experiment, model = Experiment.read(HERE / "ace" / "objects.toml"), expunge.load("emoji")
    (suite,) = experiment.suites
    few = dataclasses.replace(suite.sizes["quick"], erased=options.images)
    suite = dataclasses.replace(suite, sizes={"quick": few}, attacks=CONDITIONS)
    problems = tuple(p for p in experiment.problems if p.erase[0].name in options.words)
    jobs = dataclasses.replace(experiment, methods=METHODS, problems=problems).jobs()
    settings = {
        "model sha256": hash_for_images(model),
        "images a word": options.images,
        "autocast": "bfloat16",
        "budgets": json.loads(json.dumps(CONDITIONS)),
    }
    record = read_record(options.to, settings)
    for condition in options.conditions:
        for job in jobs:
            start = time.monotonic()
            candidate = job.run(model, options.edits)
            assert isinstance(candidate.edit, Edit)
            known = record["edits"].setdefault(job.name, {"hash": candidate.edit.hash, "conditions": {}})
            if known["hash"] != candidate.edit.hash:
                known = record["edits"][job.name] = {"hash": candidate.edit.hash, "conditions": {}}
            if condition in known["conditions"]:
                continue
            with model.autocasting(torch.bfloat16):
                report = expunge.evaluate(
                    model, [candidate], [suite], attacks=[condition], roles=("erased",)
                )
            (found,) = report.cases[0].rows[1].attacks
            known["conditions"][condition] = {
                **found.to_dict(),
                "seconds": round(time.monotonic() - start, 1),
            }
            with replacing(options.to) as file:
                file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
            shares = {budget: round(share.value, 2) for budget, share in found.seen.items()}
            print(job.name, condition, f"before {found.pre.value:.2f}", shares, flush=True)
    print(make_table(record))


if __name__ == "__main__":
    main()
