"""Concept Ablation against a slow reading of its equations, and what its training does."""

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.erasing.reference_images import draw_each
from expunge.methods.concept_ablation import ConceptAblation
from expunge.runtime.context import RunContext

FAST = {"num_images": 3, "samples": 5, "max_train_steps": 1, "learning_rate": 1e-3}


@pytest.fixture
def first_loss(monkeypatch):
    """The loss of the first training step, of the original network."""

    def ask(model, problem, method):
        found = []

        def spy(model, trained, losses, run, generator, **_):
            with torch.no_grad():
                found.append(sum(float(part) for part in losses()))
            return ()

        monkeypatch.setattr("expunge.methods.concept_ablation.train_in_place", spy)
        method.fit(model, problem, RunContext(seed=3))
        return found[0]

    return ask


@pytest.mark.parametrize(
    ("target", "regularisation"), [("model", 0.0), ("noise", 0.0), ("model", 0.7), ("noise", 0.7)]
)
@torch.no_grad()
def test_the_loss_against_a_slow_reading(model, first_loss, target, regularisation):
    """Sample by sample with the pipeline's own U-Net and scheduler, the sum of squares by hand."""
    concepts = (Concept("airplane", "sky", synonyms=("jet",)), Concept("cat", ""))
    method = ConceptAblation(target=target, regularisation=regularisation, **FAST)
    model.pipe.to(torch.float64)  # a batch and its rows differ in float32's last digits
    ours = first_loss(model, Problem(concepts), method)

    run, pairs, latents = RunContext(seed=3), [], []
    for concept in concepts:
        ways = [(t, name) for name in concept.names for t in TEMPLATES["object"]]
        chosen = [ways[i * len(ways) // 3] for i in range(3)]
        anchors = [t.format(concept.anchor) if concept.anchor else "" for t, _ in chosen]
        pairs += zip([t.format(name) for t, name in chosen], anchors, strict=True)
        latents.append(draw_each(model, f"the anchor of {concept.name}", anchors, run))
    latents = torch.cat(latents)
    generator = run.generator("training")
    rows = torch.randint(6, (5,), generator=generator)
    steps = torch.randint(1000, (5,), generator=generator)
    noise = torch.randn(5, *latents.shape[1:], generator=generator).double()
    unet, scheduler = model.pipe.unet, model.pipe.scheduler
    total = 0.0
    for row, t, e in zip(rows, steps, noise, strict=True):
        z = scheduler.add_noise(latents[row][None], e[None], t[None])
        concept, anchor = (
            unet(z, t, encoder_hidden_states=model.encode([prompt]).embeddings).sample[0].double()
            for prompt in pairs[row]
        )
        goal = e.double() if target == "noise" else anchor
        total += (
            sum((concept - goal).flatten().tolist()[i] ** 2 for i in range(e.numel())) / e.numel() / 5
        )
        total += regularisation * float(((anchor - e) ** 2).mean()) / 5
    assert ours == pytest.approx(total, rel=1e-6)


def test_the_teacher_passes_no_gradient(model, problem, monkeypatch):
    seen, predict = [], type(model).predict

    def spied(self, latents, t, text):
        found = predict(self, latents, t, text)
        seen.append(found.requires_grad)
        return found

    monkeypatch.setattr(type(model), "predict", spied)
    method = ConceptAblation(**FAST)
    method.fit(model, problem, RunContext(seed=0))  # without what is predicted to measure the edit
    assert seen[-2:] == [False, True]


def test_training_brings_the_concept_to_its_anchor(model, problem):
    """On noisy images of the anchor the predictions for both come nearer, and keys and values change."""
    method = ConceptAblation(num_images=4, samples=8, max_train_steps=60, learning_rate=2e-3)
    edit = expunge.erase(model, problem, method)
    layers = {layer for change in edit.changes for layer in change.layers}
    assert layers == {entry.layer for entry in model.text_entries()}
    text = model.encode(["an image of the airplane", "an image of the sky"])
    z = torch.randn(1, *model._latent_shape, generator=torch.Generator().manual_seed(1)).repeat(
        2, 1, 1, 1
    )

    def apart():
        with torch.no_grad():
            one, other = model.predict(z, 600, text)
        return float((one - other).square().mean())

    before = apart()
    with model.using(edit):
        after = apart()
    assert after < 0.7 * before


def test_what_is_retained_drifts_less_with_a_weight(model):
    """Far from what the training met: other noise, other images."""
    text = model.encode(["horse"])
    z = torch.randn(1, *model._latent_shape, generator=torch.Generator().manual_seed(1))
    fast = {"num_images": 2, "samples": 4, "max_train_steps": 20, "learning_rate": 1e-3}

    def drift(weight):
        method = ConceptAblation(retain_weight=weight, **fast)
        assert method.reads_retain == (weight > 0)
        edit = expunge.erase(model, Problem((Concept("airplane", "sky"),), ("horse",)), method)
        with torch.no_grad():
            before = model.predict(z, 600, text)
            with model.using(edit):
                return float((model.predict(z, 600, text) - before).square().mean())

    assert drift(10.0) < 0.7 * drift(0.0)


def test_bad_values():
    with pytest.raises(ExpungeError, match="one {} for the concept"):
        ConceptAblation(templates=("no place",))
    with pytest.raises(ExpungeError, match="num_images must be at least 1"):
        ConceptAblation(num_images=0)
