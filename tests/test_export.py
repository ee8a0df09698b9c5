"""Edits as other programs load them: written, read back by diffusers' own loaders, and undone."""

import dataclasses
import hashlib
import re
import shutil
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Probe, Problem
from expunge.base import registry
from expunge.changes import Dense, Gated, LowRank, Right, find_layer
from expunge.checkpoints import hub, safetensors_io
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.cost_estimate import estimate, estimate_model, list_resident_parts
from expunge.checkpoints.export import export
from expunge.checkpoints.linearize import fit_static_weights
from expunge.checkpoints.merge import merge
from expunge.checkpoints.text_moments import read_text_moments
from expunge.checkpoints.undo import undo
from expunge.families.flux import Flux
from expunge.families.sd3 import SD3
from expunge.families.sdxl import SDXL
from expunge.fingerprint import hash_base, list_places, make_base_reader
from expunge.ops.low_rank import factor_shared
from tiny import PIPELINES, sdxl, single_file

PROBE = Probe.of("airplane", 2, num_inference_steps=2)


def edited(model, changes):
    """An edit of these changes, made from this model."""
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    record = expunge.erase(model, problem, registry.get("methods", "uce")(general=2)).record
    object.__setattr__(record, "base", hash_base(make_base_reader(model.pipe), list_places(changes)))
    return Edit(tuple(changes), record)


def low_rank(model, rank=2):
    """A change of low rank for each layer through which text enters."""
    torch.manual_seed(7)
    return [
        LowRank((e.layer,), torch.randn(w.shape[0], rank) / 3, torch.randn(rank, w.shape[1]) / 3)
        for e in (*model.text_entries(), *model.pooled_entries())
        for w in [model.weight(e.layer)]
    ]


