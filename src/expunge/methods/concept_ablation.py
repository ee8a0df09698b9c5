"""Concept Ablation: train what a concept is predicted as to be what its anchor is; minutes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.in_place_training import measure_drift, train_in_place
from expunge.erasing.moved_share import count_predictions
from expunge.erasing.parameters import Part, select_parameters
from expunge.erasing.prompt_templates import assemble_anchor_prompts, assemble_prompts, require_place
from expunge.erasing.reference_images import draw_each
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.noise_error import Loss, measure_error
from expunge.ops.training_target import compute_training_target
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class ConceptAblation(Method):
    """Ablate a concept: make its prompts mean the anchor's, on images of the anchor.

        model-based    min E ‖ε(z_t, t, c) − sg ε(z_t, t, c_anchor)‖²
        noise-based    min E ‖ε(z_t, t, c) − ε‖²

    z_t are noisy images of the anchor with the noise ε, drawn by the original; c is the anchor's prompt
    with the concept in its place; sg stops the gradient, so that the network in training is its own
    teacher. `regularisation` adds E ‖ε(z_t, t, c_anchor) − ε‖²: the anchor itself stays.

    Errors are compared in ε, whatever the network predicts. The paper's prompts are a language model's;
    here they are templates (ours). It also trains the token embedding alone, which is not here: an edit
    is of the denoiser. Images are not flipped or scaled. The paper knows no retain; `retain_weight` adds
    E ‖ε(z_t, t, r) − ε₀(z_t, t, r)‖² over retained prompts r and the empty one (ours).

    Cost: an image of the anchor for each of `num_images`; for each of a step's samples one prediction
    with a gradient and, model-based, one without.

    Source: Kumari et al., ICCV 2023, arXiv 2303.13516, eq. 4 and 5.
    """

    citation: ClassVar[str] = (
        "Kumari, Zhang, Wang, Shechtman, Zhang, Zhu: Ablating Concepts in Text-to-Image Diffusion"
        " Models. ICCV 2023, arXiv 2303.13516."
    )

    stronger: ClassVar[str] = "more max_train_steps, or a larger learning_rate"
    presets: ClassVar[Presets] = read_presets(__file__)

    target: Literal["model", "noise"] = "model"
    """What is predicted for the concept's prompt: what the network predicts for the anchor's, or the
    noise that an image of the anchor got."""
    regularisation: float = bounded(0.0, at_least=0)
    """Weight of the noise's prediction for the anchor's own prompt."""
    retain_weight: float = bounded(0.0, at_least=0)
    """Weight of what the original predicts for retained prompts and the empty one; 0 is the paper's."""
    part: Part = "text"
    """What is trained: "text", the keys and values of the cross-attentions; "cross-attention", all of
    these; "denoiser", everything."""
    num_images: int = bounded(16, at_least=1)
    """Images of each concept's anchor."""
    samples: int = bounded(8, at_least=1)
    """Noisy images in a training step."""
    max_train_steps: int = bounded(100, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(1.6e-5, above=0)
    """Adam's learning rate; larger erases more, and more of what is near."""
    loss: Loss = "squared"
    """How an error of a prediction counts: squared, as in the paper; or by the Hellinger distance, which
    is bounded."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "predictions"

    @property
    def reads_retain(self) -> bool:
        return self.retain_weight > 0

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        # Twice: guidance predicts with and without the prompt.
        drawn = len(problem.erase) * self.num_images * 2 * num_inference_steps
        rows = self.max_train_steps * self.samples
        taught = rows if self.target == "model" else 0
        taught += rows if self.retain_weight else 0
        learnt = rows * (1 + bool(self.regularisation) + bool(self.retain_weight))
        # Measuring how far the edit went takes predictions, too.
        drawn += count_predictions(len(problem.erase))
        return Cost(2 * len(problem.erase) * self.num_images, drawn + taught, learnt)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        texts, latents = self._pairs(model, problem, run)
        generator = run.generator("training")
        scale, levels = model.noise_scale(), model.log_snr()
        trained = InPlace(select_parameters(model, self.part))
        kept = model.encode([*problem.retain, ""])

        def losses() -> Iterator[Tensor]:
            rows = torch.randint(len(latents), (self.samples,), generator=generator).tolist()
            t = torch.randint(len(levels), (self.samples,), generator=generator)
            clean = latents[rows]
            # Drawn on the CPU, so that training meets the same noise on every device.
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            at, erased, anchored = t.to(clean.device), texts[0][rows], texts[1][rows]
            noisy = model.add_noise(clean, noise, at)
            # At least float32: `measure_error` squares in the dtype of its scale.
            wide = scale[t].to(clean.device, torch.promote_types(clean.dtype, torch.float32))
            true = compute_training_target(model.prediction_type, clean, noise, levels[t])
            goal = true
            if self.target == "model":
                # The network as it stands teaches itself: no gradient reaches its answer for the anchor.
                with torch.no_grad():
                    goal = model.predict(noisy, at, anchored)
            yield measure_error(model.predict(noisy, at, erased), goal, wide, self.loss).mean()
            if self.regularisation:
                # Anew, with a gradient: `goal` has none. By now the first part's graph is freed.
                found = model.predict(noisy, at, anchored)
                yield self.regularisation * measure_error(found, true, wide, self.loss).mean()
            if self.retain_weight:
                stay = kept[torch.randint(len(kept), (self.samples,), generator=generator).tolist()]
                drift = measure_drift(model, trained, noisy, at, stay, wide, self.loss)
                yield self.retain_weight * drift.mean()

        return train_in_place(
            model,
            trained,
            losses,
            run,
            generator,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            title="ablating",
        )

    def _pairs(
        self, model: Model, problem: Problem, run: RunContext
    ) -> tuple[tuple[Text, Text], Tensor]:
        """Draw the anchors' images, and pair each with the concept's prompt and the anchor's.

        Returns:
            Both prompts of every image, and its clean latents, (n, c, h, w).
        """
        erased, anchored, latents = [], [], []
        for concept in problem.erase:
            own = assemble_prompts(concept, self.templates)
            # One a template: repeated for every name, so that both lists pair row for row.
            of_anchor = assemble_anchor_prompts(concept, self.templates) * len(concept.names)
            model.require_window(own + of_anchor)
            # In turn over names and templates, as far as the images go.
            places = [i * len(own) // self.num_images for i in range(self.num_images)]
            if self.num_images >= len(own):
                places = [i % len(own) for i in range(self.num_images)]
            erased += [own[i] for i in places]
            anchored += [of_anchor[i] for i in places]
            label = f"the anchor of {concept.name}"
            with torch.no_grad():
                latents.append(draw_each(model, label, [of_anchor[i] for i in places], run))
        return (model.encode(erased), model.encode(anchored)), torch.cat(latents)
