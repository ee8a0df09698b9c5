"""STEREO against a slow reading of its targets, and what each of its stages does."""

import dataclasses

import pytest
import torch

import expunge
from expunge import Concept, ExpungeError, Problem
from expunge.erasing.reference_images import draw_examples
from expunge.erasing.word_inversion import choose_word, learn_word
from expunge.methods import stereo
from expunge.methods.stereo import STEREO
from expunge.runtime.context import RunContext
from quick import quick


@pytest.mark.parametrize("compose", ["sum", "mean"])
@torch.no_grad()
def test_the_target_against_a_slow_reading(model, compose):
    """Prompt by prompt with the pipeline's own U-Net, the equation term by term."""
    method = STEREO(negative_guidance=0.7, compose=compose)
    model.pipe.to(torch.float64)  # a batch and its rows differ in float32's last digits
    z = torch.randn(1, *model._latent_shape, generator=torch.Generator().manual_seed(0)).double()
    words, anchor = ["airplane", "jet", "plane"], "sky"
    t = torch.tensor([321])
    texts = [model.encode([word]) for word in words]
    ours = method.compose_target(model, z, t, texts, model.encode([anchor]))

    def ask(prompt):
        return model.pipe.unet(z, 321, encoder_hidden_states=model.encode([prompt]).embeddings).sample

    empty = ask("").double()
    goal = empty + 0.7 * (ask(anchor).double() - empty)
    share = 1 if compose == "sum" else 1 / 3
    for word in words:
        goal = goal - 0.7 * share * (ask(word).double() - empty)
    assert (ours - goal).norm() / goal.norm() < 1e-6


@pytest.mark.parametrize("retain_weight", [0.0, 0.5])
def test_the_first_loss_of_the_erasure_against_a_slow_reading(model, monkeypatch, retain_weight):
    """At the point that was drawn, of the network before it is trained; the retained have not moved."""
    seen, losses = {}, []
    draw_points = stereo.Steering.draw_points

    def drawn(self, subjects):
        seen["concept"], seen["sample"] = subjects[0], draw_points(self, subjects)
        return seen["sample"]

    def train(model, trained, losses_of, *_, **__):
        losses.extend(float(part.detach()) for part in losses_of())
        return ()

    monkeypatch.setattr(stereo.Steering, "draw_points", drawn)
    monkeypatch.setattr(stereo, "train_in_place", train)
    concept = Concept("airplane", "sky", synonyms=("jet",))
    method = STEREO(rounds=0, compose="sum", negative_guidance=0.7, retain_weight=retain_weight)
    method = dataclasses.replace(method, trajectory_steps=4)
    method.fit(model, Problem((concept,), ("bird",)), RunContext(seed=2))

    point = seen["sample"].late
    scale = float(stereo.Steering(model, method.trajectory_config).scale[int(point.t)])
    with torch.no_grad():

        def ask(text):
            return model.predict(point.latents, point.t, text).double()

        empty, sky, airplane, jet = (ask(model.encode([w])) for w in ("", "sky", "airplane", "jet"))
        goal = empty + 0.7 * (sky - empty) - 0.7 * (airplane - empty) - 0.7 * (jet - empty)
        slow = (scale * (ask(seen["concept"].text) - goal)).square().mean()
    assert losses[0] == pytest.approx(float(slow), rel=1e-4)
    assert losses[1:] == ([pytest.approx(0, abs=1e-9)] if retain_weight else [])


def test_each_round_looks_for_a_word_in_the_network_that_was_trained_last(model, monkeypatch):
    """Every inversion meets other weights, and every found word is trained against at the end."""
    met, learn, erased = [], stereo.learn_word, []
    entry = model.text_entries()[0].layer

    def spied(model, changes, *given, **fields):
        with model.using(changes):
            met.append(model.weight(entry).clone())
        return learn(model, changes, *given, **fields)

    def erase(self, model, groups, anchors, kept, run):
        erased.extend([len(texts) for texts in groups])
        return whole(self, model, groups, anchors, kept, run)

    whole = STEREO._erase
    monkeypatch.setattr(stereo, "learn_word", spied)
    monkeypatch.setattr(STEREO, "_erase", erase)
    problem = Problem((Concept("airplane", "sky", synonyms=("jet",)), Concept("cat", "")))
    edit = expunge.erase(model, problem, quick("stereo", rounds=2))
    assert len(met) == 4
    original = model.weight(entry)
    assert all(not torch.equal(one, original) for one in met)
    assert not torch.equal(met[0], met[1])
    assert erased == [2 + 2, 1 + 2]
    assert edit.changes


def test_the_word_is_in_no_template(model):
    """What is learnt takes the word's place wherever it stands."""
    erased = (Concept("airplane", "the blue sky"),)
    assert choose_word(model, erased[0], erased, ("{}",)) == "sky"
    second = choose_word(model, erased[0], erased, ("{} in the Sky",))
    assert second != "sky"
    assert choose_word(model, erased[0], erased, ("{} in the sky", f"a {second} {{}}")) != second


def test_a_word_learns_what_the_images_show(model):
    """The error of its predictions of the noise falls, on noise that it has not seen."""
    shown = draw_examples(model, "airplane", "airplane", 2, RunContext(), 3).latents
    word = choose_word(model, Concept("airplane", "the blue sky"), (Concept("airplane"),), ("{}",))
    assert word == "sky"
    found = [
        learn_word(
            model, (), [word], word, shown, RunContext(), torch.Generator().manual_seed(0),
            steps=steps, learning_rate=0.2, batch_size=4,
        )
        for steps in (0, 40)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(16, *shown.shape[1:], generator=generator)
    t = torch.randint(1000, (16,), generator=generator)
    noisy = model.add_noise(shown[[0, 1] * 8], noise, t)

    def error(vectors):
        with torch.no_grad():
            text = model.encode_with([word], word, vectors)
            return float((model.predict(noisy, t, text[[0] * 16]) - noise).square().mean())

    assert error(found[1]) < error(found[0])


def test_without_rounds_nothing_is_looked_for(model, problem, monkeypatch):
    monkeypatch.setattr("expunge.methods.stereo.learn_word", None)
    assert expunge.erase(model, problem, quick("stereo", rounds=0)).changes


def test_bad_values():
    with pytest.raises(ExpungeError, match="templates is empty"):
        STEREO(templates=())
    with pytest.raises(ExpungeError, match="rounds must be at least 0"):
        STEREO(rounds=-1)
