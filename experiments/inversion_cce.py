"""Does the ladder `inversion:cce` work, and what does it cost: three words, with its positive control.

A word is learnt against an edit of UCE, and against an edit that changes nothing: where the original
itself does not draw the concept of the learnt word, the attack was too weak to be counted (80 % is
asked). Batch and images are those of Circumventing Concept Erasure (Pham et al., ICLR 2024), the steps
as few as asked: its 5,000 take 33 times as long as 150. Writes `results/inversion_cce.json`.

    python experiments/inversion_cce.py [--steps 150] [--words airplane cat ship]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Edit
from expunge.attacks.inversion import Inversion
from expunge.base.files import replacing
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.measure import make_metric
from expunge.evaluation.suite import Suite
from expunge.fingerprint import hash_for_images
from expunge.metric import Classifier
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext

HERE = Path(__file__).parent


def shares(model: Model, edit: Edit, suite: Suite, word: str, probe: Probe) -> dict[str, float]:
    """The shares of images in which the word is seen, and of broken ones."""
    classifier, concept = (
        make_metric(suite.judge, suite.options.get(suite.judge, {})),
        suite.find_concept(word),
    )
    if not isinstance(classifier, Classifier) or concept is None:
        raise TypeError("the suite has no classifier, or not this word")
    with model.using(edit), model.autocasting(torch.bfloat16):
        images = model.draw(probe)
    rows = classifier.measure(images, probe.prompts)
    broken = classifier.find_broken(rows)
    seen = classifier.score(rows, concept.labels, concept.near, suite.question).nan_to_num(0)
    seen = seen.masked_fill(broken, 0.0)
    return {"seen": float(seen.mean()), "unrecognisable": float(broken.float().mean())}


def main() -> None:
    """Erase, attack, attack the original, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--words", nargs="+", default=["airplane", "cat", "ship"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=12, help="judged images of each word")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "inversion_cce.json")
    options = parser.parse_args()
    model = expunge.load("emoji")
    experiment = Experiment.read(HERE / "mace" / "objects.toml")
    (suite,) = experiment.suites
    ladder = {**Inversion.ladders["cce"], **suite.attacks.get("inversion:cce", {})}
    attack = Inversion(**{**ladder, "steps": options.steps})
    record: dict[str, Any] = {
        "model sha256": hash_for_images(model),
        "attack": dataclasses.asdict(attack),
        "steps of the whole ladder": ladder["steps"],
        "images": options.images,
        "words": {},
    }
    for problem in experiment.problems:
        word = problem.erase[0].name
        if word not in options.words:
            continue
        made = expunge.erase(model, problem, "uce")
        (prompt,) = {cell.prompt for cell in suite.cells([word], full=False) if cell.role == "erased"}
        probe = Probe((prompt,) * options.images, tuple(range(options.images)))
        row = record["words"][word] = {}
        for name, edit in (("uce", made), ("original", Edit((), made.record))):
            before = shares(model, edit, suite, word, probe)
            start = time.process_time()
            attacked = attack.run(model, edit, probe, RunContext(0))
            seconds = (time.process_time() - start) / options.steps
            after = shares(model, edit, suite, word, attacked)
            row[name] = {"unattacked": before, "attacked": after, "processor seconds a step": seconds}
            print(word, name, row[name], flush=True)
            with replacing(options.to) as file:
                file.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
