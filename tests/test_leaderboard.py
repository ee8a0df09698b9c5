"""The leaderboard's script, on a tiny model and a suite of its own."""

import importlib.util
import json
from pathlib import Path

import pytest

from expunge.base.quiet import ignore_progress
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.suite import Suite
from test_report import SUITE_TEXT

SCRIPT = Path(__file__).parents[1] / "experiments" / "leaderboard.py"


@pytest.fixture(scope="module")
def board():
    import sys

    spec = importlib.util.spec_from_file_location("leaderboard", SCRIPT)
    module = sys.modules["leaderboard"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["emoji", "miniature"])
def test_every_task_has_problems_that_its_suite_knows(board, name):
    for task in board.TASKS[name]:
        suite = Suite.read(task.suite, name)
        found = board.problems(task, suite, 0)
        assert found
        for problem in found:
            erased = suite.find_erased([concept.name for concept in problem.erase])
            assert len(erased) == len(problem.erase)
            assert problem.retain
            held_out = {word for concept in erased for word in concept.synonyms}
            assert held_out.isdisjoint(name for concept in problem.erase for name in concept.names)
        assert [one.together for one in task.split()] == [(n,) for n in task.together]
        assert list(task.split([7])) == []
    words = board.TASKS[name][0], Suite.read("object", name)
    assert [len(board.problems(*words, take)) for take in (0, 2)] == [10, 2]


def test_a_suite_is_judged_kept_and_shown(board, model, tmp_path):
    (tmp_path / "own.toml").write_text(SUITE_TEXT)
    task, cache = board.Task(str(tmp_path / "own.toml"), "object"), Cache(tmp_path / "cache")

    def judge():
        return board.judge(
            model,
            task,
            ["uce"],
            full=False,
            take=1,
            folder=tmp_path / "work",
            cache=cache,
            progress=ignore_progress,
        )

    report = judge()
    drawn = cache.drawn
    assert drawn > 0
    assert (tmp_path / "work" / "quick" / "own" / "index.html").is_file()
    board.keep(tmp_path, "quick", task, report, model)
    file = tmp_path / f"leaderboard-{model.name}-quick.json"
    first = file.read_text()
    again = judge()
    board.keep(tmp_path, "quick", task, again, model)
    assert cache.drawn == drawn
    assert file.read_text() == first
    rows = json.loads(first)["suites"]["own"]["rows"]
    assert list(rows) == ["original", "uce"]
    other = json.loads(first)
    other["suites"]["own"]["rows"] = {"mace": rows["uce"], "uce": {}}
    file.write_text(json.dumps(other))
    board.keep(tmp_path, "quick", task, again, model)  # what another run has found stays
    kept = json.loads(file.read_text())["suites"]["own"]["rows"]
    assert kept == {"mace": rows["uce"], **rows}
    file.write_text(first)
    assert rows["uce"]["H_o"]["value"] == pytest.approx(report.cases[0].rows[1].h.value, abs=1e-4)
    table = board.table(tmp_path)
    assert "| method | H_o | efficacy | specificity | generality | unrecognisable |" in table
    assert f"| uce | {100 * rows['uce']['H_o']['value']:.1f} <sub>" in table


def test_the_page_is_that_of_the_results(board):
    page = (SCRIPT.parents[1] / board.PAGE).read_text("utf-8")
    assert page == board.table(SCRIPT.parent / "results")
    assert page.count("| uce |") >= 2
