"""How far an edit moved its concepts, in prompts it was not made with; what is said of a weak one."""

from types import SimpleNamespace

import pytest
import torch

import expunge
from expunge import Concept, Edit, Problem
from expunge.changes import LowRank, find_layer
from expunge.checkpoints.pace import Pace
from expunge.cli.erase import describe_moved
from expunge.cli.main import main
from expunge.erasing.moved_share import FOLLOWING, WEAK, measure_moved
from expunge.erasing.prompt_templates import HELD_OUT
from expunge.erasing.refit import Refit
from expunge.methods.mace import MACE
from expunge.methods.uce import UCE
from quick import quick

CONCEPT = Concept("airplane", "sky")
PROBLEM = Problem((CONCEPT,))
ERASED = [template.format("airplane") for template in HELD_OUT["object"]]
ANCHORED = [template.format("sky") for template in HELD_OUT["object"]]


@pytest.fixture
def whole(model):
    """Changes that send the held-out prompts themselves to their anchors."""
    refit = Refit()
    refit.erase(model.encode(ERASED), model.encode(ANCHORED))
    return refit.solve(model, 1e-9)


def test_the_share_is_in_proportion_to_the_strength(model, whole):
    """An edit that is strong as it was made is weak at a strength of 0.2."""
    nothing, weak, full = (
        measure_moved(model, whole, [CONCEPT], "text", strength)["airplane"] for strength in (0, 0.2, 1)
    )
    assert nothing == 0
    assert weak == pytest.approx(0.2 * full, abs=2e-3)
    assert weak < WEAK < full


def read_slowly(model, changes):
    """The share, from what the pipeline's own layers return, token by token."""
    erased, anchored = model.encode(ERASED), model.encode(ANCHORED)
    layers = [
        find_layer(model.pipe, entry.layer)
        for entry in model.text_entries()
        if any(entry.layer in change.layers for change in changes)
    ]
    with torch.no_grad():
        before, goals = ([layer(text.embeddings) for layer in layers] for text in (erased, anchored))
        with model.using(changes):
            after = [layer(erased.embeddings) for layer in layers]
    shares = []
    for first, last in ((0, 1), (1, 1 + FOLLOWING)):
        went = way = 0.0
        for old, goal, new in zip(before, goals, after, strict=True):
            for row in range(len(erased)):
                e, a = int(erased.content_mask[row].sum()), int(anchored.content_mask[row].sum())
                for i in range(first, last):  # the start token stands at 0
                    d = goal[row, a + i] - old[row, e + i]
                    went += float(d @ (new[row, e + i] - old[row, e + i]))
                    way += float(d @ d)
        shares.append(went / way)
    return max(shares)


@pytest.mark.parametrize("name", ["uce", "ace", "speed", "oce"])
def test_it_is_what_the_pipelines_layers_do_gates_and_all(model, name):
    edit = expunge.erase(model, PROBLEM, quick(name))
    assert edit.record.moved == {"airplane": pytest.approx(read_slowly(model, edit.changes), abs=2e-3)}


def test_a_denoiser_on_the_disk_is_measured_the_same(model, whole):
    here = measure_moved(model, whole, [CONCEPT], "text")
    read = {entry.layer: model.weight(entry.layer) for entry in model.text_entries()}
    model.stored = lambda layer, parameter: read[layer]
    assert measure_moved(model, whole, [CONCEPT], "text") == here


def test_predictions_are_measured_on_trajectories(model, whole):
    moved = [
        measure_moved(model, whole, [CONCEPT], "predictions", strength)["airplane"]
        for strength in (0.0, 0.5, 1.0)
    ]
    assert moved[0] == 0
    assert moved[0] < moved[1] < moved[2]
    assert moved[2] > WEAK


@pytest.mark.parametrize("name", ["concept_ablation", "gem"])
def test_a_trained_edit_is_measured_in_predictions_and_they_are_counted(model, name):
    method = quick(name)
    edit = expunge.erase(model, PROBLEM, method)
    found = measure_moved(model, edit.changes, [CONCEPT], "predictions")
    assert edit.record.moved == found
    assert abs(found["airplane"]) > 0
    whole = method.estimate_cost(PROBLEM, model.num_inference_steps).predictions
    with Pace(model, {}, {}) as pace:
        expunge.erase(model, PROBLEM, method)
    assert pace.kinds["predictions"].done == pytest.approx(whole, rel=0.15, abs=14)


def test_where_it_means_nothing_nothing_is_said(model):
    elsewhere = LowRank(("unet.conv_in",), torch.zeros(8, 1), torch.zeros(1, 36))
    assert measure_moved(model, [elsewhere], [CONCEPT], "text") == {}
    assert MACE(stages=("suppress", "fuse")).measured_in == ""


def test_the_record_keeps_it(model, tmp_path):
    edit = expunge.erase(model, PROBLEM, UCE(num_retain_words=5))
    assert edit.record.moved.keys() == {"airplane"}
    edit.save(tmp_path / "e.safetensors")
    assert Edit.load(tmp_path / "e.safetensors").record.moved == edit.record.moved


@pytest.mark.parametrize(("ridge", "weak"), [("0.001", False), ("1e6", True)])
def test_a_weak_edit_is_called_weak_with_what_to_turn(folder, tmp_path, capsys, ridge, weak):
    templates = ("--templates", *HELD_OUT["object"], "--num-retain-words", "0", "--retain-scale", "0")
    told = ("--model", str(folder), "--concept", "airplane=sky", "-o", str(tmp_path / "e.safetensors"))
    told = (*told, "--ridge", ridge)
    assert main(["erase", "uce", *told, *templates]) == 0
    out = capsys.readouterr().out
    assert "airplane: moved " in out
    assert "% of the way to sky on held-out prompts" in out
    assert (
        "this edit is weak for airplane: less than 50 % of the way; try a smaller ridge" in out
    ) == weak
    assert main(["info", str(tmp_path / "e.safetensors")]) == 0
    assert "of the way to its anchor, on held-out prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "share", "said"),
    [("esd", 0.4, "weak"), ("esd", 0.6, "often still"), ("esd", 0.9, ""), ("uce", 0.6, "")],
)
def test_a_trained_edit_needs_more_than_half_of_the_way(name, share, said):
    record = SimpleNamespace(moved={"airplane": share}, problem=PROBLEM, reads_anchor=True)
    (moved, *more) = describe_moved(record, quick(name))
    assert f"{100 * share:.0f} %" in moved
    assert [said in line for line in more] == [True] * bool(said)
