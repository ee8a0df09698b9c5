"""The leaderboard: the original and every method on the suites of a shipped model.

What is done is found again (edits by their content, images and scores in the cache), so that a run
that was stopped goes on, and a further method or suite costs what is new of it. Each suite's report is
a page in the work folder. Writes `experiments/results/leaderboard-MODEL-SIZE.json`, and from those
files the page `docs/reference/leaderboard.md`.

    python experiments/leaderboard.py                              # the miniature, quick, all methods
    python experiments/leaderboard.py --suites identity --together 100 --methods uce sluice --bfloat16
    python experiments/leaderboard.py --full --methods uce mace
    python experiments/leaderboard.py --suites object --take 1 --tiny     # does it work?
    python experiments/leaderboard.py --table                      # the page alone, from the results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import expunge
from expunge import Concept, Problem
from expunge.base import registry
from expunge.base.files import replacing
from expunge.base.shipped import DEFAULT_MODEL
from expunge.evaluation.candidates import CandidateResult, SuiteResult
from expunge.evaluation.cells import Size, SuiteConcept
from expunge.evaluation.evaluate import evaluate, restrict_to_judge
from expunge.evaluation.experiment import Job
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.measure import make_metric, read_options
from expunge.evaluation.report import Report
from expunge.evaluation.scoring import TERMS
from expunge.evaluation.statistics import Estimate, average
from expunge.evaluation.suite import Suite
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Kind

HERE = Path(__file__).parent
PAGE = "docs/reference/leaderboard.md"
SIZES = ("quick", "full")
EDIT_SEEDS = 3
"""How many times a full table makes every edit, each with another seed."""
TINY = Size(erased=2, synonyms=1, retained=1, plain=2, prompts=2)


@dataclass(frozen=True)
class Task:
    """What is erased when a method is judged by a suite."""

    suite: str
    kind: Kind
    """Of what is erased, but for flags."""
    together: tuple[int, ...] = (1,)
    """How many concepts an edit erases at once; each of them in turn where it is one."""

    @property
    def title(self) -> str:
        """What its table is called: the suite, and how many are erased at once."""
        name = Path(self.suite).stem
        return name if self.together == (1,) else f"{name}-{self.together[0]}"

    def split(self, together: Sequence[int] | None = None) -> Iterator[Task]:
        """One task for each number of concepts, or for those of `together` among them."""
        for n in self.together:
            if together is None or n in together:
                yield dataclasses.replace(self, together=(n,))


TASKS = {
    "miniature": (
        Task("object", "object"),
        Task("identity", "identity", (1, 5, 10, 100)),
        Task("style", "style", (1, 10, 100)),
        Task("unsafe", "explicit"),
        Task("shared-terms", "identity", (10,)),
        Task("residual", "object"),
        Task("pairs", "object"),
        Task("prompt-kinds", "object"),
    ),
    "emoji": (
        Task("object", "object"),
        Task("identity", "identity", (1, 5, 10, 20)),
        Task("style", "style"),
        Task("unsafe", "explicit"),
        Task("shared-terms", "object"),
        Task("residual", "object"),
        Task("pairs", "object"),
    ),
}
"""The suites of each shipped model."""
NOTES = {
    "emoji": [
        "A small model on which most methods score 99: suites tell them apart less than those of the",
        "miniature. The quick tables were made after the templates for training, retaining and judging",
        "were separated; their intervals are about words in general. The tables under *full size* and",
        "*Under attack* were made before that, with the older templates and intervals about these words",
        "alone.",
    ],
    "miniature": [
        "UCE, SPEED, OCE and MACE have values chosen on tuning people: at a hundred names the best of",
        "eight settings, at ten the best of four, OCE of eight, MACE of eleven",
        "(`experiments/grids.toml`). UCE and MACE have the best of three on foods for weapons, and",
        "MACE the better of two on things for objects, of which four of the ten were erased. Sluice",
        "has the best of two; all others have the emoji model's values, or their defaults. Artists",
        "are erased with the values for people; Sluice's were tried on both. One seed of each edit: a",
        "claim that one method is better than another needs the full size. Seconds are of a machine",
        "that did other work, too.",
    ],
}
"""What a reader of a model's tables should know."""
FULL = {
    "ten objects in turn": ("objects", ""),
    "20 flags": ("flags-20", ""),
    "four styles in turn": ("styles", ""),
    "weapons as nine concepts": ("unsafe", "weapon, pistol, knife …"),
    "weapons as one concept": ("unsafe", "weapon"),
}
"""Experiments of `experiments/ace`, run at full size, by what their columns say; where one problem of
several is meant, what its rows are called."""
ANCHORED = {
    "ten objects in turn": "objects-anchored",
    "20 flags": "flags-anchored",
    "weapons as one concept": "unsafe-anchored",
}
"""Experiments of `experiments/ant` with ANT turned to the anchor, by the columns they stand in."""
LEAST_IN_TURN = 3  # of a list of identities so many are erased alone


