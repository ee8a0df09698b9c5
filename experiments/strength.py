"""What an edit of weights does at strengths of 0.5 to 2, as programs that load it as a LoRA set it.

At strength s each changed weight is W + s ΔW, whether an edit is applied here or its LoRA elsewhere
(`tests/test_lora_programs.py`). Three words in turn, each erased by methods whose edits leave as a LoRA;
images of the word, and of nine others that the method was told to keep, at each strength.

Writes `experiments/results/strength.json`, and prints a table: how far the edit moved the word toward
its anchor, in what share of the images the word is still seen, in what share the others are, and what
share of all images is unrecognisable.

    python experiments/strength.py [--methods uce mace] [--images 4]
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import expunge
from expunge import Concept, Edit, Probe, Problem
from expunge.base import registry
from expunge.base.fields import build
from expunge.base.files import replacing
from expunge.erasing.moved_share import measure_moved
from expunge.method import Method
from expunge.metrics.detector import EmojiDetector
from expunge.model import Model

FILE = Path(__file__).parent / "results" / "strength.json"
PROMPT = "a photo of the {}"
ERASED = {"airplane": "sky", "cat": "ground", "ship": "sea"}
KEPT = ("automobile", "bird", "deer", "dog", "frog", "horse", "truck", "airplane", "cat", "ship")
ORIGINAL = "original"
METHODS = {
    ORIGINAL: "",
    "uce": "",
    "mace": "emoji",
    "oce": "object",
    "esd": "emoji-object",
    "ant": "emoji-object",
}
STRENGTHS = (0.5, 1.0, 1.5, 2.0)


def try_method(model: Model, name: str, images: int) -> list[dict[str, Any]]:
    """Erase each word with a method, and judge the edits at each strength.

    Args:
        model: the original.
        name: the method's, or `ORIGINAL`.
        images: how many of each word.
    """
    method, detector, rows = make_method(name), EmojiDetector(), []
    for word, anchor in ERASED.items():
        kept = tuple(other for other in KEPT if other != word)
        words = [w for w in (word, *kept) for _ in range(images)]
        prompts = tuple(PROMPT.format(w) for w in words)
        probe = Probe(prompts, tuple(range(2000, 2000 + images)) * (1 + len(kept)))
        moved: list[float | None] = [None]
        strengths: tuple[float, ...] = (0.0,)
        if method is None:
            drawings = [draw(model, probe)]
        else:
            edit = expunge.erase(model, Problem((Concept(word, anchor),), kept), method)
            concept = Concept(word, anchor if method.reads_anchor else "")
            where, strengths = method.measured_in or "text", STRENGTHS
            moved = [
                measure_moved(model, edit.changes, [concept], where, s).get(word) for s in strengths
            ]
            drawings = [draw(model, probe, edit, s) for s in strengths]
        for strength, share, drawn in zip(strengths, moved, drawings, strict=True):
            seen = detector.measure(drawn, prompts)
            broken = detector.find_broken(seen).float()
            right = [
                float(detector.score(seen[i : i + images], [words[i]], (), "top1").mean())
                for i in range(0, len(words), images)
            ]
            rows.append(
                {
                    "method": name,
                    "word": word,
                    "strength": strength,
                    "moved": share,
                    "seen": right[0],
                    "kept": sum(right[1:]) / len(kept),
                    "unrecognisable": {
                        "erased": float(broken[:images].mean()),
                        "kept": float(broken[images:].mean()),
                    },
                    "images": {"erased": images, "kept": images * len(kept)},
                }
            )
    return rows


def make_method(name: str) -> Method | None:
    """Return a method with its preset; None for the original."""
    if name == ORIGINAL:
        return None
    cls = registry.get("methods", name)
    preset = cls.presets[METHODS[name]] if METHODS[name] else {}
    made: Method = build(cls, {key: value for key, value in preset.items() if key != "about"})
    return made


def draw(model: Model, probe: Probe, edit: Edit | None = None, strength: float = 1.0) -> Tensor:
    """Draw a probe in bfloat16, with an edit at a strength, or from the model as it is."""
    with (
        model.using(edit, strength=strength) if edit else nullcontext(),
        model.autocasting(torch.bfloat16),
    ):
        return model.draw(probe)


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Return a table: a row for each method and strength, means over the words."""
    lines = ["| method | strength | moved | still seen | kept | muddle, erased | muddle, kept |"]
    lines.append("|" + "---|" * 7)
    for name in dict.fromkeys(row["method"] for row in rows):
        for strength in sorted({row["strength"] for row in rows if row["method"] == name}):
            some = [r for r in rows if (r["method"], r["strength"]) == (name, strength)]
            figures = [
                [r["moved"] for r in some if r["moved"] is not None],
                [r["seen"] for r in some],
                [r["kept"] for r in some],
                [r["unrecognisable"]["erased"] for r in some],
                [r["unrecognisable"]["kept"] for r in some],
            ]
            cells = [f"{100 * sum(f) / len(f):.0f}" if f else "–" for f in figures]
            lines.append(f"| {name} | {strength:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run it, write after each method, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    rows = json.loads(FILE.read_text("utf8")) if FILE.exists() else []
    model = expunge.load("emoji")
    for name in options.methods:
        rows = [row for row in rows if row["method"] != name] + try_method(model, name, options.images)
        with replacing(FILE) as file:
            file.write_text(json.dumps(rows, indent=1) + "\n", "utf8")
    print(tabulate(rows))


if __name__ == "__main__":
    main()
