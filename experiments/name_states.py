"""How well one linear map can tell erased people from retained ones, word by word; no image is drawn.

Closed forms (UCE, MACE's fusion, SPEED, OCE) add one matrix to keys and values, so what they do to a
token is linear in its state. Here the best such map is solved for as MACE's fusion is, with a single
output: 1 on all tokens behind the start of an erased person's prompts, 0 on those of retained people
and of the captions (`fusion.retained_gram`). In phrasings that were not fitted it is then read at the
first word, at the last word and at the tokens behind, of erased and of retained people. `told apart`
is the probability that an erased person's state answers more than a retained one's: 1 is perfect, 0.5
is chance.

    python experiments/name_states.py   # tuning people: alone, ten beside a hundred, among a hundred
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tune import TASKS, suite

import expunge
from expunge import Model
from expunge.base.files import replacing
from expunge.erasing.concept_tokens import find_phrases
from expunge.erasing.fusion import retained_gram
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.fingerprint import hash_for_images
from expunge.ops.least_squares import gram
from expunge.runtime.context import RunContext

FILE = Path(__file__).parent / "results" / "name_states.json"
WEIGHTS = (10.0, 100.0, 1000.0)  # MACE's domain_weight
PRIOR, RIDGE = 100.0, 100.0  # MACE's fuse_prior and ridge
PLACES = ("first word", "last word", "tokens behind")


def read_states(model: Model, templates: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return all states (n, d), and those of PLACES (prompts, 3, d), of names in every template."""
    rows, places = [], []
    for name in names:
        text = model.encode([template.format(name) for template in templates])
        phrases, states = find_phrases(model, templates, text), text.embeddings.double().cpu()
        rows.append(states[:, 1:].flatten(0, 1))
        for row, phrase in enumerate(phrases.cpu()):
            words = states[row, phrase]
            behind = states[row, int(text.first_end[row]) :].mean(0)
            places.append(torch.stack([words[0], words[-1], behind]))
    return torch.cat(rows), torch.stack(places)


def told_apart(erased: Tensor, retained: Tensor) -> float:
    """Return the probability that one of `erased` is above one of `retained`."""
    return float((erased[:, None] > retained[None]).double().mean())


def main() -> None:
    model = expunge.load("miniature")
    phrasings = suite("people").templates["erased"]
    record: dict[str, object] = {"model sha256": hash_for_images(model), "prior": PRIOR, "ridge": RIDGE}
    for task in ("people", "people-10", "people-100"):
        (problem,) = TASKS[task]()
        erase = [concept.name for concept in problem.erase]
        erased, _ = read_states(model, TEMPLATES["identity"], erase)
        # Always people of one list: twenty erased, or the ten there are, and twenty retained.
        asked = {"erased": erase[:20], "retained": list(problem.retain)[:20]}
        judged = {role: read_states(model, phrasings, names)[1] for role, names in asked.items()}
        for weight in WEIGHTS:
            kept = retained_gram(
                model, problem, RunContext(), captions_from="general", weighs=True, domain_weight=weight
            )
            whole = gram(erased) + PRIOR * kept + RIDGE * torch.eye(len(kept), dtype=torch.float64)
            answer = torch.linalg.solve(whole, erased.sum(0))
            seen = {role: states @ answer for role, states in judged.items()}
            found = {
                place: {
                    "erased": round(float(seen["erased"][:, i].mean()), 3),
                    "retained": round(float(seen["retained"][:, i].mean()), 3),
                    "told apart": round(told_apart(seen["erased"][:, i], seen["retained"][:, i]), 3),
                }
                for i, place in enumerate(PLACES)
            }
            record[f"{task}, domain_weight {weight:g}"] = found
            print(task, weight, found, flush=True)
    with replacing(FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
