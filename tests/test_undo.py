"""An erased model as it was: from the original bit for bit, or by arithmetic."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import expunge
from conftest import tiny_pipeline
from edits import PROBE, edited, gated, low_rank
from expunge import Concept, ExpungeError, ExpungeWarning, Problem
from expunge.changes import Dense
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.checkpoints.undo import undo
from tiny import sdxl


def test_undo(folder, uce, tmp_path):
    _, edit = uce
    model = expunge.load(folder)
    export(edit, "diffusers", folder, tmp_path / "once")
    second = expunge.erase(expunge.load(tmp_path / "once"), Problem((Concept("horse", "sky"),)))
    export(second, "diffusers", tmp_path / "once", tmp_path / "twice")
    history = Checkpoint.find(tmp_path / "twice").read_erasures()
    assert [e.edit for e in history] == [edit.hash, second.hash]
    last = undo(tmp_path / "twice", tmp_path / "back", edit=second)
    assert last.record.problem.erase[0].name == "horse"
    assert [e.edit for e in Checkpoint.find(tmp_path / "back").read_erasures()] == [edit.hash]
    undo(tmp_path / "back", tmp_path / "original", original=folder)
    assert torch.equal(expunge.load(tmp_path / "original").draw(PROBE), model.draw(PROBE))
    layer = edit.changes[0].layers[0]
    back = expunge.load(tmp_path / "back").weight(layer)
    torch.testing.assert_close(back, expunge.load(tmp_path / "once").weight(layer), rtol=1e-3, atol=1e-4)


def test_undo_refuses(folder, uce, tmp_path):
    model, edit = uce
    with pytest.raises(ExpungeError, match="says of no erasure"):
        undo(folder, tmp_path / "x", original=folder)
    export(edit, "diffusers", folder, tmp_path / "out")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ExpungeError, match="has other weights"):
        undo(tmp_path / "out", tmp_path / "x", original=tmp_path / "other")
    sdxl().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ExpungeError, match="sdxl is SDXL, and what was erased was StableDiffusion"):
        undo(tmp_path / "out", tmp_path / "x", original=tmp_path / "sdxl")
    with pytest.raises(ExpungeError, match="not the edit"):
        undo(tmp_path / "out", tmp_path / "x", edit=edited(model, low_rank(model)))
    with pytest.raises(ExpungeError, match="the original model, or the edit"):
        undo(tmp_path / "out", tmp_path / "x")
    w = model.weight(edit.changes[0].layers[0])
    dense = edited(model, [Dense((edit.changes[0].layers[0],), torch.zeros_like(w))])
    export(dense, "diffusers", folder, tmp_path / "dense")
    with pytest.raises(ExpungeError, match="keeps nothing of what was"):
        undo(tmp_path / "dense", tmp_path / "x", edit=dense)
    gates = edited(model, [gated(model)])
    export(gates, "diffusers", folder, tmp_path / "gates")
    with pytest.raises(ExpungeError, match="has gates; .* give the original"):
        undo(tmp_path / "gates", tmp_path / "x", edit=gates)
    assert not (tmp_path / "x").exists()


def test_an_edit_made_in_bfloat16_is_one_of_its_model(folder, tmp_path):
    model = expunge.load(folder, dtype=torch.bfloat16)
    edit = edited(model, low_rank(model))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert edit.fits(expunge.load(folder, dtype=dtype)) == (dtype != torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExpungeWarning)
        export(edit, "diffusers", folder, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back", original=folder)
    name = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(folder / name), load_file(tmp_path / "back" / name)
    assert all(torch.equal(tensor, new[key]) for key, tensor in old.items())
