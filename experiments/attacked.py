"""How often an attack brings an erased word back: ACE beside MACE and ANT, or others.

Every method erases each word as `experiments/ace/objects.toml` tells it; both attacks run at the object
suite's budgets, anew against every edit. Only ACE knows a bounded attack from its training, on keys and
values or, fortified, from other words' prompts; textual inversion is in no method's training. Writes
`experiments/results/ace/attacked.json`, after every edit, and `docs/images/ace-attacked.png`: each word
before, and from each edit under attack, at radius 0.2 and after 150 steps.

    python experiments/attacked.py [--words airplane cat ship] [--images 6]
    python experiments/attacked.py --methods "ace, fortified" --inversion 150 600 --to longer.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import expunge
from expunge.base.files import replacing
from expunge.base.image_files import save_image
from expunge.edit import Edit
from expunge.evaluation import statistics
from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.robustness import AttackResult
from expunge.evaluation.statistics import Estimate
from expunge.fingerprint import hash_for_images

HERE = Path(__file__).parent
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "ace", "preset": "emoji", "title": "ace"},
    {"name": "ace", "preset": "emoji-fortified", "title": "ace, fortified"},
    {"name": "mace", "preset": "emoji", "title": "mace"},
    {"name": "ant", "preset": "emoji-object", "title": "ant"},
    {"name": "uce", "title": "uce"},
    {"name": "ace", "preset": "emoji", "stages": ["gate"], "title": "ace, gates alone"},
    {"name": "ace", "preset": "emoji", "margin": 0.1, "title": "ace, wide gates"},
)
ATTACKS = ("embedding", "inversion")
AT = {"embedding": -2, "inversion": -1}
"""Which of a strip's rows is shown: radius 0.2, which is hardened against, and the longest inversion."""


def summary(found: list[AttackResult]) -> dict[str, dict[str, Estimate]]:
    """For each method pre-ASR and ASR at each budget, means over words."""
    rows: dict[str, dict[str, list[Estimate]]] = {}
    for one in found:
        row = rows.setdefault(one.edit, {})
        row.setdefault("pre-ASR", []).append(one.pre)
        for budget, asr in one.asr.items():
            row.setdefault(f"{one.attack} {budget}", []).append(asr)
    return {
        method: {budget: statistics.average(values) for budget, values in row.items()}
        for method, row in rows.items()
    }


def differences(means: dict[str, dict[str, Estimate]], of: str) -> dict[str, Any]:
    """ASR of one method less half of another's, paired: below zero is what the goal asks for."""
    return {
        other: {
            budget: dataclasses.asdict(means[of][budget].minus(value.map(lambda x: x / 2)).score)
            for budget, value in row.items()
        }
        for other, row in means.items()
        if other != of and of in means and row.keys() == means[of].keys()
    }


def band(title: str, found: list[AttackResult]) -> Strip:
    """One word under one attack: before, and what each edit then draws."""
    rows = [found[0].strip.rows[0]]
    for one in found:
        label, images = one.strip.rows[AT[one.attack]]
        rows.append((f"{one.edit}, {label}", images))
    return Strip(title, found[0].strip.captions, rows, "seen, at the left")


def main() -> None:
    """Erase, attack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--words", nargs="+", default=["airplane", "cat", "ship"])
    parser.add_argument("--images", type=int, default=6, help="pictures of each word")
    titles = [one["title"] for one in METHODS]
    parser.add_argument("--methods", nargs="+", default=titles[:5], choices=titles)
    parser.add_argument("--edits", type=Path, default=HERE / "ace.work" / "objects" / "edits")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "ace" / "attacked.json")
    images = HERE.parent / "docs" / "images"
    parser.add_argument("--images-to", type=Path, default=images / "ace-attacked.png")
    parser.add_argument(
        "--inversion", nargs="+", type=int, help="steps of inversion; default: the suite's"
    )
    parser.add_argument("--float32", action="store_true", help="draw without bfloat16")
    options = parser.parse_args()
    dtype = None if options.float32 else torch.bfloat16
    experiment, model = Experiment.read(HERE / "ace" / "objects.toml"), expunge.load("emoji")
    (suite,) = experiment.suites
    few = dataclasses.replace(suite.sizes["quick"], erased=options.images)
    suite = dataclasses.replace(suite, sizes={"quick": few})
    if options.inversion:
        suite = dataclasses.replace(
            suite, attacks={**suite.attacks, "inversion": {"steps": options.inversion}}
        )
    problems = tuple(p for p in experiment.problems if p.erase[0].name in options.words)
    methods = tuple(one for one in METHODS if one["title"] in options.methods)
    experiment = dataclasses.replace(experiment, methods=methods, problems=problems)
    found: list[AttackResult] = []
    strips: dict[str, list[AttackResult]] = {}
    record: dict[str, Any] = {
        "model sha256": hash_for_images(model),
        "words": options.words,
        "pictures a word": options.images,
        "autocast": "" if options.float32 else "bfloat16",
        "edits": {},
    }
    jobs = experiment.jobs()
    for job in sorted(jobs, key=lambda job: problems.index(job.problem)):
        candidate = job.run(model, options.edits)
        assert isinstance(candidate.edit, Edit)
        record["edits"][job.name] = {"hash": candidate.edit.hash, "attacks": {}}
        for attack in ATTACKS:
            with model.autocasting(dtype):
                report = expunge.evaluate(
                    model,
                    [dataclasses.replace(candidate, name=job.title)],
                    [suite],
                    attacks=[attack],
                    roles=("erased",),
                )
            found += report.cases[0].rows[1].attacks
            record["edits"][job.name]["attacks"][attack] = found[-1].to_dict()
            strips.setdefault(f"{job.problem.erase[0].name}, {attack}", []).append(found[-1])
        means = summary(found)
        record["means"] = {
            method: {budget: dataclasses.asdict(value.score) for budget, value in row.items()}
            for method, row in means.items()
        }
        for title in ("ace", "ace, fortified"):
            record[f"{title} less half of"] = differences(means, title)
        with replacing(options.to) as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
        latest = {budget: round(asr.value, 2) for one in found[-2:] for budget, asr in one.asr.items()}
        print(job.name, f"pre {found[-1].pre.value:.2f}", latest, flush=True)
    save_image(
        draw_contact_sheet([band(title, some) for title, some in strips.items()], 96), options.images_to
    )
    table = Table("", *next(iter(means.values())))
    for method, row in means.items():
        table.add_row(method, *(f"{100 * value.value:.0f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