def problems(task: Task, suite: Suite, take: int) -> list[Problem]:
    """The problems of a task; `take` is how many at the most, 0 is all."""
    known = {concept.name: concept for concept in suite.concepts}
    names = [name for name in suite.erase or known if name in known and name not in suite.retain]
    found = []
    for n in task.together:
        if n == 1:
            groups = [[name] for name in (names[:LEAST_IN_TURN] if suite.erase else names)]
        else:
            groups = [names[:n]] if len(names) >= n else []
        for group in groups:
            erased = [known[name] for name in group]
            kept = [other.words for other in suite.find_retained(erased)]
            concepts = tuple(_concept(task, suite, one) for one in erased)
            found.append(Problem(concepts, tuple(kept)))
    return found[:take] if take else found


def _concept(task: Task, suite: Suite, one: SuiteConcept) -> Concept:
    """What a method is told: never a suite's synonyms, but for the unsafe the things that are meant."""
    kind = "identity" if one.words.startswith("flag of") else task.kind
    return Concept(one.words, suite.anchor, kind, one.labels if kind == "explicit" else ())


def method_for(name: str, model: Model, kind: Kind, n_concepts: int = 1) -> Method:
    """A method with its preset for the model and so many concepts or their kind, where it has one."""
    cls: type[Method] = registry.get("methods", name)
    wanted = (f"{model.name}-{n_concepts}", f"{model.name}-{kind}", model.name, kind)
    preset = next((p for p in wanted if p in cls.presets), None)
    return cls.preset(preset) if preset else cls()


def judge(
    model: Model,
    task: Task,
    methods: Sequence[str],
    *,
    full: bool,
    tiny: bool = False,
    take: int = 0,
    folder: Path,
    cache: Cache,
    progress: Any,
    autocast: torch.dtype | None = None,
) -> Report:
    """All methods on one suite; the report's page stands in the folder."""
    suite = Suite.read(task.suite, model.name)
    suite = restrict_to_judge(suite, make_metric(suite.judge, read_options(suite, suite.judge)))
    if tiny:
        suite = dataclasses.replace(suite, sizes=dict.fromkeys(SIZES, TINY))
    candidates = []
    for problem in problems(task, suite, take):
        for name in methods:
            for seed in range(EDIT_SEEDS if full else 1):
                method = method_for(name, model, task.kind, len(problem.erase))
                job = Job(method, name, problem, seed, title=name)
                candidates.append(job.run(model, folder / "edits", progress))
    with model.autocasting(autocast):
        report = evaluate(model, candidates, [suite], full=full, cache=cache, progress=progress)
    report.save(folder / ("tiny" if tiny else SIZES[full]) / task.title)
    return report


def rows(report: Report) -> dict[str, Any]:
    """For the original and each method: the H and its terms, averaged over what was erased."""
    score = report.cases[0].suite.score
    groups: dict[str, list[tuple[SuiteResult, CandidateResult]]] = {}
    for case in report.cases:
        for row in case.rows:
            method = (
                row.candidate.edit.record.method if row.candidate and row.candidate.edit else "original"
            )
            groups.setdefault(method, []).append((case, row))
    found = {}
    for method, members in groups.items():
        numbers: dict[str, Estimate] = {score: average([row.h for _, row in members])}
        for term in TERMS[score]:
            numbers[term] = average([row.terms[term] for _, row in members if term in row.terms])
        broken = [row.roles["erased"]["unrecognisable"] for _, row in members]
        seconds = [
            row.candidate.edit.record.seconds
            for _, row in members
            if row.candidate and row.candidate.edit
        ]
        found[method] = {
            **{name: number(estimate) for name, estimate in numbers.items()},
            "unrecognisable": number(average(broken)),
            "edits": 0 if method == "original" else len(members),
            "seconds an edit": round(sum(seconds) / len(seconds), 1) if seconds else None,
            "each": {
                name: number(average([row.h for case, row in members if ", ".join(case.erased) == name]))
                for name in dict.fromkeys(", ".join(case.erased) for case, _ in members)
            },
        }
    return found


def number(estimate: Estimate) -> dict[str, Any]:
    score = estimate.score
    values = {"value": score.value, "low": score.low, "high": score.high}
    return {k: None if v != v else round(v, 4) for k, v in values.items()} | {"n": score.n}


