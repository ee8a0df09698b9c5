"""Why textual inversion gets past ACE's gates: how far they open on the word that was learnt.

For each word the edit of `experiments/ace/objects.toml` (made if it is not there) is attacked at the
object suite's budgets, and the widest gate is read on the word itself, the end token and the padding, as
in the plain prompt. `moved` is the mean over tokens of how far the edit moves one, as a share of its
norm. Writes `experiments/results/ace/inversion.json`.

    python experiments/archive/ace_inversion.py [--words airplane cat]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Probe
from expunge.base.files import replacing
from expunge.changes import Gated
from expunge.edit import Edit
from expunge.evaluation.attack_budgets import read_ladder
from expunge.evaluation.experiment import Experiment
from expunge.runtime.context import RunContext
from expunge.text import Text

HERE = Path(__file__).parents[1]


@torch.no_grad()
def opened(change: Gated, text: Text) -> dict[str, float]:
    """The widest gate on each part of the first prompt, and how far its tokens are moved."""
    e = text.embeddings[:1]
    widest, last = change.gates(e)[0].amax(-1), int(text.content_mask[0].sum())
    moved = (change.change_input(e) - e).norm(dim=-1) / e.norm(dim=-1)
    parts = {"word": widest[last], "end": widest[last + 1], "padding": widest[last + 2 :].max()}
    return {name: round(float(x), 3) for name, x in {**parts, "moved": moved[:, 1:].mean()}.items()}


def main() -> None:
    """Attack, read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--words", nargs="+", default=["airplane", "cat"])
    options = parser.parse_args()
    experiment, model = Experiment.read(HERE / "ace" / "objects.toml"), expunge.load("emoji")
    methods = tuple(one for one in experiment.methods if one["name"] == "ace")
    (suite,) = experiment.suites
    record: dict[str, Any] = {}
    for job in dataclasses.replace(experiment, methods=methods).jobs():
        word = job.problem.erase[0].name
        if word not in options.words:
            continue
        edit = job.run(model, HERE / "ace.work" / "objects" / "edits").edit
        assert isinstance(edit, Edit)
        (change,) = edit.changes
        assert isinstance(change, Gated)
        probe = Probe.of(f"a photo of the {word}", 1, 7000)
        record[word] = {"the prompt": opened(change, model.encode(probe.prompts))}
        for budget, attack in read_ladder(suite, "inversion").rungs.items():
            text = attack.run(model, edit, probe, RunContext()).text
            assert text is not None
            record[word][budget] = opened(change, text)
        record[word]["edit"] = edit.hash
        print(word, json.dumps(record[word]), flush=True)
    with replacing(HERE / "results" / "ace" / "inversion.json") as file:
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


if __name__ == "__main__":
    main()
