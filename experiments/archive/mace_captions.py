"""How far MACE's first stage moves unrelated prompts, with each source of captions for its prior.

The paper's prior is the sum over COCO's 616,767 captions. They do not ship and cannot be had here; those
that can are compared instead: our 1,040 ("general"), the tokenizer's words ("vocabulary"), and none but
what is retained (""). For the presets named after the paper, how far keys and values of prompts that
have nothing to do with the erased move, ‖W'e − We‖ / ‖We‖ over all layers and tokens, and how much of
the way to the anchor is left to the erased, at the end and padding tokens of a held-out wording. Text
alone is read: no images. Writes `experiments/results/mace_captions.json`.

    python experiments/archive/mace_captions.py
    python experiments/archive/mace_captions.py --captions coco.txt     # another source beside them
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.erasing.caption_gram import compute_prior, read_captions_for
from expunge.fingerprint import hash_for_images
from expunge.methods.mace import MACE
from expunge.methods.mace.prompt_sums import PromptSums, group_by_anchor
from expunge.runtime.context import RunContext

SOURCES = ("general", "vocabulary", "")
KEPT = tuple(f"flag of {name}" for name in ("Germany", "Spain", "Chile", "India", "Kenya", "Greece"))
FLAGS = [
    Concept(f"flag of {name}", "a flag", "identity")
    for name in (
        "France",
        "Italy",
        "Nepal",
        "Cuba",
        "Canada",
        "Japan",
        "Guinea",
        "Ireland",
        "Ukraine",
        "Niger",
    )
]
PROBLEMS = {
    "identity-1": Problem(tuple(FLAGS[:1]), KEPT),
    "identity-10": Problem(tuple(FLAGS), KEPT),
    "style": Problem((Concept("twemoji", "art", "style"),), ("noto", "fluent")),
    "explicit": Problem(
        tuple(Concept(name, "ground", "explicit") for name in ("pistol", "knife", "bomb", "axe"))
    ),
}
UNRELATED = (
    "a photo of the pizza", "a picture of the penguin", "a drawing of the guitar",
    "an oil painting of the crown", "the strawberry", "the mushroom and the bell",
    "a photo of the balloon", "a photo of the turtle", "an owl on a table", "a red bicycle",
    "someone with an umbrella at a bus stop", "a bowl of soup",
)  # fmt: skip
HELD_OUT = "a view of {}"


def main() -> None:
    """Every preset with every source, printed as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--captions", nargs="*", default=[], help="further sources, as in --captions of erase"
    )
    options = parser.parse_args()
    model = expunge.load("emoji")
    weights = torch.cat([model.weight(entry.layer).double() for entry in model.text_entries()])
    unrelated = model.encode(UNRELATED).embeddings.flatten(0, 1).double()
    there = (unrelated @ weights.T).norm(dim=1)
    every = [concept for problem in PROBLEMS.values() for concept in problem.erase]  # read once for all
    means = {
        source: compute_prior(model, read_captions_for(model, source, every)).mean
        if source
        else torch.zeros(())
        for source in (*SOURCES, *options.captions)
    }
    rows: list[dict[str, Any]] = []
    for preset, problem in PROBLEMS.items():
        sums = PromptSums.of(group_by_anchor(model, problem))
        names = [(c.name, str(c.anchor)) for c in problem.erase]
        erased, goals = (
            model.encode([HELD_OUT.format(name) for name in some]).embeddings[:, -60:].double()
            for some in zip(*names, strict=True)
        )
        for source in (*SOURCES, *options.captions):
            if not source and not problem.retain:
                continue  # no prior at all
            method = MACE.preset(preset, captions="")
            matrix = method.refine(
                sums, means[source] + method.sum_retained(model, problem, RunContext())
            )
            moved = ((unrelated @ (matrix.T - torch.eye(len(matrix)))) @ weights.T).norm(dim=1) / there
            left = (erased @ matrix.T - goals).norm(dim=-1) / (erased - goals).norm(dim=-1)
            row = {"preset": preset, "captions": source or "the retained alone", "erased": len(names),
                   "unrelated move": round(float(moved.mean()), 3),
                   "worst": round(float(moved.max()), 3),
                   "left of the erased": round(float(left.mean()), 3)}  # fmt: skip
            rows.append(row)
            print(*row.values(), sep=" | ", flush=True)
    record = {
        "not measured": "COCO's captions, the paper's: they do not ship and could not be had here",
        "rows": rows,
        "model sha256": hash_for_images(model),
        "versions": {name: version(name) for name in ("expunge", "torch", "diffusers")},
    }
    with replacing(Path(__file__).parents[1] / "results" / "mace_captions.json") as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
