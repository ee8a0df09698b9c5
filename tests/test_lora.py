"""LoRA files of others: read whole with their own scale, or refused in a sentence."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import expunge
from conftest import tiny_pipeline
from edits import edited, gated, low_rank
from expunge import Concept, Edit, ExpungeError, ExpungeWarning, Probe, Problem
from expunge.changes import Dense, LowRank, Right, Sparse
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.export import export
from expunge.checkpoints.lora import Lora, fuse_lora, read_lora, read_lora_info
from expunge.checkpoints.lora.base_models import read_base_title
from expunge.checkpoints.merge import merge
from expunge.cli.loading_options import parse_loras

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"


def factors(rank=4, seed=0):
    """Up, (8, rank), and down, (rank, 32), for `LAYER`."""
    torch.manual_seed(seed)
    return torch.randn(8, rank), torch.randn(rank, 32)


def kohya(tmp_path, more=None, rank=4, alpha=None, metadata=None, stem=KOHYA):
    """A LoRA of one layer in kohya's naming."""
    up, down = factors(rank)
    state = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
    if alpha is not None:
        state[f"{stem}.alpha"] = torch.tensor(float(alpha))
    path = tmp_path / "theirs.safetensors"
    save_file({**state, **(more or {})}, path, metadata)
    return path


def peft(tmp_path, fields, rank=4, form="unet.{}.lora_{}.weight"):
    """A LoRA of two layers as diffusers saves it, with PEFT's configuration in its metadata."""
    state = {}
    for layer in (LAYER, LAYER.replace("to_k", "to_v")):
        up, down = factors(rank)
        state |= {form.format(layer, "B"): up, form.format(layer, "A"): down}
    path = tmp_path / "theirs.safetensors"
    save_file(state, path, {"lora_adapter_metadata": json.dumps(fields), "format": "pt"})
    return path


def moved(path, scale=1.0, layer=LAYER):
    """By what a LoRA file moves a layer of the tiny model when it is fused."""
    pipe = tiny_pipeline()
    weight = pipe.unet.get_submodule(layer).weight
    before = weight.detach().clone()
    fuse_lora(path, pipe, scale)
    return weight.detach() - before


def fused_with(path):
    """The tiny U-Net with a LoRA laid on it for good."""
    pipe = tiny_pipeline()
    fuse_lora(path, pipe)
    return pipe.unet


def test_a_pipeline_in_memory_is_taken_as_it_is(tmp_path):
    with pytest.raises(ExpungeError, match="in memory is taken as it is: .* expunge.*lora.fuse_lora"):
        expunge.load(tiny_pipeline(), lora=[(kohya(tmp_path), 1.0)])


# F2: the scale.


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 1}, 0.25),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2}}, 0.5),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {r"down_blocks\..*to_k": 12}}, 3.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}, 2.0),
        ({"unet.r": 9, "unet.lora_alpha": 8, "unet.rank_pattern": {"to_k": 4, "to_v": 4}}, 2.0),
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 6}, 1.0),
        ({}, 1.0),
    ],
)
def test_the_scale_in_the_metadata(tmp_path, fields, scale):
    up, down = factors()
    torch.testing.assert_close(moved(peft(tmp_path, fields)), scale * up @ down, rtol=1e-4, atol=1e-5)
    half = moved(peft(tmp_path, fields), 0.5)
    torch.testing.assert_close(half, 0.5 * scale * up @ down, rtol=1e-4, atol=1e-5)


