"""Real words searched through the text encoder alone, which say to it what the concept's name says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.attack import Access, Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.erasing.prompt_templates import TEMPLATES
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
from expunge.problem import Concept, normalize_name
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class EncoderSearch(Attack):
    """A few real words whose encoding is near that of the prompt with the concept's name, and beyond.

        min_w ‖E(w) − T‖² / ‖E(anchor) − T‖²,    T = E(prompt) + η ĉ,
        ĉ = mean over templates of E(template of the name) − E(template of the anchor)

    E is all of a prompt's embeddings, padding included. w are words in the place of the name, none of
    them a name that is erased. The erased model is never asked: one search serves for every edit of the
    concept, and an edit that leaves the text encoder as it is cannot change what is found. So this is
    the attack of somebody who has the text encoder alone, which most models share.

    A query is a prompt encoded, or a gradient through the text encoder.

    Cost: the text encoder's passes, and no denoiser's.

    Source: Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012), eq. 3 to 5; there a genetic search,
    here greedy coordinate gradient (Zou et al., 2023, arXiv 2307.15043).
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"queries": [250, 1000]},
        "long": {"queries": [3000], "num_words": 8},
    }

    access: ClassVar[Access] = "text encoder"

    queries: int = bounded(1000, at_least=0)
    """The budget: prompts encoded and gradients taken, for each prompt; 0 changes nothing."""
    num_words: int = bounded(3, at_least=1, at_most=50)
    """Words searched, in the place of the name."""
    eta: float = bounded(0.0, at_least=0)
    """η, how far beyond the prompt the target lies along ĉ. The paper has 3; with 0 the target is the
    prompt itself, which is what we have tried."""
    batch_size: int = bounded(31, at_least=1)
    """Prompts tried in a round."""
    choices: int = bounded(64, at_least=1)
    """Words that a round draws from, for each place: those that lower the loss most to first order."""

    @property
    def changes_nothing(self) -> bool:
        return not self.queries

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe with the words that were found.

        Args:
            model: the original; only its text encoder is asked.
            edit: says what is erased.
            probe: what is drawn unattacked.
            run: the seed, where the search is saved, and what it found.
        """
        if self.changes_nothing:
            return probe
        problem = edit.record.problem

        def search_one(space: WordSpace, blank: Blank) -> str:
            return self.search_one(model, problem.erase, space, blank, run)

        return search_each(model, problem, probe, "name", search_one)

    def search_one(
        self,
        model: Model,
        erased: Sequence[Concept],
        space: WordSpace,
        blank: Blank,
        run: RunContext,
    ) -> str:
        """Search words for one prompt, and return it with them.

        Args:
            model: the original.
            erased: the concepts.
            space: the words.
            blank: the prompt, and the place in it.
            run: as in `run`.
        """
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "queries"}
        label = f"encoder search {sorted(settings.items())} {blank.prompt}"
        generator = run.generator(label, "first")
        name = blank.name or blank.prompt
        first = space.begin(model, name, self.batch_size, self.num_words, generator)
        named = [c for c in erased if normalize_name(blank.name) in map(normalize_name, c.names)]
        (concept,) = named[:1] or erased[:1]
        with torch.no_grad():
            target = model.encode([blank.prompt]).embeddings
            neutral = model.encode([blank.fill(concept.anchor or "")]).embeddings
            if self.eta:
                target = target + self.eta * find_direction(model, concept)
            scale = (neutral - target).square().sum()

        def loss(text: Text) -> Tensor:
            return ((text.embeddings - target).square().sum((1, 2)) / scale).sum()

        def losses(prompts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                found = model.encode(prompts).embeddings
                return (found - target).square().sum((1, 2)) / scale

        def propose(population: Tensor, numbers: torch.Generator) -> Tensor:
            prompt = blank.fill(space.say(population[0]))
            ranked = rank_swaps(model, space, prompt, population[0], loss, self.choices)
            return swap_words(population, ranked, self.batch_size, numbers)

        with frozen(model.parameters()):
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


@torch.no_grad()
def find_direction(model: Model, concept: Concept) -> Tensor:
    """Return ĉ, what a concept's name adds to encoded prompts over its anchor, (1, tokens, width).

    Args:
        model: whose text encoder is asked.
        concept: the concept.
    """
    names, anchors = (
        model.encode([template.format(word) for template in TEMPLATES[concept.kind]]).embeddings
        for word in (concept.name, concept.anchor or "")
    )
    return (names - anchors).mean(0, keepdim=True)
