"""ACE's second stage: train gates, directions and goals against attacks that bring the concept back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expunge.changes import Gated
from expunge.erasing import pooled_gates, reference_images
from expunge.erasing.gate_tokens import GateTokens
from expunge.methods.ace.attention_reduction import LEVELS
from expunge.methods.ace.closed_form import FACTORS, join, split
from expunge.methods.ace.settings import ACESettings
from expunge.model import Model
from expunge.ops.finetune import frozen, minimise
from expunge.ops.gates import Background, stack_root
from expunge.ops.noise_error import average_error
from expunge.ops.pgd import minimise_in_ball as attack
from expunge.problem import Concept
from expunge.runtime.context import RunContext, Tensors
from expunge.text import Text


def harden_all(
    settings: ACESettings,
    model: Model,
    closed: Gated,
    tokens: Mapping[str, Sequence[GateTokens]],
    shared: Sequence[Sequence[Concept]],
    backgrounds: Mapping[str, Background],
    pooled: Mapping[str, Gated],
    run: RunContext,
) -> Gated:
    """Harden the closed form against attacks, each set of directions by itself.

    Args:
        settings: the attacks and the training.
        model: the original.
        closed: the closed form of all concepts.
        tokens: of each gate, by concept.
        shared: the concepts of each set of directions.
        backgrounds: what each concept's gates stay closed on.
        pooled: the changes of the vector of a whole prompt, by layer; they stay as they are.
        run: its seed, and the folder in which finished concepts are stored.
    """
    counts = [sum(len(tokens[c.name]) for c in members) for members in shared]
    parts = {m[0].name: part for m, part in zip(shared, split(closed, counts), strict=True)}
    rows = {
        m[0].name: (ground.retained.float()[:, None], ground.general.float()[:, None])
        for m in shared
        for ground in [backgrounds[m[0].name]]
    }
    # Bound to plain data, so that it can be pickled and run on another machine.
    train = partial(
        _harden_named, settings, model, [_merge(m) for m in shared], parts, rows, pooled, run.seed
    )
    found = run.map_cached(train, list(parts), label="hardening")
    hardened: dict[str, Any] = found
    return join([dataclasses.replace(parts[n], **hardened[n]) for n in hardened])


def _harden_named(
    settings: ACESettings,
    model: Model,
    concepts: Sequence[Concept],
    parts: Mapping[str, Gated],
    rows: Mapping[str, tuple[Tensor, Tensor]],
    pooled: Mapping[str, Gated],
    seed: int,
    names: Sequence[str],
) -> dict[str, Tensors]:
    """Harden the concepts of these names, one after the other."""
    run, found = RunContext(seed), {}
    for concept in concepts:
        if concept.name in names:
            part, staying = parts[concept.name], rows[concept.name]
            found[concept.name] = harden(settings, model, concept, part, *staying, run, pooled)
    return found


def harden(
    settings: ACESettings,
    model: Model,
    concept: Concept,
    gated: Gated,
    retained: Tensor,
    general: Tensor,
    run: RunContext,
    pooled: Mapping[str, Gated] | None = None,
) -> dict[str, Tensor]:
    """Train a concept's gates, directions and goals, as long as an attack on them succeeds.

    Args:
        settings: the attacks and the training.
        model: the original.
        concept: the concept.
        gated: its closed form.
        retained: (n, 1, d), tokens that must stay.
        general: (n, 1, d), tokens that must stay unless the closed form opens on them: other names of
            the concept are among the words of a vocabulary.
        run: its seed.
        pooled: the changes of the vector of a whole prompt, by layer; they stay as they are.

    Returns:
        The trained tensors (`FACTORS`), by name.
    """
    # Words on which the closed form opens are names of the concept.
    kept = torch.cat([retained, general[gated.gates(general).amax((1, 2)) < 0.5]])
    text = model.encode([settings.first_prompt(concept, name) for name in concept.names])
    anchored = model.encode([settings.anchor_prompt(concept)])
    n, steps = settings.num_images, settings.num_inference_steps or None
    shown = reference_images.draw_examples(model, concept.name, text.prompts[0], n, run, steps).latents
    root = stack_root([model.weight(layer) for layer in gated.layers]).to(text.embeddings)
    generator = run.generator("hardening", concept.name)
    # Both losses in units of how far concept and anchor are apart.
    weight_seen = 1 / measure_distance(root, text.embeddings, anchored.embeddings).mean()
    weight_noise = 1 / measure_noise_distance(model, text, anchored, shown, generator)
    # Each factor is trained as a share of its own size, so that one learning rate fits all.
    sizes = {name: getattr(gated, name).square().mean().sqrt() for name in FACTORS}
    shifts = {name: torch.zeros(1, *getattr(gated, name).shape).to(kept) for name in FACTORS}

    def current() -> Gated:
        moved: Any = {
            name: getattr(gated, name).to(kept) + sizes[name].to(kept) * shift[0]
            for name, shift in shifts.items()
        }
        return dataclasses.replace(gated, **moved)

    def missing(e: Tensor) -> Tensor:
        """Measure how much of the concept is missing: 0 is none, 1 as much as the anchor lacks."""
        return measure_distance(root, current().change_input(e), text.embeddings) * weight_seen

    levels, closed = model.log_snr(), gated.change_input(text.embeddings)
    vectors = pooled_gates.apply_gates(pooled or {}, text)
    for done in range(settings.rounds):
        run.progress(f"hardening {concept.name}", done, settings.rounds)
        hard, lack = attack(missing, text.embeddings, settings.radius, settings.attack_steps)
        # The share of the concept that came back, in root: losses are squares.
        if bool((1 - lack.clamp(min=0).sqrt() < settings.recovery_threshold).all()):
            break

        def losses(_: int, hard: Tensor = hard) -> Tensor:
            # Another name for every image: synonyms are hardened together.
            rows = torch.randint(len(text), (len(shown),), generator=generator).tolist()
            t = torch.randint(len(levels), (len(shown),), generator=generator)
            noise = torch.randn(shown.shape, generator=generator).to(shown)
            noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
            # The anchor's prediction is the teacher's, and needs no gradient.
            with torch.no_grad():
                goal = model.predict(noisy, t, anchored[[0] * len(shown)])
            step = current()
            given = dataclasses.replace(
                text[rows],
                embeddings=step.change_input(hard[rows]),
                pooled=None if vectors is None else vectors[rows],
            )
            difference = model.predict(noisy, t, given) - goal
            error = average_error(difference, settings.loss) * weight_noise
            harm = measure_distance(root, step.change_input(kept), kept).mean() * weight_seen
            lost = (
                measure_distance(root, step.change_input(text.embeddings), closed).mean() * weight_seen
            )
            return (error + settings.retain_weight * harm + settings.anchor_hold_weight * lost)[None]

        with frozen(model.parameters()):
            minimise(
                list(shifts.values()),
                losses,
                max_train_steps=settings.max_train_steps,
                learning_rate=settings.learning_rate,
                weight_decay=0,
            )
    return {name: getattr(current(), name).detach().cpu() for name in FACTORS}


def _merge(concepts: Sequence[Concept]) -> Concept:
    """Make one concept of several with the same anchor: the first, with the names of all."""
    first, *names = (name for concept in concepts for name in concept.names)
    return dataclasses.replace(concepts[0], name=first, synonyms=tuple(names))


def measure_distance(root: Tensor, given: Tensor, other: Tensor) -> Tensor:
    """Return the mean over tokens of ‖W a − W b‖² summed over layers, for each row: (n,).

    Args:
        root: a root of Σ WᵀW, (d, d).
        given: a, (n, tokens, d).
        other: b, (n, tokens, d).
    """
    return ((given - other) @ root.T).square().sum(-1).mean(-1)


@torch.no_grad()
def measure_noise_distance(
    model: Model, text: Text, anchored: Text, shown: Tensor, generator: torch.Generator
) -> Tensor:
    """Estimate E ‖ε₀(z_t, t, e) − ε₀(z_t, t, e_anchor)‖², a mean over latents' entries: ().

    Args:
        model: the original.
        text: the concept's prompts.
        anchored: (1,), the anchor's prompt.
        shown: (n, c, h, w), images of the concept, each met at `LEVELS` timesteps.
        generator: draws the noise.
    """
    levels, rows = len(model.log_snr()), [i % len(text) for i in range(len(shown))]
    squares = []
    for at in range(LEVELS):
        noise = torch.randn(shown.shape, generator=generator).to(shown)
        t = torch.full((len(shown),), (2 * at + 1) * levels // (2 * LEVELS))
        noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
        one, other = (model.predict(noisy, t, x) for x in (text[rows], anchored[[0] * len(shown)]))
        squares.append((one - other).square().mean())
    return torch.stack(squares).mean().clamp(min=1e-12)
