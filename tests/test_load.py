"""Models that load, and what is none: broken, of another kind, of the hub."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from edits import PROBE
from expunge import Concept, ExpungeError, Problem
from expunge.base.errors import ExpungeWarning
from expunge.changes import LowRank
from expunge.checkpoints import hub, loading
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.cli.loading_options import read_autocast
from expunge.runtime.number_formats import is_bfloat16_fast
from tiny import sdxl


def test_numbers_that_are_none(folder, uce, tmp_path):
    _, edit = uce
    path = shutil.copytree(folder, tmp_path / "nan")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = edit.changes[0].layers[0].removeprefix("unet.") + ".weight"
    state[key][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ExpungeError, match=f"NaN or infinity: unet.{key}"):
        expunge.load(path)
    for to, out in (("diffusers", "out"), ("lora", "x.safetensors"), ("kohya", "x.safetensors")):
        with pytest.raises(ExpungeError, match="contains NaN or infinity"):
            export(edit, to, path, tmp_path / out)
    with pytest.raises(ExpungeError, match="contains NaN or infinity"):
        expunge.erase(Checkpoint.find(path).load_text_model(), edit.record.problem)
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_tensors_that_are_missing(folder, tmp_path, part):
    path = shutil.copytree(folder, tmp_path / "less")
    file = path / f"{part}.safetensors"
    state = load_file(file)
    del state[next(key for key in state if key.endswith(".weight"))]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(
        ExpungeError, match=f"less is not whole: no file of its {part.split('/')[0]} has"
    ):
        expunge.load(path)


def test_what_is_no_model(folder, uce, single, tmp_path):
    _, edit = uce
    edit.save(tmp_path / "edit.safetensors")
    export(edit, "kohya", folder, tmp_path / "lora.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "other.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"PK\3\4")
    torch.save({}, tmp_path / "renamed.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:-9])
    for name, message in (
        ("edit.safetensors", "is an edit, not a model"),
        ("lora.safetensors", "is a LoRA, not a model"),
        ("vae.safetensors", "is a VAE, not a whole model"),
        (
            "other.safetensors",
            "of no family that is known; known: .*flux, .*sd3, sdxl, stable",
        ),
        ("old.ckpt", "but pickled"),
        ("renamed.safetensors", "but pickled"),
        ("cut.safetensors", "not a whole safetensors file"),
    ):
        for read in (expunge.load, Checkpoint.find):
            with pytest.raises(ExpungeError, match=message):
                read(tmp_path / name)
    for name, message in (
        ("edit.safetensors", "is not a LoRA"),
        ("vae.safetensors", "is not a LoRA"),
        ("cut.safetensors", "not a whole safetensors file"),
        ("old.ckpt", "but pickled"),
    ):
        with pytest.raises(ExpungeError, match=message):
            expunge.load(folder, lora=[(tmp_path / name, 1.0)])
    with pytest.raises(ExpungeError, match="not on this machine; give --config"):
        expunge.load(single)
    with pytest.raises(ExpungeError, match="there is no folder nowhere"):
        expunge.load(single, config="nowhere")
    sdxl().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ExpungeError, match="is of StableDiffusion, and .* of StableDiffusionXLPipeline"):
        expunge.load(single, config=tmp_path / "sdxl")
    state = load_file(single)
    del state[next(key for key in state if "attn2.to_k" in key)]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ExpungeError, match="is not whole: it lacks tensors"):
        expunge.load(tmp_path / "less.safetensors", config=folder)
    for name in ("nothing.safetensors", "no/such/folder"):
        with pytest.raises(ExpungeError, match=f"there is no file or folder {name}"):
            expunge.load(name)
    tiny_pipeline(width=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(ExpungeError, match="is not a LoRA for this model"):
        expunge.load(tmp_path / "wide", lora=[(tmp_path / "lora.safetensors", 1.0)])
    for other in ("wide", "sdxl"):
        with pytest.raises(ExpungeError, match=r"lora.safetensors is not a LoRA for this model: .*unet"):
            Checkpoint.find(tmp_path / other).read_lora(tmp_path / "lora.safetensors")


def test_the_hub_in_one_sentence(monkeypatch):
    from huggingface_hub import errors

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for read in (expunge.load, Checkpoint.find):
        with pytest.raises(ExpungeError, match="o/n is not on this machine, and HF_HUB_OFFLINE forbids"):
            read("o/n")
    with pytest.raises(ExpungeError, match="forbids the upload"):
        hub.check_upload("o/n")
    with pytest.raises(ExpungeError, match="OWNER/NAME, not 'n'"):
        hub.check_upload("n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExpungeError, match="log in with"):
        hub.check_upload("o/n")
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    assert "o/n is gated: accept its licence" in str(hub.explain_failure("o/n", gated))
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert "the hub has no model o/n" in str(hub.explain_failure("o/n", missing))


def test_a_model_of_the_hub(on_hub, folder, tmp_path):
    model = expunge.load("owner/name")
    assert torch.equal(model.draw(PROBE), expunge.load(folder).draw(PROBE))
    assert not list(on_hub[1].rglob("*fp16*"))
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)))
    export(edit, "diffusers", "owner/name", tmp_path / "out")
    assert 'base_model: "owner/name"' in (tmp_path / "out" / "README.md").read_text()


def test_a_model_of_the_hub_that_is_here_in_part(on_hub):
    Checkpoint.find("owner/name", weights=False)
    shutil.rmtree(on_hub[0])
    for read in (expunge.load, Checkpoint.find):
        with pytest.raises(ExpungeError, match="the text_encoder of owner/name is not here in .safeten"):
            read("owner/name")


def test_a_model_of_the_hub_that_lacks_tensors(on_hub):
    file = on_hub[0] / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file)
    for read in (expunge.load, lambda name: Checkpoint.find(name).load_text_model()):
        with pytest.raises(ExpungeError, match="is not whole: no file of its unet has conv_in.weight"):
            read("owner/name")


def test_a_model_of_the_hub_that_is_here(folder, tmp_path, monkeypatch):
    place, commit = tmp_path / "hub" / "models--owner--name", 40 * "a"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(expunge.load("owner/name").draw(PROBE), expunge.load(folder).draw(PROBE))


def test_gradient_checkpointing_changes_no_gradient(folder):
    found = []
    for checkpointing in (False, True):
        model = expunge.load(
            folder, gradient_checkpointing=checkpointing, attention_slicing=checkpointing
        )
        assert model.network.is_gradient_checkpointing == checkpointing
        layer, text = model.text_entries()[0].layer, model.encode(["ship"])
        up = torch.zeros(model.weight(layer).shape[0], 1, requires_grad=True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with model.using([LowRank((layer,), up, torch.ones(1, 32))]):
            model.predict(latents, 500, text).square().sum().backward()
        found.append(up.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_offloading_needs_an_accelerator(folder):
    if not torch.cuda.is_available():
        with pytest.raises(ExpungeError, match="no accelerator to offload from"):
            expunge.load(folder, offload=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models/x.safetensors", "there is no file or folder models/x.safetensors"),
        ("models/x.SAFETENSORS", "there is no file or folder models/x.SAFETENSORS"),
        ("models/x.ckpt", "there is no file or folder models/x.ckpt"),
        ("models/dreamm.safetensors", "did you mean models/dream.safetensors?"),
        ("models/my model", "there is no file or folder models/my model"),
        ("models/", "there is no file or folder models/|is not a diffusers folder"),
    ],
)
def test_a_mistyped_file_is_no_model_of_the_hub(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dream.safetensors").write_text("")
    for read in (expunge.load, Checkpoint.find):
        with pytest.raises(ExpungeError, match=message.replace("?", r"\?")):
            read(name)
    assert loading.is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert loading.is_hub_id("black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_auto_is_what_the_processor_multiplies_faster(fast, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert is_bfloat16_fast("cpu") == fast
    assert read_autocast("auto") == (torch.bfloat16 if fast else None)
    assert read_autocast(None) is None
    with pytest.raises(ExpungeError, match="'bfloat61'.*bfloat16"):
        read_autocast("bfloat61")
    if fast:
        assert read_autocast("bfloat16") == torch.bfloat16
    else:
        with pytest.warns(ExpungeWarning, match="no bfloat16 and draws slower"):
            assert read_autocast("bfloat16") == torch.bfloat16


def test_a_device_without_a_known_format_has_no_fast_bfloat16():
    assert not is_bfloat16_fast("meta")
