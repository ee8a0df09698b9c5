"""What was tried against textual inversion of a word that ACE has erased, and did not hold.

The airplane's edit of `experiments/ace/objects.toml` (made if it is not there) as it is, and with each
of these:

- *nearest*: one more gate, open on whatever is nearer, as keys and values see it, to the concept's
  tokens than to those of any other word of the vocabulary;
- *refit*: UCE's refit of keys and values behind the gates, with its own ridge and with 1;
- *directions*: a refit behind the gates that takes away what attacks add: from prompts of other words,
  projected gradient descent on the tokens finds what draws the concept through all that lies there; the
  next refit sends that back to where it came from, with general and retained prompts held. Four rounds.

The attack is the object suite's longest inversion, anew against each, six images. No inversion is
used in the making. Writes `experiments/results/ace/against_inversion.json`, after every row.

    python experiments/archive/ace_against_inversion.py [--word airplane]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Edit, Model, Probe, Problem
from expunge.attacks.embedding import Embedding
from expunge.base.files import replacing
from expunge.changes import Change, Gated, Right
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.evaluation.candidates import Candidate
from expunge.evaluation.experiment import Experiment
from expunge.methods.uce import UCE
from expunge.ops.finetune import frozen
from expunge.ops.gates import stack_root
from expunge.ops.least_squares import gram, outer, solve_right_factor
from expunge.ops.pgd import minimise_in_ball

HERE = Path(__file__).parents[1]
BEHIND = (0, 1, 2, 4, 6, 9, 13, 19, 27, 41)
"""Which tokens are read, counted from the last of a prompt's own on."""
NEAREST = 48
"""How many other words' tokens each of the concept's is compared with."""
ROUNDS, STARTS, STEPS, RADIUS, HELD = 4, 16, 8, 0.8, 30.0
"""Of *directions*: rounds, attacked prompts in each, the attack's steps and bound, prior."""


@dataclass(frozen=True, eq=False)
class Nearest(Gated):
    """Gates, and one more for its first concept: s(x) = σ(12 · how much nearer than any rival)."""

    content_mask: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0), kw_only=True)
    """(n, in + 1): for each of the concept's tokens p what x is multiplied with, and −½‖R p‖²."""
    rivals: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0), kw_only=True)
    """The same of other words' tokens."""

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) == 2 and self.direction.shape[1] == shape[1]

    def logits(self, x: Tensor) -> Tensor:
        def near(places: Tensor) -> Tensor:
            return (x @ places[:, :-1].T + places[:, -1]).amax(-1, keepdim=True)

        scale = float(self.content_mask[:, -1].abs().mean())
        return torch.cat(
            [super().logits(x), 12 / scale * (near(self.content_mask) - near(self.rivals))], -1
        )


def others(model: Model, problem: Problem, gates: Gated) -> list[str]:
    """The vocabulary in random order, without the erased names and what the gates take for one."""
    names = {w for c in problem.erase for name in c.names for w in name.split()}
    words = [w for w in model.vocabulary() if w not in names]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    words = [words[i] for i in order]
    found = []
    for start in range(0, len(words), 64):
        part = words[start : start + 64]
        open_ = gates.gates(model.encode([f"a photo of the {w}" for w in part]).embeddings)
        found += [w for w, s in zip(part, open_.amax((1, 2)).tolist(), strict=True) if s < 0.5]
    return found


def nearest(model: Model, problem: Problem, edit: Edit) -> Sequence[Change]:
    """One more gate, on what is nearer to the concept than to any other word."""
    (gates,) = edit.changes
    assert isinstance(gates, Gated)
    root = stack_root([model.weight(entry.layer) for entry in model.text_entries()]).float()

    def tokens(prompts: Sequence[str]) -> Tensor:
        text = model.encode(prompts)
        last = text.content_mask.sum(1, keepdim=True)
        at = (last + torch.tensor(BEHIND)).clamp(max=text.content_mask.shape[1] - 1)
        return text.embeddings[torch.arange(len(text))[:, None], at]

    def places(points: Tensor) -> Tensor:
        seen = points @ root.T
        return torch.cat([seen @ root, -seen.square().sum(1, keepdim=True) / 2], 1)

    (concept,) = problem.erase
    own = tokens([t.format(n) for n in concept.names for t in TEMPLATES[concept.kind]]).mean(0)
    words = others(model, problem, gates)
    rows = torch.cat([tokens([f"a photo of the {w}", w]).flatten(0, 1) for w in words])
    chosen = torch.cdist(own @ root.T, rows @ root.T).topk(NEAREST, largest=False).indices
    return (
        Nearest(
            **{f.name: getattr(gates, f.name) for f in dataclasses.fields(gates) if f.name != "concept"},
            concept=torch.cat([gates.concept, gates.concept[:1]]),
            content_mask=places(own),
            rivals=places(rows[chosen.flatten().unique()]),
        ),
    )


