"""Textual inversion in training an edit: the word that still calls a concept from a changed model.

The attack that judges (`attacks/inversion.py`) is another one: it learns from the original's
predictions, with words, images and noise of its own, which no edit has seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.changes import Changes
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.noise_error import measure_error
from expunge.ops.training_target import compute_training_target
from expunge.problem import Concept
from expunge.runtime.context import RunContext


def choose_word(
    model: Model, concept: Concept, erased: Sequence[Concept], templates: Sequence[str]
) -> str:
    """Choose the word to start from: the anchor's last that the tokenizer knows whole, or any.

    Args:
        model: whose tokenizer knows words.
        concept: the concept whose anchor is asked.
        erased: all concepts, whose own words are left out.
        templates: phrasings that the word is put into; their own words are left out, for what is learnt
            takes the word's place wherever it stands.

    Raises:
        ExpungeError: no word is left.
    """
    said = " ".join(templates).lower().split()
    known = [word for word in vocabulary_words(model, erased) if word not in said]
    if not known:
        raise ExpungeError("the tokenizer knows no word to start from that the templates do not hold")
    wanted = [word for word in reversed((concept.anchor or "").lower().split()) if word in known]
    return (wanted or known)[0]


def learn_word(
    model: Model,
    changes: Changes,
    prompts: Sequence[str],
    word: str,
    latents: Tensor,
    run: RunContext,
    generator: torch.Generator,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
) -> list[Tensor]:
    """Learn token embeddings v that make a changed model draw what some images show.

        min_v E ‖ε_changed(z_t, t, c(v)) − ε‖²,     z_t the images with the noise ε

    Args:
        model: the original.
        changes: what is applied to it.
        prompts: phrasings with the word in them.
        word: the word whose place v takes, and whose embedding v starts from.
        latents: the images, (n, c, h, w), clean.
        run: the progress.
        generator: draws images, phrasings, times and noise.
        steps: training steps; 0 returns the word's own embeddings.
        learning_rate: Adam's, as a share of the embedding's own size.
        batch_size: noisy images a step.

    Returns:
        v of each text encoder, (width,).

    Source: Gal et al., ICLR 2023, arXiv 2208.01618.
    """
    model.encode(prompts)  # calls the text encoder back where idle parts are offloaded
    first, levels, scale = model.word_vectors(word), model.log_snr(), model.noise_scale()
    # Shifts in units of the embedding's own size, so that one learning rate fits all text encoders.
    sizes = [vector.norm() / len(vector) ** 0.5 for vector in first]
    shifts = [torch.zeros_like(vector).requires_grad_() for vector in first]
    optimiser = torch.optim.Adam(shifts, lr=learning_rate)

    def current() -> list[Tensor]:
        return [v + size * shift for v, size, shift in zip(first, sizes, shifts, strict=True)]

    with frozen(model.parameters()), model.using(changes), torch.enable_grad():
        for step in range(steps):
            run.progress("looking for a word that brings it back", step, steps)
            rows = torch.randint(len(latents), (batch_size,), generator=generator).tolist()
            said = torch.randint(len(prompts), (batch_size,), generator=generator).tolist()
            t = torch.randint(len(levels), (batch_size,), generator=generator)
            clean = latents[rows]
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = model.add_noise(clean, noise, t.to(clean.device))
            goal = compute_training_target(model.prediction_type, clean, noise, levels[t])
            text = model.encode_with([prompts[i] for i in said], word, current())
            wide = scale[t].to(clean.device, torch.promote_types(clean.dtype, torch.float32))
            found = model.predict(noisy, t.to(clean.device), text)
            error = measure_error(found, goal, wide).mean()
            # Set by hand: `backward` would fill the gradients of the model's weights, too.
            for shift, gradient in zip(shifts, torch.autograd.grad(error, shifts), strict=True):
                shift.grad = gradient
            optimiser.step()
    return [vector.detach() for vector in current()]
