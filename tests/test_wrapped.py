"""Pipelines whose layers something else has wrapped, fused, compiled, offloaded or quantised."""

import pytest
import torch
from torch import nn

import expunge
from conftest import tiny_pipeline
from expunge import Concept, ExpungeError, Probe, Problem
from expunge.changes import Applied, Gated, LowRank, iterate_layers

PROBLEM = Problem((Concept("airplane", "sky"),), ("ship",))
PROBE = Probe.of("airplane", 1, 0, 2)
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


class Around(nn.Module):
    """A layer with something added, as peft wraps it where a LoRA is loaded."""

    def __init__(self, layer, scale=0.0):
        super().__init__()
        self.base_layer, self.scale = layer, scale
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.scale * x.sum()


def compile_whole(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compile_block(pipe):
    blocks = pipe.unet.mid_block.attentions[0].transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


def compile_in_place(pipe):
    pipe.unet.compile(backend="eager")


def spread(pipe):
    pipe.unet = nn.DataParallel(pipe.unet, device_ids=None)


def wrap_layers(pipe):
    for _, block in list(pipe.unet.named_modules()):
        for key in ("to_q", "to_k", "to_v"):
            if isinstance(getattr(block, key, None), nn.Linear):
                setattr(block, key, Around(getattr(block, key)))


WAYS = [compile_whole, compile_block, compile_in_place, spread, wrap_layers]


@pytest.fixture(scope="module")
def bare():
    model = expunge.load(tiny_pipeline())
    edit = expunge.erase(model, PROBLEM)
    with edit.apply(model):
        return edit, model.draw(PROBE)


def gated(layer, width=32):
    one = torch.ones(1)
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(width, 1, generator=g), torch.randn(1, width, generator=g)
    return Gated((layer,), torch.zeros(1, width), -10 * one, 10 * one, up=up, down=down, goal=one,
                 owner=torch.tensor([0]))  # fmt: skip


@pytest.mark.parametrize("wrap", WAYS)
def test_an_edit_made_on_a_wrapped_pipeline_fits_the_bare_one(bare, wrap):
    edit, erased = bare
    pipe = tiny_pipeline()
    wrap(pipe)
    model = expunge.load(pipe)
    assert [e.layer for e in model.text_entries()] == list(edit.changes[0].layers)
    # What is compiled is compiled before the edit comes; of the whole network, that takes too long.
    torch.compiler.set_stance("default" if wrap is compile_block else "force_eager")
    before = model.draw(PROBE)
    own = expunge.erase(model, PROBLEM)
    assert own.changes[0].layers == edit.changes[0].layers
    assert own.record.base == edit.record.base
    assert own.fits(tiny_pipeline())
    with edit.apply(model):
        torch.testing.assert_close(model.draw(PROBE), erased, rtol=0, atol=1e-4)
    with own.apply(tiny_pipeline()):
        pass
    assert torch.equal(model.draw(PROBE), before)
    assert not torch.allclose(before, erased, atol=1e-2)
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("wrap", [*WAYS, lambda pipe: None])
def test_names_are_those_of_the_bare_network(wrap):
    pipe, bare = tiny_pipeline(), tiny_pipeline()
    wrap(pipe)
    names = [name for name, _ in iterate_layers(pipe.unet)]
    assert names == [name for name, _ in bare.unet.named_modules()]


@pytest.mark.parametrize("wrap", [compile_whole, compile_block, compile_in_place])
def test_gates_on_compiled_layers_are_refused(wrap):
    pipe = tiny_pipeline()
    wrap(pipe)
    model = expunge.load(pipe)
    with pytest.raises(ExpungeError, match=r"to_k is compiled, .* without torch\.compile"):
        Applied(pipe, [gated(LAYER)])
    with pytest.raises(ExpungeError, match="is compiled"):
        model.cross_attentions()
    Applied(pipe, [LowRank((LAYER,), torch.ones(16, 1), torch.ones(1, 32))]).remove()


def test_gates_hold_for_what_a_lora_adds_too():
    pipe = tiny_pipeline()
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.to_k = Around(layer.to_k, scale=1.0)
    x = torch.randn(1, 3, 32)
    with Applied(pipe, [gate := gated(LAYER)]):
        got = layer.to_k(x)
    assert torch.equal(got, layer.to_k(gate.change_input(x)))
    assert not torch.allclose(got, layer.to_k(x))


def test_fused_projections_are_refused(bare):
    edit, erased = bare
    pipe = tiny_pipeline()
    pipe.fuse_qkv_projections()
    model = expunge.load(pipe)
    for apply in (edit.apply, lambda pipe: Applied(pipe, [gated(LAYER)])):
        with pytest.raises(ExpungeError, match=r"to_[kv] is fused .* unfuse_qkv_projections\(\)"):
            apply(pipe)
    with pytest.raises(ExpungeError, match="is fused"):
        model.cross_attentions()
    pipe.unfuse_qkv_projections()
    with edit.apply(pipe):
        torch.testing.assert_close(model.draw(PROBE), erased, rtol=0, atol=1e-5)


def test_weights_in_a_form_of_their_own_are_refused(bare):
    edit, _ = bare
    for change in (
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: layer.register_parameter(
            "weight", nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        ),
    ):
        pipe = tiny_pipeline()
        change(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k)
        with pytest.raises(
            ExpungeError, match=r"keeps its weight in a form of its own \((float32|int8)"
        ):
            edit.apply(pipe)


def test_weights_that_are_not_in_memory_are_refused(bare):
    edit, _ = bare
    pipe = tiny_pipeline()
    pipe.unet.to("meta")
    with pytest.raises(ExpungeError, match="not in memory: .*enable_model_cpu_offload"):
        Applied(pipe, edit.changes)


def test_a_lora_of_peft(bare):
    pytest.importorskip("peft")
    from peft import LoraConfig  # type: ignore[import-not-found]

    edit, _ = bare
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    assert edit.fits(pipe)
    layer = pipe.unet.get_submodule(LAYER.removeprefix("unet."))
    x = torch.randn(1, 3, 32)
    added = layer(x) - layer.base_layer(x)
    with edit.apply(pipe):
        wanted = (
            x @ edit.changes[0].weight(tiny_pipeline().unet.get_submodule(LAYER[5:]).weight).T + added
        )
        torch.testing.assert_close(layer(x), wanted)
    model = expunge.load(pipe)
    assert [e.layer for e in model.text_entries()] == list(edit.changes[0].layers)
