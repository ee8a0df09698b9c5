"""The ComfyUI nodes on ComfyUI itself: its U-Net, its patcher and its samplers' call of the model.

ComfyUI is no dependency and its code is not here. `COMFYUI=FOLDER pytest tests/test_comfyui_real.py`
runs these tests against a checkout, in an environment that has what ComfyUI imports (torchsde, einops,
scipy, psutil). Without it they are skipped; `test_comfyui.py` holds the nodes to a stand-in everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Probe, Problem
from expunge.families.stable_diffusion import StableDiffusion

COMFYUI = os.environ.get("COMFYUI", "")
if not COMFYUI:
    pytest.skip("COMFYUI names no checkout of ComfyUI", allow_module_level=True)
HERE = Path(__file__).parent.parent / "integrations" / "comfyui"
PROBLEM = Problem((Concept("airplane", "sky"),), ("ship", "bird"))
PROBE = Probe.of("a photo of the airplane", 2, 0, 3, 3.0)
GATE = {
    "stages": ("gate",),
    "num_retain_words": 10,
    "max_overlap": 1.0,
    "templates": ("a photo of the {}",),
}
CHANNELS = (32, 64)
"""ComfyUI's normalisations have 32 groups, whatever the model."""


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, told to use the processor."""
    sys.path.insert(0, COMFYUI)
    importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("model_patcher", "supported_models"):
        importlib.import_module(f"comfy.{name}")
    yield sys.modules["comfy"]
    sys.path.remove(COMFYUI)


@pytest.fixture(scope="module")
def load():
    """The node *Load erasure*, from the folder as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        "expunge_nodes", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["expunge_nodes"] = package
    spec.loader.exec_module(package)
    yield package.NODE_CLASS_MAPPINGS["ExpungeLoadErasure"]().load
    del sys.modules["expunge_nodes"]


@pytest.fixture(scope="module")
def model():
    return expunge.load(tiny_pipeline(channels=CHANNELS, groups=32))


@pytest.fixture
def patcher(comfy, model):
    """ComfyUI's own model of the same weights, in its ModelPatcher."""
    made = comfy.supported_models.SD15({
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": CHANNELS[0],
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 32,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
        "dtype": torch.float32,
    })  # fmt: skip
    made.unet_config["num_heads"] = 2
    held = made.get_model({}, device="cpu")
    config = model.network.config
    weights = {}
    for name, value in model.network.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        weights[f"{StableDiffusion.ldm_layer_name(layer, config)}.{parameter}"] = value.clone()
    held.diffusion_model.load_state_dict(weights)  # every name, and no other
    return comfy.model_patcher.ModelPatcher(held, torch.device("cpu"), torch.device("cpu"))


@contextmanager
def drawn_by(model, patcher):
    """Let a model draw with ComfyUI's network, patched as ComfyUI patches it while it samples."""
    held = patcher.patch_model()
    options = patcher.model_options
    wrapper = options.get("model_function_wrapper")

    def forward(sample, timestep, encoder_hidden_states, return_dict):
        assert not return_dict
        t = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        sigma = held.model_sampling.sigma(t)
        # ComfyUI's latents are not scaled to one variance, and it returns what is without noise.
        wide = sigma.reshape(-1, 1, 1, 1)
        x = sample * (1 + wide**2).sqrt()
        c = {"c_crossattn": encoder_hidden_states, "transformer_options": options["transformer_options"]}
        if wrapper is not None:
            clean = wrapper(held.apply_model, {"input": x, "timestep": sigma, "c": c})
        else:
            clean = held.apply_model(x, sigma, **c)
        return ((x - clean) / wide,)

    own = model.network.forward
    model.network.forward = forward
    try:
        yield
    finally:
        model.network.forward = own
        patcher.unpatch_model()


@pytest.mark.parametrize(
    ("method", "fields", "strength", "most"),
    [("uce", {}, 1.0, 1e-3), ("uce", {}, 0.5, 1e-3), ("ace", GATE, 1.0, 1e-2), ("ace", GATE, 0.5, 1e-2)],
)
def test_an_edit_draws_what_expunge_draws(
    load, model, patcher, tmp_path, method, fields, strength, most
):
    edit = expunge.erase(model, PROBLEM, expunge.base.registry.get("methods", method)(**fields))
    edit.save(tmp_path / "edit.safetensors")
    before = model.draw(PROBE)
    with model.using(edit, strength=strength):
        ours = model.draw(PROBE)
    (patched,) = load(patcher, str(tmp_path / "edit.safetensors"), strength)
    with drawn_by(model, patcher):
        plain = model.draw(PROBE)
    with drawn_by(model, patched):
        theirs = model.draw(PROBE)
    base, moved, off = (
        float((a - b).abs().max()) for a, b in ((plain, before), (ours, before), (theirs, ours))
    )
    print(f"{method} at {strength}: base {base:.1e}, edited {off:.1e}, moved {moved:.1e}")
    assert base <= 1e-3  # the user's MODEL is not changed
    assert off <= most
    assert moved > 10 * off  # the edit does something
