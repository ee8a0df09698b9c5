"""MACE's second stage: train a low-rank change of each concept to lower the attention to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.changes import Right, find_layer
from expunge.erasing import object_masks, reference_images
from expunge.erasing.concept_tokens import find_phrases
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_factors
from expunge.erasing.parameters import select_layers
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.methods.mace.settings import MACESettings
from expunge.model import Model
from expunge.ops.attention import AttentionReader, energy, infer_grid
from expunge.ops.finetune import frozen, minimise
from expunge.ops.low_rank import init_factors, use_own_factors
from expunge.ops.noise_level import shift_log_snr
from expunge.ops.trajectory import Objective
from expunge.problem import Concept
from expunge.runtime.context import RunContext, Tensors
from expunge.text import Text


@dataclass(frozen=True, eq=False)
class SuppressionSample:
    """What one training step shows of one concept."""

    text: Text
    """One prompt."""
    tokens: Tensor
    """(tokens,), bool: the tokens that should get no attention."""
    latents: Tensor
    """(c, h, w), clean."""
    mask: Tensor
    """(h, w), 1 where the concept is."""
    t: int
    """The timestep."""
    noise: Tensor
    """(c, h, w)"""


@dataclass(frozen=True, eq=False)
class SuppressionData:
    """What one concept's change is trained on, and its own random numbers."""

    concept: str
    """Its name."""
    text: Text
    """The concept's prompts."""
    tokens: Tensor
    """(prompts, tokens), bool."""
    latents: Tensor
    """(images, c, h, w), clean."""
    masks: Tensor
    """(images, h, w)"""
    generator: torch.Generator

    def sample(self, probabilities: Tensor) -> SuppressionSample:
        """Draw a prompt, an image, a timestep and noise.

        Args:
            probabilities: of each timestep, (T,).
        """
        # Prompt and image are drawn apart: any phrasing may meet any image.
        row, image = (
            int(torch.randint(n, (), generator=self.generator))
            for n in (len(self.text), len(self.latents))
        )
        t = int(torch.multinomial(probabilities, 1, generator=self.generator))
        noise = torch.randn(self.latents.shape[1:], generator=self.generator)
        latents = self.latents[image]
        return SuppressionSample(
            self.text[[row]], self.tokens[row], latents, self.masks[image], t, noise.to(latents)
        )


def prepare(settings: MACESettings, model: Model, concept: Concept, run: RunContext) -> SuppressionData:
    """Find a concept's prompts, images and masks, once for all training steps.

    Args:
        settings: where images and masks come from.
        model: the original.
        concept: the concept.
        run: its seed.

    Raises:
        ExpungeError: images or masks are missing or do not fit.
    """
    prompts, templates = settings.prompts(concept), settings.templates or TEMPLATES[concept.kind]
    text = model.encode(prompts)
    phrase = find_phrases(model, templates, text, len(concept.names))
    # The end token and the padding carry the whole prompt, and so the concept, too.
    place = torch.arange(phrase.shape[1], device=phrase.device)
    ending = (place >= text.first_end) & text.read

    if settings.images_from:
        shown = reference_images.read_examples(model, concept.name, prompts[0], settings.images_from)
    else:
        steps = settings.num_inference_steps or None
        shown = reference_images.draw_examples(
            model, concept.name, prompts[0], settings.num_images, run, steps
        )
    # A style is everywhere in its images.
    source = "none" if concept.kind == "style" else settings.masks
    mask = object_masks.find_masks(source, model, shown, (phrase | ending)[:1], run)
    return SuppressionData(
        concept.name,
        text,
        # As released; the paper counts the phrase's tokens alone.
        phrase | ending if settings.end_tokens else phrase,
        shown.latents,
        _resized(mask.to(shown.latents), shown.latents.shape[-2:]),
        run.generator("training", concept.name),
    )


def train_on_attention(
    settings: MACESettings,
    model: Model,
    data: Sequence[SuppressionData],
    matrix: Tensor,
    run: RunContext,
) -> dict[str, Tensors]:
    """Train changes of some concepts in one batch to lower the attention to their tokens.

    Args:
        settings: the loss and the training.
        model: the original.
        data: of each concept.
        matrix: M, (d, d), by which keys and values are refined before; not read without *refine*.
        run: its seed.

    Returns:
        By concept: `LAYER.up` (out, rank), `LAYER.down` (rank, d).
    """
    layers = tuple(entry.layer for entry in model.text_entries())
    modules = [find_layer(model.pipe, layer) for layer in layers]
    generators = [run.generator("factors", one.concept) for one in data]
    ups, downs = init_factors(modules, settings.rank, generators)
    refined = [Right(layers, matrix)] if "refine" in settings.stages else []
    probabilities = timestep_probabilities(settings, model)

    def losses(_: int) -> Tensor:
        samples = [one.sample(probabilities) for one in data]
        return attention_losses(settings, model, reader, samples)

    # Nothing after the last cross-attention is needed, but checkpointed parts cannot be left early.
    whole = model.network.is_gradient_checkpointing
    with (
        frozen(model.parameters()),
        model.using(refined),
        use_own_factors(modules, ups, downs),
        AttentionReader(model.cross_attentions(), whole=whole) as reader,
    ):
        minimise(
            [*ups, *downs],
            losses,
            max_train_steps=settings.max_train_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            names=[one.concept for one in data],
        )
    return {
        one.concept: {
            f"{layer}.{part}": tensor[b].cpu()
            for part, tensors in (("up", ups), ("down", downs))
            for layer, tensor in zip(layers, tensors, strict=True)
        }
        for b, one in enumerate(data)
    }


