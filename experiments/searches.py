"""Do searches over real words work? Their control: ESD on the cross-attentions, which nobody defended.

ESD's preset for the shipped model trains nearly all of the denoiser. This one is the paper's "x", short
enough that other words are still drawn: the concept is gone from its own prompt, and no more was done.
The search must bring it back, and must find words for the original, too. Writes
`results/searches-quick.json` word by word and budget by budget, and goes on from there.

    python experiments/searches.py [--words airplane cat]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Concept, Edit, Probe, Problem
from expunge.attacks.token_search import TokenSearch
from expunge.base import registry
from expunge.base.files import replacing
from expunge.evaluation.measure import make_metric
from expunge.metric import Classifier
from expunge.model import Model
from expunge.runtime.context import RunContext

HERE = Path(__file__).parent
IMAGES = 6
BUDGETS = (64, 256)
OTHERS = ("bird", "dog")


def count_seen(model: Model, probe: Probe, word: str, judge: Classifier) -> int:
    """Return in how many of a probe's images a word is recognised."""
    images = model.draw(probe)
    rows = judge.measure(images, list(probe.prompts))
    return int((judge.score(rows, (word,), (), "best") > 0.5).sum())


def main() -> None:
    """Erase, search, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--words", nargs="+", default=["airplane", "cat"])
    parser.add_argument("--work", type=Path, default=HERE / "searches.work")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "searches-quick.json")
    options = parser.parse_args()
    model, judge = expunge.load("emoji"), make_metric("detector", {})
    assert isinstance(judge, Classifier)
    preset = registry.get("methods", "esd").preset("emoji-style")
    method = dataclasses.replace(preset, max_train_steps=60, samples=1, learning_rate=5e-5)
    record: dict[str, Any] = {"images": IMAGES, "method": dataclasses.asdict(method), "words": {}}
    if options.to.is_file():
        record = json.loads(options.to.read_text(encoding="utf-8"))
    for word in options.words:
        file = options.work / f"esd-x-{word}.safetensors"
        if not file.is_file():
            expunge.erase(model, Problem((Concept(word),)), method).save(file)
        edit, probe = Edit.load(file), Probe.of(f"a photo of the {word}", n=IMAGES)
        with model.autocasting(torch.bfloat16), model.using(edit):
            others = {w: Probe.of(f"a photo of the {w}", n=IMAGES) for w in OTHERS}
            one = record["words"].setdefault(word, {"searches": []})
            one["unattacked"] = count_seen(model, probe, word, judge)
            one["others"] = {w: count_seen(model, p, w, judge) for w, p in others.items()}
        for queries in BUDGETS:
            for name, attacked in (
                ("esd-x", edit),
                ("original", dataclasses.replace(edit, changes=())),
            ):
                if any((s["of"], s["budget"]) == (name, queries) for s in one["searches"]):
                    continue
                run = RunContext(0, folder=options.work / name / word)
                with model.autocasting(torch.bfloat16):
                    found = TokenSearch(queries=queries).run(model, attacked, probe, run)
                    with model.using(attacked):
                        seen = count_seen(model, found, word, judge)
                result = {"of": name, "budget": queries, "seen": seen, **run.findings[0]}
                one["searches"].append(result)
                print(json.dumps({"word": word, **one["searches"][-1]}), flush=True)
                with replacing(options.to) as out:
                    out.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