def test_a_lora_that_diffusers_saved_has_diffusers_strength(tmp_path):
    mod = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True,
              "target_modules": ["attn2.to_k", "attn2.to_q"],
              "alpha_pattern": {"up_blocks.*to_k": 3}, "rank_pattern": {"mid_block.*to_q": 2},
              "init_lora_weights": False}  # fmt: skip
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(mod.LoraConfig(**config))
    state = mod.get_peft_model_state_dict(pipe.unet)
    meta = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=meta)
    fused = tiny_pipeline()
    fused.load_lora_weights(tmp_path)
    fused.fuse_lora()
    fused.unload_lora_weights()
    ours = fused_with(tmp_path / "pytorch_lora_weights.safetensors")
    plain = tiny_pipeline().unet
    layers = [name for name, _ in plain.named_modules() if name.endswith(("attn2.to_k", "attn2.to_q"))]
    for layer in layers:
        wanted = fused.unet.get_submodule(layer).weight
        assert not torch.allclose(wanted, plain.get_submodule(layer).weight, atol=1e-3)
        torch.testing.assert_close(ours.get_submodule(layer).weight, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem", [
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", KOHYA, f"lycoris_{KOHYA[10:]}", LAYER,
])  # fmt: skip
def test_alpha_of_every_naming(tmp_path, stem):
    up, down = factors()
    path = kohya(tmp_path, alpha=2, stem=stem)
    torch.testing.assert_close(moved(path), 0.5 * up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [
    "unet.{}.lora_{}.weight", "unet.{}.lora_{}.default.weight", "base_model.model.{}.lora_{}.weight",
    "unet.base_model.model.{}.lora_{}.style.weight", "{}.lora_{}.weight", "{}.lora_{}",
])  # fmt: skip
def test_pefts_namings(tmp_path, form):
    up, down = factors()
    path = peft(tmp_path, {"unet.r": 4, "unet.lora_alpha": 8}, form=form)
    torch.testing.assert_close(moved(path), 2 * up @ down, rtol=1e-4, atol=1e-5)


def test_the_attention_processors_naming_and_its_output(tmp_path):
    torch.manual_seed(0)
    state = {}
    for name, rows, width in (("to_k", 8, 32), ("to_out", 8, 8)):
        stem = f"unet.{LAYER.removesuffix('to_k')}processor.{name}_lora"
        state |= {
            f"{stem}.up.weight": torch.randn(rows, 2),
            f"{stem}.down.weight": torch.randn(2, width),
        }
    save_file(state, tmp_path / "x.safetensors")
    changed = {c.layers[0] for c in layers_of(tmp_path / "x.safetensors")}
    assert changed == {f"unet.{LAYER}", f"unet.{LAYER.removesuffix('to_k')}to_out.0"}


def layers_of(path):
    pipe = tiny_pipeline()
    return read_lora(path, type(pipe), pipe.unet.config)


def test_tuckers_convolutions(tmp_path):
    torch.manual_seed(0)
    up, mid, down = torch.randn(8, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 4, 1, 1)
    state = {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_mid.weight": mid,
             "lora_unet_conv_in.lora_down.weight": down,
             "lora_unet_conv_in.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(state, tmp_path / "x.safetensors")
    x = torch.randn(1, 4, 5, 5)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down), mid), up) / 2
    found = conv(x, moved(tmp_path / "x.safetensors", layer="conv_in"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unet.lora_alpha": float("nan")}, "should be a number"),
        ({"unet.lora_alpha": "8"}, "lora_alpha of its metadata is '8'"),
        ({"unet.lora_alpha": 8, "unet.r": 3}, "say rank 3 of unet.down.*which has 4"),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"(": 1}}, "has no pattern"),
        ([1], "cannot be read"),
        ({"unet.use_dora": True}, "is a DoRA, and .* has no magnitude"),
    ],
)
def test_metadata_that_say_nonsense(tmp_path, fields, message):
    with pytest.raises(ExpungeError, match=message):
        moved(peft(tmp_path, fields))


# F3: DoRA.


def decomposed(weight, delta, magnitude, side):
    """m V / ‖V‖, row by row or column by column."""
    v = (weight + delta).double()
    for i in range(v.shape[side]):
        line = v[i] if side == 0 else v[:, i]
        line *= magnitude[i] / line.norm()
    return v.float()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_is_laid_on_as_it_was_trained(tmp_path, side, strength):
    up, down = factors()
    weight = tiny_pipeline().unet.get_submodule(LAYER).weight.detach()
    norms = torch.rand(weight.shape[side]) + 0.5
    path = kohya(
        tmp_path, {f"{KOHYA}.dora_scale": norms[:, None] if side == 0 else norms[None]}, alpha=2
    )
    wanted = strength * (decomposed(weight, 0.5 * up @ down, norms, side) - weight)
    torch.testing.assert_close(moved(path, strength), wanted, rtol=1e-4, atol=1e-5)


