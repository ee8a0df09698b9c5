"""Folders with several copies of their weights, with files nobody reads, and with scaled weights."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from expunge import Concept, ExpungeError, Problem
from expunge.checkpoints import loading
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.checkpoints.undo import undo
from expunge.checkpoints.variants import check_folder, find_weight_files, read_variants
from expunge.cli.main import main

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship",))
UNET = "unet/diffusion_pytorch_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder as Stable Diffusion 1.5's own: plain, .fp16 and .non_ema, the last with other weights."""
    path = tmp_path_factory.mktemp("several") / "sd"
    pipe = tiny_pipeline()
    pipe.save_pretrained(path)
    tiny_pipeline(seed=5).unet.save_pretrained(path / "unet", variant="non_ema")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        name = {pipe.unet: "unet", pipe.vae: "vae"}.get(part, "text_encoder")
        part.half().save_pretrained(path / name, variant="fp16")
    return path


def sharded(path, variant=None):
    """The same U-Net in shards, with an index."""
    unet = tiny_pipeline().unet
    (path / f"{UNET}{'.' + variant if variant else ''}.safetensors").unlink(missing_ok=True)
    unet.save_pretrained(path / "unet", variant=variant, max_shard_size="40KB")
    assert len(list((path / "unet").glob("*-of-*"))) > 1


def of_diffusers(folder, variant=None):
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, variant=variant, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True
    )
    return {f"unet.{key}": t for key, t in pipe.unet.state_dict().items()} | {
        f"text_encoder.{key}": t for key, t in pipe.text_encoder.state_dict().items()
    }


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("shards", [False, True])
def test_what_diffusers_reads_is_read(several, tmp_path, variant, shards):
    folder = several
    if shards:
        folder = shutil.copytree(several, tmp_path / "sharded")
        sharded(folder)
    wanted = of_diffusers(folder, variant)
    checkpoint = Checkpoint.find(folder, variant=variant)
    model = expunge.load(folder, variant=variant)
    for key, tensor in wanted.items():
        layer, _, parameter = key.rpartition(".")
        assert torch.equal(checkpoint.read(layer, parameter).to(tensor.dtype), tensor), key
        assert checkpoint.shape(layer, parameter) == tuple(tensor.shape)
    for part in ("unet", "text_encoder"):
        for key, tensor in getattr(model.pipe, part).state_dict().items():
            assert torch.equal(tensor, wanted[f"{part}.{key}"].to(tensor.dtype)), key
    size = checkpoint.count_bytes("unet")
    assert size == pytest.approx(sum(t.nbytes for k, t in wanted.items() if "unet" in k), rel=0.5)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_an_edit_fits_what_it_was_made_from_and_undo_puts_it_back(several, tmp_path, variant):
    model = expunge.load(several, variant=variant)
    edit = expunge.erase(model, PROBLEM)
    on_disk = Checkpoint.find(several, variant=variant)
    assert on_disk.fits(edit)
    alone = expunge.erase(on_disk.load_text_model(), PROBLEM)
    assert alone.record.base == edit.record.base
    export(edit, "diffusers", on_disk, tmp_path / "out")
    # None of the variants keeps what is erased: each has the change on top of its own weights.
    for name in ("", ".fp16", ".non_ema"):
        file = f"{UNET}{name}.safetensors"
        old, new = load_file(several / file), load_file(tmp_path / "out" / file)
        differing = {key for key in old if not torch.equal(old[key], new[key])}
        assert len(differing) == 14, name
        (change,) = edit.changes
        key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        wanted = (old[key].float() @ change.matrix.float()).to(new[key].dtype)
        assert torch.equal(new[key], wanted)
    erased = expunge.load(tmp_path / "out", variant=variant)
    with edit.apply(model):
        layer = edit.changes[0].layers[0]
        weight = model.pipe.unet.get_submodule(layer.removeprefix("unet.")).weight
        torch.testing.assert_close(erased.weight(layer), weight, rtol=1e-3, atol=1e-4)
    back = Checkpoint.find(tmp_path / "out", variant=variant)
    undo(back, tmp_path / "back", original=on_disk)
    for path in sorted(several.rglob("*.safetensors")):
        again = load_file(tmp_path / "back" / path.relative_to(several))
        assert all(torch.equal(t, again[key]) for key, t in load_file(path).items()), path


def test_undo_says_when_the_original_lacks_a_variant(several, folder, tmp_path):
    edit = expunge.erase(expunge.load(several), PROBLEM)
    export(edit, "diffusers", several, tmp_path / "out")
    with pytest.raises(ExpungeError, match="tiny has no fp16 weights .* or the edit"):
        undo(tmp_path / "out", tmp_path / "back", original=folder)
    undo(tmp_path / "out", tmp_path / "back", edit=edit)
    for name in ("", ".fp16", ".non_ema"):
        file = f"{UNET}{name}.safetensors"
        for key, tensor in load_file(tmp_path / "back" / file).items():
            torch.testing.assert_close(tensor, load_file(several / file)[key], rtol=1e-2, atol=1e-3)


def test_a_folder_of_one_variant_needs_no_word(several, tmp_path):
    folder = shutil.copytree(several, tmp_path / "half")
    for file in (f"{UNET}.safetensors", f"{UNET}.non_ema.safetensors", "text_encoder/model.safetensors"):
        (folder / file).unlink()
    assert read_variants(folder) == {
        "vae": "", "text_encoder": "fp16", "unet": "fp16"
    }  # fmt: skip
    half = expunge.load(several, variant="fp16")
    read = expunge.load(folder)
    layer = read.text_entries()[0].layer
    assert torch.equal(read.weight(layer), half.weight(layer))
    assert torch.equal(Checkpoint.find(folder).read(layer).float(), half.weight(layer))
    edit = expunge.erase(read, PROBLEM)
    export(edit, "diffusers", folder, tmp_path / "out")
    undo(tmp_path / "out", tmp_path / "back", original=several)
    again = load_file(tmp_path / "back" / f"{UNET}.fp16.safetensors")
    assert all(
        torch.equal(t, again[k]) for k, t in load_file(folder / f"{UNET}.fp16.safetensors").items()
    )


