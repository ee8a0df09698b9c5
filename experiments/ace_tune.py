"""Choose the values of ACE's emoji preset on MACE's tasks (`mace_tune.py`).

No suite erases their words; of the style there are more pictures. MACE and UCE stand beside it. What has
been tried stays in `experiments/results/ace_tune.json`, and is not tried again on the same weights.
Pictures are drawn in bfloat16.

    python experiments/ace_tune.py style explicit --try stages=gate,gate+harden --beside mace uce
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mace_tune import TASKS, combinations, suite

import expunge
from expunge import Model
from expunge.cache import model_hash
from expunge.case import Candidate
from expunge.fields import build
from expunge.files import replacing
from expunge.method import Method
from expunge.methods.ace import ACE
from expunge.methods.mace import MACE
from expunge.methods.uce import UCE
from expunge.suite import Size

HERE = Path(__file__).parent
BESIDE = {"mace": MACE.preset("emoji"), "uce": UCE()}
SUITES = {task: suite(task) for task in TASKS}
SUITES["style"] = dataclasses.replace(
    SUITES["style"], sizes={"quick": Size(erased=120, retained=20, plain=120)}
)


def judge(model: Model, task: str, method: Method) -> dict[str, Any]:
    """What a task comes to: H and its terms, means over its problems, and shares unrecognisable."""
    edits = [expunge.erase(model, problem, method) for problem in TASKS[task]()]
    candidates = [Candidate.of(edit, str(i)) for i, edit in enumerate(edits)]
    with model.autocasting(torch.bfloat16):
        report = expunge.evaluate(model, candidates, [SUITES[task]])
    rows = [(case, row) for case in report.cases for row in case.rows if row.candidate]

    def mean(values: list[float]) -> float:
        there = [value for value in values if value == value]  # a term may have nothing to judge
        return round(sum(there) / len(there), 4)

    return {
        "H": mean([row.h.value for _, row in rows]),
        **{term: mean([row.terms[term].value for _, row in rows]) for term in rows[0][1].terms},
        "unrecognisable": {
            role: mean([row.roles[role]["unrecognisable"].value for _, row in rows])
            for role in rows[0][1].roles
        },
        "each": {case.erased[0]: round(row.h.value, 3) for case, row in rows},
        "left out": sorted({words for case, _ in rows for _, words, _ in case.left_out}),
        "seconds": mean([edit.record.seconds for edit in edits]),
    }


def main() -> None:
    """Try what was asked for; the file is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=tuple(TASKS))
    parser.add_argument("--preset", default="emoji", help="where to start from")
    parser.add_argument("--try", dest="tried", nargs="*", default=[], metavar="FIELD=VALUE,VALUE")
    parser.add_argument("--beside", nargs="*", default=[], choices=tuple(BESIDE))
    parser.add_argument("--to", type=Path, default=HERE / "results" / "ace_tune.json")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.to.read_text("utf8")) if options.to.is_file() else {}
    model = expunge.load("emoji")
    if record.get("model sha256") != model_hash(model):
        record = {"model sha256": model_hash(model)}
    base = {name: value for name, value in ACE.presets[options.preset].items() if name != "about"}
    methods: dict[str, Method] = {name: BESIDE[name] for name in options.beside}
    for values in combinations(options.tried):
        if isinstance(values.get("stages"), str):
            values["stages"] = values["stages"].split("+")
        ace = build(ACE, base | values)
        default = ACE()
        fields = {f.name: getattr(ace, f.name) for f in dataclasses.fields(ace)}
        changed = [f"{k} {v}" for k, v in fields.items() if v != getattr(default, k)]
        methods[", ".join(["ace", *changed])] = ace
    for task, (title, method) in itertools.product(options.tasks, methods.items()):
        rows = record.setdefault(task, {})
        if title not in rows:
            rows[title] = judge(model, task, method)
            record["versions"] = {name: version(name) for name in ("expunge", "torch", "diffusers")}
            with replacing(options.to) as file:
                file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
        figures = {k: v for k, v in rows[title].items() if isinstance(v, float)}
        print(
            task,
            title,
            figures,
            rows[title]["unrecognisable"],
            rows[title]["each"],
            sep=" | ",
            flush=True,
        )


if __name__ == "__main__":
    main()