def test_dora_of_peft(tmp_path):
    mod = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    config = mod.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["attn2.to_k", "conv_in"],
                            init_lora_weights=False)  # fmt: skip
    pipe.unet.add_adapter(config)
    for name, tensor in pipe.unet.named_parameters():
        if "magnitude" in name:
            tensor.data *= 1.3
    state = mod.get_peft_model_state_dict(pipe.unet)
    meta = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=meta)
    pipe.fuse_lora()
    ours = fused_with(tmp_path / "pytorch_lora_weights.safetensors")
    for layer in (LAYER, "conv_in"):
        wanted = pipe.unet.get_submodule(layer).base_layer.weight
        torch.testing.assert_close(ours.get_submodule(layer).weight, wanted, rtol=1e-4, atol=1e-5)


def test_dora_beneath_an_export(folder, tmp_path):
    up, down = factors()
    path = kohya(tmp_path, {f"{KOHYA}.dora_scale": torch.ones(8, 1)}, alpha=4)
    model = expunge.load(folder)
    edit = edited(model, [LowRank(("unet.conv_in",), torch.ones(8, 1), torch.ones(1, 36))])
    export(edit, "diffusers", folder, tmp_path / "out", beneath=[(path, 1.0)])
    found = expunge.load(tmp_path / "out").weight(f"unet.{LAYER}")
    wanted = decomposed(model.weight(f"unet.{LAYER}"), up @ down, torch.ones(8), 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# F4: what went in comes out, or is named.


def test_what_is_left_out_is_said(tmp_path):
    path = kohya(tmp_path, {"bundle_emb.tok.string_to_param.*": torch.ones(1, 32)})
    up, down = factors()
    with pytest.warns(ExpungeWarning, match=r"1 of 3 tensors left out, .*: bundle_emb\.tok") as warned:
        torch.testing.assert_close(moved(path), up @ down, rtol=1e-4, atol=1e-5)
    assert len(str(warned[0].message)) < 400


@pytest.mark.parametrize("state", [
    {f"{KOHYA}.hada_w1_a": torch.ones(8, 2), f"{KOHYA}.hada_w1_b": torch.ones(2, 32),
     f"{KOHYA}.alpha": torch.tensor(1.0)},
    {f"lycoris_{i}.lokr_w1": torch.ones(2, 2) for i in range(500)},
    {f"lora_unet_{i}.nonsense": torch.ones(1) for i in range(500)},
])  # fmt: skip
def test_nothing_that_can_be_read(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ExpungeError, match="is not a LoRA") as refused:
        moved(tmp_path / "x.safetensors")
    assert len(str(refused.value)) < 400


def test_loha_beside_a_lora_is_left_out_and_said(tmp_path):
    other = KOHYA.replace("to_k", "to_v")
    more = {f"{other}.hada_w1_a": torch.ones(8, 2), f"{other}.alpha": torch.tensor(1.0)}
    with pytest.warns(ExpungeWarning, match="2 of 4 tensors left out"):
        assert moved(kohya(tmp_path, more), layer=LAYER.replace("to_k", "to_v")).abs().max() == 0


def test_layers_that_the_model_has_not_are_named(tmp_path, folder):
    path = kohya(tmp_path, stem="lora_unet_down_blocks_7_attentions_0_proj_in")
    for use in (moved, Checkpoint.find(folder).read_lora):
        with pytest.raises(
            ExpungeError, match=r"not a LoRA for this model: .*down_blocks\.7"
        ) as refused:
            use(path)
        assert len(str(refused.value)) < 400


# F9: numbers.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
def test_a_lora_with_numbers_that_are_none(tmp_path, bad, part):
    path = kohya(tmp_path, alpha=4)
    state = load_file(path)
    state[f"{KOHYA}.{part}"] = state[f"{KOHYA}.{part}"] * bad
    save_file(state, path)
    for use in (moved, read_lora_info):
        with pytest.raises(ExpungeError, match=r"theirs\.safetensors contains NaN or infinity"):
            use(path)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_that_is_no_number(tmp_path, strength):
    with pytest.raises(ExpungeError, match=f"finite number, not {strength}"):
        parse_loras((f"x.pt={strength}",))
    with pytest.raises(ExpungeError, match="the strength of a LoRA must be a finite number"):
        moved(kohya(tmp_path), float(strength))


@pytest.mark.parametrize("strength", [1e38, -1e38])
def test_a_strength_that_overflows(tmp_path, strength):
    with pytest.raises(ExpungeError, match="makes NaN or infinity of"):
        moved(kohya(tmp_path), strength)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["right", "low-rank", "dense", "sparse", "gated"])
