"""Choose the values of a method's emoji presets on words that no suite reports.

Five tasks, each a suite in `experiments/tune`: six objects in turn, two of them to be attacked
(`fortify`), sixteen together, food as if it were unsafe, one style. The sixteen become sea, sky and the
like, or "a thing", which is no one image, as "a flag" is none (`many-vague`), or five of them do
(`many-few-vague`). Food is told in four ways: as concepts that become ground or nothing
(`explicit-bare`), or as one with many names (`explicit-one`, `explicit-one-bare`). Every combination of
the values given is tried, judged as any edit is. What has been tried stays in
`experiments/results/tune/METHOD.json`, and is not tried again on the same weights. Images are drawn
in bfloat16 where the hardware has it. Eight more tasks are for the miniature model (`people` and
`artists`, also at the load of its tables: `people-10`, `people-100`, `artists-100`; `things`;
`harmful`, and told as its suite is, `harmful-one`), whose results are in `METHOD-miniature.json`; with
`--grid` every method tries the settings that `grids.toml` has for it: as many for each, so that nobody's
values are better looked for than another's, and more where the best of those is below 90.

    python experiments/tune.py mace object many --try stages=refine ridge=10,100 refine_prior=0,10
    python experiments/tune.py ant many --preset emoji-identity --try learning_rate=1e-3,3e-3
    python experiments/tune.py ace fortify --preset emoji-fortified --attack inversion --seeds 3
    python experiments/tune.py sluice people things --grid
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import expunge
from expunge import Concept, Model, Problem
from expunge.base import registry
from expunge.base.fields import build, flatten
from expunge.base.files import read_toml, replacing
from expunge.cli.loading_options import read_autocast
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.method import Method
from expunge.methods.ant import ANT
from expunge.methods.ant.low_rank import LowRankChanges
from expunge.methods.ant.settings import SharedSettings
from expunge.methods.mace import MACE
from expunge.methods.mace.suppression import SuppressionData
from expunge.problem import Kind
from expunge.runtime.context import RunContext, Tensors

HERE = Path(__file__).parent


@dataclass(frozen=True)
class RememberingMACE(MACE):
    """MACE that finds a concept's images and masks once, however many values are tried on them."""

    def prepare(self, model: Model, concept: Concept, run: RunContext) -> SuppressionData:
        key = (concept, run.seed, self.templates, self.num_images, self.num_inference_steps, self.masks)
        if (*key, self.end_tokens) not in LESSONS:
            LESSONS[*key, self.end_tokens] = super().prepare(model, concept, run)
        lesson = LESSONS[*key, self.end_tokens]
        return dataclasses.replace(lesson, generator=run.generator("training", concept.name))


@dataclass(frozen=True)
class RememberingChanges(LowRankChanges):
    """Low-rank changes that are trained once, however many fusions are tried on them."""

    def train(
        self,
        settings: SharedSettings,
        model: Model,
        problem: Problem,
        run: RunContext,
        whole: Tensor,
        prior: Tensor,
    ) -> dict[str, Tensors]:
        fusion: tuple[str, ...] = ("strength", "ridge", "fuse_prior", "domain_weight", "captions")
        if self.through_fusion:
            fusion = fusion[:1]
        fields = tuple(value for name, value in flatten(settings).items() if name not in fusion)
        key = (*fields, problem.erase, run.seed)
        if key not in FACTORS:
            FACTORS[key] = super().train(settings, model, problem, run, whole, prior)
        return FACTORS[key]


@dataclass(frozen=True)
class RememberingANT(ANT):
    """ANT with low-rank changes that are remembered."""

    low_rank: RememberingChanges = field(default_factory=RememberingChanges)


ATTACKED = 4
"""Images of each prompt that are attacked, which takes long."""

LESSONS: dict[Any, SuppressionData] = {}
FACTORS: dict[Any, dict[str, Tensors]] = {}
REMEMBERING: dict[str, type[Method]] = {"mace": RememberingMACE, "ant": RememberingANT}


def objects() -> list[Problem]:
    """Each of six words erased, the five others retained."""
    becomes = {"turtle": "sea", "rabbit": "grass", "bicycle": "street", "helicopter": "sky",
               "hamburger": "ground", "soccer ball": "grass"}  # fmt: skip
    return [
        Problem((Concept(name, anchor),), tuple(other for other in becomes if other != name))
        for name, anchor in becomes.items()
    ]


def fortified() -> list[Problem]:
    """The turtle and the rabbit, nine words retained."""
    named = [concept.name for concept in suite("fortify").concepts[:10]]
    return [
        Problem((concept,), tuple(name for name in named if name != concept.name))
        for problem in objects()[:2]
        for concept in problem.erase
    ]


