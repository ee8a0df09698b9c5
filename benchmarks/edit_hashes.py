"""One hash of an edit a method: did a change of the code change what the methods compute?

Every method of the registry erases one problem from the tests' tiny Stable Diffusion, with the tests'
rough values and one seed. A hash depends on the tensors of the edit alone, not on its record, so that it
stays through renames. The floating-point sums differ between processors and versions of torch: compare
two checkouts on one machine.

    python benchmarks/edit_hashes.py > before.txt
    git switch other; python benchmarks/edit_hashes.py | diff before.txt -
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    """Erase with every method, and print its name and hash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("methods", nargs="*", help="by default all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EXPUNGE_CACHE"] = cache  # so that no prior of another checkout is read

        import expunge
        from conftest import tiny_pipeline
        from expunge.base import registry
        from quick import quick

        warnings.simplefilter("ignore")
        concepts = (
            expunge.Concept("airplane", "sky", synonyms=("jet",)),
            expunge.Concept("art", "", kind="style"),
        )
        problem = expunge.Problem(concepts, ("ship", "bird"))
        for name in options.methods or registry.list_names("methods"):
            model = expunge.load(tiny_pipeline())
            edit = expunge.erase(model, problem, quick(name), seed=options.seed)
            print(f"{name:8} {edit.hash}", flush=True)


if __name__ == "__main__":
    main()
