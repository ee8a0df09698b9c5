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
    fields = {
        "max_train_steps": 3,
        "num_images": 1,
        "num_inference_steps": 10,
        "trajectories": 1,
        "trajectory_steps": 10,
    }
    given = ("tiny", method, way, "cpu", torch.bfloat16, fields, str(tmp_path / "work"))
    found = training_steps.run(*given)
    assert found["seconds a step"] > 0
    assert 0 < found["weights, GB"] < found["peak, GB"]
    assert torch.get_default_dtype() == torch.float32


def table(name):
    """The rows of a table of the page, between its comments."""
    page = (HERE.parent / "docs" / "notes" / "export.md").read_text()
    return page.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end")[0].splitlines()[2:]


def test_text_alone_is_as_on_the_page():
    rows = json.loads((HERE / "results" / "text_alone.json").read_text())
    pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    assert len(table("text alone")) == len(pairs) >= 2
    for (whole, alone), line in zip(pairs, table("text alone"), strict=True):
        assert (whole["read"], alone["read"]) == ("whole", "text alone")
        assert whole["edit"] == alone["edit"]
        peaks = (f"{row['peak, GB']:.1f} GB" for row in (whole, alone))
        assert line.endswith(f"| {' | '.join([whole['dtype'], *peaks])} |")


def test_true_sizes_are_those_of_the_page():
    rows = json.loads((HERE / "results" / "true_size.json").read_text())
    assert len(table("true size")) == len(rows) >= 5
    for row in rows:
        # A gated edit is exported by fitting weights to what a text encoder says, which is not here.
        seconds = (row.get(f"{part}, processor s") for part in ("closed form", "export"))
        figures = ("–" if one is None else f"{one:.0f}" for one in seconds)
        line = f"| {' | '.join(figures)} | {row['peak, GB']:.1f} GB |"
        assert any(found.endswith(line) for found in table("true size")), (row["model"], row["method"])
        assert row["peak, GB"] < 4


def test_ranks_are_those_of_the_page():
    found = json.loads((HERE / "results" / "lora_rank.json").read_text(encoding="utf-8"))
    assert len(table("lora rank")) == len(found["rank"]) >= 12
    for row, line in zip(found["rank"], table("lora rank"), strict=True):
        cells = (f"{row['erasure lost']:.2%}", f"{row['drift lost']:.1%}", f"{row['norm lost']:.0%}")
        assert line.startswith(f"| {row['edit']} | {row['rank']} ")
        assert line.endswith(f"| {row['chosen by']} | {' | '.join(cells)} |")
        if row["chosen by"] == "text" and row["rank"] >= 16:
            assert row["erasure lost"] < 0.002
    assert found["time"]["ratio"] > 2


def test_moved_shares_are_those_of_the_page():
    rows = json.loads((HERE.parent / "experiments" / "results" / "moved_share.json").read_text())
    page = (HERE.parent / "docs" / "notes" / "moved-share.md").read_text("utf-8")
    for row in rows:
        assert f"\n| {row['method']} | {row['measured in']} | " in page
    weak = [row for row in rows if row["measured in"] == "predictions" and row["share"] < 0.5]
    drawn = sum(row["seen"] * row["images"] for row in weak)
    assert f"in {drawn:.0f} of {sum(row['images'] for row in weak)} images" in page