def train_on_trajectories(
    settings: MACESettings,
    model: Model,
    concepts: Sequence[Concept],
    matrix: Tensor,
    run: RunContext,
) -> dict[str, Tensors]:
    """Train changes of some concepts with ANT's objective, on trajectories of the original.

    Args:
        settings: the training; as many trajectories are drawn as there would be images.
        model: the original.
        concepts: the concepts.
        matrix: as in `train_on_attention`.
        run: as in `train_on_attention`.

    Returns:
        As `train_on_attention`.
    """
    subjects = [
        TrainingConcept(c.name, model.encode(settings.prompts(c)), run.generator("training", c.name))
        for c in concepts
    ]
    layers = select_layers(model, "text")
    config = TrajectoryConfig(
        # ANT's weights for identities and styles; it turns at step 40 of 50.
        Objective(preserve=0.4, unconditional_late=0.5, unconditional_early=0.2),
        turn=shift_log_snr(-3.18, settings.focal_side, model.latents_side),
        num_inference_steps=settings.num_inference_steps,
        # Drawn by the original as the user draws: the concept at full strength.
        guidance_scale=model.guidance_scale,
    )
    return train_factors(
        Steering(model, config),
        subjects,
        layers,
        run,
        rank=settings.rank,
        # alpha / rank is 1: B D as it stands, as when attention is lowered.
        alpha=settings.rank,
        max_train_steps=settings.max_train_steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        n_stored=settings.num_images,
        base_changes=[Right(layers, matrix)] if "refine" in settings.stages else [],
    )


def attention_losses(
    settings: MACESettings,
    model: Model,
    reader: AttentionReader,
    samples: Sequence[SuppressionSample],
) -> Tensor:
    """Compute the loss of each sample: how much attention its tokens get inside its mask.

    Args:
        settings: the norm.
        model: the network in training.
        reader: reads its cross-attentions.
        samples: n samples.

    Returns:
        (n,)
    """
    latents, noise, mask, tokens = (
        torch.stack([getattr(sample, name) for sample in samples])
        for name in ("latents", "noise", "mask", "tokens")
    )
    t = torch.tensor([sample.t for sample in samples], device=latents.device)
    noisy = model.add_noise(latents, noise, t)
    text = Text.joined([sample.text for sample in samples])

    def inside(attention: Tensor) -> Tensor:
        size = infer_grid(attention.shape[2], *latents.shape[-2:])
        return energy(attention, tokens, _resized(mask, size).flatten(1))

    parts = torch.stack(reader.read(inside, lambda: model.predict(noisy, t, text)))
    # A root has no slope at 0, where a small mask misses a whole layer.
    return (parts.clamp_min(1e-30).sqrt() if settings.norm == "joint" else parts).sum(0)


def timestep_probabilities(settings: MACESettings, model: Model) -> Tensor:
    """Return the probability of each timestep in training: (T,), summing to 1."""
    log_snr = model.log_snr()
    if not settings.focal:
        return torch.full_like(log_snr, 1 / len(log_snr))
    high, low = (
        shift_log_snr(level, settings.focal_side, model.latents_side)
        for level in (settings.focal_high, settings.focal_low)
    )
    return focal(log_snr, high, low, settings.focal_slope)


def focal(log_snr: Tensor, high: float, low: float, slope: float) -> Tensor:
    """Return the probability of each timestep, ξ(λ) · |dλ/dt| for its log-SNR λ: (T,), summing to 1.

        ξ(λ) ∝ σ(slope (λ − low)) − σ(slope (λ − high))

    The paper's ξ(t) ∝ σ(γ(t − t₁)) − σ(γ(t − t₂)), said in noise instead of in timesteps: in its window
    the log-SNR of Stable Diffusion falls almost evenly, by 0.0072 a timestep. The width |dλ/dt| makes it
    the same distribution of noise on every schedule.

    Args:
        log_snr: λ of each timestep, (T,).
        high: where the window begins, as a log-SNR.
        low: where it ends.
        slope: how sharply, per unit of log-SNR.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 5.
    """
    level = log_snr.clamp(-50, 50)  # infinite where a schedule ends without noise or signal
    # By how much λ changes in a timestep: schedules are dense where it changes little.
    (width,) = torch.gradient(level)
    probabilities = (slope * (level - low)).sigmoid() - (slope * (level - high)).sigmoid()
    probabilities = probabilities * width.abs()
    return probabilities / probabilities.sum()


def _resized(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize masks (n, h, w), each pixel to the nearest one's value: they stay 0 or 1."""
    return interpolate(mask[:, None], tuple(size), mode="nearest-exact")[:, 0]
