"""What an edit of ACE loses as plain weights: gates against the weights fitted to them.

Edits are those of an experiment of ACE's, made if they are not there; the suite is judged at quick size.
Writes `experiments/results/ace/plain.json`, and adds to it.

    python experiments/archive/ace_plain.py objects [--only airplane cat ship]
    python experiments/archive/ace_plain.py objects-fortified
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge.base.files import replacing
from expunge.checkpoints.linearize import fit_static_weights
from expunge.edit import Edit
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.evaluate import evaluate
from expunge.evaluation.experiment import Experiment

HERE = Path(__file__).parents[1]


def main() -> None:
    """Fit, judge both, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiment", help="one of experiments/ace, without its ending")
    parser.add_argument("--only", nargs="*", default=[], help="names of concepts; by default all")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "ace" / "plain.json")
    options = parser.parse_args()
    experiment = Experiment.read(HERE / "ace" / f"{options.experiment}.toml")
    folder, model = HERE / "ace.work" / options.experiment / "edits", expunge.load("emoji")
    record: dict[str, Any] = json.loads(options.to.read_text("utf8")) if options.to.is_file() else {}
    for job in experiment.jobs():
        name = job.problem.erase[0].name
        if job.method_name != "ace" or (options.only and name not in options.only):
            continue
        edit = job.run(model, folder).edit
        assert isinstance(edit, Edit)
        fit = fit_static_weights(model, edit.changes, edit.record.problem)
        weights = dataclasses.replace(edit, changes=fit.changes)
        both = [Candidate.of(edit, "gates"), Candidate.of(weights, "weights")]
        with model.autocasting(torch.bfloat16):
            report = evaluate(model, both, experiment.suites)
        (case,) = report.to_dict()["cases"]
        row: dict[str, Any] = {"lost": round(fit.lost, 4), "moved": round(fit.moved, 4)}
        for found in case["rows"][1:]:
            terms = {term: value["value"] for term, value in found["terms"].items()}
            row[found["name"]] = {case["suite"]["score"]: found[case["suite"]["score"]], **terms}
        row["edit"] = edit.hash
        record.setdefault(options.experiment, {})[job.name] = row
        with replacing(options.to) as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
        print(job.name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
