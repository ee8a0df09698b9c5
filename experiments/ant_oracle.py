"""What ANT's objective asks for, drawn as if it had been learnt perfectly.

No training: while the original model draws a word, its prediction is replaced by the objective's
target, ε₀(∅) − η (ε₀(c) − ε₀(∅)), from t' on. What is found in the pictures then is where training
leads at the best: for each t' and η, how often the word is still seen, and how often the picture is a
muddle. The words are those of `experiments/tune/many.toml`, which no suite reports. Writes
`experiments/results/ant_oracle.json`.

    python experiments/ant_oracle.py [--each 4]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tune import many, suite

import expunge
from expunge import Model, Probe
from expunge.emoji.detector import Detector
from expunge.files import replacing
from expunge.model import Text

TURNS = (-99.0, -5.0, -3.0, -2.0, -1.0)
ETAS = (0.0, 0.25, 0.5, 1.0, 2.0)


def steered(model: Model, turn: float, eta: float) -> Any:
    """In place of `model._guided`: the original's predictions, or the objective's where t ≤ t'."""
    level = model.log_snr()

    def predict(latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        empty, prompt = model.predict(latents, t, text).chunk(2)
        late = float(level[int(t)]) >= turn
        return torch.cat([empty, empty - eta * (prompt - empty) if late else prompt])

    return predict


def main() -> None:
    """Draw, look, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="pictures of each word")
    each = parser.parse_args().each
    model, detector = expunge.load("emoji"), Detector.load()
    concepts = suite("many").concepts
    words = {c.name: c.labels for c in concepts if c.name in [e.name for e in many()[0].erase]}
    prompts = [f"a photo of the {word}" for word in words for _ in range(each)]
    wanted = [labels for labels in words.values() for _ in range(each)]
    probe = Probe(tuple(prompts), tuple(range(len(prompts))))
    rows: list[dict[str, Any]] = []

    def look(title: dict[str, float]) -> None:
        found = detector(model.draw(probe, batch_size=64))
        seen = [label in labels for label, labels in zip(found.top(), wanted, strict=True)]
        row = {**title, "seen": sum(seen) / len(seen), "muddle": float(found.broken().float().mean())}
        rows.append(row)
        print({key: round(value, 3) for key, value in row.items()}, flush=True)

    with model.autocasting(torch.bfloat16):
        look({"original": 1.0})
        for turn in TURNS:
            for eta in ETAS:
                model._guided = steered(model, turn, eta)  # type: ignore[attr-defined]
                look({"turn": turn, "eta": eta})
    file = Path(__file__).parent / "results" / "ant_oracle.json"
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"pictures": len(prompts), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
