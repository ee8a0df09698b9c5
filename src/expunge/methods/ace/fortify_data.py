"""What ACE's third stage trains on: images of the concepts, and of what stays."""

from __future__ import annotations

import torch

from expunge.base.errors import ExpungeError
from expunge.changes import Gated
from expunge.erasing import reference_images
from expunge.erasing.gate_backgrounds import draw_words
from expunge.erasing.prompt_templates import KEPT, assemble_retained_prompts
from expunge.methods.ace.fortify import FortifyTarget, RetainSet
from expunge.methods.ace.settings import ACESettings
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext

CONCEPT_IMAGES, WORD_IMAGES = 24, 200
"""How many images are drawn of each concept, and of how many general words one is. Of what is retained
by name half as many as of the words are drawn in all, so that it is met more often than any word."""


def count_copies(n_named: int) -> int:
    """Return how many images are drawn of each prompt that stays by name."""
    return max(1, WORD_IMAGES // (2 * n_named))


def count_images(n_erased: int, n_retained: int) -> int:
    """Return how many images are drawn in all, at most.

    Args:
        n_erased: the concepts.
        n_retained: the names to retain.
    """
    named = n_retained + n_erased + 1
    return CONCEPT_IMAGES * n_erased + WORD_IMAGES + named * count_copies(named)


def prepare_targets(
    settings: ACESettings, model: Model, problem: Problem, run: RunContext
) -> list[FortifyTarget]:
    """Draw images of each concept.

    Args:
        settings: the phrasings.
        model: the original.
        problem: the concepts.
        run: its seed.
    """
    targets = []
    for concept in problem.erase:
        prompt = settings.first_prompt(concept)
        targets.append(
            FortifyTarget(
                concept.name,
                model.encode([prompt]),
                model.encode([settings.anchor_prompt(concept)]),
                reference_images.draw_examples(model, concept.name, prompt, CONCEPT_IMAGES, run).latents,
            )
        )
    return targets


def prepare_retained(
    settings: ACESettings, model: Model, problem: Problem, gates: Gated, run: RunContext
) -> RetainSet:
    """Draw images of what stays: retained names, anchors, the empty prompt, and general words.

    Args:
        settings: the phrasings, and how many words are drawn from.
        model: the original.
        problem: the concepts and what is retained.
        gates: of the first two stages; a word that they open on is left out.
        run: its seed.
    """
    phrasings = list(dict.fromkeys(KEPT[concept.kind] for concept in problem.erase))
    # Kind after kind in turn, so that each has as many.
    words = enumerate(draw_words(settings, model, problem, run))
    prompts = [phrasings[i % len(phrasings)].format(word) for i, word in words]
    text = model.encode(prompts)
    # Other names of a concept are among the words of a vocabulary.
    # Tokens that are not read are zeros, on which a gate may be open all the same.
    openness = torch.where(text.read[..., None], gates.gates(text.embeddings), 0)
    closed = (openness.amax((1, 2)) < 0.5).nonzero()[:, 0].tolist()
    if not closed:
        raise ExpungeError(
            "every general word opens a gate, so there is none for fortify to attack from: raise n_std,"
            " or set stages to 'gate harden'"
        )
    retained = assemble_retained_prompts(problem.retain, phrasings)
    anchors = [settings.anchor_prompt(concept) for concept in problem.erase]
    named = list(dict.fromkeys([*retained, *anchors, ""]))
    stay = named * count_copies(len(named)) + [prompts[i] for i in closed[:WORD_IMAGES]]
    images = reference_images.draw_each(model, "what stays", stay, run)
    return RetainSet(model.encode(stay), images, text[closed])
