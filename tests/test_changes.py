"""Every kind of change: what it computes, that it fits or says why, that it comes off again."""

import pytest
import torch
from torch import nn

from conftest import weights
from expunge import ExpungeError
from expunge.changes import (
    KINDS,
    Applied,
    Damped,
    Dense,
    Gated,
    LowRank,
    Projected,
    Right,
    Sparse,
    Subtracted,
    build_change,
    summarize,
)

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
VALUE = KEY.replace("to_k", "to_v")
CONVOLUTION = "unet.conv_in"


# SLD's change of predictions fits no layer: tests/test_inference_time.py.
LAYER_KINDS = [kind for kind in KINDS if kind != "guided"]


def linear(pipe, name=KEY) -> nn.Linear:
    return pipe.unet.get_submodule(name.removeprefix("unet."))


def examples(pipe):
    """One change of each kind that fits the key projection."""
    out, width = linear(pipe).weight.shape
    torch.manual_seed(1)
    return [
        Right((KEY, VALUE), torch.randn(width, width)),
        LowRank((KEY,), torch.randn(out, 2), torch.randn(2, width)),
        Sparse((KEY,), torch.tensor([0, 5]), torch.tensor([1.0, -1.0])),
        Dense((KEY,), torch.randn(out, width)),
        gated((KEY, VALUE), width),
        Damped((KEY,), torch.randn(2, width), torch.zeros(2), torch.ones(2), damping=torch.rand(2, out)),
        Projected((KEY, VALUE), torch.randn(2, out), slope=1.0, centre=-1.0),
        Subtracted((KEY, VALUE), torch.randn(2, 4, width), torch.full((2,), -1.0), torch.ones(2)),
    ]


def gated(layers, width, gates=2, rank=2) -> Gated:
    """Random gates with `rank` directions each, half open at 0."""
    return Gated(
        layers,
        torch.randn(gates, width),
        torch.zeros(gates),
        torch.ones(gates),
        up=torch.randn(width, gates * rank) / width,
        down=torch.randn(gates * rank, width),
        goal=torch.randn(gates * rank),
        owner=torch.arange(gates).repeat_interleave(rank),
    )


def test_there_is_an_example_of_every_kind(pipe):
    assert sorted(change.kind for change in examples(pipe)) == sorted(LAYER_KINDS)
    assert len(LAYER_KINDS) == 8


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_laid_on_and_taken_off(pipe, kind):
    change = next(c for c in examples(pipe) if c.kind == kind)
    layer, x = linear(pipe), torch.randn(3, 4, linear(pipe).in_features)
    before, parameters, answer = weights(pipe), list(pipe.unet.parameters()), layer(x)
    with pytest.raises(RuntimeError, match="inside"), Applied(pipe, [change]):
        assert not torch.allclose(layer(x), answer)
        raise RuntimeError("inside")
    assert all(a is b for a, b in zip(parameters, pipe.unet.parameters(), strict=True))
    assert all(torch.equal(before[k], v) for k, v in weights(pipe).items())
    assert torch.equal(layer(x), answer)


def test_what_they_compute(pipe):
    right, low, sparse, dense, *_ = examples(pipe)
    w = linear(pipe).weight.detach()
    torch.testing.assert_close(right.weight(w), w @ right.matrix)
    torch.testing.assert_close(low.weight(w), w + low.up @ low.down)
    difference = sparse.weight(w) - w
    assert difference.flatten()[[0, 5]].round().tolist() == [1, -1]
    assert difference.count_nonzero() == 2
    assert torch.equal(dense.weight(w), dense.value)


def test_a_convolution_takes_low_rank(pipe):
    weight = linear(pipe, CONVOLUTION).weight
    change = LowRank((CONVOLUTION,), torch.randn(weight.shape[0], 1), torch.randn(1, weight[0].numel()))
    with Applied(pipe, [change]):
        moved = linear(pipe, CONVOLUTION).weight - weight
    torch.testing.assert_close(moved.flatten(1), change.up @ change.down, rtol=1e-4, atol=1e-5)


def test_changes_stack_in_order(pipe):
    right, low, *_ = examples(pipe)
    w = linear(pipe).weight.detach()
    with Applied(pipe, [right, low]):
        torch.testing.assert_close(linear(pipe).weight.detach(), w @ right.matrix + low.up @ low.down)
    first = Applied(pipe, [right])
    second = Applied(pipe, [low])
    torch.testing.assert_close(linear(pipe).weight.detach(), w @ right.matrix + low.up @ low.down)
    with pytest.raises(ExpungeError, match="on top of this one"):
        first.remove()
    second.remove()
    first.remove()
    first.remove()
    assert torch.equal(linear(pipe).weight, w)


def test_half_precision_stays_so(pipe):
    pipe.unet.half()
    for change in examples(pipe)[:4]:
        assert change.weight(linear(pipe).weight.detach()).dtype == torch.float16


def test_gradients_equal_those_of_a_real_copy(pipe):
    low = examples(pipe)[1]
    up, down = (t.clone().requires_grad_() for t in (low.up, low.down))
    x = torch.randn(5, down.shape[1])
    with Applied(pipe, [LowRank((KEY,), up, down)]):
        linear(pipe)(x).square().sum().backward()
    again_up, again_down = (t.clone().requires_grad_() for t in (low.up, low.down))
    (x @ (linear(pipe).weight.detach() + again_up @ again_down).T).square().sum().backward()
    torch.testing.assert_close(up.grad, again_up.grad)
    torch.testing.assert_close(down.grad, again_down.grad)
    assert linear(pipe).weight.grad is None