def many(anchor: str = "") -> list[Problem]:
    """Sixteen words erased together, the suite's others retained; each becomes what stands near it, or
    all become one thing."""
    becomes = {
        "sea": ("tropical fish", "octopus", "whale", "crab"),
        "sky": ("butterfly", "honeybee"),
        "ground": ("apple", "carrot", "doughnut", "grapes", "alarm clock", "trophy"),
        "grass": ("tree", "sunflower", "soccer ball"),
        "street": ("tractor",),
    }
    erase = (
        Concept(name, anchor or near, "identity") for near, names in becomes.items() for name in names
    )
    return [Problem(tuple(erase), suite("many").retain)]


def few(anchor: str) -> list[Problem]:
    """Five of the sixteen, all of which become one thing; the suite's others retained."""
    (whole,) = many(anchor)
    return [dataclasses.replace(whole, erase=whole.erase[::3][:5])]


def explicit(anchor: str = "ground", one: bool = False) -> list[Problem]:
    """A group and its members, one name each, as many concepts or as one with many names; nothing is
    retained by name."""
    group, *members = ("food", *suite("explicit").concepts[0].also)
    if one:
        return [Problem((Concept(group, anchor, "explicit", synonyms=tuple(members)),))]
    return [Problem(tuple(Concept(name, anchor, "explicit") for name in (group, *members)))]


def style() -> list[Problem]:
    """Noto, with the other styles retained."""
    kept = [concept.name for concept in suite("style").concepts[1:]]
    return [Problem((Concept("noto", "art", "style"),), tuple(kept))]


def named(task: str, kind: Kind, anchor: str) -> list[Problem]:
    """The names that a suite of the miniature erases, together, and what it retains."""
    erase = tuple(Concept(name, anchor, kind) for name in suite(task).erase)
    return [Problem(erase, suite(task).retain)]


def crowd(task: str, reported: str, kind: Kind, anchor: str, count: int) -> list[Problem]:
    """As `named`, with `count` erased and a hundred retained: the load of the reported tables.

    Names of the reported suite fill it up, those it retains as erased and those it erases as retained:
    so nothing is chosen on the problem that is reported. None of them is judged.
    """
    (few,) = named(task, kind, anchor)
    filling, erase = Suite.read(reported, "miniature"), few.erase[:count]
    more = tuple(Concept(name, anchor, kind) for name in filling.retain[: count - len(erase)])
    return [Problem(erase + more, few.retain + filling.erase[: 100 - len(few.retain)])]


def things() -> list[Problem]:
    """Six of the miniature's things in turn, six retained; of the last six nobody is told."""
    names = [concept.name for concept in suite("things").concepts]
    becomes = dict(zip(names, ("street", "sea", "grass", "room", "beach", "ground"), strict=False))
    return [
        Problem((Concept(name, anchor),), tuple(n for n in names[:12] if n != name))
        for name, anchor in becomes.items()
    ]


def harmful(one: bool = False) -> list[Problem]:
    """A group of foods and its members.

    Args:
        one: whether they are told as the reported suite is: one concept with many names and no anchor,
            beside names that stay. Otherwise as concepts of one name each, and nothing stays by name.
    """
    whole = suite("harmful")
    group = whole.concepts[0]
    if one:
        concept = Concept(group.name, None, "explicit", synonyms=tuple(group.also))
        return [Problem((concept,), whole.retain)]
    names = (group.name, *group.also)
    return [Problem(tuple(Concept(name, "ground", "explicit") for name in names))]


TASKS: dict[str, Callable[[], list[Problem]]] = {
    "object": objects,
    "fortify": fortified,
    "many": many,
    "many-vague": partial(many, "a thing"),
    "many-few-vague": partial(few, "a thing"),
    "explicit": explicit,
    "explicit-bare": partial(explicit, ""),
    "explicit-one": partial(explicit, one=True),
    "explicit-one-bare": partial(explicit, "", one=True),
    "style": style,
    "people": partial(named, "people", "identity", "a person"),
    "people-10": partial(crowd, "people", "identity", "identity", "a person", 10),
    "people-100": partial(crowd, "people", "identity", "identity", "a person", 100),
    "artists": partial(named, "artists", "style", "art"),
    "artists-100": partial(crowd, "artists", "style", "style", "art", 100),
    "things": things,
    "harmful": harmful,
    "harmful-one": partial(harmful, one=True),
}


def suite(task: str) -> Suite:
    """The suite that a task is judged by: tasks of one suite are ways to tell of one thing."""
    return Suite.read(HERE / "tune" / f"{task.partition('-')[0]}.toml")


def combinations(tried: list[str]) -> Iterator[dict[str, Any]]:
    """All combinations of FIELD=VALUE,VALUE,…; the stages are written refine+fuse."""

    def value(text: str) -> Any:
        if set(text.split("+")) <= {"refine", "suppress", "fuse", "gate", "harden"}:
            return tuple(text.split("+"))
        try:
            return json.loads(text)
        except ValueError:
            return text

    parts = [text.partition("=") for text in tried]
    fields = [(name, [value(text) for text in values.split(",")]) for name, _, values in parts]
    for values in itertools.product(*(values for _, values in fields)):
        yield dict(zip((name for name, _ in fields), values, strict=True))