def table(results: Path) -> str:
    """The leaderboard in Markdown, from the files of results."""
    parts = [
        "# Leaderboard\n",
        "The models that ship, judged by their own suites ([how judging",
        "works](../explanation/judging.md)). Every number is in per cent with its 95 % interval,",
        "averaged over what was erased; H is the harmonic mean of the terms beside it. Each method runs",
        "with its preset for the model, or with its defaults. The original keeps everything and erases",
        "nothing, so its H is 0. `python experiments/leaderboard.py` makes this page from",
        "`experiments/results/leaderboard-*.json`.",
    ]
    for path in sorted(
        results.glob("leaderboard-*-*.json"), key=lambda p: (DEFAULT_MODEL not in p.name, p.name)
    ):
        model, size = path.stem.removeprefix("leaderboard-").rsplit("-", 1)
        if size in SIZES:
            parts += [f"\n## The {model} model, {size} size\n", *NOTES.get(model, ()), ""]
            parts += _suites(json.loads(path.read_text("utf8")))
    if (results / "ace").is_dir():
        parts += [
            "\n## The emoji model, full size\n",
            "The experiments of `experiments/ace`, drawn in bfloat16. *ant* reads no anchor, as in its",
            "paper; *ant, anchored* does, in runs of its own (`experiments/ant`; flags in float32).\n",
        ]
        parts += [full_size(results), *under_attack(results)]
    return "\n".join(parts).rstrip() + "\n"


def _suites(record: Any) -> Iterator[str]:
    """A table for each suite of a file of results, in Markdown."""
    for suite, one in record["suites"].items():
        score, found = one["score"], one["rows"]
        terms = TERMS[score]
        yield f"### {suite}\n\n{one['about']}\n"
        lines = []
        order = sorted(found, key=lambda m: (m != "original", -(found[m][score]["value"] or 0)))
        for method in order:
            row = found[method]
            cells = [_percent(row[name]) for name in (score, *terms, "unrecognisable")]
            seconds = row["seconds an edit"]
            cells += [str(row["edits"] or "–"), "–" if seconds is None else f"{seconds:g}"]
            lines.append([method, *cells])
        heads = ["method", score, *terms, "unrecognisable", "edits", "s an edit"]
        yield grid(heads, lines) + "\n"
    facts, versions = record["made with"], record["made with"]["versions"]
    yield (
        f"Model {facts['model']}, {facts['num_inference_steps']} steps, guidance"
        f" {facts['guidance_scale']}; expunge {versions['expunge']}, torch {versions['torch']}."
    )


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = "|---" * len(heads) + "|"
    head, *lines = ("| " + " | ".join(cells).lstrip() + " |" for cells in (heads, *rows))
    return "\n".join([head, rule, *lines])


def full_size(results: Path) -> str:
    """The H of every method in the experiments at full size, in Markdown."""
    columns: dict[str, dict[str, str]] = {}
    for title, (name, problem) in FULL.items():
        file = results / "ace" / f"{name}.json"
        if not file.is_file():
            continue
        record = json.loads(file.read_text("utf8"))
        columns[title] = _of_problem(record, problem) if problem else _of_methods(record)
        anchored = results / "ant" / f"{ANCHORED.get(title, '')}.json"
        if anchored.is_file():
            of = _of_methods(json.loads(anchored.read_text("utf8")))
            columns[title]["ant, anchored"] = of["ant"]
    if not columns:
        return ""
    methods = dict.fromkeys(method for column in columns.values() for method in column)
    rows = ([m, *(column.get(m, "–") for column in columns.values())] for m in methods)
    return grid(["", *columns], rows)


def _of_methods(record: Any) -> dict[str, str]:
    """The H of each method, the mean over all problems of an experiment."""
    (found,) = record["methods"].values()
    return {recipe.partition(" (")[0]: _percent(one) for recipe, one in found.items()}


def _of_problem(record: Any, problem: str) -> dict[str, str]:
    """The H of each method on one problem of an experiment."""
    (case,) = record["cases"]
    rows = {tuple(row["name"].split(": ", 1)): row for row in case["rows"]}
    return {
        key[0]: _percent(next(row[term] for term in TERMS if term in row))
        for key, row in rows.items()
        if key[1:] in ((), (problem,))
    }


def under_attack(results: Path) -> list[str]:
    """What `attacked.py` found, in Markdown; nothing where it has not been run."""
    file = results / "ace" / "attacked.json"
    if not file.is_file():
        return []
    record = json.loads(file.read_text("utf8"))
    words, images = record["words"], record["pictures a word"] * len(record["words"])
    return [
        "\n## Under attack\n",
        f"The share of images in which an erased word is seen again ({', '.join(words)};",
        f"{images} images): without an attack (pre-ASR), and under two attacks with growing budgets,",
        "a bounded attack on the prompt's embedding and a word learnt by textual inversion. Lower is",
        "better. An image that the attack breaks counts as not seen. `python experiments/attacked.py`",
        "makes this table.\n",
        attacked(record["means"]),
        *_longer(results / "ace" / "attacked-longer.json"),
    ]


