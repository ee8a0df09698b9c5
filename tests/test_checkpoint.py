"""A model on the disk: layers found in every layout, text encoders loaded alone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import expunge
from edits import PROBE, drawn
from expunge import Concept, ExpungeError, Problem
from expunge.base import registry
from expunge.changes import find_layer
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from tiny import PIPELINES


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_closed_form_with_the_denoiser_left_on_the_disk(tiny, name, tmp_path):
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    method = registry.get("methods", "uce")(ridge=1.0, num_retain_words=3)
    small = Checkpoint.find(tiny[name]).load_text_model()
    assert {p.device.type for p in small.network.parameters()} == {"meta"}
    edit = expunge.erase(small, problem, method)
    model = expunge.load(tiny[name])
    assert edit.fits(model)
    assert edit.hash == expunge.erase(model, problem, method).hash
    export(edit, "diffusers", tiny[name], tmp_path / "out")
    again = expunge.load(tmp_path / "out")
    assert torch.equal(again.draw(PROBE), drawn(model, edit))


def test_a_layer_is_found_in_both_layouts_of_clip(folder, tmp_path):
    checkpoint = Checkpoint.find(folder)
    new = checkpoint.locate("text_encoder.encoder.layers.0.self_attn.q_proj", "weight")
    old = checkpoint.locate("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "weight")
    assert new == old


@pytest.mark.parametrize("name", list(PIPELINES))
def test_both_layouts_of_clips_files_are_read(tiny, name, tmp_path):
    found = []
    for nested in (True, False):
        path = shutil.copytree(tiny[name], tmp_path / str(nested))
        for file in path.glob("text_encoder*/model.safetensors"):
            state = load_file(file)
            if any("token_embedding" in key for key in state) and not any(
                "text_projection" in key for key in state
            ):
                bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
                state = {f"text_model.{key}" if nested else key: t for key, t in bare.items()}
                save_file(state, file, {"format": "pt"})
        found.append(expunge.load(path).draw(PROBE))
    assert torch.equal(*found)


class OldLayout(torch.nn.Module):
    """CLIP's text encoder as transformers had it up to 5.5: the tower in `text_model`."""

    def __init__(self, tower):
        super().__init__()
        self.text_model = tower


def test_a_layer_in_memory_is_found_in_both_layouts_of_clip(pipe):
    tower = pipe.text_encoder
    tower = getattr(tower, "text_model", tower)
    layer = tower.encoder.layers[0].self_attn.q_proj
    for encoder in (tower, OldLayout(tower)):
        pipe.text_encoder = encoder
        for name in ("encoder", "text_model.encoder"):
            assert find_layer(pipe, f"text_encoder.{name}.layers.0.self_attn.q_proj") is layer
    with pytest.raises(ExpungeError, match="has no layer text_encoder.encoder.nothing"):
        find_layer(pipe, "text_encoder.encoder.nothing")
