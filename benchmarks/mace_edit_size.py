"""How large MACE's edits of many flags are, saved: 1, 10 and 100 names on the emoji model.

All three stages, with two images and two steps of training a concept: an edit's size hangs on
neither. The shipped model knows forty flags; the other names are words to it like any others.
Writes `benchmarks/results/mace_edit_size.json`. To reach: 8 MB for a hundred.

    python benchmarks/mace_edit_size.py [--concepts 1 10 100]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import expunge
from expunge import Concept, Problem
from expunge.base.files import replacing
from expunge.evaluation.suite import Suite
from expunge.methods.mace import MACE


def main() -> None:
    """Erase, save, weigh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent / "results" / "mace_edit_size.json"
    )
    options = parser.parse_args()
    model, suite = expunge.load("emoji"), Suite.read("identity", "emoji")
    names = [concept.words for concept in suite.concepts]
    method = MACE.preset("emoji", max_train_steps=2, num_images=2, num_inference_steps=2, masks="none")
    rows = []
    for n in options.concepts:
        problem = Problem(tuple(Concept(name, "a flag", "identity") for name in names[:n]))
        edit = expunge.erase(model, problem, method)
        parts: dict[str, int] = {}
        for change in edit.changes:
            size = sum(tensor.numel() * tensor.itemsize for tensor in change.tensors.values())
            parts[change.kind] = parts.get(change.kind, 0) + size
        with tempfile.TemporaryDirectory() as folder:
            edit.save(file := Path(folder) / "edit.safetensors")
            bytes_ = file.stat().st_size
        rows.append(
            {
                "concepts": n,
                "MB": round(bytes_ / 1e6, 3),
                "of which": {kind: round(size / 1e6, 3) for kind, size in parts.items()},
            }
        )
        print(rows[-1], flush=True)
    versions = {name: version(name) for name in ("expunge", "torch", "diffusers")}
    with replacing(options.to) as file:
        file.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