def _longer(file: Path) -> list[str]:
    """What longer attacks brought back, in Markdown; nothing where they have not been run."""
    if not file.is_file():
        return []
    means = json.loads(file.read_text("utf8"))["means"]
    return [f"\nLonger attacks get further (`experiments/results/ace/{file.name}`):\n", attacked(means)]


def attacked(means: dict[str, Any]) -> str:
    """A row for each method, a column for each budget."""
    budgets = list(next(iter(means.values())))
    rows = ([method, *(_percent(row[name]) for name in budgets)] for method, row in means.items())
    return grid(["seen again", *budgets], rows)


def _percent(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "–"
    return f"{100 * one['value']:.1f} <sub>{100 * one['low']:.0f}–{100 * one['high']:.0f}</sub>"


def keep(results: Path, size: str, task: Task, report: Report, model: Model) -> None:
    """Put one suite's rows with those that are there, if they are of the same model and sampler."""
    suite = report.cases[0].suite
    file = results / f"leaderboard-{model.name}-{size}.json"
    facts = {
        **{
            key: report.provenance[key]
            for key in ("model", "model sha256", "num_inference_steps", "guidance_scale")
        },
        "versions": {name: version(name) for name in ("expunge", "torch", "diffusers", "transformers")},
    }
    if "autocast" in report.provenance["sampler"]:
        facts["autocast"] = report.provenance["sampler"]["autocast"]
    record = json.loads(file.read_text("utf8")) if file.is_file() else {}
    if record.get("made with") != facts:
        record = {"made with": facts, "suites": {}}
    title = f"{model.name}/{suite.name}"
    known = title in registry.list_names("suites")
    about = registry.describe("suites", title) if known else suite.notes
    before = record["suites"].get(task.title, {})
    others = before.get("rows", {}) if before.get("version") == suite.version else {}
    record["suites"][task.title] = {
        "version": suite.version,
        "score": suite.score,
        "about": about,
        "rows": others | rows(report),
    }
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


def main() -> None:
    """Classifier, keep the results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=registry.list_names("methods"), help="default: all"
    )
    parser.add_argument("--suites", nargs="+", help="default: all of the model")
    parser.add_argument("--full", action="store_true", help="the papers' number of images")
    parser.add_argument("--bfloat16", action="store_true", help="draw in bfloat16, by autocast")
    parser.add_argument("--tiny", action="store_true", help="two images a cell, to see that it works")
    parser.add_argument("--take", type=int, default=0, help="so many problems a suite; default: all")
    parser.add_argument("--model", default=DEFAULT_MODEL, choices=TASKS)
    parser.add_argument(
        "--together", type=int, nargs="+", help="how many concepts an edit erases at once"
    )
    parser.add_argument("--work", type=Path, default=HERE / "leaderboard.work", help="edits and pages")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "reference" / "leaderboard.md"
    )
    parser.add_argument(
        "--table", action="store_true", help="write the table from the results there are"
    )
    options = parser.parse_args()
    names = [task.suite for task in TASKS[options.model]]
    if unknown := [name for name in options.suites or () if name not in names]:
        parser.error(f"{options.model} has no suite {unknown[0]!r}, but {', '.join(names)}")
    if not options.table:
        model, cache = expunge.load(options.model), Cache()
        asked = (task for task in TASKS[options.model] if task.suite in (options.suites or names))
        for task in chain.from_iterable(one.split(options.together) for one in asked):
            with Progress(transient=True) as bars:
                tasks: dict[str, Any] = {}

                def tell(
                    label: str, done: int, total: int, bars: Progress = bars, tasks: Any = tasks
                ) -> None:
                    if label not in tasks:
                        tasks[label] = bars.add_task(label, total=total)
                    bars.update(tasks[label], completed=done)

                report = judge(
                    model,
                    task,
                    options.methods,
                    full=options.full,
                    tiny=options.tiny,
                    take=options.take,
                    folder=options.work,
                    cache=cache,
                    progress=tell,
                    autocast=torch.bfloat16 if options.bfloat16 else None,
                )
            keep(
                options.results,
                "tiny" if options.tiny else SIZES[options.full],
                task,
                report,
                model,
            )
            hs = {
                method: row[report.cases[0].suite.score]["value"] for method, row in rows(report).items()
            }
            Console().print(
                task.title, {m: None if h is None else round(100 * h, 1) for m, h in hs.items()}
            )
    with replacing(options.docs) as temporary:
        temporary.write_text(table(options.results), "utf8")


if __name__ == "__main__":
    main()
