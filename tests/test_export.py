"""Edits as other programs load them: written, read back by diffusers' own loaders, and undone."""

import dataclasses
import hashlib
import re
import shutil
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import expunge
from conftest import tiny_pipeline
from edits import PROBE, drawn, edited, gated, low_rank, single_in
from expunge import Concept, ExpungeError, ExpungeWarning, Problem
from expunge.changes import LowRank
from expunge.checkpoints.export import describe_strengths, export
from expunge.checkpoints.linearize import fit_static_weights
from expunge.fingerprint import list_places


def test_a_diffusers_folder(folder, uce, tmp_path):
    model, edit = uce
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = export(edit, "diffusers", folder, tmp_path / "out")
    assert done.path == tmp_path / "out"
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    # The convolutions' layout in memory differs, and with it the last bits.
    torch.testing.assert_close(expunge.load(again).draw(PROBE), drawn(model, edit), rtol=0, atol=1e-5)
    assert {path: path.read_bytes() for path in before} == before
    changed = [p.relative_to(folder) for p, old in before.items()
               if (tmp_path / "out" / p.relative_to(folder)).read_bytes() != old]  # fmt: skip
    assert [str(path) for path in changed] == ["unet/diffusion_pytorch_model.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("airplane", "'sky'", "uce", "Limits", "license: ", edit.hash[:16]):
        assert text in card


def test_only_changed_tensors_differ(folder, uce, tmp_path):
    _, edit = uce
    export(edit, "diffusers", folder, tmp_path / "out")
    name = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(folder / name), load_file(tmp_path / "out" / name)
    assert list(old) == list(new)
    differing = {key for key in old if not torch.equal(old[key], new[key])}
    assert differing == {
        f"{layer.removeprefix('unet.')}.weight" for layer, _ in list_places(edit.changes)
    }
    assert all(old[key].dtype == new[key].dtype for key in old)


def test_half_precision_stays_so(uce, tmp_path):
    _, edit = uce
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "half")
    export(edit, "diffusers", tmp_path / "half", tmp_path / "out")
    new = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float16}


# Rank: what is kept, what it costs, and what is only rounding.


