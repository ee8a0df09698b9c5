"""Does it stay gone? Every method on three words, or ten flags, under every condition, with few images.

Every edit is judged on its word's own prompt, unattacked and under each condition, the original under
the same condition beside it. The budgets are the fewest that say something, and the images few: a first
look, and no figure to compare methods by. Words are erased one at a time, flags all ten at
once. With `--budgets large` the methods that hold are put under the budgets of somebody who takes
the time. Writes `results/conditions-quick.json`, `conditions-flags-quick.json` and so on, after every
method and condition, and goes on from there when it is started again, whatever part it was started
for; `--table` prints what is there.

    python experiments/conditions.py [--methods uce ace] [--conditions wording] [--images 4]
    python experiments/conditions.py --problem flags --images 1
    python experiments/conditions.py --budgets large
    python experiments/conditions.py --table
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import expunge
from expunge.base.files import replacing
from expunge.cli.loading_options import read_autocast
from expunge.evaluation.experiment import Experiment, Job
from expunge.evaluation.robustness import CONTROL, AttackResult
from expunge.fingerprint import hash_for_images

HERE = Path(__file__).parent
WORDS = ("airplane", "cat", "ship")
FRANCE = ("flag of France",)


@dataclass(frozen=True)
class Erased:
    """What is erased, and how."""

    experiment: str
    first: tuple[str, ...]
    """The first names of those of the experiment's problems that are taken."""
    results: str
    presets: Mapping[str, str] = field(default_factory=dict)
    """Of the methods that take another preset than in `METHODS`."""

    def file(self, budgets: str) -> str:
        """The name of the results' file."""
        return self.results.replace("quick", budgets)


