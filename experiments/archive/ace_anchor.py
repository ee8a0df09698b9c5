"""What "a flag" itself is: how many images of the anchor, and of what flags became, are a muddle.

For the suite's cells of 1, 5, 10 and 20 erased flags, the share of unrecognisable images that the
original draws with "a flag" in each flag's place, from the same noises; that the edits of
`experiments/ace/flags-N.toml` draw of the flags; and ACE's closed form alone. A method that makes the
flags exactly the anchor has the anchor's share. Images are drawn in bfloat16. Writes
`experiments/results/ace/anchor.json`.

    python experiments/archive/ace_anchor.py [--edits experiments/ace.work]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import expunge
from expunge.base.files import replacing
from expunge.edit import Edit
from expunge.evaluation.cells import Cell
from expunge.evaluation.evaluate import restrict_to_judge
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Source
from expunge.evaluation.measure import make_metric
from expunge.evaluation.sample import lay_out
from expunge.methods.ace import ACE
from expunge.metric import Classifier
from expunge.problem import Problem

HERE = Path(__file__).parents[1]


def anchored(cell: Cell, problem: Problem) -> Cell:
    """The cell with the anchor in its concept's place."""
    (concept,) = (c for c in problem.erase if cell.prompt.endswith(c.name))
    words = cell.prompt.removesuffix(concept.name).removesuffix("the ")
    return dataclasses.replace(cell, prompt=words + (concept.anchor or ""))


def main() -> None:
    """Draw, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edits", type=Path, default=HERE / "ace.work")
    options = parser.parse_args()
    model, cache = expunge.load("emoji"), Cache()
    record: dict[str, dict[str, float]] = {}
    for n in (1, 5, 10, 20):
        experiment = Experiment.read(HERE / "ace" / f"flags-{n}.toml")
        (suite,), (problem,) = experiment.suites, experiment.problems
        judge = make_metric(suite.judge, suite.options.get(suite.judge, {}))
        assert isinstance(judge, Classifier)
        suite = restrict_to_judge(suite, judge)

        def muddle(source: Source, cells: Sequence[Cell], judge: Classifier = judge) -> float:
            asked = [one for sample in lay_out(model, cells) for one in sample.requests]
            images = torch.stack(list(cache.draw(source, asked)))
            rows = judge.measure(images, [one.prompt for one in asked])
            return round(float(judge.find_broken(rows).double().mean()), 4)

        cells = [
            cell
            for cell in suite.cells([c.name for c in problem.erase], full=True)
            if cell.role == "erased"
        ]
        with model.autocasting(torch.bfloat16):
            row = {"the anchor": muddle(Source(model), [anchored(cell, problem) for cell in cells])}
            for job in experiment.jobs():
                edit = job.run(model, options.edits / f"flags-{n}" / "edits").edit
                assert isinstance(edit, Edit)
                row[job.title or job.method_name] = muddle(Source(model, (edit,)), cells)
            gates = ACE.preset("emoji", stages=("gate",))
            edit = expunge.erase(model, problem, gates)
            row["ace, gates alone"] = muddle(Source(model, (edit,)), cells)
        record[f"{n} flags"] = row
        print(n, row, flush=True)
        with replacing(HERE / "results" / "ace" / "anchor.json") as file:
            file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