def test_a_variant_in_shards_alone(several, tmp_path):
    folder = shutil.copytree(several, tmp_path / "shards")
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    sharded(folder, "fp16")
    assert read_variants(folder)["unet"] == "fp16"
    wanted = tiny_pipeline().unet.state_dict()
    read = expunge.load(folder).pipe.unet.state_dict()
    assert all(torch.equal(tensor, read[key]) for key, tensor in wanted.items())


def test_which_variant_is_a_question_where_none_is_plain(several, tmp_path):
    folder = shutil.copytree(several, tmp_path / "two")
    (folder / f"{UNET}.safetensors").unlink()
    for read in (expunge.load, Checkpoint.find):
        with pytest.raises(ExpungeError, match=r"variants fp16 and non_ema .* say which with --variant"):
            read(folder)
        with pytest.raises(ExpungeError, match="no variant 'fp61'; did you mean 'fp16'"):
            read(several, variant="fp61")
    with pytest.raises(ExpungeError, match="a single file; only a folder has the variant"):
        loading.find_source(several / f"{UNET}.safetensors", "fp16")
    read = Checkpoint.find(folder, variant="non_ema").read("unet.conv_in")
    assert torch.equal(read, tiny_pipeline(seed=5).unet.conv_in.weight)


def test_the_command_takes_a_variant(several, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    how = ["--model", str(several), "--variant", "non_ema"]
    assert main(["erase", "uce", "--concept", "airplane=sky", "-o", "e.safetensors", *how]) == 0
    edit = expunge.Edit.load("e.safetensors")
    assert Checkpoint.find(several, variant="non_ema").fits(edit)
    assert not Checkpoint.find(several).fits(edit)
    assert main(["export", "e.safetensors", "--to", "diffusers", "-o", "out", *how]) == 0
    assert main(["erase", "uce", "--concept", "ship=sky", "-o", "f.safetensors", *how[:-1], "x"]) == 2
    assert "no variant 'x'; known: fp16, non_ema" in capsys.readouterr().err


def test_a_stale_file_beside_shards_is_not_read(several, tmp_path):
    folder = shutil.copytree(several, tmp_path / "stale")
    sharded(folder)
    save_file(tiny_pipeline(seed=9).unet.state_dict(), folder / f"{UNET}.safetensors")
    model = expunge.load(folder)
    assert torch.equal(Checkpoint.find(folder).read("unet.conv_in"), model.pipe.unet.conv_in.weight)
    assert torch.equal(model.pipe.unet.conv_in.weight, of_diffusers(folder)["unet.conv_in.weight"])
    export(expunge.erase(model, PROBLEM), "diffusers", folder, tmp_path / "out")
    assert not (tmp_path / "out" / f"{UNET}.safetensors").exists()  # it would keep what is erased
    assert (
        expunge.load(tmp_path / "out").network.conv_in.weight.shape == model.network.conv_in.weight.shape
    )


# Files that nobody reads, and pointers where files should be.


def test_what_nobody_reads_blocks_nothing(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "messy")
    for name in (
        "unet/._diffusion_pytorch_model.safetensors",
        "._model_index.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/flax_model.msgpack",
        "unet/diffusion_pytorch_model.bin",
        "unet/old-backup.safetensors",
        "v1-5-pruned.safetensors",
        "safety_checker/model.safetensors",
        "image_encoder/model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "tokenizer/.cache.json",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(POINTER)
    (path / "safety_checker" / "config.json").write_text("{}")
    (path / "unet" / "._x.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (path / "model_index.json").write_text(json.dumps(index))
    model = expunge.load(path)
    edit = expunge.erase(Checkpoint.find(path).load_text_model(), PROBLEM)
    assert edit.fits(model)
    export(edit, "diffusers", path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("._*"))
    assert not (tmp_path / "out" / "unet" / "old-backup.safetensors").exists()
    assert not (tmp_path / "out" / "text_encoder" / "model.fp16.safetensors").exists()
    assert torch.equal(
        expunge.load(tmp_path / "out").network.conv_in.weight, model.network.conv_in.weight
    )


@pytest.mark.parametrize(
    "name", [f"{UNET}.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json",
             "unet/config.json", "tokenizer/tokenizer.json"]
)  # fmt: skip
def test_a_pointer_that_is_needed_says_what_to_do(folder, tmp_path, name):
    path = shutil.copytree(folder, tmp_path / "lfs")
    (path / name).write_text(POINTER)
    for read in (expunge.load, Checkpoint.find):
        with pytest.raises(ExpungeError, match=f"{name} is a pointer of Git LFS .*`git lfs pull`"):
            read(path)


def test_checks_of_folders(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "broken")
    file = path / f"{UNET}.safetensors"
    whole = file.read_bytes()
    file.unlink()
    torch.save({}, path / f"{UNET}.bin")
    with pytest.raises(ExpungeError, match=r"diffusion_pytorch_model\.bin is pickled"):
        check_folder(path)
    index = path / f"{UNET}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (path / "unet" / "1.safetensors").write_bytes(whole)
    with pytest.raises(ExpungeError, match=r"2\.safetensors is missing"):
        check_folder(path)
    for text in ("{}", "[", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ExpungeError, match="not an index of weight files"):
            check_folder(path)
    assert find_weight_files(path / "nowhere") == {}


# Mistyped names.


# Scaled eight-bit weights.


# A running mean beside the weights.