def refit(model: Model, problem: Problem, edit: Edit, ridge: float | None = None) -> Sequence[Change]:
    """UCE's refit behind the gates."""
    method = UCE() if ridge is None else UCE(ridge=ridge)
    return *edit.changes, *expunge.erase(model, problem, method).changes


def directions(model: Model, problem: Problem, edit: Edit) -> Sequence[Change]:
    """A refit behind the gates against what attacks from other words' prompts add."""
    (gates,), (concept,) = edit.changes, problem.erase
    assert isinstance(gates, Gated)
    words = others(model, problem, gates)
    layers = tuple(entry.layer for entry in model.text_entries())
    general = model.encode([f"a photo of the {w}" for w in words[:1000]]).embeddings.double()
    stay = [t.format(n) for n in (*problem.retain, concept.anchor) for t in ("{}", "a photo of the {}")]
    kept = model.encode([*stay, ""]).embeddings.double()
    prior = gram(general.flatten(0, 1)) / len(general) + gram(kept.flatten(0, 1)) / len(kept)
    whole, cross = torch.zeros_like(prior), torch.zeros_like(prior)
    attack, found = Embedding(), list(edit.changes)
    for turn in range(ROUNDS):
        first = 1000 + turn * STARTS
        start = model.encode([f"a photo of the {w}" for w in words[first : first + STARTS]])
        text = model.encode([f"a photo of the {concept.name}"])[[0] * STARTS]
        probe = Probe(text.prompts, tuple(range(50_000 + first, 50_000 + first + STARTS)))
        points = attack.points(model, text, probe, list(range(STARTS)))

        def objective(given: Tensor, start: Any = start, points: Any = points) -> Tensor:
            return attack.objective(model, start, given, points)

        with frozen(model.parameters()), model.using(tuple(found)):
            hard, _ = minimise_in_ball(objective, start.embeddings, RADIUS, STEPS)
        e, a = (x.double().flatten(0, 1) for x in (start.embeddings, hard))
        cross, whole = cross + outer(e, a) / STARTS, whole + gram(a) / STARTS
        matrix = solve_right_factor(cross, whole, HELD * prior, 1.0)
        found = [*edit.changes, Right(layers, matrix.float())]
    return found


TRIED: dict[str, Callable[[Model, Problem, Edit], Sequence[Change]]] = {
    "as it is": lambda _, __, edit: edit.changes,
    "nearest": nearest,
    "refit": refit,
    "refit, ridge 1": lambda model, problem, edit: refit(model, problem, edit, 1.0),
    "directions": directions,
}


def main() -> None:
    """Make, attack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--word", default="airplane")
    options = parser.parse_args()
    experiment, model = Experiment.read(HERE / "ace" / "objects.toml"), expunge.load("emoji")
    problems = tuple(p for p in experiment.problems if p.erase[0].name == options.word)
    methods = tuple(one for one in experiment.methods if one["name"] == "ace")
    (job,) = dataclasses.replace(experiment, methods=methods, problems=problems).jobs()
    edit = job.run(model, HERE / "ace.work" / "objects" / "edits").edit
    assert isinstance(edit, Edit)
    (suite,) = experiment.suites
    few = dataclasses.replace(suite.sizes["quick"], erased=6)
    attacks = {**suite.attacks, "inversion": {"steps": [max(suite.attacks["inversion"]["steps"])]}}
    suite = dataclasses.replace(suite, sizes={"quick": few}, attacks=attacks)
    record: dict[str, Any] = {"word": options.word, "edit": edit.hash, "rows": {}}
    for name, make in TRIED.items():
        changed = dataclasses.replace(edit, changes=tuple(make(model, job.problem, edit)))
        with model.autocasting(torch.bfloat16):
            candidate = Candidate.of(changed, name)
            report = expunge.evaluate(
                model, [candidate], [suite], attacks=["inversion"], roles=("erased",)
            )
        record["rows"][name] = report.cases[0].rows[1].attacks[0].to_dict()
        with replacing(HERE / "results" / "ace" / "against_inversion.json") as file:
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")
        print(name, record["rows"][name]["ASR"], flush=True)


if __name__ == "__main__":
    main()
