"""Tensors read and copied one at a time, scaled ones by their scales."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from expunge import Concept, ExpungeError, Problem
from expunge.checkpoints import safetensors_io
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.checkpoints.undo import undo
from tiny import single_file

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship",))

UNET = "unet/diffusion_pytorch_model"


KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def test_tensors_are_copied_byte_for_byte(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16),
             "c": torch.tensor(4), "e": torch.zeros(0, 3)}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    changed = {"b": lambda b: b * 2, "a": lambda a: a + 1}
    safetensors_io.copy_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", changed, {"by": "us"}
    )
    new = load_file(tmp_path / "b.safetensors")
    assert torch.equal(new["a"], state["a"] + 1)
    assert torch.equal(new["b"], state["b"] * 2)
    assert torch.equal(new["c"], state["c"])
    assert new["e"].shape == (0, 3)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    safetensors_io.copy_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", {})
    assert load_file(tmp_path / "c.safetensors").keys() == state.keys()
    with pytest.raises(ExpungeError, match="never written to"):
        safetensors_io.copy_file(tmp_path / "a.safetensors", tmp_path / "a.safetensors", {})
    with pytest.raises(ExpungeError, match="no tensor z"):
        safetensors_io.copy_file(
            tmp_path / "a.safetensors", tmp_path / "d.safetensors", {"z": lambda z: z}
        )
    assert not (tmp_path / "d.safetensors").exists()


def scaled_file(path, to, scale="scale_weight", by_row=False, order=1, mark=True):
    """A single file with its linear layers' weights as scaled fp8, and what they stand for."""
    state, meant = {}, {}
    for name, tensor in load_file(path).items():
        if (
            not name.startswith("model.diffusion_model")
            or not name.endswith(".weight")
            or tensor.ndim != 2
        ):
            state[name] = meant[name] = tensor
            continue
        size = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().amax()
        factor = (size / 448).float()
        stored = (tensor.float() / factor).to(torch.float8_e4m3fn)
        beside = {name.removesuffix("weight") + scale: factor if by_row else factor.reshape(())}
        both = [{name: stored}, beside][::order]
        state |= both[0] | both[1]
        state[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
        meant[name] = stored.float() * factor
    if mark:
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({k: v.contiguous() for k, v in state.items()}, to, {"format": "pt"})
    return meant


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    single_file(tiny_pipeline(), path)
    return path


@pytest.mark.parametrize(
    ("scale", "by_row"),
    [("scale_weight", False), ("weight_scale", False), ("weight_scale", True), ("scale_weight", True)],
)
def test_scaled_weights_are_read_by_their_scales(plain, folder, tmp_path, scale, by_row):
    path = tmp_path / "fp8.safetensors"
    meant = scaled_file(plain, path, scale, by_row)
    assert torch.equal(Checkpoint.find(path).read(LAYER), meant[KEY])
    model = expunge.load(path, config=folder)
    assert torch.equal(model.weight(LAYER), meant[KEY])
    edit = expunge.erase(model, PROBLEM)
    assert Checkpoint.find(path).fits(edit)
    # A LoRA made from it does what one made from the same numbers unscaled does.
    save_file(meant, tmp_path / "meant.safetensors", {"format": "pt"})
    for name in ("fp8", "meant"):
        how = {"rank": 4, "dtype": torch.float32}
        export(
            edit, "kohya", tmp_path / f"{name}.safetensors", tmp_path / f"{name}-l.safetensors", **how
        )
    one, other = (load_file(tmp_path / f"{name}-l.safetensors") for name in ("fp8", "meant"))
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize(("by_row", "order"), [(False, 1), (True, 1), (False, -1), (True, -1)])
def test_scaled_weights_are_written_by_their_scales(plain, folder, tmp_path, by_row, order):
    path, out = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    meant = scaled_file(plain, path, by_row=by_row, order=order)
    edit = expunge.erase(expunge.load(path, config=folder), PROBLEM)
    export(edit, "safetensors", path, out)
    old, new = load_file(path), load_file(out)
    assert list(old) == list(new)
    assert all(old[key].dtype == new[key].dtype for key in old)
    (change,) = edit.changes
    wanted = meant[KEY] @ change.matrix.float()
    before, after = Checkpoint.find(path), Checkpoint.find(out)
    got = after.read(LAYER)
    # One part in sixteen is what a number of this format can be off when rounded up or down.
    assert float((got - wanted).norm() / wanted.norm()) < 0.06
    along = total = 0.0  # over all layers: each is rounded at random, and right in the mean
    for layer in change.layers:
        old_one = before.read(layer, "weight")
        should = old_one @ change.matrix.float() - old_one
        along += float(((after.read(layer, "weight") - old_one) * should).sum())
        total += float(should.square().sum())
    assert along / total == pytest.approx(1, abs=0.1)
    undo(out, tmp_path / "back.safetensors", original=path)
    back = load_file(tmp_path / "back.safetensors")
    assert all(
        torch.equal(t.view(torch.uint8), back[k].view(torch.uint8)) for k, t in old.items() if t.ndim
    )
    assert all(torch.equal(t.reshape(-1), back[k].reshape(-1)) for k, t in old.items() if "scale" in k)


def test_a_scale_grows_with_its_weight(tmp_path):
    weight, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.tensor(0.5)
    for scales in (scale, torch.full((6, 1), 0.5)):
        save_file({"a.scale_weight": scales, "a.weight": weight, "b": torch.ones(3)}, tmp_path / "x")
        larger = torch.randn(6, 4) * 3000
        safetensors_io.copy_file(tmp_path / "x", tmp_path / "y", {"a.weight": lambda t, to=larger: to})
        got = safetensors_io.read_tensor(tmp_path / "y", "a.weight")
        assert bool(((got - larger).abs() <= larger.abs() / 8 + 1).all())
        assert torch.equal(load_file(tmp_path / "y")["b"], torch.ones(3))


def test_scales_that_one_number_a_row_cannot_be(plain, folder, tmp_path):
    state = load_file(plain)
    fp8 = state[KEY].to(torch.float8_e4m3fn)
    stem = KEY.removesuffix("weight")
    for more, message in (
        ({KEY: fp8, f"{stem}weight_scale_inv": torch.ones(2, 2)}, "scaled in blocks"),
        ({KEY: fp8, f"{stem}weight_scale": torch.ones(16, 4)}, "scaled in blocks"),
        ({KEY: fp8, f"{stem}weight_scale": torch.ones(()), f"{stem}weight_scale_2": torch.ones(())},
         "scaled in blocks"),
        ({KEY: state[KEY].to(torch.int8)}, "is quantised .stored as I8."),
        ({KEY: torch.zeros(64, 1, dtype=torch.uint8)}, "is quantised .stored as U8."),
    ):  # fmt: skip
        path = tmp_path / "odd.safetensors"
        save_file(state | more, path, {"format": "pt"})
        with pytest.raises(ExpungeError, match=message):
            expunge.load(path, config=folder)
        with pytest.raises(ExpungeError, match=message):
            Checkpoint.find(path).read(LAYER)


def test_scaled_weights_in_a_folder_are_not_read_as_plain_ones(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "fp8")
    file = path / f"{UNET}.safetensors"
    state = load_file(file)
    key = LAYER.removeprefix("unet.") + ".weight"
    state[key] = (state[key] / 0.25).to(torch.float8_e4m3fn)
    state[key.removesuffix("weight") + "scale_weight"] = torch.tensor(0.25)
    save_file(state, file, {"format": "pt"})
    read = Checkpoint.find(path).read(LAYER)
    assert torch.equal(read, state[key].float() * 0.25)
    with pytest.raises(ExpungeError, match="scaled eight-bit weights, which diffusers reads without"):
        expunge.load(path)


def test_the_running_mean_is_erased_too(plain, folder, tmp_path):
    state = load_file(plain)
    for name in list(state):
        if name.startswith("model.diffusion_model."):
            state["model_ema." + name.removeprefix("model.").replace(".", "")] = 0.5 * state[name]
    said = {"modelspec.title": "dream", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "2", "k": "v"}
    save_file(state, tmp_path / "ema.safetensors", said)
    edit = expunge.erase(expunge.load(tmp_path / "ema.safetensors", config=folder), PROBLEM)
    export(edit, "safetensors", tmp_path / "ema.safetensors", tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    mean = "model_ema." + KEY.removeprefix("model.").replace(".", "")
    (change,) = edit.changes
    assert torch.equal(new[mean], change.weight(state[mean]))
    assert torch.equal(new[KEY], change.weight(state[KEY]))
    assert len({key for key in state if not torch.equal(state[key], new[key])}) == 28
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        told = file.metadata()
    assert told["modelspec.title"] == "dream without airplane"
    assert told["k"] == "v"
    assert not {"modelspec.hash_sha256", "sshs_model_hash"} & told.keys()
    undo(
        tmp_path / "out.safetensors",
        tmp_path / "back.safetensors",
        original=tmp_path / "ema.safetensors",
    )
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(tensor, back[key]) for key, tensor in state.items())
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "dream"


@pytest.mark.parametrize("by_row", [False, True])
def test_equal_scaled_files_are_rounded_alike_wherever_they_lie(tmp_path, by_row):
    torch.manual_seed(0)
    scale = torch.full((8, 1) if by_row else (), 0.01)
    state = {"a.weight": torch.randn(8, 64).to(torch.float8_e4m3fn), "a.scale_weight": scale}
    written = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "x.safetensors")
        target = tmp_path / name / "y.safetensors"
        changed = {"a.weight": lambda w: w * 1.01}
        safetensors_io.copy_file(tmp_path / name / "x.safetensors", target, changed)
        written.append(target.read_bytes())
    assert written[0] == written[1]
    after = load_file(tmp_path / "here" / "y.safetensors")
    drift = (after["a.weight"].float() / state["a.weight"].float()).nanmean()
    assert not torch.equal(after["a.weight"].float(), state["a.weight"].float())
    assert drift == pytest.approx(1.01, abs=0.01)