def test_an_edit_with_numbers_that_are_none(folder, tmp_path, bad, kind):
    model = expunge.load(folder)
    layer = f"unet.{LAYER}"
    change = {
        "right": lambda: Right((layer,), torch.eye(32)),
        "low-rank": lambda: LowRank((layer,), *factors()),
        "dense": lambda: Dense((layer,), torch.ones(8, 32)),
        "sparse": lambda: Sparse((layer,), torch.tensor([0]), torch.ones(1)),
        "gated": lambda: dataclasses.replace(gated(model), up=gated(model).up.clone()),
    }[kind]()
    edit = edited(model, [change])
    edit.save(tmp_path / "edit.safetensors")
    tensor = next(t for t in change.tensors.values() if t.is_floating_point())
    tensor.view(-1)[0] = bad
    with pytest.raises(ExpungeError, match="edit contains NaN or infinity: .* of its"):
        edit.save(tmp_path / "again.safetensors")
    for to, name in (("diffusers", "out"), ("lora", "out.safetensors")):
        with pytest.raises(ExpungeError, match="the edit contains NaN or infinity"):
            export(edit, to, folder, tmp_path / name)
    good = edited(model, [LowRank(("unet.conv_in",), torch.ones(8, 1), torch.ones(1, 36))])
    with pytest.raises(ExpungeError, match="edit 2 of those to merge contains NaN"):
        merge(model, [good, edit])
    state = load_file(tmp_path / "edit.safetensors")
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        said = file.metadata()
    key = next(key for key, t in state.items() if t.is_floating_point())
    state[key].view(-1)[0] = bad
    save_file(state, tmp_path / "edit.safetensors", said)
    with pytest.raises(ExpungeError, match=r"edit\.safetensors contains NaN or infinity"):
        Edit.load(tmp_path / "edit.safetensors")
    assert not (tmp_path / "again.safetensors").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("values", [{"ridge": float("nan")}, {"ridge": float("inf")},
                                    {"prior_scale": float("nan")},
                                    {"prior_scale": float("inf")}])  # fmt: skip
def test_merging_with_numbers_that_are_none(model, values):
    one, other = low_rank(model)[:2]
    with pytest.raises(ExpungeError, match="both finite, not"):
        merge(model, [edited(model, [one]), edited(model, [other])], **values)


# F14: an edit where a LoRA is loaded.


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_edit_beside_a_loaded_lora(folder, tmp_path, when):
    pytest.importorskip("peft")
    probe = Probe.of("airplane", 2, num_inference_steps=2)
    path = kohya(tmp_path, alpha=4)
    pipe = tiny_pipeline()
    model = expunge.load(pipe)
    edit = edited(model, [*low_rank(model), gated(model)])
    if when == "before":
        pipe.load_lora_weights(str(path))
        assert edit.fits(pipe)
    plain = expunge.load(pipe).draw(probe)
    applied = edit.apply(pipe)
    if when == "after":
        pipe.load_lora_weights(str(path))
    found = expunge.load(pipe).draw(probe)
    beside = expunge.load(tiny_pipeline())
    hooked = edit.changes[-1]
    with beside.using(edit):
        layer = beside.pipe.unet.get_submodule(LAYER)
        up, down = factors()
        handle = layer.register_forward_hook(lambda m, x, y: y + RAW["x"] @ (up @ down).T)
        first = layer.register_forward_pre_hook(lambda m, x: RAW.update(x=x[0]), prepend=True)
        wanted = beside.draw(probe)
        handle.remove()
        first.remove()
    assert hooked.kind == "gated"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    applied.remove()
    if when == "before":
        assert torch.equal(expunge.load(pipe).draw(probe), plain)


