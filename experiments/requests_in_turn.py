"""Requests one after another: does what was erased first stay erased, and is it as good as all at once?

The miniature's people, or artists, are erased one at a time, each onto the edit before it (an edit of
gates is merged with it instead). At 1, 10, 50 and 100 requests the edit is judged beside one that was
told of all of them at once: efficacy, specificity and their harmonic mean, in the suite's prompts. The
relapse is the share of earlier targets seen at the end less their share right after their own erasure.
Prompts from which the original does not draw whom they name are left out. Writes
`results/ours/requests-KIND.json` at every stop.

    python experiments/requests_in_turn.py --methods uce sluice --requests 1 10 50 100 --orders 1
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Concept, Edit, Model, Probe, Problem
from expunge.base import registry
from expunge.base.files import replacing
from expunge.changes import HookedChange
from expunge.checkpoints.merge import merge
from expunge.cli.loading_options import read_autocast
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.method import Method
from expunge.metrics.miniature import MiniatureRecogniser
from expunge.problem import Kind
from expunge.text import Text

HERE = Path(__file__).parent
ANCHORS: dict[Kind, str] = {"identity": "a person", "style": "art"}


@dataclass(frozen=True)
class Judge:
    """Which names are seen in a model's images of the suite's prompts, one image a name and prompt."""

    model: Model
    templates: tuple[str, ...]
    recogniser: MiniatureRecogniser
    autocast: torch.dtype | None = None
    batch_size: int = 32

    def see(self, names: Sequence[str], edit: Edit | None = None) -> Tensor:
        """(names, templates) of 0 and 1: whether each prompt's image shows whom it names."""
        prompts = [template.format(name) for name in names for template in self.templates]
        seeds = [seed for _ in names for seed in range(len(self.templates))]
        named = [name for name in names for _ in self.templates]
        answers = []
        for start in range(0, len(prompts), self.batch_size):
            some = slice(start, start + self.batch_size)
            probe = Probe(tuple(prompts[some]), tuple(seeds[some]))
            with self.model.autocasting(self.autocast):
                images = self._draw(probe, edit)
            rows = self.recogniser.measure(images, probe.prompts)
            for row, name in zip(rows, named[some], strict=True):
                answers.append(self.recogniser.score(row[None], [name], [], "top1"))
        return torch.cat(answers).nan_to_num().view(len(names), len(self.templates))

    def _draw(self, probe: Probe, edit: Edit | None) -> Tensor:
        if edit is None:
            return self.model.draw(probe)
        with self.model.using(edit):
            return self.model.draw(probe)


def remember_text(model: Model) -> None:
    """Encode every prompt once: each request reads the names that stay, and they are the same.

    For edits that leave the text encoder as it is.
    """
    encode, known = model.encode, dict[str, Text]()

    def look_up(prompts: Sequence[str]) -> Text:
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            text = encode(new)
            known.update({prompt: text[[row]] for row, prompt in enumerate(new)})
        return Text.joined([known[prompt] for prompt in prompts])

    model.encode = look_up  # type: ignore[method-assign]


def add(model: Model, method: Method, problem: Problem, so_far: Edit | None) -> Edit:
    """Return the edit that also erases a further problem's concept."""
    if so_far is None:
        return expunge.erase(model, problem, method)
    if any(isinstance(change, HookedChange) for change in so_far.changes):
        return merge(model, [so_far, expunge.erase(model, problem, method)])
    return expunge.erase(model, problem, method, onto=so_far)


def share(seen: Tensor, drawn: Tensor) -> float:
    """The share seen of the prompts that the original draws right."""
    return round(float((seen * drawn).sum() / drawn.sum().clamp(min=1)), 4)


def run(
    judge: Judge, method: Method, kind: Kind, order: Sequence[str], retain: tuple[str, ...],
    stops: Sequence[int], drawn: dict[str, Tensor],
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Erase in this order, and give at each stop the figures in turn and at once, and the relapse."""
    concepts = [Concept(name, ANCHORS[kind], kind) for name in order]
    so_far: Edit | None = None
    own: list[Tensor] = []
    kept = torch.cat([drawn[name] for name in retain])
    began = time.monotonic()
    for number, concept in enumerate(concepts[: max(stops)], 1):
        so_far = add(judge.model, method, Problem((concept,), retain), so_far)
        own.append(judge.see([concept.name], so_far))
        if number not in stops:
            continue
        names, seconds = list(order[:number]), round(time.monotonic() - began, 1)
        there = torch.cat([drawn[name] for name in names])
        at_once = expunge.erase(judge.model, Problem(tuple(concepts[:number]), retain), method)
        found: dict[str, Any] = {"seconds with images": seconds}
        for title, edit in (("in turn", so_far), ("at once", at_once)):
            seen = judge.see(names, edit)
            efficacy = 1 - share(seen.flatten(), there)
            specificity = share(judge.see(retain, edit).flatten(), kept)
            h = 2 * efficacy * specificity / max(efficacy + specificity, 1e-9)
            found[title] = {
                "H_c": round(h, 4),
                "efficacy": round(efficacy, 4),
                "specificity": specificity,
            }
            if title == "in turn":
                right_after = share(torch.cat(own).flatten(), there)
                found["relapse"] = round(share(seen.flatten(), there) - right_after, 4)
        yield number, found


def main() -> None:
    """Erase in random orders by each method, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=["uce", "speed", "sluice"], metavar="METHOD[:PRESET]"
    )
    parser.add_argument("--kind", default="identity", choices=list(ANCHORS))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 10, 50, 100])
    parser.add_argument("--orders", type=int, default=1, help="how many random orders")
    parser.add_argument(
        "--templates", type=int, default=2, help="how many of the suite's, an image each"
    )
    parser.add_argument("--retain", type=int, default=100, help="how many names are retained")
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    to = options.to or HERE / "results" / "ours" / f"requests-{options.kind}.json"
    model, suite = expunge.load("miniature"), Suite.read(options.kind, "miniature")
    remember_text(model)
    templates, autocast = suite.templates["erased"][: options.templates], read_autocast("auto")
    judge = Judge(model, templates, MiniatureRecogniser(), autocast)
    retain = tuple(suite.retain[: options.retain])
    erase = list(suite.erase[: max(options.requests)])
    settings = {
        "model sha256": hash_for_images(model),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "requests": options.requests,
        "templates": options.templates,
        "retained": len(retain),
    }
    record: dict[str, Any] = {**settings, "methods": {}}
    if to.is_file():
        found = json.loads(to.read_text(encoding="utf-8"))
        record = found if all(found.get(key) == value for key, value in settings.items()) else record
    names = [*erase, *retain]
    drawn = dict(zip(names, judge.see(names), strict=True))
    record["the original draws"] = {
        "erased": round(float(torch.stack([drawn[name] for name in erase]).mean()), 4),
        "retained": round(float(torch.stack([drawn[name] for name in retain]).mean()), 4),
    }
    for asked in options.methods:
        title, _, preset = asked.partition(":")
        cls = registry.get("methods", title)
        method = cls.preset(preset) if preset else cls()
        for order in range(options.orders):
            rows = record["methods"].setdefault(asked, {}).setdefault(str(order), {})
            if all(str(number) in rows for number in options.requests):
                continue
            shuffled = random.Random(order).sample(erase, len(erase))
            given = (judge, method, options.kind, shuffled, retain, options.requests, drawn)
            for number, found in run(*given):
                rows[str(number)] = found
                print(asked, number, found, flush=True)
                with replacing(to) as file:
                    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
