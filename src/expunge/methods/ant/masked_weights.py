"""ANT for one concept: train the weights that a saliency mask leaves, and keep the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded, check_fields
from expunge.changes import Changes
from expunge.erasing import saliency
from expunge.erasing.caption_gram import read_captions_for
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_weights
from expunge.erasing.parameters import Part, select_parameters
from expunge.erasing.prompt_templates import assemble_retained_prompts
from expunge.erasing.trajectories import TrainingConcept
from expunge.methods.ant.settings import SharedSettings
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.problem import Problem, normalize_name
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class MaskedWeights:
    """The denoiser's own weights, those alone that matter to the concept in every one of many maps."""

    train_on: Literal["part", "text-refiner"] = "part"
    """Where: in `part`, or in the layers that see text alone and no time, of a family that has some
    (Z-Image). What makes images of the text then stays as it is."""
    part: Part = "denoiser"
    """The weights: "denoiser", the whole of it; "cross-attention"; "text", of these the keys and values
    alone; or "rest", all but the cross-attentions."""
    maps: int = bounded(100, at_least=0)
    """Saliency maps, at most; 0 trains all weights. With the largest halves the number of weights does
    not settle: more maps leave fewer."""
    mask_half: Literal["largest", "smallest"] = "largest"
    """Which half of each tensor's gradients a map keeps: the largest, as the paper says; or the
    smallest, as released, whose common part falls far more slowly."""
    map_samples: int = bounded(10, at_least=1)
    """Points of a trajectory that a map sums the gradient over."""
    settle: float = bounded(0.01, at_least=0, at_most=1)
    """Stop when the last 10 maps removed at most this fraction of the mask; 0 disables early
    stopping."""
    mask: str = ""
    """A .safetensors file for the saliency mask: read from there, or made and written there."""
    augmentations: tuple[str, ...] = ()
    """Prompts for the maps, the concept among them; by default its names in the templates."""
    retain_weight: float = bounded(0.0, at_least=0)
    """Weight of a term of ours: predictions for what is retained and for the captions stay as they
    were."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mask and not self.mask.lower().endswith(".safetensors"):
            raise ExpungeError(f"a mask is a .safetensors file; {self.mask} should end so")

    @property
    def trained_part(self) -> Part | Literal["text-refiner"]:
        """What is trained."""
        return self.part if self.train_on == "part" else self.train_on

    def train(
        self, settings: SharedSettings, model: Model, problem: Problem, run: RunContext
    ) -> Changes:
        """Train the weights of the mask; several concepts count as one.

        Args:
            settings: the objective, the trajectories and the training.
            model: as in `Method.fit`.
            problem: as in `Method.fit`.
            run: as in `Method.fit`.

        Raises:
            ExpungeError: the augmentations leave a concept out or have no anchors, the mask is another
                model's, nothing is there to retain, or the loss diverges.
        """
        steering = Steering(model, settings.trajectory_config)
        model, parameters = steering.model, select_parameters(steering.model, self.trained_part)
        prompts = [p for concept in problem.erase for p in settings.prompts(model, concept)]
        augmented = self._augmented(problem) or prompts
        model.require_window(augmented)
        anchors = settings.encode_anchors(model, problem.erase)
        if anchors is not None and self.augmentations and self.maps:
            raise ExpungeError(
                "augmentations have no anchor's prompts to turn to: leave them out, or set turn_to to"
                " 'empty'"
            )
        masks = None
        if self.maps:
            found = self.find_mask(settings, steering, augmented, run, anchors)
            # A mask from a file lies on the CPU.
            masks = {k: m.to(parameters[k].device) for k, m in found.masks.items()}
        # One for both terms: its state is what a killed run resumes from.
        generator = run.generator("training")
        subject = TrainingConcept(
            problem.erase[0].name,
            model.encode(prompts),
            generator,
            anchors,
        )
        return train_weights(
            steering,
            subject,
            InPlace(parameters, masks),
            run,
            max_train_steps=settings.max_train_steps,
            learning_rate=settings.learning_rate,
            samples=settings.samples,
            n_stored=settings.n_stored,
            drawn_by_original=settings.drawn_by == "original",
            micro_batch=settings.micro_batch,
            retained=self._retained(settings, model, problem, generator),
            retain_weight=self.retain_weight,
        )

    def find_mask(
        self,
        settings: SharedSettings,
        steering: Steering,
        prompts: Sequence[str],
        run: RunContext,
        anchors: Text | None = None,
    ) -> saliency.Mask:
        """Read the mask from its file, or make a new one and write it there.

        Without a file of the user's, it is kept with the unfinished work.

        Args:
            settings: how many points go through the network together.
            steering: the trajectories and their losses.
            prompts: of the maps, in turn.
            run: its seed and folder.
            anchors: the same prompts with the anchor in the concept's place; None for empty ones.

        Raises:
            ExpungeError: the mask was made for another model or method, or no weight is left.
        """
        model, parameters = steering.model, select_parameters(steering.model, self.trained_part)
        file = Path(self.mask) if self.mask else run.folder and run.folder / "mask" / "mask.safetensors"
        if file and file.is_file():
            mask = saliency.Mask.load(file)
            mask.require_fit(model, parameters, "ant", file)
            return mask
        mask = saliency.make_mask(
            steering,
            parameters,
            prompts,
            run,
            anchors=anchors,
            method="ant",
            maps=self.maps,
            samples=self.map_samples,
            settle=self.settle,
            batch_size=settings.fit_together(1),
            half=self.mask_half,
        )
        if file:
            mask.save(file)
        return mask

    def _augmented(self, problem: Problem) -> tuple[str, ...]:
        """Return the user's own prompts for the maps, and check that each concept is named in one."""
        # Between spaces, so that a name is found as whole words: "cat" is not in "a catalogue".
        texts = [f" {normalize_name(text)} " for text in self.augmentations]
        for concept in problem.erase if texts else ():
            if not any(f" {normalize_name(name)} " in text for name in concept.names for text in texts):
                raise ExpungeError(f"no prompt of the augmentations names {concept.name!r}")
        return self.augmentations

    def _retained(
        self, settings: SharedSettings, model: Model, problem: Problem, generator: torch.Generator
    ) -> TrainingConcept | None:
        """Encode prompts that stay as they are: of the retained, and of the captions as often."""
        if not self.retain_weight:
            return None
        named = assemble_retained_prompts(problem.retain)
        erased = [f" {normalize_name(name)} " for concept in problem.erase for name in concept.names]
        captions = (
            read_captions_for(model, settings.captions, problem.erase) if settings.captions else ()
        )
        # A caption that names the concept would hold it where it is.
        general = [
            text for text in captions if not any(name in f" {normalize_name(text)} " for name in erased)
        ]
        if not named and not general:
            raise ExpungeError("retain_weight keeps nothing: retain something, or give captions")
        # A row is drawn at random: those of the retained are repeated to weigh as much as the captions'.
        times = max(1, len(general) // max(1, len(named)))
        rows = [*(list(range(len(named))) * times), *range(len(named), len(named) + len(general))]
        return TrainingConcept("retained", model.encode([*named, *general])[rows], generator)
