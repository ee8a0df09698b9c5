"""Robustness: how often an attack brings an erased concept back.

Asked are the images of a suite's erased prompts in which the original model shows the concept. Of
these, *pre-ASR* is the share in which the edited model shows it unattacked; *ASR* at a budget is the
share in which it does at that budget or any smaller one, none included, for nobody has to attack as
hard as allowed. A broken image does not show the concept, nor has it been defended: beside ASR stands
the share that is *unrecognisable* at a budget and has not come back. The budgets are the suite's; an
attack may have several ladders of them, "NAME" and "NAME:LADDER".
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.attack import Attack
from expunge.base import fields, registry
from expunge.base.errors import ExpungeError
from expunge.base.quiet import Progress, quiet
from expunge.changes import content
from expunge.edit import Edit
from expunge.evaluation import statistics
from expunge.evaluation.contact_sheet import Strip
from expunge.evaluation.image_cache import Cache, Request, Source
from expunge.evaluation.measure import make, measure, requests
from expunge.evaluation.statistics import Estimate
from expunge.evaluation.suite import Cell, Suite
from expunge.metric import Classifier
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"radius": [0.05, 0.1, 0.2, 0.4], "steps": 10},
    "inversion": {"steps": [50, 150]},
    "embedding:restarts": {"restarts": [1, 4, 8], "radius": 0.2, "steps": 40, "num_timesteps": 6},
    "inversion:restarts": {"restarts": [1, 3], "steps": 150},
    "inversion:long": {"steps": [150, 600]},
    "inversion:cce": {"steps": [5000], "batch_size": 16, "num_images": 16},
}
"""The budgets of a suite that names none."""

SHOWN = 6
"""Images in a strip."""


@dataclass(frozen=True, eq=False)
class Robustness:
    """One edit under one attack, on one suite."""

    suite: str
    edit: str
    attack: str
    fields: Mapping[str, Any]
    """The attack's, but for what the budgets run over."""
    pre: Estimate
    """pre-ASR"""
    asr: Mapping[str, Estimate]
    """ASR, for each budget in words."""
    pre_broken: Estimate
    """The share unrecognisable unattacked."""
    broken: Mapping[str, Estimate]
    """For each budget the share that is unrecognisable there and has not come back at it or a smaller
    one: neither a success of the attack nor of the defence."""
    strip: Strip
    """A few of the images: before, after, and attacked, with a row for each budget."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "suite": self.suite,
            "edit": self.edit,
            "attack": self.attack,
            "fields": dict(self.fields),
            "pre-ASR": dataclasses.asdict(self.pre.score),
            "ASR": {budget: dataclasses.asdict(asr.score) for budget, asr in self.asr.items()},
            "unrecognisable": {
                "unattacked": dataclasses.asdict(self.pre_broken.score),
                **{budget: dataclasses.asdict(one.score) for budget, one in self.broken.items()},
            },
        }


def robustness(
    model: Model,
    edit: Edit,
    suite: Suite,
    attack: str,
    *,
    name: str = "",
    full: bool = False,
    cache: Cache | None = None,
    progress: Progress = quiet,
    seed: int = 0,
) -> Robustness:
    """Attack an edit on a suite's erased prompts, at each of its budgets anew.

    Args:
        model: the original.
        edit: what is attacked.
        suite: its prompts, seeds, judge, and budgets (`attacks`).
        attack: the name of an attack, or of one of its ladders of budgets, "NAME:LADDER".
        name: what to call the edit.
        full: the suite's full size.
        cache: where images are kept; an attacked image by the hash of its embedding.
        progress: told what is done.
        seed: of the attack.

    Raises:
        ExpungeError: no such attack, a budget it does not take, or a suite without a judge.
    """
    cache = Cache() if cache is None else cache
    model = model.sampled_by(suite.scheduler)
    ladder = budgets(suite, attack)
    judge = make(suite.judge, dict(suite.options.get(suite.judge, {})))
    if not isinstance(judge, Classifier):
        raise ExpungeError(f"suite {suite.name}: {suite.judge} does not say what an image shows")
    names = [concept.name for concept in edit.record.problem.erase]
    cells = [cell for cell in suite.cells(names, full=full) if cell.role == "erased" and cell.asks]
    asked = requests(model, cells, suite.num_inference_steps, suite.guidance_scale)

    def seen(
        source: Source, rows: Sequence[Sequence[Request]], label: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        looks = measure(cache, source, None, cells, rows, {suite.judge: judge}, progress, label)
        return _seen(suite, judge, cells, looks.rows[suite.judge])

    original, edited = Source(model), Source(model, (edit,))
    drawn, _ = seen(original, asked, f"{suite.name}, original")
    answers, muddled = seen(edited, asked, suite.name)
    reached = {key: rows.nan_to_num(0) for key, rows in answers.items()}
    concepts = {cell.prompt: cell.concept for cell in cells}

    def share(values: Mapping[str, Tensor], what: str = "") -> Estimate:
        counted = {key: rows.masked_fill(~(drawn[key] >= 0.5), math.nan) for key, rows in values.items()}
        return statistics.mean(counted, name=f"{attack} on {name}{what}", concepts=concepts)

    def lost() -> Estimate:
        """What is a muddle, and has not come back."""
        only = {key: rows * (1 - reached[key]).clamp(0, 1) for key, rows in muddled.items()}
        return share(only, ", unrecognisable")

    chosen = _spread(asked)
    pre, asr, pre_broken, broken = share(reached), {}, lost(), {}
    shown = {
        "before": cache.draw(original, _at(asked, chosen)),
        f"after: {_percent(pre)}": cache.draw(edited, _at(asked, chosen)),
    }
    for budget, one in ladder.items():
        rows = [
            _attacked(model, edit, one, cell, asks, RunContext(seed, progress))
            for cell, asks in zip(cells, asked, strict=True)
        ]
        found, muddled = seen(edited, rows, f"{suite.name}, {attack} {budget}")
        reached = {key: torch.maximum(reached[key], x.nan_to_num(0)) for key, x in found.items()}
        asr[budget], broken[budget] = share(reached), lost()
        shown[f"{budget}: {_percent(asr[budget])}"] = cache.draw(edited, _at(rows, chosen))
    first = dataclasses.asdict(next(iter(ladder.values())))
    plain = {key: value for key, value in first.items() if key != _grid(suite, attack)[0]}
    name = name or edit.record.method
    captions = [one.prompt for one in _at(asked, chosen)]
    strip = Strip(
        f"{attack} on {name}", captions, [(k, list(v)) for k, v in shown.items()], "seen, at the left"
    )
    return Robustness(suite.name, name, attack, plain, pre, asr, pre_broken, broken, strip)


def _spread(asked: Sequence[Sequence[Request]]) -> list[tuple[int, int]]:
    """A few of all images, evenly taken: their cell, and their place in it."""
    every = [(cell, place) for cell, row in enumerate(asked) for place in range(len(row))]
    return [every[i * len(every) // SHOWN] for i in range(SHOWN)] if len(every) > SHOWN else every


def _at(rows: Sequence[Sequence[Request]], chosen: Sequence[tuple[int, int]]) -> list[Request]:
    return [rows[cell][place] for cell, place in chosen]


def _percent(share: Estimate) -> str:
    """In a few letters, for a label."""
    return f"{100 * share.value:.0f} %"


def budgets(suite: Suite, attack: str) -> dict[str, Attack]:
    """The attack at each of the suite's budgets, the smallest first.

    Raises:
        ExpungeError: there is no such attack or ladder, or the suite gives it a field that it has not.
    """
    cls = registry.get("attacks", attack.partition(":")[0])
    field, values = _grid(suite, attack)
    rest = {key: value for key, value in _table(suite, attack).items() if key != field}
    return {
        f"{field} {value:g}": fields.build(cls, {**rest, field: value}, attack)
        for value in sorted(values)
    }


def _table(suite: Suite, attack: str) -> Mapping[str, Any]:
    return suite.attacks.get(attack) or DEFAULTS.get(attack, {})


def _grid(suite: Suite, attack: str) -> tuple[str, list[float]]:
    """The field that the budgets run over, and its values."""
    lists = {key: value for key, value in _table(suite, attack).items() if isinstance(value, list)}
    if len(lists) != 1 or not all(lists.values()):
        known = [key for key in dict.fromkeys((*suite.attacks, *DEFAULTS)) if key != attack]
        hint = f"; there are some for {', '.join(known)}"
        raise ExpungeError(
            f"suite {suite.name} has no budgets for the attack {attack}: write one list in"
            f" [attacks.{_quoted(attack)}], such as steps = [50, 150]{hint}"
        )
    ((field, values),) = lists.items()
    return field, values


def _quoted(attack: str) -> str:
    """An attack's key as TOML writes it."""
    return f'"{attack}"' if ":" in attack else attack


def _attacked(
    model: Model, edit: Edit, attack: Attack, cell: Cell, asked: Sequence[Request], run: RunContext
) -> list[Request]:
    """A cell's images, with the text that the attack has found for each."""
    first = asked[0]
    probe = Probe(
        (cell.prompt,) * len(asked), cell.seeds, first.num_inference_steps, first.guidance_scale
    )
    text = attack.run(model, edit, probe, run).text
    if text is None:
        return list(asked)
    return [
        dataclasses.replace(
            one,
            text=text[[row]],
            text_hash=hashlib.sha256(content(text.embeddings[row])).hexdigest(),
        )
        for row, one in enumerate(asked)
    ]


def _seen(
    suite: Suite, judge: Classifier, cells: Sequence[Cell], rows: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each prompt whether each image shows what it was erased for, and whether it is broken;
    broken ones do not."""
    found, broken = {}, {}
    for cell, row in zip(cells, rows, strict=True):
        ask = next((ask for ask in cell.asks if ask.role == "erased"), None)
        if ask is None:
            continue
        answer = judge.score(row, ask.labels, ask.near, suite.question)
        broken[cell.prompt] = judge.broken(row).float()
        found[cell.prompt] = answer.masked_fill(judge.broken(row), 0.0)
    return found, broken
