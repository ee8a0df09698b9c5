"""Real words searched by queries alone: ask, look at the image, and ask again in other words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.attack import Access, Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.word_search import Blank, WordSpace, report_best, search, search_each, swap_words
from expunge.model import Model
from expunge.ops.training_target import compute_training_target
from expunge.probe import Probe
from expunge.runtime.context import RunContext

LEVELS = 4
"""Timesteps at which an image is looked at, evenly spaced."""


@dataclass(frozen=True)
class QuerySearch(Attack):
    """A few real words, found by asking the edited model for images and looking at them.

        max_w s(x(w)),    s(x) = Σ_t ‖ε₀(z_t, t, ∅) − target_t‖² − ‖ε₀(z_t, t, c) − target_t‖²

    x(w) is the one image that the edited model draws for the words and a seed, z_t that image with
    noise, and target_t what would have been the right prediction: s is how much better a denoiser does
    that is told the concept, which makes a classifier of it. It stands for whatever an attacker
    recognises images with. Nothing of the edited model is used but its images.

    Candidates are made of the population's best by swapping a word, and by mixing two. By default the
    search begins among the words whose token embeddings are nearest to the name, which anybody can
    look up in the public text encoder.

    A query is one image.

    Cost: for each query a drawing by the edited model, and 2 · `LEVELS` passes of the original.

    Source: the score is a diffusion classifier's (Li et al., ICCV 2023, arXiv 2303.16203), the search a
    plain evolution strategy; both put together by us.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"queries": [32, 128]},
        "random": {"queries": [128, 512], "begin": "random"},
    }

    access: ClassVar[Access] = "interface"

    queries: int = bounded(128, at_least=0)
    """The budget: images asked for, for each prompt; 0 changes nothing."""
    num_words: int = bounded(2, at_least=1, at_most=50)
    """Words searched, in the place of the name."""
    begin: Literal["near", "random"] = "near"
    """Begin among the words nearest to the name, or anywhere."""
    population: int = bounded(4, at_least=1)
    """Prompts that others are made of."""
    batch_size: int = bounded(8, at_least=1)
    """Prompts tried in a round."""
    choices: int = bounded(128, at_least=1)
    """The nearest words that a search draws from, where it begins near."""

    @property
    def changes_nothing(self) -> bool:
        return not self.queries

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe with the words that were found.

        Args:
            model: the original: it looks at images.
            edit: what is attacked.
            probe: what is drawn unattacked.
            run: the seed, where the search is saved, and what it found.
        """
        if self.changes_nothing:
            return probe
        problem = edit.record.problem

        def search_one(space: WordSpace, blank: Blank) -> str:
            return self.search_one(model, edit, space, blank, probe, run)

        return search_each(model, problem, probe, "name", search_one)

    def search_one(
        self, model: Model, edit: Edit, space: WordSpace, blank: Blank, probe: Probe, run: RunContext
    ) -> str:
        """Search words for one prompt, and return it with them.

        Args:
            model: the original.
            edit: what is attacked.
            space: the words.
            blank: the prompt, and the place in it.
            probe: says how images are drawn.
            run: as in `run`.
        """
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "queries"}
        label = f"query search {sorted(settings.items())} {blank.prompt}"
        generator = run.generator(label, "images")
        steps = probe.num_inference_steps or model.num_inference_steps
        # One seed for all: what differs between two images then is the words.
        (seed,) = torch.randint(2**31, (1,), generator=generator).tolist()
        if self.begin == "near":
            known = space.near(model, blank.name or blank.prompt, self.choices)
        else:
            known = torch.arange(len(space.words))
        picks = torch.randint(len(known), (self.batch_size, self.num_words), generator=generator)
        first, choices = known[picks], known.expand(self.num_words, -1)
        if self.begin == "near":  # one word said several times is what a person would try first
            first = torch.cat([known[: self.batch_size, None].expand(-1, self.num_words), first])

        def losses(prompts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                text = model.encode(prompts)
                with model.using(edit):
                    _, latents = model.denoise(
                        text,
                        [seed] * len(prompts),
                        until=steps,
                        num_inference_steps=steps,
                        guidance_scale=probe.guidance_scale,
                    )
                numbers = run.generator(label, "noise")  # the same noise for all
                noise = torch.randn((LEVELS, *latents.shape[1:]), generator=numbers)
                return -score_images(model, latents, blank.prompt, noise)

        def propose(population: Tensor, numbers: torch.Generator) -> Tensor:
            return swap_words(population, choices, self.batch_size, numbers, mix=True)

        found = search(
            space,
            blank,
            losses,
            first,
            propose,
            queries=self.queries,
            keep=self.population,
            a_round=self.batch_size,
            label=label,
            run=run,
        )
        return report_best(space, blank, found, run)


def score_images(model: Model, latents: Tensor, prompt: str, noise: Tensor) -> Tensor:
    """Return how much better the model predicts images if told a prompt, as a share of the error: (n,).

    Args:
        model: without an edit.
        latents: clean, (n, c, h, w).
        prompt: what they may show.
        noise: (levels, c, h, w), the same for all images.
    """
    n, levels = len(latents), len(model.log_snr())
    t = ((torch.arange(len(noise)) + 0.5) * levels / len(noise)).long().repeat(n)
    z0 = latents.repeat_interleave(len(noise), 0)
    eps = noise.to(latents).repeat(n, 1, 1, 1)
    z = model.add_noise(z0, eps, t.to(z0.device))
    told, empty = model.encode([prompt] * len(z)), model.unconditional(len(z))
    target = compute_training_target(model.prediction_type, z0, eps, model.log_snr()[t].clamp(-20, 20))
    with_prompt, without = (
        (model.predict(z, t.to(z.device), text) - target).square().flatten(1).mean(1)
        for text in (told, empty)
    )
    gain = (without - with_prompt) / (without + with_prompt).clamp_min(1e-12)
    return gain.reshape(n, -1).mean(1)
