"""What ANT's objective asks for, drawn as if it had been learnt perfectly.

No training: while the original model draws a word, its prediction is replaced by the objective's
target, ε₀(∅) − η (ε₀(c) − ε₀(∅)), from t' on. What is found in the images then is where training
leads at the best: for each t' and η, how often the word is still seen, and how often the image is a
muddle. Sixteen words of `experiments/tune/many.toml` and the foods of `experiments/tune/explicit.toml`,
where any food counts, which no suite reports; and the twenty flags and the ten words of
`experiments/ant`, from which no value was chosen. Writes `experiments/results/ant_oracle.json`.

    python experiments/archive/ant_oracle.py [--each 4] [--only "ten words"]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Model, Probe
from expunge.base.files import replacing
from expunge.emoji.detector import Detector
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.suite import Suite
from expunge.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))  # the experiments that are kept alive

from tune import many, suite

HERE = Path(__file__).parents[1]

TURNS = (-99.0, -5.0, -3.0, -2.0)
ETAS = (0.25, 1.0, 3.0)


def steered(model: Model, turn: float, eta: float) -> Any:
    """In place of `model._guided`: the original's predictions, or the objective's where t ≤ t'."""
    level = model.log_snr()

    def predict(latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        empty, prompt = model.predict(latents, t, text).chunk(2)
        late = float(level[int(t)]) >= turn
        return torch.cat([empty, empty - eta * (prompt - empty) if late else prompt])

    return predict


def words() -> dict[str, dict[str, tuple[str, ...]]]:
    """The labels that count as each word: {"objects": …, "foods": …, "flags": …, "ten words": …}."""
    objects, flags = suite("many").concepts, Suite.read("identity", "emoji").concepts
    chosen = [concept.name for concept in many()[0].erase]
    flagged = [c.name for c in Experiment.read(HERE / "ant" / "flags.toml").problems[0].erase]
    food = suite("explicit").concepts[0]
    erased = [p.erase[0].name for p in Experiment.read(HERE / "ant" / "objects.toml").problems]
    return {
        "objects": {c.name: c.labels for c in objects if c.name in chosen},
        "foods": dict.fromkeys(food.also, food.labels),
        "flags": {c.words: c.labels for c in flags if c.words in flagged},
        "ten words": {
            c.name: c.labels for c in Suite.read("object", "emoji").concepts if c.name in erased
        },
    }


def look(
    model: Model, detector: Detector, probe: Probe, wanted: list[tuple[str, ...]]
) -> dict[str, float]:
    """How often the word is seen, and a muddle, in the images of a probe."""
    what = detector(model.draw(probe, batch_size=64))
    seen = [label in those for label, those in zip(what.top(), wanted, strict=True)]
    muddle = float(what.broken().float().mean())
    return {"seen": sum(seen) / len(seen), "muddle": muddle, "n": len(seen)}


def main() -> None:
    """Draw, look, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="pictures of each word")
    parser.add_argument("--only", nargs="+", default=list(words()), choices=list(words()))
    options = parser.parse_args()
    model, detector, each = expunge.load("emoji"), Detector.load(), options.each
    file = HERE / "results" / "ant_oracle.json"
    found: dict[str, list[dict[str, float]]] = json.loads(file.read_text()) if file.is_file() else {}
    for kind in options.only:
        labels, found[kind] = words()[kind], []
        prompts = tuple(f"a photo of the {word}" for word in labels for _ in range(each))
        wanted = [those for those in labels.values() for _ in range(each)]
        probe = Probe(prompts, tuple(range(len(prompts))))
        rows = found[kind]
        with model.autocasting(torch.bfloat16):
            rows.append(look(model, detector, probe, wanted))
            for turn, eta in itertools.product(TURNS, ETAS):
                model._guided = steered(model, turn, eta)  # type: ignore[attr-defined]
                rows.append({"turn": turn, "eta": eta, **look(model, detector, probe, wanted)})
                print(kind, {key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
            del model._guided  # type: ignore[attr-defined]
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
