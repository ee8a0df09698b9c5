"""Real words searched by gradients through the edited denoiser, which call the concept back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.attack import Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.word_search import (
    Blank,
    WordSpace,
    rank_swaps,
    report_best,
    search,
    search_each,
    swap_words,
)
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.probe import Probe
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class TokenSearch(Attack):
    """A few real words, found by greedy coordinate gradient with the denoiser's loss.

        min_w E_{z,t} ‖ε_edit(z_t, t, c(w)) − ε₀(z_t, t, c)‖² / ‖ε₀(z_t, t, c) − ε₀(z_t, t, ∅)‖²

    w are words of the tokenizer in the place of the concept's name, none of them a name that the edit
    erases; or, with `place`, before or behind the whole prompt, name and all. z_t are noisy images
    that the original draws of the prompt with seeds of its own. A round ranks swaps of one word to first
    order, tries some of the best, and keeps the best prompt so far. Each prompt of a probe gets a search
    of its own, whose words all its images are drawn with.

    A query is a prompt tried on the edited denoiser, or a gradient through it; what was found, and how
    many queries it took, is in the results. A search that was stopped goes on.

    Cost: for each prompt a few drawings by the original; a query is `num_points` passes of the denoiser,
    forward, and for one in `batch_size` + 1 backward.

    Source: the loss is UnlearnDiffAtk's (Zhang et al., ECCV 2024, arXiv 2310.11868) with the original's
    prediction in the place of the noise, which leaves out what no words explain; the search is greedy
    coordinate gradient (Zou et al., 2023, arXiv 2307.15043), but that the best prompt is never let go.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"queries": [64, 256]},
        "before": {"queries": [64, 256], "place": "before"},
        "behind": {"queries": [64, 256], "place": "behind"},
        "few": {"queries": [64, 256], "num_words": 3},
        "long": {"queries": [1000]},
    }

    queries: int = bounded(256, at_least=0)
    """The budget: prompts tried and gradients taken, for each prompt; 0 changes nothing."""
    num_words: int = bounded(16, at_least=1, at_most=50)
    """Words searched: with few, little but synonyms can be found."""
    place: Literal["name", "before", "behind"] = "name"
    """Where they stand: in the place of the concept's name, or before or behind the whole prompt."""
    batch_size: int = bounded(15, at_least=1)
    """Prompts tried in a round."""
    choices: int = bounded(64, at_least=1)
    """Words that a round draws from, for each place: those that lower the loss most to first order."""
    num_points: int = bounded(8, at_least=1)
    """Noisy images that a prompt is tried on, at as many timesteps, evenly spaced."""

    @property
    def changes_nothing(self) -> bool:
        return not self.queries

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe with the words that were found.

        Args:
            model: the original.
            edit: what is attacked.
            probe: what is drawn unattacked.
            run: the seed, where the search is saved, and what it found.
        """
        if self.changes_nothing:
            return probe
        problem = edit.record.problem

        def search_one(space: WordSpace, blank: Blank) -> str:
            return self.search_one(model, edit, space, blank, probe, run)

        return search_each(model, problem, probe, self.place, search_one)

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
        label = f"token search {sorted(settings.items())} {blank.prompt}"
        generator = run.generator(label, "images")
        points = draw_points(model, blank.prompt, self.num_points, probe, generator)
        name = edit.record.problem.find_name(blank.prompt) or blank.prompt
        first = space.begin(model, name, self.batch_size, self.num_words, generator)

        def losses(prompts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                text = model.encode(prompts)
                return torch.stack([points.loss(model, text[[i]]) for i in range(len(prompts))])

        def propose(population: Tensor, numbers: torch.Generator) -> Tensor:
            prompt = blank.fill(space.say(population[0]))
            ranked = rank_swaps(
                model, space, prompt, population[0], lambda text: points.loss(model, text), self.choices
            )
            return swap_words(population, ranked, self.batch_size, numbers)

        with frozen(model.parameters()), model.using(edit):
            found = search(
                space,
                blank,
                losses,
                first,
                propose,
                queries=self.queries,
                keep=1,
                a_round=self.batch_size + 1,
                label=label,
                run=run,
            )
        return report_best(space, blank, found, run)


@dataclass(frozen=True, eq=False)
class Points:
    """Noisy images of a concept, and what the original predicts of them."""

    z: Tensor
    """(n, c, h, w)"""
    t: Tensor
    """(n,)"""
    goal: Tensor
    """(n, c, h, w), the original's prediction for the concept."""
    weight: Tensor
    """(n,), one over how far that is from its prediction for the empty prompt."""

    def loss(self, model: Model, text: Text) -> Tensor:
        """Return how far the model's predictions for a prompt, one row, are from the goal, ().

        0 is the concept itself; 1 is as far as the empty prompt's in the original.
        """
        predicted = model.predict(self.z, self.t, text[[0] * len(self.z)])
        return ((predicted - self.goal).square().flatten(1).mean(1) * self.weight).mean()


@torch.no_grad()
def draw_points(model: Model, prompt: str, n: int, probe: Probe, generator: torch.Generator) -> Points:
    """Draw images of a prompt with seeds of their own, and noise them at evenly spaced timesteps.

    Args:
        model: the original, without an edit.
        prompt: the prompt.
        n: how many.
        probe: says how images are drawn.
        generator: draws seeds and noise.
    """
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    text, empty = model.encode([prompt] * n), model.unconditional(n)
    steps = probe.num_inference_steps or model.num_inference_steps
    how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": probe.guidance_scale}
    _, latents = model.denoise(text, seeds, until=steps, **how)
    levels = len(model.log_snr())
    # The middles of equal parts: neither pure noise nor a clean image, of which no word says anything.
    t = ((torch.arange(n) + 0.5) * levels / n).long()
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    z = model.add_noise(latents, noise, t.to(latents.device))
    t = t.to(z.device)
    goal = model.predict(z, t, text)
    apart = (goal - model.predict(z, t, empty)).square().flatten(1).mean(1)
    # Where the two hardly differ, the smallest noise would count most.
    weight = 1 / apart.clamp(min=1e-2 * float(apart.max()) + 1e-12)
    return Points(z, t, goal, weight)
