"""What MACE's closed forms do by themselves, as ridge and prior grow: no images, seconds.

The task "many" of `tune.py`, in wordings that the method does not train on. For each pair of
values, what *refine* leaves of the erased (‖M e − g‖ / ‖e − g‖, g where the anchor's prompt goes),
and how far it moves the retained and captions of the prior (‖M e − e‖ / ‖e − g‖, with the mean
‖e − g‖ of the erased); and both again after *fuse*. Means over the end and padding tokens, which
carry the prompt. Writes `experiments/results/mace_ridge.json`.

    python experiments/archive/mace_ridge.py
"""

from __future__ import annotations

import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import expunge
from expunge import Model
from expunge.base.files import replacing
from expunge.erasing.caption_gram import read_captions
from expunge.methods.mace import MACE
from expunge.methods.mace.prompt_sums import PromptSums, group_by_anchor
from expunge.runtime.context import RunContext

sys.path.insert(0, str(Path(__file__).parents[1]))  # the experiments that are kept alive

from tune import many

WORDINGS = ("a view of the {}", "a beautiful image of the {}", "a shot of the {}")
RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
PRIORS = (0.0, 1.0, 10.0, 30.0, 100.0, 1000.0)
DOMAINS = (1.0, 10.0, 100.0)


def end_states(model: Model, prompts: list[str], count: int = 60) -> Tensor:
    """The last `count` tokens of every prompt, (n, count, width): the padding, and no word."""
    return model.encode(prompts).embeddings[:, -count:].double()


def main() -> None:
    """Every pair, printed as it goes."""
    model, (problem,) = expunge.load("emoji"), many()

    def said(names: list[str]) -> Tensor:
        return end_states(model, [wording.format(name) for name in names for wording in WORDINGS])

    erased = said([concept.name for concept in problem.erase])
    goals = said([str(concept.anchor) for concept in problem.erase])
    watched = {
        "retained": said(list(problem.retain)),
        "captions": end_states(model, list(read_captions("general")[::20])),
    }
    far = (erased - goals).norm(dim=-1).mean()

    def moved(matrix: Tensor) -> dict[str, float]:
        left = ((erased @ matrix.T - goals).norm(dim=-1) / (erased - goals).norm(dim=-1)).mean()
        drift = {name: (e @ matrix.T - e).norm(dim=-1).mean() / far for name, e in watched.items()}
        return {name: round(float(value), 3) for name, value in {"left": left, **drift}.items()}

    rows: list[dict[str, Any]] = []
    groups = group_by_anchor(model, problem)
    sums = PromptSums.of(groups)
    kept = {
        domain: MACE(refine_prior=1.0, domain_weight=domain).sum_retained(model, problem, RunContext())
        for domain in DOMAINS
    }
    for ridge, prior, domain in itertools.product(RIDGES, PRIORS, DOMAINS):
        if not prior and domain != DOMAINS[0]:
            continue
        method = MACE(ridge=ridge, refine_prior=prior, fuse_prior=prior, domain_weight=domain)
        first = method.refine(sums, kept[domain])
        second, _ = method.fuse(groups, sums, kept[domain], first, {})
        rows.append({"ridge": ridge, "prior": prior, "domain_weight": domain,
                     "refine": moved(first), "refine and fuse": moved(second)})  # fmt: skip
        print(*rows[-1].values(), flush=True)
    versions = {name: version(name) for name in ("expunge", "torch", "diffusers")}
    with replacing(Path(__file__).parents[1] / "results" / "mace_ridge.json") as file:
        file.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
