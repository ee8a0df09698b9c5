"""Does a text-side edit on a denoiser's help? ESD and ACE's gates on three words, alone and stacked.

Judged as in `conditions.py`, with its words, images and budgets, on the conditions under which ESD lets
concepts come back. ESD's and ACE's own figures are in `results/conditions-quick.json`. Writes
`results/remedies-quick.json`.

    python experiments/remedies.py [--conditions wording image_to_image]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import conditions
import torch

import expunge
from expunge.base.files import replacing
from expunge.checkpoints.merge import merge
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.experiment import Experiment
from expunge.fingerprint import hash_for_images

HERE = Path(__file__).parent
DEFAULT = ["wording", "image_to_image", "ddim_inversion", "finetuning"]


def main() -> None:
    """Merge the two edits of each word, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--conditions", nargs="+", default=DEFAULT, choices=list(conditions.CONDITIONS))
    parser.add_argument("--images", type=int, default=4, help="images of each word")
    parser.add_argument("--edits", type=Path, default=HERE / "conditions.work" / "edits")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "remedies-quick.json")
    options = parser.parse_args()
    experiment, model = Experiment.read(HERE / "ace" / "objects.toml"), expunge.load("emoji")
    (suite,) = experiment.suites
    few = dataclasses.replace(suite.sizes["quick"], erased=options.images)
    suite = dataclasses.replace(suite, sizes={"quick": few}, attacks=conditions.CONDITIONS)
    problems = tuple(p for p in experiment.problems if p.erase[0].name in conditions.WORDS)
    jobs = dataclasses.replace(experiment, methods=conditions.METHODS, problems=problems).jobs()
    stacked = []
    for word in conditions.WORDS:
        pair = [
            job.run(model, options.edits).edit
            for title in ("esd", "ace")
            for job in jobs
            if job.title == title and job.problem.erase[0].name == word
        ]
        # The gates ask the text before the weights that ESD has changed read it.
        stacked.append(Candidate.of(merge(model, [one for one in pair if one]), f"esd + ace: {word}"))
    record = {"model sha256": hash_for_images(model), "images a word": options.images, "esd + ace": {}}
    if options.to.is_file():
        record = json.loads(options.to.read_text(encoding="utf-8"))
    for condition in options.conditions:
        if condition in record["esd + ace"]:
            continue
        with model.autocasting(torch.bfloat16):
            report = expunge.evaluate(model, stacked, [suite], attacks=[condition], roles=("erased",))
        found = [one for case in report.cases for row in case.rows[1:] for one in row.attacks]
        record["esd + ace"][condition] = conditions.add_up(found)
        with replacing(options.to) as file:
            file.write_text(json.dumps(record, indent=1) + "\n", "utf8")
        print(condition, json.dumps(record["esd + ace"][condition]), flush=True)


if __name__ == "__main__":
    main()
