"""The ComfyUI nodes, on a stand-in of its patcher over diffusers' real classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.changes import find_layer
from expunge.families.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent.parent / "integrations" / "comfyui"
PROBLEM = Problem((Concept("airplane", "sky"),), ("ship", "bird"))
PROBE = Probe.of("a photo of the airplane", 2, 0, 3, 3.0)


@pytest.fixture(scope="module")
def nodes():
    """The folder as ComfyUI imports it: a package with any name."""
    spec = importlib.util.spec_from_file_location(
        "expunge_nodes", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["expunge_nodes"] = package
    spec.loader.exec_module(package)
    yield package
    del sys.modules["expunge_nodes"]


class Patcher:
    """ComfyUI's ModelPatcher over a diffusers U-Net whose layers it calls by the first code's names."""

    def __init__(self, model, patches=(), attn2=(), wrapper=None):
        self.model, self.patches, self.attn2, self.wrapper = model, list(patches), list(attn2), wrapper
        config = model.network.config
        self.layers = {}
        for name, module in model.network.named_modules():
            original = StableDiffusion.ldm_layer_name(name, config)
            if original and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                self.layers[f"diffusion_model.{original}"] = f"unet.{name}"

    def clone(self):
        return Patcher(self.model, self.patches, self.attn2, self.wrapper)

    def model_state_dict(self):
        return {
            f"{new}.weight": find_layer(self.model.pipe, old).weight for new, old in self.layers.items()
        }

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = {key: value for key, value in patches.items() if key in self.model_state_dict()}
        self.patches.append((known, strength_patch))
        return list(known)

    def set_model_attn2_patch(self, patch):
        self.attn2.append(patch)

    @contextmanager
    def patched(self):
        """The weights moved and the contexts changed, as ComfyUI does while it samples."""
        kept, hooks, weights = [], [], self.model_state_dict()
        with torch.no_grad():
            for patches, strength in self.patches:
                for key, (kind, (difference,)) in patches.items():
                    assert kind == "diff"
                    kept.append((weights[key], weights[key].clone()))
                    weights[key] += strength * difference
        for patch in self.attn2:
            for old in self.layers.values():
                if old.endswith(("attn2.to_k", "attn2.to_v")):
                    side = 1 if old.endswith("to_k") else 2

                    def hook(_, given, patch=patch, side=side):
                        return (patch(None, given[0], given[0], {})[side],)

                    hooks.append(find_layer(self.model.pipe, old).register_forward_pre_hook(hook))
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for weight, before in reversed(kept):
                    weight.copy_(before)


class Clip:
    """ComfyUI's CLIP over diffusers' text encoder."""

    def __init__(self, model):
        self.model = model
        self.tokenizer = SimpleNamespace(clip_l=SimpleNamespace(tokenizer=model.pipe.tokenizer))

    def tokenize(self, text):
        return text.replace("\\(", "(").replace("\\)", ")")

    def encode_from_tokens(self, tokens, return_pooled=False):
        return self.model.encode([tokens]).embeddings, None


@pytest.mark.parametrize(("method", "most"), [("uce", 1e-4), ("ace", 1e-4)])
def test_an_edit_draws_what_expunge_draws(nodes, model, tmp_path, method, most):
    fields = (
        {
            "stages": ("gate",),
            "num_retain_words": 10,
            "max_overlap": 1.0,
            "templates": ("a photo of the {}",),
        }
        if method == "ace"
        else {}
    )
    made = expunge.base.registry.get("methods", method)(**fields)
    edit = expunge.erase(model, PROBLEM, made)
    edit.save(tmp_path / "edit.safetensors")
    before = model.draw(PROBE)
    with model.using(edit):
        ours = model.draw(PROBE)
    assert float((ours - before).abs().max()) > 2e-3  # it does something
    (patched,) = nodes.NODE_CLASS_MAPPINGS["ExpungeLoadErasure"]().load(
        Patcher(model), str(tmp_path / "edit.safetensors"), 1.0
    )
    with patched.patched() as other:
        theirs = other.draw(PROBE)
    assert float((theirs - ours).abs().max()) <= most
    assert torch.equal(model.draw(PROBE), before)


def test_half_the_strength_is_half_the_change(nodes, model, tmp_path):
    edit = expunge.erase(model, PROBLEM, "uce")
    edit.save(tmp_path / "edit.safetensors")
    load = nodes.NODE_CLASS_MAPPINGS["ExpungeLoadErasure"]().load
    patched = [load(Patcher(model), str(tmp_path / "edit.safetensors"), s)[0] for s in (0.5, 1.0)]
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    original = find_layer(model.pipe, layer).weight.detach().clone()
    moved = []
    for one in patched:
        with one.patched():
            moved.append(find_layer(model.pipe, layer).weight.detach() - original)
    torch.testing.assert_close(moved[0], moved[1] / 2, atol=1e-6, rtol=1e-3)


def test_concepts_are_erased_from_the_loaded_model(nodes, model):
    """The node finds the weights that expunge finds on the diffusers pipeline."""
    erase = nodes.NODE_CLASS_MAPPINGS["ExpungeEraseConcepts"]().erase
    (patched,) = erase(Patcher(model), Clip(model), "airplane=sky", "ship\nbird", "uce", 1.0)
    edit = expunge.erase(model, PROBLEM, "uce")
    with model.using(edit):
        ours = model.draw(PROBE)
    with patched.patched() as other:
        theirs = other.draw(PROBE)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_compare_puts_before_above_after(nodes):
    compare = nodes.NODE_CLASS_MAPPINGS["ExpungeCompare"]().compare
    before, after = torch.zeros(2, 16, 16, 3), torch.ones(2, 16, 16, 3)
    (sheet,) = compare(before, after, "airplane")
    assert (sheet.shape[0], sheet.shape[3]) == (1, 3)
    dark = (sheet[0] < 0.02).all(-1).nonzero()[:, 0].float().mean()
    assert dark < sheet.shape[1] / 2
    with pytest.raises(ExpungeError, match="as many images of one size"):
        compare(before, after[:1], "airplane")


def test_what_does_not_fit_is_one_sentence(nodes, model, tmp_path):
    erase = nodes.NODE_CLASS_MAPPINGS["ExpungeEraseConcepts"]().erase
    with pytest.raises(ExpungeError, match="no concept is named"):
        erase(Patcher(model), Clip(model), " \n", "", "uce", 1.0)
    several = SimpleNamespace(tokenizer=SimpleNamespace(clip_l=None, clip_g=None))
    with pytest.raises(ExpungeError, match="one CLIP text encoder"):
        erase(Patcher(model), several, "airplane", "", "uce", 1.0)
    edit = expunge.erase(model, PROBLEM, "uce")
    edit.save(tmp_path / "edit.safetensors")
    other = Patcher(model)
    other.layers = {k: v for k, v in other.layers.items() if "middle_block" not in k}
    with pytest.raises(ExpungeError, match="does not fit"):
        nodes.NODE_CLASS_MAPPINGS["ExpungeLoadErasure"]().load(
            other, str(tmp_path / "edit.safetensors"), 1.0
        )


def test_the_workflow_wires_nodes_that_exist(nodes):
    workflow = json.loads((HERE / "workflow.json").read_text(encoding="utf-8"))
    places = {node["id"]: node for node in workflow["nodes"]}
    for _, source, output, target, place, kind in workflow["links"]:
        assert places[source]["outputs"][output]["type"] == kind
        assert places[target]["inputs"][place]["type"] == kind
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Expunge")]
    assert len(ours) >= 2
    for node in ours:
        declared = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
        sockets = [
            name for name, (kind, *_) in declared.items() if str(kind).isupper() and kind != "STRING"
        ]
        sockets = [name for name in sockets if declared[name][0] not in ("FLOAT", "INT")]
        assert [socket["name"] for socket in node["inputs"]] == sockets
        assert len(node["widgets_values"]) == len(declared) - len(sockets)


def test_the_drawing_is_of_the_workflow():
    spec = importlib.util.spec_from_file_location("draw_workflow", HERE / "draw_workflow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    workflow = json.loads((HERE / "workflow.json").read_text(encoding="utf-8"))
    drawn = (HERE / "workflow.svg").read_text(encoding="utf-8")
    assert module.draw(workflow) == drawn  # python integrations/comfyui/draw_workflow.py
    assert drawn.count("<path") == len(workflow["links"])
    assert "not a screenshot" in drawn
