"""A single file in and out: the same names and dtypes, with its text encoders or without."""

import dataclasses
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from edits import PROBE, drawn, edited, gated, low_rank
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Probe, Problem
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.checkpoints.undo import undo
from expunge.families.sd3 import SD3
from expunge.families.sdxl import SDXL
from expunge.fingerprint import list_places
from tiny import single_file

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship",))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def test_what_a_single_file_says_of_itself_is_renewed(folder, uce, tmp_path):
    _, edit = uce
    single_file(tiny_pipeline(), tmp_path / "a.safetensors")
    said = {"format": "pt", "modelspec.title": "Dream", "modelspec.hash_sha256": "0x12",
            "sshs_model_hash": "34", "modelspec.author": "somebody"}  # fmt: skip
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", said)
    second = dataclasses.replace(edit.record, problem=Problem((Concept("horse"),)))
    export(edit, "safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpungeWarning)
        export(
            Edit(edit.changes, second),
            "safetensors",
            tmp_path / "b.safetensors",
            tmp_path / "c.safetensors",
        )
    for name, title in (("b", "Dream without airplane"), ("c", "Dream without airplane, horse")):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            found = file.metadata()
        assert found["modelspec.title"] == title
        assert found["modelspec.author"] == "somebody"
        assert not {"modelspec.hash_sha256", "sshs_model_hash"} & found.keys()
    undo(tmp_path / "b.safetensors", tmp_path / "d.safetensors", original=tmp_path / "a.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        found = file.metadata()
    assert {key: found[key] for key in said} == said


def test_whether_an_edit_fits_a_single_file(single, uce, tmp_path):
    _, edit = uce
    assert Checkpoint.find(single).fits(edit)
    single_file(tiny_pipeline(seed=1), tmp_path / "other.safetensors")
    assert not Checkpoint.find(tmp_path / "other.safetensors").fits(edit)


def test_a_single_file_in_and_out(single, folder, tmp_path):
    model = expunge.load(single, config=folder)
    assert model.name == "tiny"
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),), ("ship", "bird")))
    assert edit.fits(tiny_pipeline())
    whole = single.read_bytes()
    export(edit, "safetensors", single, tmp_path / "out.safetensors")
    assert single.read_bytes() == whole
    old, new = load_file(single), load_file(tmp_path / "out.safetensors")
    assert list(old) == list(new)
    assert {key: t.dtype for key, t in old.items()} == {key: t.dtype for key, t in new.items()}
    differing = {key for key in old if not torch.equal(old[key], new[key])}
    assert len(differing) == 14
    assert all(".attn2.to_" in key for key in differing)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "tiny without airplane"
    again = expunge.load(tmp_path / "out.safetensors", config=folder)
    torch.testing.assert_close(again.draw(PROBE), drawn(model, edit), rtol=0, atol=1e-3)
    (erased,) = Checkpoint.find(tmp_path / "out.safetensors").read_erasures()
    assert (erased.edit, erased.record.problem) == (edit.hash, edit.record.problem)
    assert erased.record.base == edit.record.base
    assert (tmp_path / "out.md").read_text().startswith("---\nlicense")


def sd3_alone(transformer):
    """An SD 3's denoiser as in a single file, by what diffusers' converter makes of one."""
    given = transformer.state_dict()
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context.linear"

    def swapped(name):
        return (
            torch.cat(given[name].chunk(2)[::-1]) if name.startswith(("norm_out", last)) else given[name]
        )

    state = {"pos_embed": given["pos_embed.pos_embed"]}
    for key, tensor in given.items():
        layer, _, parameter = key.rpartition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.", key)
        name = SD3.ldm_layer_name(layer, {})
        if name is not None:
            state[f"{name}.{parameter}"] = tensor
        elif layer == "pos_embed.proj":
            state[f"x_embedder.proj.{parameter}"] = tensor
        elif layer == "norm_out.linear":
            state[f"final_layer.adaLN_modulation.1.{parameter}"] = swapped(key)
        elif layer.endswith("norm1_context.linear"):
            state[f"joint_blocks.{block[1]}.context_block.adaLN_modulation.1.{parameter}"] = swapped(key)
        elif found := re.search(r"attn\.norm_(added_)?([qk])$", layer):
            side = "context_block" if found[1] else "x_block"
            state[f"joint_blocks.{block[1]}.{side}.attn.ln_{found[2]}.weight"] = tensor
        elif found := re.search(r"attn\.(to_q|add_q_proj)$", layer):
            side = "x_block" if found[1] == "to_q" else "context_block"
            every = [given[key.replace("_q", f"_{x}")] for x in "qkv"]
            state[f"joint_blocks.{block[1]}.{side}.attn.qkv.{parameter}"] = torch.cat(every)
    return state


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_single_file_of_the_denoiser_alone(tiny, name, tmp_path):
    whole = expunge.load(tiny[name])
    if name == "sd3":
        state = sd3_alone(whole.network)
    else:
        given = whole.network.state_dict()
        split, config = {key: key.rpartition(".") for key in given}, whole.network.config
        state = {
            f"model.diffusion_model.{SDXL.ldm_layer_name(layer, config)}.{parameter}": given[key]
            for key, (layer, _, parameter) in split.items()
        }
    state = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    path = tmp_path / "alone.safetensors"
    save_file(state, path)
    with pytest.raises(ExpungeError, match="holds no text encoders; give --config"):
        expunge.load(path)
    model = expunge.load(path, config=tiny[name])
    model.sample_size = 8
    assert torch.equal(model.draw(PROBE), whole.draw(PROBE))
    edit = edited(model, low_rank(model))
    export(edit, "safetensors", path, tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    assert list(new) == list(load_file(path))
    differing = {key for key in state if not torch.equal(state[key], new[key])}
    assert len(differing) == len(list_places(edit.changes))
    again = expunge.load(tmp_path / "out.safetensors", config=tiny[name])
    again.sample_size = 8
    torch.testing.assert_close(again.draw(PROBE), drawn(model, edit), rtol=0, atol=1e-3)
    undo(tmp_path / "out.safetensors", tmp_path / "back.safetensors", original=path)
    assert all(torch.equal(t, state[key]) for key, t in load_file(tmp_path / "back.safetensors").items())


def test_gates_leave_as_a_single_file(single, folder, tmp_path):
    edit = edited(expunge.load(folder), [gated(expunge.load(folder))])
    done = export(edit, "safetensors", single, tmp_path / "out.safetensors", config=folder)
    assert "gates became weights" in done.notes[0]


def test_a_pointer_in_place_of_a_single_file(tmp_path):
    (tmp_path / "x.safetensors").write_text(POINTER)
    for read in (expunge.load, Checkpoint.find, expunge.Edit.load):
        with pytest.raises(ExpungeError, match="git lfs pull"):
            read(tmp_path / "x.safetensors")


def test_a_single_file_whose_ending_is_in_capitals(folder, tmp_path):
    single_file(tiny_pipeline(), tmp_path / "Dream.SAFETENSORS")
    model = expunge.load(tmp_path / "Dream.SAFETENSORS", config=folder)
    probe = Probe.of("airplane", 1, 0, 2)
    assert torch.equal(model.draw(probe), expunge.load(folder).draw(probe))