def test_gradients_with_checkpointing(pipe):
    torch.manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    pipe.unet.requires_grad_(False).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        up = torch.full((16, 1), 0.1, requires_grad=True)
        down = torch.full((1, 32), 0.1, requires_grad=True)
        with Applied(pipe, [LowRank((KEY,), up, down)]):
            pipe.unet(x, 10, encoder_hidden_states=text).sample.square().sum().backward()
        gradients.append(up.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Dense(("unet.nowhere.to_k",), torch.zeros(1)), "no layer unet.nowhere.to_k"),
        (Dense(("nothing.to_k",), torch.zeros(1)), "no layer nothing.to_k"),
        (Dense((KEY,), torch.zeros(3)), "and its dense change has value"),
        (Dense((KEY,), torch.zeros(3), parameter="bias"), "has no bias"),
        (Right((KEY,), torch.eye(3)), "right change has matrix"),
        (Right((CONVOLUTION,), torch.eye(3)), "right change has matrix"),
        (LowRank((KEY,), torch.zeros(16, 1), torch.zeros(1, 9)), "low-rank change"),
        (Sparse((KEY,), torch.tensor([10**6]), torch.ones(1)), "sparse change"),
        (gated((KEY,), 9), "gated change"),
        (gated((CONVOLUTION,), 9), "gated change"),
        (Damped((KEY,), *[torch.zeros(1, 1)] * 4), "damped change"),
    ],
)
def test_what_does_not_fit_touches_nothing(pipe, change, message):
    parameters = list(pipe.unet.parameters())
    with pytest.raises(ExpungeError, match=f"does not fit: .*{message}"):
        Applied(pipe, [examples(pipe)[0], change])
    assert all(a is b for a, b in zip(parameters, pipe.unet.parameters(), strict=True))


def test_specs_and_tensors_are_the_whole_change(pipe):
    for change in examples(pipe):
        again = build_change(change.spec, change.tensors)
        assert again.spec == change.spec
        assert all(torch.equal(a, change.tensors[k]) for k, a in again.tensors.items())


def test_summary(pipe):
    assert summarize(examples(pipe)[:2]) == "right on 2 layers, low-rank on 1 layer"


# Strength.


def at_strength(pipe, changes, strength):
    """The key projection's weight, and what it and the value's return, with changes at a strength."""
    torch.manual_seed(2)
    x = torch.randn(2, 5, linear(pipe).in_features)
    with Applied(pipe, changes, strength):
        outputs = [linear(pipe, name)(x).detach() for name in (KEY, VALUE)]
        return linear(pipe).weight.detach().clone(), outputs


@pytest.mark.parametrize("strength", [0.25, 0.8, 1.5])
@pytest.mark.parametrize("place", range(len(LAYER_KINDS)))
def test_strength_scales_what_a_change_makes(pipe, place, strength):
    change = examples(pipe)[place]
    weight, outputs = at_strength(pipe, [], 1)
    full_weight, full = at_strength(pipe, [change], 1)
    scaled_weight, scaled = at_strength(pipe, [change], strength)
    torch.testing.assert_close(scaled_weight, weight + strength * (full_weight - weight))
    # The projections are linear: what scales the input's difference scales the output's.
    for before, after, found in zip(outputs, full, scaled, strict=True):
        torch.testing.assert_close(found, before + strength * (after - before), rtol=1e-4, atol=1e-4)
    assert not torch.equal(scaled[0], full[0])


def test_strength_scales_the_sum_of_a_weights_changes(pipe):
    changes = examples(pipe)[:3]
    weight, _ = at_strength(pipe, [], 1)
    full, _ = at_strength(pipe, changes, 1)
    torch.testing.assert_close(at_strength(pipe, changes, 0.5)[0], (weight + full) / 2)


def test_strength_one_is_the_same_to_the_bit_and_zero_touches_nothing(pipe):
    changes, before = examples(pipe), weights(pipe)
    own = [m for name, m in linear(pipe).named_parameters()]
    with Applied(pipe, changes):
        plain = weights(pipe)
    with Applied(pipe, changes, 1.0):
        assert all(torch.equal(plain[name], tensor) for name, tensor in weights(pipe).items())
    with Applied(pipe, changes, 0):
        assert linear(pipe).weight is own[0]
        assert not linear(pipe)._forward_hooks
        assert not linear(pipe)._forward_pre_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(pipe).items())


def test_half_precision_is_rounded_once(pipe):
    pipe.unet.half()
    weight = linear(pipe).weight.detach().clone()
    change = LowRank((KEY,), torch.randn(len(weight), 1), torch.randn(1, weight.shape[1]))
    with Applied(pipe, [change], 0.3):
        found = linear(pipe).weight.detach()
    assert torch.equal(found, (weight.double() + 0.3 * (change.up @ change.down).double()).half())


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "0.8", None, True])
def test_a_strength_that_is_none_changes_nothing(pipe, strength):
    before = weights(pipe)
    with pytest.raises(ExpungeError, match=r"^strength must be"):
        Applied(pipe, examples(pipe), strength)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(pipe).items())
