"""What a model takes on a device, before it is loaded."""

import dataclasses

import pytest
import torch

import expunge
from expunge import ExpungeError
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.cost_estimate import TEXT_PARTS, estimate, estimate_model, list_resident_parts
from tiny import PIPELINES


def test_a_plan_fetches_configurations_alone(on_hub, folder):
    checkpoint = Checkpoint.find("owner/name", weights=False)
    assert {path.name for path in on_hub[1].rglob("*") if path.is_file()} == {
        "model_index.json", "config.json"
    }  # fmt: skip
    made = estimate(checkpoint, torch.float32, "cpu")
    of_folder = estimate_model(expunge.load(folder))
    assert made.parameters == of_folder.parameters
    assert made.memory == of_folder.memory == 4 * sum(made.parameters.values())


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_plan_of_every_family(tiny, name):
    checkpoint = Checkpoint.find(tiny[name])
    made, text = (
        estimate(checkpoint, torch.float16, "cpu", text_alone=alone) for alone in (False, True)
    )
    assert made.parameters == estimate_model(expunge.load(tiny[name])).parameters
    assert text.parameters == {k: n for k, n in made.parameters.items() if k in TEXT_PARTS}
    assert ("T5" in text.parameters) == (name in ("sd3", "flux", "pixart", "chroma", "wan"))
    named = ("sana", "flux2", "z_image", "qwen_image")
    assert ("language model" in text.parameters) == (name in named)
    denoiser, encoders = made.parameters["denoiser"], sum(text.parameters.values())
    assert text.memory == 2 * encoders
    autoencoder = made.parameters["autoencoder"]
    for device, offload, numbers in (
        ("cpu", False, denoiser + encoders + autoencoder),
        ("cuda", False, denoiser + max(encoders, autoencoder)),
        ("cuda", True, max(denoiser, encoders, autoencoder)),
    ):
        there = dataclasses.replace(made, resident_parts=list_resident_parts(device, offload))
        assert there.memory == 2 * numbers
    with pytest.raises(ExpungeError, match="no accelerator to offload from"):
        estimate(checkpoint, torch.float16, "cpu", offload=True)
