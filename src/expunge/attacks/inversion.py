"""Textual inversion: one new word is learnt that calls the concept back from the edited model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from expunge.attack import Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.probe import Probe
from expunge.problem import replace_whole
from expunge.runtime.context import RunContext
from expunge.text import Text

CHECKS = 16
"""Noises on which words of several starts are compared, for each of the images."""


@dataclass(frozen=True)
class Inversion(Attack):
    """A word learnt to stand for what was erased.

        min_v E_{z,t} ‖ε_edit(z_t, t, c(v)) − ε₀(z_t, t, c)‖²

    v takes the place of the token embedding of one word of the tokenizer, and that word the place of
    the concept's name in each prompt; c(v) goes through the text encoder, so its end and padding tokens
    speak of it too. z_t are noisy images that the original draws of the prompts with seeds of their
    own: the attacker has seen the concept, and not the images that are judged.

    One word is learnt for all images of a probe. This attack is never used in training an edit.

    Cost: a few drawings by the original; restarts · steps · batch passes forward and back, whatever the
    probe.

    Source: Gal et al., ICLR 2023, arXiv 2208.01618; against erased models Pham et al., ICLR 2024,
    arXiv 2308.01508. The target is the original's prediction instead of the noise: less of chance.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"steps": [50, 150]},
        "restarts": {"restarts": [1, 3], "steps": 150},
        "long": {"steps": [150, 600]},
        "cce": {"steps": [5000], "batch_size": 16, "num_images": 16},
    }
    renamed: ClassVar[Mapping[str, str]] = {
        "rate": "learning_rate",
        "batch": "batch_size",
        "pictures": "num_images",
    }

    steps: int = bounded(100, at_least=0)
    """Training steps; 0 changes nothing."""
    learning_rate: float = bounded(0.03, above=0)
    """Adam's learning rate, as a share of the embedding's own size."""
    num_images: int = bounded(4, at_least=1)
    """Images of the concept that the word is learnt from."""
    batch_size: int = bounded(4, at_least=1)
    """Noisy images a step."""
    restarts: int = bounded(1, at_least=1)
    """Words learnt, the first from `start` and each further one from a random word of the tokenizer,
    with images and noise of its own; the one with the smallest error on noise that none has seen
    counts."""
    start: str = ""
    """The word whose embedding to start from; by default the tokenizer's nearest to the anchor."""

    @property
    def changes_nothing(self) -> bool:
        return not self.steps

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe with a learnt word in the place of the concept's name.

        Args:
            model: the original.
            edit: what is attacked.
            probe: what is drawn unattacked; one word is learnt for all its images.
            run: the seed of images and noise, and the progress.
        """
        if self.changes_nothing:
            return probe
        word = self._word(model, edit)
        prompts = [replace_name(prompt, edit, word) for prompt in probe.prompts]
        starts = self._starts(model, edit, probe, word, run)
        learnt = [
            self.learn(model, edit, probe, word, prompts, run, start, k)
            for k, start in enumerate(starts)
        ]
        vectors = learnt[0]
        if len(learnt) > 1:
            errors = self._errors(model, edit, probe, word, prompts, run, learnt)
            # Chosen by the attacker's objective, for an attacker has no judge to choose by.
            vectors = learnt[errors.index(min(errors))]
        # Under the edit, which may change the text encoder.
        with torch.no_grad(), model.using(edit):
            text = model.encode_with(prompts, word, vectors)
        return dataclasses.replace(probe, text=text)

    def learn(
        self,
        model: Model,
        edit: Edit,
        probe: Probe,
        word: str,
        prompts: list[str],
        run: RunContext,
        start: str = "",
        restart: int = 0,
    ) -> list[torch.Tensor]:
        """Learn v for each text encoder, (width,) each: the mean over the last quarter of the steps.

        Args:
            model: the original.
            edit: what is attacked.
            probe: what is drawn unattacked.
            run: as in `run`.
            word: the word whose place v takes.
            prompts: the probe's, with the word in them.
            start: the word whose vector v starts from; by default `word`.
            restart: which start this is; each has images and noise of its own.
        """
        # The first start's name has no number: a single start stays what it is when more are added.
        generator = run.generator("inversion", *probe.prompts, *([str(restart)] if restart else []))
        rows, original, latents = self._images(model, probe, generator)
        levels, mine = model.log_snr(), [prompts[i] for i in rows]
        first = model.word_vectors(start or word)
        # Shifts count in units of the embedding's own size, so that one learning rate fits all encoders.
        shifts = [torch.zeros_like(vector).requires_grad_() for vector in first]
        sizes = [vector.norm() / len(vector) ** 0.5 for vector in first]
        optimiser = torch.optim.Adam(shifts, lr=self.learning_rate)
        means = [torch.zeros_like(vector) for vector in first]
        # Single steps are noisy, for a batch is small: their mean draws better than the last one.
        tail = max(1, self.steps // 4)
        with frozen(model.parameters()), torch.enable_grad():
            for step in range(self.steps):
                run.progress("learning a word", step, self.steps)
                some = torch.randint(self.num_images, (self.batch_size,), generator=generator).tolist()
                t = torch.randint(len(levels), (self.batch_size,), generator=generator).to(
                    latents.device
                )
                noise = torch.randn(latents[some].shape, generator=generator).to(latents)
                z = model.add_noise(latents[some], noise, t)
                # The original's prediction, and not the noise: it leaves out what no word can explain.
                with torch.no_grad():
                    goal = model.predict(z, t, original[some])
                now = [v + size * shift for v, size, shift in zip(first, sizes, shifts, strict=True)]
                # What several rows say is encoded once: the text encoder's share of a step is large.
                said = list(dict.fromkeys(mine[i] for i in some))
                with model.using(edit):
                    text = model.encode_with(said, word, now)[[said.index(mine[i]) for i in some]]
                    error = (model.predict(z, t, text) - goal).square().mean()
                    gradients = torch.autograd.grad(error, shifts)
                # Set by hand: `backward` would fill the gradients of the model's weights, too.
                for shift, gradient in zip(shifts, gradients, strict=True):
                    shift.grad = gradient
                optimiser.step()
                if step >= self.steps - tail:
                    for mean, shift in zip(means, shifts, strict=True):
                        mean += shift.detach() / tail
        return [v + size * mean for v, size, mean in zip(first, sizes, means, strict=True)]

    def _images(
        self, model: Model, probe: Probe, generator: torch.Generator
    ) -> tuple[list[int], Text, torch.Tensor]:
        """Images of the concept: the rows of their prompts, their text, and clean latents."""
        rows = torch.randint(len(probe), (self.num_images,), generator=generator).tolist()
        # Seeds of its own: the images that are judged must be new to the attacker.
        seeds = torch.randint(2**31, (self.num_images,), generator=generator).tolist()
        original = model.encode([probe.prompts[i] for i in rows])
        steps = probe.num_inference_steps or model.num_inference_steps
        with torch.no_grad():
            _, latents = model.denoise(
                original,
                seeds,
                until=steps,
                num_inference_steps=steps,
                guidance_scale=probe.guidance_scale,
            )
        return rows, original, latents

    def _errors(
        self,
        model: Model,
        edit: Edit,
        probe: Probe,
        word: str,
        prompts: list[str],
        run: RunContext,
        learnt: list[list[torch.Tensor]],
    ) -> list[float]:
        """The mean error of each learnt word on the same images and noise, which no start has seen."""
        # The same images and noise for all starts, so that their errors compare.
        generator = run.generator("inversion", *probe.prompts, "check")
        rows, original, latents = self._images(model, probe, generator)
        levels, mine = model.log_snr(), [prompts[i] for i in rows]
        errors = [0.0] * len(learnt)
        with torch.no_grad():
            for _ in range(CHECKS):
                t = torch.randint(len(levels), (self.num_images,), generator=generator).to(
                    latents.device
                )
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                z = model.add_noise(latents, noise, t)
                goal = model.predict(z, t, original)
                for k, vectors in enumerate(learnt):
                    with model.using(edit):
                        text = model.encode_with(mine, word, vectors)
                        errors[k] += float((model.predict(z, t, text) - goal).square().mean()) / CHECKS
        return errors

    def _starts(self, model: Model, edit: Edit, probe: Probe, word: str, run: RunContext) -> list[str]:
        """The words to start from: the first is the one whose place is taken."""
        known = [w for w in vocabulary_words(model, edit.record.problem.erase) if w != word]
        generator = run.generator("inversion", *probe.prompts, "starts")
        order = torch.randperm(len(known), generator=generator).tolist()
        # The first start is that of a single one, so that more restarts never change it.
        found = [word, *(known[i] for i in order[: self.restarts - 1])]
        return found + [word] * (self.restarts - len(found))

    def _word(self, model: Model, edit: Edit) -> str:
        """A word that the tokenizer has as one token and no erased name uses."""
        erased = edit.record.problem.erase
        known = vocabulary_words(model, erased)
        wanted = [self.start, *(concept.anchor or "" for concept in erased)]
        # The last word of an anchor first: in "a photo of the sky" that is what it names.
        of_anchor = [w for text in wanted for w in reversed(text.lower().split()) if w in known]
        return (of_anchor or known)[0]


def replace_name(prompt: str, edit: Edit, word: str) -> str:
    """Return the prompt with a word in the place of the longest erased name in it, or at its end.

    Args:
        prompt: the prompt.
        edit: says which names it erases.
        word: what takes their place.
    """
    name = edit.record.problem.find_name(prompt)
    return replace_whole(prompt, name, word) if name else f"{prompt} {word}".strip()
