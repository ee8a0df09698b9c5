"""Several edits as one: side by side, fused, with their gates."""

import pytest
import torch

import expunge
from edits import drawn, edited, gated, low_rank
from expunge import Concept, Edit, ExpungeError, Problem
from expunge.base import registry
from expunge.changes import Dense, LowRank
from expunge.checkpoints.merge import merge


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

    method = registry.get("methods", "uce")(ridge=1.0, num_retain_words=2)
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


def test_merging_keeps_gates(folder, uce):
    model, edit = uce
    gate = gated(model)
    merged = merge(model, [edit, edited(model, [gate])])
    assert torch.allclose(drawn(model, merged), drawn(model, edit, (gate,)), atol=1e-5)
