"""The published reduction of ACE, taken literally: QᵀΔAttn, read while images are drawn."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from expunge.erasing import reference_images
from expunge.methods.ace.settings import ACESettings
from expunge.model import Model
from expunge.ops.attention import read_with_queries
from expunge.ops.prompt_alignment import locate_phrases
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext

LEVELS = 8
"""At how many timesteps, evenly spaced, concept and anchor are compared."""


def read_damping(
    settings: ACESettings, model: Model, problem: Problem, run: RunContext
) -> dict[str, dict[str, Tensor]]:
    """Read g of each concept and layer, (out,), at least 0 and at most 1.

        g ∝ |Σ Qᵀ (A_concept − A_anchor)|

    A is the attention to the phrase's own tokens, in the concept's prompt and in its anchor's (0
    where there is none), Q the queries beside the first; the sum runs over pixels, over `LEVELS`
    timesteps and over images drawn with either prompt; with reduction "attention" over heads, too.

    Args:
        settings: the reduction, the images and the damping.
        model: the original.
        problem: the concepts.
        run: its seed.
    """
    layers, found = settings.layers(model), {}
    for place, concept in enumerate(problem.erase):
        run.progress("reading attention", place, len(problem.erase))
        summed = _read_concept(settings, model, concept, run)
        found[concept.name] = {
            layer: next(g for key, g in summed.items() if _attention_of(key) == _attention_of(layer))
            for layer in layers
        }
    run.progress("reading attention", len(problem.erase), len(problem.erase))
    return found


@torch.no_grad()
def _read_concept(
    settings: ACESettings, model: Model, concept: Concept, run: RunContext
) -> dict[str, Tensor]:
    """Read g of each attention, (heads · width,), by the name of its layer of keys."""
    template = settings.templates_for(concept)[0]
    prompts = settings.first_prompt(concept), settings.anchor_prompt(concept)
    text = model.encode(prompts)
    before, after = (model.count_tokens(side.strip()) for side in template.split("{}"))
    counted = locate_phrases([before] * 2, [after] * 2, text.content_mask).float()
    if not concept.anchor:
        # The empty prompt has no phrase: nothing is attended to there.
        counted[1] = 0
    n, steps = settings.num_images, settings.num_inference_steps or None
    drawn = [
        reference_images.draw_examples(model, concept.name, p, n, run, steps).latents for p in prompts
    ]
    shown = torch.cat(drawn)
    attentions = model.cross_attentions()
    sums = [torch.zeros(()) for _ in attentions]
    levels, generator = len(model.log_snr()), run.generator("attention", concept.name)
    for at in range(LEVELS):
        noise = torch.randn(shown.shape, generator=generator).to(shown)
        t = torch.full((len(shown),), (2 * at + 1) * levels // (2 * LEVELS))
        noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
        heard = [
            read_with_queries(
                attentions,
                partial(_attention_to, counted[row]),
                partial(model.predict, noisy, t, text[[row] * len(shown)]),
            )
            for row in (0, 1)
        ]
        for i, ((q, one), (_, other)) in enumerate(zip(*heard, strict=True)):
            sums[i] = sums[i] + torch.einsum("nhpw,nhp->hw", q, one - other).cpu()
    keys = [entry.layer for entry in model.text_entries() if entry.role == "key"]
    found = {}
    # Both in the order of the attentions; a norm may stand between a projection and its attention.
    for layer, total in zip(keys, sums, strict=True):
        # One g for all heads, or each head's own.
        g = total if settings.reduction == "attention-by-head" else total.sum(0).expand_as(total)
        size = g.abs().flatten()
        # Scaled to the largest channel, since the sum's unit is that of queries.
        found[layer] = (settings.damping * size / size.max().clamp(min=1e-20)).clamp(max=1)
    return found


def _attention_of(layer: str) -> str:
    """Return what the names of one attention's layers begin with."""
    return layer.rpartition(".")[0]


def _attention_to(counted: Tensor, attention: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries (n, heads, pixels, width), and the attention to some tokens (n, heads, pixels)."""
    return query.float(), attention.float() @ counted
