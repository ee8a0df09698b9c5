"""The benchmarks that need a large machine run on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def training_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import training_steps

    yield training_steps
    for name in ("training_steps", "true_size"):
        del sys.modules[name]


@pytest.mark.parametrize("way", ["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["mace", "ant-many", "ant-one"])
def test_training_steps(training_steps, method, way, tmp_path):
    fields = {"steps": 3, "pictures": 1, "picture_steps": 10, "trajectories": 1, "trajectory_steps": 10}
    given = ("tiny", method, way, "cpu", torch.bfloat16, fields, str(tmp_path / "work"))
    found = training_steps.run(*given)
    assert found["seconds a step"] > 0
    assert 0 < found["weights, GB"] < found["peak, GB"]
    assert torch.get_default_dtype() == torch.float32


def test_true_sizes_are_those_of_the_page():
    rows = json.loads((HERE / "results" / "true_size.json").read_text())
    page = (HERE.parent / "docs" / "use-elsewhere.md").read_text()
    table = page.partition("<!-- true size -->\n")[2].partition("\n<!-- end")[0].splitlines()[2:]
    assert len(table) == len(rows) >= 5
    for row in rows:
        figures = (f"{row[f'{part}, processor s']:.0f}" for part in ("closed form", "export"))
        line = f"| {' | '.join(figures)} | {row['peak, GB']:.1f} GB |"
        assert any(found.endswith(line) for found in table), (row["model"], row["method"])
        assert row["peak, GB"] < 4