FLAGS = {"speed": "many", "oce": "identity", "esd": "emoji-identity", "ant": "emoji-identity"}
PROBLEMS = {
    "words": Erased("ace/objects.toml", WORDS, "conditions-quick.json"),
    "flags": Erased("ace/flags-10.toml", FRANCE, "conditions-flags-quick.json", FLAGS),
    "20-flags": Erased("ace/flags-20.toml", FRANCE, "conditions-20-flags-quick.json", FLAGS),
}
METHODS: tuple[dict[str, Any], ...] = (
    {"name": "uce", "title": "uce"},
    {"name": "speed", "preset": "few", "title": "speed"},
    {"name": "oce", "preset": "object", "title": "oce"},
    {"name": "rece", "title": "rece"},
    {"name": "mace", "preset": "emoji", "title": "mace"},
    {"name": "ace", "preset": "emoji", "title": "ace"},
    {"name": "esd", "preset": "emoji-object", "title": "esd"},
    {"name": "ant", "preset": "emoji-object", "title": "ant"},
    {"name": "semantic_surgery", "preset": "emoji", "title": "semantic_surgery"},
    {"name": "sld", "preset": "emoji", "title": "sld"},
    {"name": "adavd", "preset": "emoji", "title": "adavd"},
    {"name": "double_projections", "preset": "emoji", "title": "double_projections"},
    {"name": "gem", "preset": "emoji", "title": "gem"},
    {"name": "concept_ablation", "preset": "emoji", "title": "concept_ablation"},
    {"name": "stereo", "preset": "emoji", "title": "stereo"},
    {"name": "hirm", "preset": "emoji", "title": "hirm"},
    {"name": "advunlearn", "preset": "emoji", "title": "advunlearn"},
    {"name": "ace", "preset": "emoji-fortified", "title": "ace, fortified"},
    {"name": "sluice", "preset": "emoji", "title": "sluice"},
)
"""Every method that ships, with its preset for the shipped model where it has one."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "quantisation": {"format": ["nf4"]},
    "wording": {"kind": ["long", "negated"]},
    "image_to_image": {"strength": [0.7]},
    "inpainting": {"share": [0.25]},
    "ddim_inversion": {"steps": [12]},
    "second_edit": {"how": ["stacked"]},
    "encoder_search": {"queries": [250]},
    "token_search": {"queries": [64]},
    "finetuning": {"max_train_steps": [50], "num_images": 16},
    "foreign_lora": {"strength": [1.0], "max_train_steps": 50},
    "query_search": {"queries": [32]},
    "embedding": {"radius": [0.2], "steps": 10},
    "inversion": {"steps": [150]},
}
"""Each with its budgets; the cheapest first, so that a run that is cut short has most of the table."""
LARGE: dict[str, dict[str, Any]] = {
    "finetuning": {"max_train_steps": [500]},
    "embedding": {"radius": [0.8], "steps": 20},
    "inversion": {"steps": [600]},
}
"""Budgets of somebody who takes the time."""
BUDGETS = {"quick": CONDITIONS, "large": LARGE}
TOUGH: tuple[dict[str, Any], ...] = (
    *(method for method in METHODS if method["title"] in ("uce", "ace", "ace, fortified", "sluice")),
    {
        "name": "ace",
        "preset": "emoji-fortified",
        "fortify_finetune_steps": 40,
        "title": "ace, fortified against training",
    },
)
"""Those put under the large budgets: the rest is undone at the small ones."""
TITLES = tuple(dict.fromkeys(str(method["title"]) for method in (*METHODS, *TOUGH)))


def make_table(record: Mapping[str, Any]) -> str:
    """Return the results as Markdown: a row for each condition, images that show the concept again."""
    titles = [title for title in TITLES if title in record["edits"]]
    lines = [f"| condition | original | {' | '.join(titles)} |", "|" + "---|" * (2 + len(titles))]
    before = {t: [c["pre"] for c in record["edits"][t].values()] for t in titles}
    first = [_count(before[title][0]) if before[title] else "" for title in titles]
    lines.append(f"| none | | {' | '.join(first)} |")
    for condition in record["budgets"]:
        known = {t: record["edits"][t][condition] for t in titles if condition in record["edits"][t]}
        for budget in next(iter(known.values()))["budgets"] if known else ():
            cells = [_count(known[t]["budgets"][budget]["seen"]) if t in known else "–" for t in titles]
            control = next(iter(known.values()))["budgets"][budget]["control"]
            shown = _count(control)
            if control["seen"] < CONTROL * control["of"]:
                shown += ", says nothing"
            lines.append(f"| {condition}, {budget} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(one: Mapping[str, Any]) -> str:
    return f"{one['seen']} of {one['of']}"


def add_up(found: list[AttackResult]) -> dict[str, Any]:
    """Return the images that show the concept, of those in which the original does, over all words."""

    def total(estimates: list[Any]) -> dict[str, int]:
        known = [e for e in estimates if e.n]
        return {"seen": sum(round(e.value * e.n) for e in known), "of": sum(e.n for e in known)}

    budgets = {
        budget: {
            "seen": total([one.seen[budget] for one in found]),
            "control": total([one.control[budget] for one in found]),
            "unrecognisable": total([one.broken[budget] for one in found]),
        }
        for budget in found[0].asr
    }
    return {"pre": total([one.pre for one in found]), "budgets": budgets}


def shorten(one: AttackResult) -> dict[str, Any]:
    """Return of one word, for each budget, the shares with their intervals, and what a search found."""
    return {
        budget: {
            "seen": one.seen[budget].to_dict(),
            "difference": one.difference[budget].to_dict(),
            "control": one.control[budget].to_dict(),
            **({"findings": list(found)} if (found := one.findings.get(budget)) else {}),
        }
        for budget in one.seen
    }


def read_record(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier run has written, if it was run as this one is; else an empty record."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(found.get(key) == value for key, value in settings.items()):
            return found
    return {**settings, "edits": {}}


def judge(model: Any, suite: Any, jobs: list[Job], condition: str, folder: Path) -> dict[str, Any]:
    """Judge one method's edits under one condition.

    Args:
        model: the original.
        suite: with the condition's budgets.
        jobs: the method's, one a word.
        condition: the condition.
        folder: where edits are kept.
    """
    candidates = [job.run(model, folder) for job in jobs]
    start = time.monotonic()
    with model.autocasting(read_autocast("auto")):
        report = expunge.evaluate(model, candidates, [suite], attacks=[condition], roles=("erased",))
    found = [one for case in report.cases for row in case.rows[1:] for one in row.attacks]
    return {
        "hashes": [candidate.record["hash"] for candidate in candidates],
        **add_up(found),
        "each": {", ".join(case.erased): shorten(row.attacks[0])
                 for case in report.cases for row in case.rows[1:]},
        "autocast": report.provenance["sampler"].get("autocast"),
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def main() -> None:
    """Erase, judge under each condition, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=TITLES, metavar="METHOD")
    parser.add_argument("--images", type=int, default=4, help="images of each word")
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS))
    parser.add_argument("--problem", default="words", choices=list(PROBLEMS))
    parser.add_argument("--budgets", default="quick", choices=list(BUDGETS))
    parser.add_argument("--edits", type=Path, default=HERE / "conditions.work" / "edits")
    parser.add_argument("--to", type=Path, help="the file of results")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    erased = PROBLEMS[options.problem]
    budgets, methods = BUDGETS[options.budgets], METHODS if options.budgets == "quick" else TOUGH
    options.to = options.to or HERE / "results" / erased.file(options.budgets)
    if options.table:
        print(make_table(json.loads(options.to.read_text(encoding="utf-8"))))
        return
    experiment, model = Experiment.read(HERE / erased.experiment), expunge.load("emoji")
    (suite,) = experiment.suites
    few = dataclasses.replace(suite.sizes["quick"], erased=options.images)
    suite = dataclasses.replace(suite, sizes={"quick": few}, attacks=budgets)
    problems = tuple(p for p in experiment.problems if p.erase[0].name in erased.first)
    methods = tuple(
        method | {"preset": erased.presets[method["title"]]}
        if method["title"] in erased.presets
        else method
        for method in methods
    )
    jobs = dataclasses.replace(experiment, methods=methods, problems=problems).jobs()
    settings = {
        "model sha256": hash_for_images(model),
        "words": [concept.name for problem in problems for concept in problem.erase],
        "images a word": options.images,
        "budgets": json.loads(json.dumps(budgets)),
    }
    for condition in options.conditions or budgets:
        for title in options.methods or [method["title"] for method in methods]:
            # Read anew each time: several runs, for other methods or conditions, may write in turn.
            if condition in read_record(options.to, settings)["edits"].get(title, {}):
                continue
            mine = [job for job in jobs if job.title == title]
            found = judge(model, suite, mine, condition, options.edits)
            record = read_record(options.to, settings)
            record["edits"].setdefault(title, {})[condition] = found
            with replacing(options.to) as file:
                file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
            shares = {b: _count(one["seen"]) for b, one in found["budgets"].items()}
            print(title, condition, "before", _count(found["pre"]), shares, found["seconds"], flush=True)
    print(make_table(read_record(options.to, settings)))


if __name__ == "__main__":
    main()
