"""Search for real words that call for something: what attacks on discrete prompts are made of.

A search moves in the words that the tokenizer has as one token, so that every prompt it tries can be
typed, and is tokenized as it was meant. It is cut into rounds, of which the state is saved: a search
that was stopped goes on, and one with a larger budget goes on from one with a smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.model import Model
from expunge.probe import Probe
from expunge.problem import Concept, Problem, replace_whole
from expunge.runtime.context import RunContext
from expunge.text import Text

Losses = Callable[[Sequence[str]], Tensor]
"""Gives the loss of each prompt, (n,); smaller is nearer to what is wanted."""
Propose = Callable[[Tensor, torch.Generator], Tensor]
"""Gives the next candidates, (n, places), from the population, (m, places), the best row first."""


@dataclass(frozen=True, eq=False)
class WordSpace:
    """The words that a search may use, each one token to every text encoder of the model."""

    words: tuple[str, ...]
    embeddings: tuple[Tensor, ...]
    """For each text encoder the token embedding of every word, (words, width)."""

    @classmethod
    def of(cls, model: Model, erased: Sequence[Concept]) -> WordSpace:
        """Collect the words of the tokenizer that no erased name is part of.

        Args:
            model: whose tokenizers are asked.
            erased: the concepts. Their names, and words made of them such as plurals, are left out: to
                ask by name is no search.

        Raises:
            ExpungeError: no word is left.
        """
        taken = {w for c in erased for name in c.names for w in re.findall(r"\w{3,}", name.lower())}
        words, vectors = [], []
        for word in vocabulary_words(model, erased):
            if any(name in word for name in taken):
                continue
            with contextlib.suppress(ExpungeError):  # several tokens to another of its tokenizers
                vectors.append(model.word_vectors(word))
                words.append(word)
        if not words:
            raise ExpungeError("this model's tokenizers share no word that could be searched for")
        return cls(tuple(words), tuple(torch.stack(part) for part in zip(*vectors, strict=True)))

    def near(self, model: Model, name: str, n: int) -> Tensor:
        """Return the n words whose token embeddings are most like those of a name: (n,), nearest first.

        Args:
            model: has the tokenizers.
            name: of one word or several; those that are several tokens are passed by.
            n: how many, at the most.
        """
        known = []
        for word in re.findall(r"\w+", name.lower()):
            with contextlib.suppress(ExpungeError):
                known.append(model.word_vectors(word))
        score = torch.zeros(len(self.words))
        for own, *parts in zip(self.embeddings, *known, strict=True) if known else ():
            mean = torch.stack(parts).mean(0)
            # Common words lie together in one corner; without their mean, likeness is of meaning.
            centre = own.mean(0)
            score += torch.cosine_similarity(own - centre, (mean - centre)[None]).float().cpu()
        return score.argsort(descending=True, stable=True)[:n]

    def begin(self, model: Model, name: str, n: int, places: int, generator: torch.Generator) -> Tensor:
        """Return rows to begin a search with, (n, places): half among the words nearest to a name.

        Args:
            model: has the tokenizers.
            name: what is searched for.
            n: how many rows.
            places: words of a row.
            generator: chooses them.
        """
        known = self.near(model, name, 4 * places)
        rows = torch.randint(len(self.words), (n, places), generator=generator)
        near = known[torch.randint(len(known), (n, places), generator=generator)]
        # Every second row: words near a name are what an edit is most likely to have closed.
        rows[::2] = near[::2]
        return rows

    def say(self, chosen: Tensor) -> str:
        """Return the words of a row of their numbers, (places,), as text."""
        return " ".join(self.words[i] for i in chosen.tolist())


@dataclass(frozen=True)
class Blank:
    """A prompt with a place for words."""

    prompt: str
    name: str
    """What the words take the place of; "" puts them beside the prompt."""
    before: bool = False
    """Whether they stand before the prompt there, and not behind it."""

    @classmethod
    def of(cls, prompt: str, problem: Problem, place: str) -> Blank:
        """Find the place for words in a prompt.

        Args:
            prompt: the prompt.
            problem: whose names are looked for.
            place: "name", where the erased name stands, or behind a prompt that has none; "before",
                in front of the whole prompt; or "behind" it.
        """
        return cls(prompt, problem.find_name(prompt) if place == "name" else "", place == "before")

    def fill(self, words: str) -> str:
        """Return the prompt with words in its place."""
        if self.name:
            return replace_whole(self.prompt, self.name, words)
        return f"{words} {self.prompt}" if self.before else f"{self.prompt} {words}"


@dataclass
class Found:
    """What a search has found, and what it has cost so far."""

    population: Tensor
    """(m, places), the numbers of words; the best row first."""
    losses: Tensor
    """(m,), of the population."""
    queries: int
    """Prompts tried, and gradients taken, so far."""

    def to_dict(self) -> dict[str, Tensor]:
        """Return everything, as tensors, for a checkpoint."""
        queries = torch.tensor(self.queries)
        return {"population": self.population, "losses": self.losses, "queries": queries}


def search(
    space: WordSpace,
    blank: Blank,
    losses: Losses,
    first: Tensor,
    propose: Propose,
    *,
    queries: int,
    keep: int,
    a_round: int,
    label: str,
    run: RunContext,
) -> Found:
    """Search for the words with the smallest loss, round by round, within a budget.

    A round is taken whole or not at all, so that what is found within a budget does not depend on how
    often the search was stopped, or on a smaller budget that it went on from.

    Args:
        space: the words.
        blank: the prompt and the place in it.
        losses: judges prompts, one query each.
        first: (m, places), the words to begin with.
        propose: makes candidates of the population.
        queries: the budget.
        keep: how many rows the population has.
        a_round: the queries of a round: its candidates, and a gradient where it takes one.
        label: names the state in the work folder.
        run: its seed; and where the state is saved, round by round.
    """
    generator, done = run.generator(label), f"{label}, {queries} queries"

    def judge(rows: Tensor) -> Tensor:
        return losses([blank.fill(space.say(row)) for row in rows]).detach().float().cpu()

    def best(rows: Tensor, values: Tensor, spent: int) -> Found:
        order = values.argsort(stable=True)[:keep]
        return Found(rows[order], values[order], spent)

    # The end of a search with this very budget, or else wherever one with any budget has come to.
    state = run.checkpoint(done) or run.checkpoint(label)
    if state is not None and int(state["queries"]) <= queries:
        found = Found(state["population"], state["losses"], int(state["queries"]))
        generator.set_state(state["numbers"])
    else:
        first = first[: max(1, queries)]
        found = best(first, judge(first), len(first))
    while True:
        run.progress("searching for words", found.queries, queries)
        state = {**found.to_dict(), "numbers": generator.get_state()}
        run.save_checkpoint(label, state)
        if found.queries + a_round > queries:
            # Under the budget's own name, for a larger budget goes on under the other.
            run.save_checkpoint(done, state)
            run.progress("searching for words", queries, queries)
            return found
        rows = propose(found.population, generator)
        # The population stays in the choice, so that the best loss never rises.
        values = torch.cat([found.losses, judge(rows)])
        found = best(torch.cat([found.population, rows]), values, found.queries + a_round)


def search_each(
    model: Model,
    problem: Problem,
    probe: Probe,
    place: str,
    search_one: Callable[[WordSpace, Blank], str],
) -> Probe:
    """Return a probe with the words that were found, each of its prompts searched once.

    Args:
        model: whose words they are.
        problem: what is erased, whose names are no answer.
        probe: what is drawn unattacked.
        place: where in a prompt the words stand, as `Blank.of` takes it.
        search_one: searches words for one prompt, and returns it with them.
    """
    space = WordSpace.of(model, problem.erase)
    prompts = dict.fromkeys(probe.prompts)
    found = {prompt: search_one(space, Blank.of(prompt, problem, place)) for prompt in prompts}
    return dataclasses.replace(probe, prompts=tuple(found[prompt] for prompt in probe.prompts))


def report_best(space: WordSpace, blank: Blank, found: Found, run: RunContext) -> str:
    """Return the prompt that a search ended with, and tell the run of it.

    Args:
        space: the words.
        blank: the prompt, and the place in it.
        found: what the search came to.
        run: keeps what was found, for the results.
    """
    prompt = blank.fill(space.say(found.population[0]))
    loss = round(float(found.losses[0]), 4)
    run.findings.append({"asked": blank.prompt, "found": prompt, "queries": found.queries, "loss": loss})
    return prompt


def swap_words(
    population: Tensor, choices: Tensor, n: int, generator: torch.Generator, mix: bool = False
) -> Tensor:
    """Make candidates: rows of a population with one word swapped for another.

    Args:
        population: (m, places), numbers of words.
        choices: (places, k), the words that may stand in each place.
        n: how many candidates.
        generator: chooses rows, places and words.
        mix: let every second candidate have half of its words from another row first.

    Returns:
        (n, places).
    """

    def below(limit: int) -> Tensor:
        return torch.randint(limit, (n,), generator=generator)

    rows = population[below(len(population))].clone()
    if mix:
        other = population[below(len(population))]
        half = torch.rand(rows.shape, generator=generator) < 0.5
        half[::2] = False
        rows = torch.where(half, other, rows)
    place = below(population.shape[1])
    rows[torch.arange(n), place] = choices[place, below(choices.shape[1])]
    return rows


def rank_swaps(
    model: Model, space: WordSpace, prompt: str, row: Tensor, loss: Callable[[Text], Tensor], k: int
) -> Tensor:
    """Rank for each place the words that, to first order, lower a loss the most: (places, k).

        L(word j in place i) ≈ L + (E_j − e_i) · ∂L/∂e_i,    summed over text encoders

    Args:
        model: as it stands, with the edit applied.
        space: the words.
        prompt: with the words of the row in their places.
        row: (places,), the numbers of those words.
        loss: of the encoded prompt, one row; a scalar.
        k: how many words of each place.

    Source: HotFlip (Ebrahimi et al., ACL 2018, arXiv 1712.06751); greedy coordinate gradient (Zou et
    al., 2023, arXiv 2307.15043), eq. 3.
    """
    words = [space.words[i] for i in row.tolist()]
    leaves = {word: [v.requires_grad_() for v in model.word_vectors(word)] for word in words}
    with torch.enable_grad(), _replacing(model, leaves):
        value = loss(model._encoded([prompt]))
        flat = [leaf for parts in leaves.values() for leaf in parts]
        gradients = torch.autograd.grad(value, flat, allow_unused=True)
    found: dict[str, Tensor] = {}
    for i, word in enumerate(leaves):
        own = gradients[i * len(space.embeddings) : (i + 1) * len(space.embeddings)]
        # The word's own part is the same for all that could take its place, so that it is left out.
        found[word] = sum(
            (e @ g for e, g in zip(space.embeddings, own, strict=True) if g is not None),
            torch.zeros(len(space.words), device=space.embeddings[0].device),
        )
    scores = torch.stack([found[word] for word in words])
    scores[torch.arange(len(row)), row] = torch.inf  # no word for itself
    return scores.argsort(dim=1, stable=True)[:, :k].cpu()


@contextlib.contextmanager
def _replacing(model: Model, vectors: dict[str, list[Tensor]]) -> Iterator[None]:
    """Let words have other token embeddings for a block; gradients flow to them."""
    with contextlib.ExitStack() as stack:
        for word, parts in vectors.items():
            for (layers, i), vector in zip(model._word(word), parts, strict=True):

                def replace(
                    _: Any, given: tuple[Tensor, ...], output: Tensor, i: int = i, v: Tensor = vector
                ) -> Tensor:
                    return torch.where((given[0] == i)[..., None], v.to(output), output)

                for layer in layers:
                    stack.callback(layer.register_forward_hook(replace).remove)
        yield
