"""GEM against a slow reading of its loss, and what its low-rank changes do."""

import pytest
import torch

import expunge
from expunge import Problem
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.trajectories import TrainingConcept
from expunge.methods import gem
from expunge.methods.gem import GEM, ContrastiveObjective
from quick import quick
from tiny import flux, loaded, z_image


def numbers(n, seed):
    return torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("repulsion", [0.0, 0.25, 1.0])
def test_the_loss_against_a_slow_reading(repulsion):
    """Sample by sample, number by number; some samples are done pulling."""
    student, anchor, own = numbers(6, 0), numbers(6, 1), numbers(6, 2)
    student[3:] = anchor[3:] + 0.05 * student[3:]
    scale = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    objective = ContrastiveObjective(repulsion, anchored=True)
    found = objective.loss({"late": student}, {"late anchor": anchor, "late": own}, scale, scale)
    for i, ours in enumerate(found.tolist()):

        def norm(a, b, i=i):
            squares = [(float(scale[i]) * (x - y)) ** 2 for x, y in zip(a, b, strict=True)]
            return (sum(squares) / len(squares)) ** 0.5

        v, a, o = (x[i].flatten().tolist() for x in (student, anchor, own))
        assert ours == pytest.approx(max(0.0, norm(v, a) - repulsion * norm(v, o)), rel=1e-6, abs=1e-9)
    if repulsion:
        assert (found[3:] == 0).all()


def test_the_gradient_is_finite_where_training_begins():
    """The network is the original then, so that one of the two distances is 0."""
    own, anchor, one = numbers(2, 0), numbers(2, 1), torch.ones(2, dtype=torch.float64)
    student = own.clone().requires_grad_()
    loss = ContrastiveObjective(0.5, anchored=True).loss(
        {"late": student}, {"late anchor": anchor, "late": own}, one, one
    )
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert (
        (student - gradient - anchor).flatten(1).norm(dim=1) < (own - anchor).flatten(1).norm(dim=1)
    ).all()


def test_queries_and_keys_where_text_enters(model):
    """Cross-attentions of a U-Net; both streams of FLUX's double blocks alone; elsewhere every one."""
    layers = GEM().trained_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_k"}
    assert all(".attn2." in name for name in layers)
    assert all(name.endswith("to_k") for name in GEM(layers="keys").trained_layers(model))
    layers = GEM().trained_layers(loaded(flux(), "flux"))
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_k", "add_q_proj", "add_k_proj"}
    assert all(name.startswith("transformer.transformer_blocks.") for name in layers)
    layers = GEM(layers="queries").trained_layers(loaded(z_image(), "z_image"))
    assert layers
    assert all(name.endswith("to_q") for name in layers)


def test_training_brings_the_concept_to_its_anchor(model, problem):
    """On noise that it has not seen; the phrasing is one, since a random network knows no others."""
    method = quick(
        "gem",
        templates=("an image of the {}",),
        trajectories=8,
        samples=4,
        max_train_steps=60,
        learning_rate=5e-3,
    )
    edit = expunge.erase(model, problem, method)
    assert all(change.down.shape[0] == method.rank for change in edit.changes)
    steering = Steering(model, method.trajectory_config)
    text = model.encode(["an image of the airplane"])
    subject = TrainingConcept(
        "other", text, torch.Generator().manual_seed(9), model.encode(["an image of the sky"])
    )
    sample, original = steering.pick_points([subject] * 8, [steering.store_trajectories(subject, 8)] * 8)
    before = steering.compute_losses(sample, original).mean()
    with model.using(edit), torch.no_grad():
        after = steering.compute_losses(sample, original).mean()
    assert after < 0.8 * before


def test_no_anchor_is_the_empty_prompt(model, monkeypatch):
    """Training is drawn to what the original predicts for the empty prompt, and to nothing else."""
    seen, train = [], gem.train_factors

    def spied(steering, subjects, *given, **fields):
        seen.extend(subjects)
        return train(steering, subjects, *given, **fields)

    monkeypatch.setattr(gem, "train_factors", spied)
    for anchor in ("", "sky"):
        edit = expunge.erase(model, Problem((expunge.Concept("airplane", anchor),)), quick("gem"))
        assert edit.record.problem.erase[0].anchor == anchor
    empty = model.encode([""]).embeddings
    for subject, is_empty in zip(seen, (True, False), strict=True):
        assert all(torch.equal(row, empty[0]) is is_empty for row in subject.anchor.embeddings)