RAW: dict = {}


# F22, F31: halves and ranks.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{KOHYA}.lora_up.weight"), "has down and no up"),
        (lambda s: s.pop(f"{KOHYA}.lora_down.weight"), "has up and no down"),
        (lambda s: s.update({f"{KOHYA}.lora_up.weight": torch.ones(8, 3)}), "factors of ranks 3 and 4"),
        (lambda s: s.update({f"{KOHYA}.lora_up.weight": torch.ones(8)}), "is not a whole LoRA"),
        (lambda s: s.update({f"{KOHYA}.alpha": torch.ones(2)}), "alpha is not a single number"),
        (lambda s: s.update({"lora_unet_conv_in.alpha": torch.ones(())}), "belongs to no factors"),
        (lambda s: s.update({f"{KOHYA}.dora_scale": torch.ones(5, 1)}), "has 5 magnitudes"),
        (lambda s: s.update({f"unet.{LAYER}.lora_A.weight": torch.ones(4, 32),
                             f"unet.{LAYER}.lora_B.weight": torch.ones(8, 4)}), "changes .* twice"),
    ],
)  # fmt: skip
def test_half_a_lora(tmp_path, folder, change, message):
    path = kohya(tmp_path, alpha=4)
    state = load_file(path)
    change(state)
    save_file(state, path)
    for use in (moved, Checkpoint.find(folder).read_lora):
        with pytest.raises(ExpungeError, match=message) as refused:
            use(path)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alpha_is_kept_in_single_precision(tmp_path, dtype):
    lora = Lora.from_changes(
        lambda *_: torch.zeros(400, 400),
        {
            ("unet.conv_in", "weight"): [
                LowRank(("unet.conv_in",), torch.ones(400, 301), torch.ones(301, 400))
            ]
        },
    )
    lora.save(tmp_path / "x.safetensors", "kohya", lambda _: "lora_unet_conv_in", dtype, {})
    alpha = load_file(tmp_path / "x.safetensors")["lora_unet_conv_in.alpha"]
    assert (alpha.dtype, float(alpha)) == (torch.float32, 301.0)


# F28: names with "=".


@pytest.mark.parametrize(
    "name", ["a=b.safetensors", "style=1.safetensors", "x=0.5", "a=b=c.safetensors"]
)
def test_a_file_with_an_equals_sign(tmp_path, name):
    path = shutil.copy(kohya(tmp_path), tmp_path / name)
    assert parse_loras((str(path),)) == [(str(path), 1.0)]
    assert parse_loras((f"{path}=0.25",)) == [(str(path), 0.25)]
    up, down = factors()
    (file, scale) = parse_loras((f"{path}=0.5",))[0]
    torch.testing.assert_close(moved(file, scale), 0.5 * up @ down, rtol=1e-4, atol=1e-5)


def test_what_is_no_strength():
    with pytest.raises(ExpungeError, match="FILE or FILE=STRENGTH, not 'a=b'"):
        parse_loras(("a=b",))
    assert parse_loras(("a=b.safetensors", "c.safetensors=2")) == [
        ("a=b.safetensors", 1.0),
        ("c.safetensors", 2.0),
    ]


# What a file says of itself.


def test_info_says_for_which_base(folder, tmp_path, capsys):
    from expunge.cli.info import print_model

    edit = edited(expunge.load(folder), low_rank(expunge.load(folder)))
    export(edit, "kohya", folder, tmp_path / "x.safetensors")
    print_model(str(tmp_path / "x.safetensors"))
    said = capsys.readouterr().out
    assert "rank 2 on 14 layers" in said
    assert "Stable Diffusion 1.x" in said
    assert "airplane" in said
    print_model(str(kohya(tmp_path)))
    assert "it does not say which base" in capsys.readouterr().out


def test_the_problem_of_an_exported_lora_is_its_title(folder, tmp_path):
    edit = edited(expunge.load(folder), low_rank(expunge.load(folder)))
    export(edit, "kohya", folder, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.title"].endswith("without airplane")
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert read_base_title(said) == "Stable Diffusion 1.x"
    assert Problem((Concept("airplane", "sky"),), ("ship",)) == edit.record.problem