# Rounding.


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.float8_e4m3fn, 0.9, 1.1), (torch.bfloat16, 0.9, 1.1), (torch.float16, 0.99, 1.01)],
)
def test_a_copy_in_few_bits_keeps_the_change_and_says_what_it_cost(tmp_path, folder, dtype, least, most):
    state = load_file(single_in(tmp_path / "model.safetensors", dtype))
    model = expunge.load(folder)
    layers = [entry.layer for entry in model.text_entries()]
    torch.manual_seed(0)
    changes = [
        LowRank((x,), torch.randn(model.weight(x).shape[0], 1) / 99, torch.randn(1, 32) / 9)
        for x in layers
    ]
    edit = edited(model, changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpungeWarning)  # that the weights are rounded
        for name in ("once", "again"):
            done = export(
                edit, "safetensors", tmp_path / "model.safetensors", tmp_path / f"{name}.safetensors"
            )
    after = load_file(done.path)
    along = missed = total = 0.0
    config = expunge.load(folder).network.config
    for change in changes:
        name = f"model.diffusion_model.{type(model).ldm_layer_name(change.layers[0][5:], config)}.weight"
        delta = change.up @ change.down
        moved = after[name].float() - state[name].float()
        along, total = along + float((moved * delta).sum()), total + float(delta.square().sum())
        missed += float((moved - delta).square().sum())
    assert least < along / total < most
    said = f"keeps {along / total:.1%} of the change and adds noise of {(missed / total) ** 0.5:.1%}"
    if (missed / total) ** 0.5 >= 1e-3:
        assert f"Rounding to {str(dtype)[6:]} {said}" in done.notes[0]
        assert done.notes[0] in (tmp_path / "again.md").read_text()
    assert (tmp_path / "once.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


# Files.


@pytest.mark.parametrize("to", ["lora", "kohya", "comfyui"])
def test_equal_exports_have_equal_bytes(folder, uce, tmp_path, to):
    _, edit = uce
    for name in "abc":
        export(edit, to, folder, tmp_path / f"{name}.safetensors")
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"}) == 1
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = file.metadata()
    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert said["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data[start:]).hexdigest()}"


@pytest.mark.parametrize("to", ["lora", "kohya", "safetensors"])
def test_a_users_files_stay(folder, single, uce, tmp_path, to):
    _, edit = uce
    model = single if to == "safetensors" else folder
    (tmp_path / "x.md").write_text("my notes", "utf8")
    (tmp_path / "x.card.md").write_text("more notes", "utf8")
    for _ in range(2):
        done = export(edit, to, model, tmp_path / "x.safetensors")
        assert done.card == tmp_path / "x.card-2.md"
    assert "x.md is not a card of ours and stays as it is; the card is x.card-2.md" in done.notes[-1]
    assert (tmp_path / "x.md").read_text() == "my notes"
    assert (tmp_path / "x.card.md").read_text() == "more notes"
    assert edit.hash[:16] in done.card.read_text()
    first = export(edit, to, model, tmp_path / "y.safetensors")
    assert first.card == tmp_path / "y.md"
    assert export(edit, to, model, tmp_path / "y.safetensors").card == first.card
    edit.save(tmp_path / "z.safetensors")
    whole = (tmp_path / "z.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(b"mine")
    for name in "zw":
        with pytest.raises(ExpungeError, match="is there already and is no export of ours"):
            export(edit, to, model, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "z.safetensors").read_bytes() == whole
    assert (tmp_path / "w.safetensors").read_bytes() == b"mine"
    assert sorted(path.suffix for path in tmp_path.iterdir()).count(".md") == 4


def test_weights_fitted_to_gates_are_kept(folder, tmp_path, monkeypatch):
    model = expunge.load(folder)
    change = gated(model)
    change = dataclasses.replace(change, up=change.up.clone(), goal=torch.full((1,), 0.37))
    edit = edited(model, [change])
    fitted = []

    def counted(*given):
        fitted.append(given)
        return fit_static_weights(*given)

    monkeypatch.setattr("expunge.checkpoints.static_weights.fit_static_weights", counted)
    notes = [
        export(edit, to, folder, tmp_path / out, dtype=torch.float32).notes[0]
        for to, out in (("diffusers", "a"), ("kohya", "b.safetensors"), ("diffusers", "c"))
    ]
    assert len(fitted) == 1
    assert len(set(notes)) == 1
    layer = change.layers[0]
    assert torch.equal(*(expunge.load(tmp_path / name).weight(layer) for name in "ac"))
    other = edited(model, [dataclasses.replace(change, goal=torch.full((1,), 0.38))])
    export(other, "diffusers", folder, tmp_path / "d")
    assert len(fitted) == 2


# Names of single files and of kohya's LoRAs, against diffusers' converters.


# A single file.


def test_a_lora_beneath_an_erasure(folder, uce, tmp_path):
    model, _ = uce
    path = tmp_path / "style.safetensors"
    export(edited(model, low_rank(model)), "kohya", folder, path, dtype=torch.float32)
    styled = expunge.load(folder, lora=[(path, 0.5)])
    on_it = expunge.erase(styled, Problem((Concept("horse", "sky"),), ("ship",)))
    wanted = drawn(styled, on_it)
    with pytest.warns(ExpungeWarning, match="other weights"):
        export(on_it, "diffusers", folder, tmp_path / "without")
    export(on_it, "diffusers", folder, tmp_path / "out", beneath=[(path, 0.5)])
    torch.testing.assert_close(expunge.load(tmp_path / "out").draw(PROBE), wanted, rtol=0, atol=1e-3)
    own = tmp_path / "own.safetensors"
    export(on_it, "lora", folder, own, beneath=[(path, 0.5)], energy=1.0, dtype=torch.float32)
    both = expunge.load(folder, lora=[(path, 0.5), (own, 1.0)])
    torch.testing.assert_close(both.draw(PROBE), wanted, rtol=0, atol=1e-3)


# Undone and merged.


# Gates.


def test_gates_leave_as_the_weights_fitted_to_them(folder, tmp_path):
    model = expunge.load(folder)
    edit = edited(model, [gated(model)])
    fit = fit_static_weights(model, edit.changes, edit.record.problem)
    assert 0 < fit.lost < 1
    done = export(edit, "diffusers", folder, tmp_path / "out")
    assert done.notes == (f"gates became weights: {fit}",)
    assert done.notes[0] in (tmp_path / "out" / "README.md").read_text()
    after = expunge.load(tmp_path / "out")
    for layer in edit.changes[0].layers:
        wanted = fit.changes[0].weight(model.weight(layer))
        assert torch.allclose(after.weight(layer), wanted, atol=1e-6)
        assert not torch.allclose(model.weight(layer), wanted, atol=1e-3)


# Bad input.


def test_what_cannot_be_exported(folder, uce, tmp_path):
    _, edit = uce
    out = tmp_path / "x.safetensors"
    with pytest.raises(ExpungeError, match="did you mean 'kohya'"):
        export(edit, "koya", folder, out)
    with pytest.raises(ExpungeError, match="rank of a LoRA must be at least 1, not 0"):
        export(edit, "lora", folder, out, rank=0)
    with pytest.raises(ExpungeError, match="above 0 and at most 1, not 2"):
        export(edit, "lora", folder, out, energy=2)
    with pytest.raises(ExpungeError, match="should end so"):
        export(edit, "lora", folder, tmp_path / "x.pt")
    with pytest.raises(ExpungeError, match="is a diffusers folder: export to diffusers"):
        export(edit, "safetensors", folder, out)
    tiny_pipeline(width=48).save_pretrained(tmp_path / "wide")
    for to in ("lora", "diffusers"):
        with pytest.raises(ExpungeError, match="does not fit"):
            export(edit, to, tmp_path / "wide", out if to == "lora" else tmp_path / "copy")
    with pytest.raises(ExpungeError, match="is there already"):
        export(edit, "diffusers", folder, tmp_path / "wide")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


def test_a_disk_too_full(folder, uce, tmp_path, monkeypatch):
    _, edit = uce
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for to, out in (("diffusers", "copy"), ("lora", "x.safetensors")):
        with pytest.raises(ExpungeError, match=r"has 1\.0 kB free"):
            export(edit, to, folder, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        ({"airplane": 1.0}, "strengths of 0.8 to 1.5"),
        ({"airplane": 0.8, "cat": 1.6}, "strengths of 1 to 1"),
        ({"airplane": 0.5}, "by 50% of the way alone.*use it at 1.6, or erase more"),
        ({"airplane": -0.1}, "drawn below 80%: erase more."),
    ],
)
def test_a_lora_says_at_which_strengths_it_can_be_used(uce, moved, says):
    (note,) = describe_strengths(dataclasses.replace(uce[1].record, moved=moved))
    assert re.search(says, note)


def test_trained_edits_are_for_strength_one(uce):
    record = dataclasses.replace(uce[1].record, method="esd", fields={}, moved={"airplane": 1.0})
    (note,) = describe_strengths(record)
    assert "strength 1, at which it was trained" in note
    assert describe_strengths(dataclasses.replace(record, moved={})) == ()


def test_the_note_on_strengths_stands_with_the_others(folder, uce, tmp_path):
    _, edit = uce
    (note,) = describe_strengths(edit.record)
    assert note in export(edit, "lora", folder, tmp_path / "lora.safetensors").notes