def read_grid(method: str, task: str) -> tuple[str, list[dict[str, Any]]]:
    """Return a method's preset and the settings that are tried from it on a task, of `grids.toml`."""
    table = read_toml(HERE / "grids.toml")[method]
    load = task.rpartition("-")[2]  # as in people-100
    tried = table.get(load) or [*table["try"], *table.get("again", ())]
    rows = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in tried]
    return table.get("preset", ""), rows


def judge(
    model: Model,
    task: str,
    method: Method,
    full: bool = False,
    attacks: Sequence[str] = (),
    seeds: int = 1,
) -> dict[str, Any]:
    """What a task comes to: H and its terms, means over its problems, shares unrecognisable, and what
    attacks bring back, means over seeds of theirs."""
    edits = [expunge.erase(model, problem, method) for problem in TASKS[task]()]
    candidates = [Candidate.of(edit, f"{i}") for i, edit in enumerate(edits)]
    with model.autocasting(read_autocast("auto")):
        report = expunge.evaluate(model, candidates, [suite(task)], full=full)
        quick = dataclasses.replace(suite(task).sizes["quick"], erased=ATTACKED)
        fewer = dataclasses.replace(suite(task), sizes={"quick": quick})
        attacked = [
            result
            for edit, seed in itertools.product(edits, range(seeds if attacks else 0))
            for result in expunge.evaluate(
                model, [edit], [fewer], attacks=attacks, roles=("erased",), seed=seed
            )
            .cases[0]
            .rows[1]
            .attacks
        ]
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
        **{
            budget: mean([one.asr[budget].value for one in attacked if budget in one.asr])
            for one in attacked
            for budget in one.asr
        },
        "pictures": sum(seen["seen"].n for _, row in rows for seen in row.roles.values()),
        "left out": sorted({words for case, _ in rows for _, words, _ in case.left_out}),
        "seconds": mean([edit.record.seconds for edit in edits]),
    }


def main() -> None:
    """Try what was asked for; the file is written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("method", choices=registry.list_names("methods"))
    parser.add_argument("tasks", nargs="+", choices=tuple(TASKS))
    parser.add_argument(
        "--preset", default="", help="where to start from; default: the model's, emoji's, or none"
    )
    parser.add_argument("--try", dest="tried", nargs="*", default=[], metavar="FIELD=VALUE,VALUE")
    parser.add_argument("--grid", action="store_true", help="try what grids.toml has for it")
    parser.add_argument(
        "--full", action="store_true", help="more images, where the task's suite has them"
    )
    parser.add_argument("--attack", nargs="*", default=[], choices=registry.list_names("attacks"))
    parser.add_argument("--seeds", type=int, default=1, help="how often each attack is run")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "tune")
    options = parser.parse_args()
    (shipped,) = {suite(task).model for task in options.tasks}
    file = options.results / f"{options.method}{'' if shipped == 'emoji' else f'-{shipped}'}.json"
    record: dict[str, Any] = json.loads(file.read_text("utf8")) if file.is_file() else {}
    model = expunge.load(shipped)
    if record.get("model sha256") != hash_for_images(model):
        record = {"model sha256": hash_for_images(model)}
    cls = REMEMBERING.get(options.method) or registry.get("methods", options.method)
    own = [name for name in (shipped, "emoji") if name in cls.presets]
    start, values = options.preset or next(iter(own), ""), list(combinations(options.tried))
    to_try = [
        (task, preset, row)
        for task in options.tasks
        for preset, rows in [read_grid(options.method, task) if options.grid else (start, values)]
        for row in rows
    ]
    for task, preset, row in to_try:
        base = {k: v for k, v in cls.presets[preset].items() if k != "about"} if preset else {}
        method, default = build(cls, base | row), flatten(cls())
        fields = {
            name: value
            for name, value in flatten(method).items()
            if name != "batch_size" and value != default[name]
        }
        title = ", ".join(f"{name} {value}" for name, value in fields.items()) or "as it is"
        title += "; full size" * options.full
        title += f"; under {', '.join(options.attack)}" * bool(options.attack)
        title += f", {options.seeds} times" * (options.seeds > 1)
        rows = record.setdefault(task, {})
        if title not in rows:
            rows[title] = judge(model, task, method, options.full, options.attack, options.seeds)
            record["versions"] = {name: version(name) for name in ("expunge", "torch", "diffusers")}
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
        figures = {k: v for k, v in rows[title].items() if isinstance(v, float)}
        print(task, title, figures, rows[title]["unrecognisable"], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
