"""Keep what `expunge run` came to: its numbers beside the experiments, its images in the docs.

Copies `results.json` to `experiments/results/GROUP/NAME.json`, of quick size to `NAME-quick.json`, and
draws (from the cache) a band for each edit, before above after, to `docs/images/GROUP-NAME.png`: the
erased, its synonyms, and what stays.

    expunge run experiments/mace/objects.toml --full --autocast bfloat16 -o objects.work
    python experiments/keep.py experiments/mace/objects.toml objects.work
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import Edit, Model
from expunge.base.files import replacing
from expunge.base.image_files import save_image
from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet
from expunge.evaluation.evaluate import restrict_to_judge
from expunge.evaluation.experiment import Experiment, Job
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.evaluation.measure import make_metric, read_options
from expunge.evaluation.results import read_results
from expunge.evaluation.sample import Sample, lay_out
from expunge.evaluation.suite import Suite

HERE = Path(__file__).parent
SHOWN = {"erased": 3, "synonyms": 3, "retained": 3}
"""Images of each role in a band; twice as many of the erased where they are many."""


def chosen(samples: Sequence[Sample], role: str, n: int) -> list[Request]:
    """The first images of a role, from as many of its prompts as there are."""
    rows = [sample.requests for sample in samples if sample.cell.role == role]
    turns = itertools.zip_longest(*(rows[i] for i in _spread(len(rows), n)))
    return [one for turn in turns for one in turn if one is not None][:n]


def _spread(length: int, n: int) -> Iterator[int]:
    """At most n places, evenly taken."""
    return iter(dict.fromkeys(i * length // n for i in range(n if length else 0)))


def bands(
    model: Model, suite: Suite, jobs: Sequence[Job], folder: Path, results: Any
) -> Iterator[Strip]:
    """A band for each set of erased concepts, with a row for the original and every method."""
    cache = Cache()
    for problem in dict.fromkeys(job.problem for job in jobs):
        names = [concept.name for concept in problem.erase]
        cells = suite.cells(names, full=results["size"] == "full")
        samples = lay_out(model, cells, suite.num_inference_steps, suite.guidance_scale)
        many = len(names) > 1
        shown = [
            one
            for role, n in SHOWN.items()
            for one in chosen(samples, role, 2 * n if many and role == "erased" else n)
        ]
        rows = [("before", cache.draw(Source(model), shown))]
        for job in jobs:
            if job.problem == problem:
                edit = Edit.load(folder / "edits" / job.file(model))
                name = f"{job.title or job.method_name}: {_figure(results, job.name, suite.score)}"
                rows.append((name, cache.draw(Source(model, (edit,)), shown)))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        title = f"erased: {', '.join(names[:3])}{more}"
        captions = [_short(one) for one in shown]
        yield Strip(title, captions, [(n, list(p)) for n, p in rows], f"{suite.score} at the left")


def _figure(results: Any, name: str, score: str) -> str:
    """The H of a row, in per cent."""
    rows = [row for case in results["cases"] for row in case["rows"] if row["name"] == name]
    (h,) = (row[score] for row in rows)
    return f"{100 * h['value']:.1f}"


def _short(request: Request) -> str:
    """What tells a prompt from the others."""
    return re.sub(
        r"^(an? (photo|picture|drawing|oil painting) of )?the (flag of (the )?)?", "", request.prompt
    )


def main() -> None:
    """Copy the numbers, draw the bands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("folder", type=Path, help="what `expunge run` wrote to")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--numbers-alone", action="store_true", help="draw nothing")
    options = parser.parse_args()
    experiment = Experiment.read(options.experiment)
    model = expunge.load(experiment.model)
    results = read_results(options.folder)
    group, name = options.experiment.parent.name, options.experiment.stem
    name += "-quick" * (results["size"] == "quick")
    with replacing(options.results / group / f"{name}.json") as file:
        shutil.copyfile(options.folder / "results.json", file)
    if options.numbers_alone:
        return
    suite = experiment.suites[0]
    suite = restrict_to_judge(suite, make_metric(suite.judge, read_options(suite, suite.judge)))
    # What has been made so far: a run may have been stopped.
    made = [job for job in experiment.jobs() if (options.folder / "edits" / job.file(model)).is_file()]
    rounded = results["provenance"]["sampler"].get("autocast")
    with model.autocasting(getattr(torch, rounded) if rounded else None):
        found = list(bands(model, suite, made, options.folder, results))
    save_image(draw_contact_sheet(found, 96), options.images / f"{group}-{name}.png")


if __name__ == "__main__":
    main()