def drawn(model, *edits):
    with model.using(*edits):
        return model.draw(PROBE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model of each family, as a diffusers folder; sizes that its configuration does not hold."""
    made = {}
    for name, make in PIPELINES.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(made[name])
        (made[name] / "expunge.json").write_text('{"sample_size": 8, "num_inference_steps": 2}')
    return made


@pytest.fixture
def uce(folder):
    model = expunge.load(folder)
    return model, expunge.erase(model, Problem((Concept("airplane", "sky"),), ("ship", "bird")))


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


@pytest.mark.parametrize("name", list(PIPELINES))
@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_a_lora_of_a_low_rank_edit_is_exact(tiny, name, to, tmp_path):
    if (name, to) == ("sd3", "kohya"):
        pytest.skip("diffusers reads no SD 3 LoRA in kohya's naming; its names are tested below")
    model = expunge.load(tiny[name])
    edit = edited(model, low_rank(model))
    path = tmp_path / "x.safetensors"
    done = export(edit, to, tiny[name], path, dtype=torch.float32)
    assert done.error == 0
    assert "rank 2" in done.notes[0]
    fused = expunge.load(tiny[name], lora=[(path, 1.0)])
    wanted = drawn(model, edit)
    assert (wanted - model.draw(PROBE)).abs().max() > 1e-3
    torch.testing.assert_close(fused.draw(PROBE), wanted, rtol=0, atol=1e-3)
    for layer, parameter in list_places(edit.changes):
        with model.using(edit):
            torch.testing.assert_close(fused.weight(layer), model.weight(layer), rtol=1e-4, atol=1e-5)
        assert parameter == "weight"


@pytest.mark.parametrize("name", list(PIPELINES))
@pytest.mark.parametrize("to", ["lora", "kohya"])
def test_diffusers_loads_every_key(tiny, name, to, tmp_path):
    pytest.importorskip("peft")
    if to == "kohya" and name in ("sd3", "flux"):
        pytest.skip("diffusers leaves these layers of kohya's naming out; names are tested below")
    model = expunge.load(tiny[name])
    edit = edited(model, low_rank(model))
    path = tmp_path / "x.safetensors"
    export(edit, to, tiny[name], path, dtype=torch.float32)
    wanted = drawn(model, edit)
    pipe = PIPELINES[name]()
    pipe.load_lora_weights(str(path))
    loaded = {key for key, _ in getattr(pipe, model.denoiser).named_parameters() if "lora_" in key}
    assert len(loaded) == 2 * len(list_places(edit.changes))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    again = expunge.load(pipe)
    again.sample_size = 8
    torch.testing.assert_close(again.draw(PROBE), wanted, rtol=0, atol=1e-3)


def test_the_strength_is_the_erasures_strength(folder, uce, tmp_path):
    model, edit = uce
    export(edit, "kohya", folder, tmp_path / "x.safetensors", energy=1.0, dtype=torch.float32)
    half = expunge.load(folder, lora=[(tmp_path / "x.safetensors", 0.5)])
    layer = edit.changes[0].layers[0]
    with model.using(edit):
        whole = model.weight(layer)
    middle = (whole + model.weight(layer)) / 2
    torch.testing.assert_close(half.weight(layer), middle, rtol=1e-4, atol=1e-5)


def test_a_right_factor_leaves_as_the_lora_nearest_to_text(folder, uce, tmp_path):
    model, edit = uce
    path = tmp_path / "x.safetensors"
    whole = export(edit, "lora", folder, path, energy=1.0, dtype=torch.float32)
    assert whole.error < 1e-6
    fused = expunge.load(folder, lora=[(path, 1.0)])
    torch.testing.assert_close(fused.draw(PROBE), drawn(model, edit), rtol=0, atol=1e-3)
    done = export(edit, "lora", folder, path, rank=2, dtype=torch.float32)
    known = read_text_moments(model, edit.record.problem)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    for change in Checkpoint.find(folder).read_lora(path):
        (layer,) = change.layers
        w = model.weight(layer).double()
        delta, kept = edit.changes[0].weight(w) - w, change.up.double() @ change.down.double()
        assert change.down.shape[0] == 2
        best = (
            torch.linalg.svdvals(delta @ torch.linalg.cholesky(known[layer].metric))[2:].square().sum()
        )
        missed = ((delta - kept) @ known[layer].metric * (delta - kept)).sum()
        torch.testing.assert_close(missed, best, rtol=1e-4, atol=1e-10)
        for i, moments in enumerate((torch.eye(len(w.T)), known[layer].erased, known[layer].retained)):
            for k, some in enumerate((delta - kept, delta)):
                sums[i, k] += (some @ moments.double() * some).sum()
    shares = (sums[:, 0] / sums[:, 1]).tolist()
    assert done.error == pytest.approx(shares[0] ** 0.5, rel=1e-4)
    assert done.erasure_lost == pytest.approx(shares[1], rel=1e-4)
    assert done.drift_lost == pytest.approx(shares[2], rel=1e-4)
    assert 0 < done.erasure_lost < done.error**2
    assert f"{done.error:.2%}" in done.notes[1]
    assert done.notes[1] in path.with_suffix(".md").read_text()


def test_energy_sets_the_rank(folder, uce, tmp_path):
    _, edit = uce
    ranks = []
    for energy in (0.5, 0.9, 1.0):
        done = export(edit, "lora", folder, tmp_path / "x.safetensors", energy=energy)
        ranks.append(int(re.search(r"rank (\d+)", done.notes[0])[1]))
        assert done.erasure_lost + done.drift_lost <= 2 * (1 - energy) + 1e-6
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[2]


def test_convolutions_and_what_a_lora_cannot_hold(folder, tmp_path):
    model = expunge.load(folder)
    conv, w = "unet.conv_in", model.weight("unet.conv_in")
    changes = [
        LowRank((conv,), torch.randn(w.shape[0], 2), torch.randn(2, w[0].numel())),
        Dense((conv,), torch.randn(w.shape[0]), parameter="bias"),
    ]
    edit = edited(model, changes)
    path = tmp_path / "x.safetensors"
    done = export(edit, "lora", folder, path, dtype=torch.float32)
    assert "Left out, since a LoRA cannot hold them: 1 biases and norms." in done.notes
    assert load_file(path)[f"{conv}.lora.down.weight"].shape == (2, *w.shape[1:])
    fused = expunge.load(folder, lora=[(path, 1.0)])
    torch.testing.assert_close(fused.weight(conv), changes[0].weight(w), rtol=1e-4, atol=1e-5)


# Rank: what is kept, what it costs, and what is only rounding.


def test_rounding_takes_no_rank(folder, tmp_path):
    """A matrix in single precision differs from the identity everywhere; two directions are real."""
    model = expunge.load(folder)
    layers = tuple(entry.layer for entry in model.text_entries())
    torch.manual_seed(0)
    drawn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    turned = drawn @ (torch.eye(32) + 0.3 * torch.diag_embed(torch.arange(32) < 2).double()) @ drawn.T
    matrix = turned.float()
    assert torch.linalg.matrix_rank(matrix.double() - torch.eye(32), rtol=1e-12) > 20
    edit = edited(model, [Right(layers, matrix)])
    done = export(edit, "lora", folder, tmp_path / "x.safetensors", energy=1.0, dtype=torch.float32)
    assert "rank 2 on" in done.notes[0]
    assert done.error < 1e-5
    w = model.weight(layers[0])
    halves = (w @ matrix).half()
    dense = edited(model, [Dense((layers[0],), halves)])
    done = export(dense, "lora", folder, tmp_path / "x.safetensors", energy=1.0, dtype=torch.float32)
    assert "rank 2 on" in done.notes[0]


def test_layers_of_one_matrix_are_decomposed_once(folder, uce, tmp_path, monkeypatch):
    asked = []

    def counted(matrix, *given):
        asked.append(matrix)
        return factor_shared(matrix, *given)

    monkeypatch.setattr("expunge.checkpoints.lora.truncate.shared", counted)
    _, edit = uce
    (change,) = edit.changes
    done = export(edit, "kohya", folder, tmp_path / "x.safetensors", rank=2)
    assert "rank 2 on 14 layers" in done.notes[0]
    assert len(asked) == 1
    assert torch.equal(asked[0], change.matrix.double())


def test_mixed_changes_are_cut_in_the_same_metric(folder, tmp_path):
    model = expunge.load(folder)
    (first, *_) = [entry.layer for entry in model.text_entries()]
    torch.manual_seed(0)
    w = model.weight(first)
    changes = [
        LowRank((first,), torch.randn(w.shape[0], 2) / 3, torch.randn(2, 32) / 3),
        Right((first,), torch.eye(32) + 0.1 * torch.randn(32, 32)),
        LowRank((first,), torch.randn(w.shape[0], 1) / 3, torch.randn(1, 32) / 3),
    ]
    edit = edited(model, changes)
    export(edit, "kohya", folder, tmp_path / "x.safetensors", rank=3, dtype=torch.float32)
    (found,) = Checkpoint.find(folder).read_lora(tmp_path / "x.safetensors")
    after = w.double()
    for change in changes:
        after = change.weight(after)
    metric = read_text_moments(model, edit.record.problem)[first].metric
    delta = after - w.double()
    best = torch.linalg.svdvals(delta @ torch.linalg.cholesky(metric))[3:].square().sum()
    left = delta - found.up.double() @ found.down.double()
    torch.testing.assert_close(((left @ metric) * left).sum(), best, rtol=1e-4, atol=1e-9)


def test_a_single_file_without_texts_is_cut_in_norm(single, folder, tmp_path):
    edit = expunge.erase(expunge.load(single, config=folder), Problem((Concept("airplane", "sky"),)))
    done = export(edit, "kohya", single, tmp_path / "x.safetensors", rank=2)
    assert "no text was read" in done.notes[1]
    assert done.erasure_lost is None
    told = export(edit, "kohya", single, tmp_path / "x.safetensors", rank=2, config=folder)
    assert told.error >= done.error - 1e-6  # in norm the other is the best there is
    assert 0 < told.erasure_lost < 1


def test_numbers_too_large_for_halves(folder, tmp_path):
    model = expunge.load(folder)
    edit = edited(model, [LowRank(("unet.conv_in",), 1e6 * torch.ones(8, 1), 1e6 * torch.ones(1, 36))])
    with pytest.raises(ExpungeError, match="too large for float16; write the LoRA in float32"):
        export(edit, "kohya", folder, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    export(edit, "kohya", folder, tmp_path / "x.safetensors", dtype=torch.bfloat16)


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


def single_in(path, dtype):
    """The tiny model as a single file, in a number format."""
    single_file(tiny_pipeline(), path)
    save_file({key: t.to(dtype) for key, t in load_file(path).items()}, path, {"format": "pt"})
    return path


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


def test_a_u_nets_names_are_those_of_diffusers_converter():
    for family, pipe in (
        (SDXL, sdxl()),
        (registry.get("families", "stable_diffusion"), tiny_pipeline()),
    ):
        config, state = pipe.unet.config, pipe.unet.state_dict()
        originals = {}
        for key, tensor in state.items():
            layer, _, parameter = key.rpartition(".")
            name = family.ldm_layer_name(layer, config)
            assert name is not None, key
            originals[f"model.diffusion_model.{name}.{parameter}"] = tensor
        assert len(originals) == len(state)
        back = single_file_utils.convert_ldm_unet_checkpoint(dict(originals), config)
        assert {key: id(tensor) for key, tensor in back.items()} == {k: id(t) for k, t in state.items()}
        told = family.infer_config(list(originals))
        assert told["layers_per_block"] == config.layers_per_block
        for key in state:
            layer = key.rpartition(".")[0]
            assert family.ldm_layer_name(layer, told) == family.ldm_layer_name(layer, config)


class Fabricating(dict):
    """A checkpoint that has whatever tensor it is asked for, and remembers which it gave."""

    def __init__(self, *names):
        super().__init__(dict.fromkeys(names))
        self.given = {}

    def __missing__(self, key):
        return self.pop(key)

    def __getitem__(self, key):
        return self.pop(key)

    def pop(self, key, *_):
        return self.given.setdefault(key, torch.zeros(21504, 1))


@pytest.mark.parametrize(
    ("family", "convert", "names", "prefixes"),
    [
        (Flux, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
         ("double_blocks.0.x", "double_blocks.1.x", "single_blocks.0.x", "guidance_in.x"), ()),
        (SD3, single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
         ("joint_blocks.0.x", "joint_blocks.1.x"), ()),
    ],
)  # fmt: skip
def test_a_transformers_names_are_those_of_diffusers_converter(family, convert, names, prefixes):
    checkpoint = Fabricating(*names)
    back = convert(checkpoint)
    named = {id(tensor): key for key, tensor in checkpoint.given.items()}
    whole = {key: named[id(tensor)] for key, tensor in back.items() if id(tensor) in named}
    seen = 0
    for key, original in whole.items():
        layer, _, parameter = key.rpartition(".")
        name = family.ldm_layer_name(layer, {})
        if name is not None:
            assert f"{name}.{parameter}" == original
            seen += 1
    assert seen >= 20
    for entry in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
        assert f"{entry}.weight" in whole
        assert family.kohya_layer_name(entry, {}).startswith("lora_unet_")
    # What is part of a larger layer there has no name of its own.
    assert family.ldm_layer_name("transformer_blocks.0.attn.to_q", {}) is None


def test_kohyas_names():
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    sd = registry.get("families", "stable_diffusion")
    assert (
        sd.kohya_layer_name(key, {})
        == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    )
    assert SDXL.kohya_layer_name(key, {}) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert SDXL.kohya_layer_name("add_embedding.linear_1", {}) == "lora_unet_label_emb_0_0"
    assert Flux.kohya_layer_name("context_embedder", {}) == "lora_unet_txt_in"
    assert (
        Flux.kohya_layer_name("time_text_embed.text_embedder.linear_1", {})
        == "lora_unet_vector_in_in_layer"
    )
    assert SD3.kohya_layer_name("context_embedder", {}) == "lora_unet_context_embedder"


# A single file.


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A tiny Stable Diffusion as a single file, as from the first code, in half precision."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    single_file(tiny_pipeline().to(torch.float16), path)
    return path


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


def slow_fusion(model, layer, edits, prompts, kept, ridge):
    """The fusion's equation, summed row by row, with an explicit inverse."""
    w = model.weight(layer).double()
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    left, right = ridge * w + w @ kept, ridge * eye + kept
    for edit, some in zip(edits, prompts, strict=True):
        with model.using(edit):
            own = model.weight(layer).double()
        for prompt in some:
            e = model.encode([prompt]).embeddings[0].double()
            left = left + own @ e.T @ e / len(some)
            right = right + e.T @ e / len(some)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("kinds", ["right", "low-rank", "dense"])
def test_merged_edits_answer_for_each(model, kinds):
    from expunge.erasing.caption_gram import compute_prior, read_captions
    from expunge.erasing.prompt_templates import TEMPLATES
    from expunge.runtime.context import RunContext

    method = registry.get("methods", "uce")(ridge=1.0, general=2)
    edits = [expunge.erase(model, Problem((Concept(n, "sky"),)), method) for n in ("airplane", "horse")]
    layer = edits[0].changes[0].layers[0]
    if kinds != "right":
        w = model.weight(layer)
        more = {
            "low-rank": LowRank((layer,), torch.ones(w.shape[0], 1), torch.ones(1, w.shape[1]) / 9),
            "dense": Dense((layer,), w * 1.1),
        }
        edits[1] = Edit((*edits[1].changes, more[kinds]), edits[1].record)
    merged = merge(model, edits, ridge=0.3, prior_scale=0.2)
    prompts = [[t.format(name) for t in TEMPLATES["object"]] for name in ("airplane", "horse")]
    empty = model.encode([""]).embeddings[0].double()
    kept = 0.2 * (compute_prior(model, read_captions("general"), RunContext()).mean + empty.T @ empty)
    wanted = slow_fusion(model, layer, edits, prompts, kept, 0.3)
    with model.using(merged):
        found = model.weight(layer).double()
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    assert [c.name for c in merged.record.problem.erase] == ["airplane", "horse"]
    assert merged.fits(model)


def test_merging_lays_other_weights_side_by_side(model):
    one, other = low_rank(model)[:2]
    merged = merge(model, [edited(model, [one]), edited(model, [other])])
    assert [c.layers for c in merged.changes] == [one.layers, other.layers]
    assert torch.equal(merged.changes[0].up, one.up)
    conv, twice = (
        LowRank(("unet.conv_in",), scale * torch.ones(8, 1), torch.ones(1, 36)) for scale in (1, 2)
    )
    with pytest.raises(ExpungeError, match="none through which text enters"):
        merge(model, [edited(model, [conv]), edited(model, [twice])])
    with pytest.raises(ExpungeError, match="two edits or more"):
        merge(model, [edited(model, [conv])])
    one = edited(model, [conv])
    with pytest.raises(ExpungeError, match="are the same one"):
        merge(model, [one, one])


# Gates.


def gated(model):
    """A change that stands before every layer through which text enters, always half open."""
    width = model.weight(model.text_entries()[0].layer).shape[1]
    torch.manual_seed(3)
    down = torch.nn.functional.normalize(torch.randn(1, width), dim=1)
    return Gated(
        tuple(entry.layer for entry in model.text_entries()),
        direction=torch.zeros(1, width),
        centre=torch.zeros(1),
        slope=torch.ones(1),
        up=down.T.contiguous(),
        down=down,
        goal=torch.zeros(1),
        owner=torch.zeros(1, dtype=torch.int64),
    )


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


def test_merging_keeps_gates(folder, uce):
    model, edit = uce
    gate = gated(model)
    merged = merge(model, [edit, edited(model, [gate])])
    assert torch.allclose(drawn(model, merged), drawn(model, edit, (gate,)), atol=1e-5)


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
        ("other.safetensors", "of no family that is known; known: flux, sd3, sdxl, stable_diffusion"),
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


@pytest.fixture
def on_hub(folder, tmp_path, monkeypatch):
    """A hub that has the tiny model as owner/name, at the border of its library; the fetched files."""
    there, fetched = shutil.copytree(folder, tmp_path / "there"), tmp_path / "fetched"
    file = there / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))

    def snapshot(name, *, allow_patterns, ignore_patterns):
        assert name == "owner/name"
        every = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
        kept = filter_repo_objects(every, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for path in kept:
            (fetched / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / path, fetched / path)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return there, fetched


def test_a_model_of_the_hub(on_hub, folder, tmp_path):
    model = expunge.load("owner/name")
    assert torch.equal(model.draw(PROBE), expunge.load(folder).draw(PROBE))
    assert not list(on_hub[1].rglob("*fp16*"))
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)))
    export(edit, "diffusers", "owner/name", tmp_path / "out")
    assert 'base_model: "owner/name"' in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_fetches_configurations_alone(on_hub, folder):
    checkpoint = Checkpoint.find("owner/name", weights=False)
    assert {path.name for path in on_hub[1].rglob("*") if path.is_file()} == {
        "model_index.json", "config.json"
    }  # fmt: skip
    made = estimate(checkpoint, torch.float32, "cpu")
    of_folder = estimate_model(expunge.load(folder))
    assert made.parameters == of_folder.parameters
    assert made.memory == of_folder.memory == 4 * sum(made.parameters.values())


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


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_plan_of_every_family(tiny, name):
    checkpoint = Checkpoint.find(tiny[name])
    made, text = (
        estimate(checkpoint, torch.float16, "cpu", text_alone=alone) for alone in (False, True)
    )
    assert made.parameters == estimate_model(expunge.load(tiny[name])).parameters
    assert text.parameters == {k: n for k, n in made.parameters.items() if k in ("CLIP", "T5")}
    assert ("T5" in text.parameters) == (name in ("sd3", "flux"))
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


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_closed_form_with_the_denoiser_left_on_the_disk(tiny, name, tmp_path):
    problem = Problem((Concept("airplane", "sky"),), ("ship",))
    method = registry.get("methods", "uce")(ridge=1.0, general=3)
    small = Checkpoint.find(tiny[name]).load_text_model()
    assert {p.device.type for p in small.network.parameters()} == {"meta"}
    edit = expunge.erase(small, problem, method)
    model = expunge.load(tiny[name])
    assert edit.fits(model)
    assert edit.hash == expunge.erase(model, problem, method).hash
    export(edit, "diffusers", tiny[name], tmp_path / "out")
    again = expunge.load(tmp_path / "out")
    assert torch.equal(again.draw(PROBE), drawn(model, edit))


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
