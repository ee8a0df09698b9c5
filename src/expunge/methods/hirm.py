"""HiRM: misdirect what the text encoder says of a concept, by its first block; seconds, no images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.concept_tokens import sample_words
from expunge.erasing.prompt_templates import (
    assemble_anchor_prompts,
    assemble_prompts,
    assemble_retained_prompts,
    require_place,
)
from expunge.erasing.text_encoders import select_text_parameters, train_text_encoders
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class HiRM(Method):
    """High-level representation misdirection: train the first block, judge the last one.

        min_θ₁  E ‖h_L(c) − s r‖² / ‖h_L⁰(c)‖² + ρ E ‖h_L(k) − h_L⁰(k)‖² / ‖h_L⁰(k)‖²

    over the concept's last own token and the end and padding behind it; h_L is what the denoiser reads,
    h_L⁰ the same before training, θ₁ the weights of the first block of each text encoder. r is a random
    direction of the length of a token, the same for all of a concept's tokens, or what the anchor's
    prompt has in their places. Where the denoiser reads a vector of the whole prompt, it is misdirected
    alike.

    After the paper's ‖h_L(c) − s r‖²; the division by ‖h_L⁰‖², the tokens it runs over and the length s
    are ours. The second term, prompts k of retained names, of
    anchors and of the tokenizer's words, is ours, and off in the preset `paper`. Ours, too, are the
    rate, the number of steps and the prompts, which are not in what we know of the paper.

    Swapping the text encoder undoes the edit.

    Cost: a forward and a backward pass of the text encoders a step. No images, no denoiser.

    Source: Lee et al., ICLR 2026, arXiv 2602.19631, after its abstract and summaries.
    """

    citation: ClassVar[str] = (
        "Lee, Kim, Hwang: Localized Concept Erasure in Text-to-Image Diffusion Models via High-Level"
        " Representation Misdirection. ICLR 2026, arXiv 2602.19631."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    direction: Literal["random", "anchor"] = "random"
    """Where the concept is sent: a random direction, or its anchor's own representation (the paper's
    semantic direction)."""
    size: float = bounded(1.0, above=0)
    """s, the length of the goal, in units of the concept's mean token or of the anchor's."""
    retain_scale: float = bounded(0.0, at_least=0)
    """ρ, weight of what is retained; 0 is the paper's loss."""
    num_retain_words: int = bounded(200, at_least=0)
    """How many of the tokenizer's own words are retained."""
    max_train_steps: int = bounded(50, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(1e-4, above=0)
    """Adam's learning rate."""
    batch_size: int = bounded(8, at_least=1)
    """Prompts of concepts, and as many retained ones, in a step."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def reads_anchor(self) -> bool:
        return self.direction == "anchor" or self.retain_scale > 0

    @property
    def reads_retain(self) -> bool:
        return self.retain_scale > 0

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        named = sum(len(assemble_prompts(c, self.templates)) for c in problem.erase)
        kept = len(problem.retain) + len(problem.erase) + self.num_retain_words
        # A step's backward pass costs about twice its forward pass.
        trained = 3 * self.max_train_steps * self.batch_size * (1 + (self.retain_scale > 0))
        return Cost(prompts=2 * named + (4 * kept if self.retain_scale else 0) + trained)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        prompts: list[str] = []
        goals: list[Text] = []
        for concept in problem.erase:
            named = assemble_prompts(concept, self.templates)
            becomes = assemble_anchor_prompts(concept, self.templates) * len(concept.names)
            model.require_window(named + becomes)
            before = model.encode(named)
            # By name, so that a concept's direction does not depend on the others.
            generator = run.generator("direction", concept.name)
            goals.append(self._goal(before, model.encode(becomes), generator))
            prompts += named
        original, goal = model.encode(prompts), Text.joined(goals)
        kept = self._retained(model, problem, run) if self.retain_scale else []
        kept_text = model.encode(kept) if kept else None
        draw = run.generator("training")

        def loss(_: int, trained: InPlace) -> Iterator[Tensor]:
            rows = torch.randint(len(prompts), (self.batch_size,), generator=draw).tolist()
            found = model.encode_in_training([prompts[i] for i in rows])
            # A causal encoder says nothing of a concept before it: there is nothing to unlearn there.
            yield compare(found, goal[rows], original[rows], behind=True)
            if kept_text is not None:
                rows = torch.randint(len(kept), (self.batch_size,), generator=draw).tolist()
                found = model.encode_in_training([kept[i] for i in rows])
                yield self.retain_scale * compare(found, kept_text[rows], kept_text[rows])

        return train_text_encoders(
            model,
            select_text_parameters(model, "first block"),
            run,
            loss,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            title="misdirecting the text encoder",
        )

    def _goal(self, before: Text, anchored: Text, generator: torch.Generator) -> Text:
        """Make what a concept's prompts are to say: its embeddings are s r, its pooled vector likewise.

        Args:
            before: the concept's prompts, as they are encoded.
            anchored: the same with its anchor.
            generator: draws the random direction.
        """
        pooled = before.pooled
        if self.direction == "anchor":
            # Counted from the last own token, as the concept's tokens are.
            embeddings = before.embeddings.clone()
            for row in range(len(before)):
                spans = zip(before.from_last_token(row), anchored.from_last_token(row), strict=True)
                for span, goal_span in spans:
                    rest = anchored.embeddings[row, goal_span]
                    n = min(span.stop - span.start, len(rest))
                    embeddings[row, span.start : span.start + n] = self.size * rest[:n]
            if pooled is not None and anchored.pooled is not None:
                pooled = self.size * anchored.pooled
        else:
            embeddings = self._random(before.embeddings, generator)
            pooled = None if pooled is None else self._random(pooled, generator)
        return Text(
            before.prompts,
            embeddings,
            before.content_mask,
            before.ids,
            pooled,
            before.eos_index,
            before.segment_lengths,
            before.attention_mask,
        )

    def _random(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return s r in the place of every row, r one random direction as long as the mean row.

        Args:
            rows: (…, d).
            generator: on the CPU, so that the direction does not depend on the device.
        """
        drawn = torch.randn(rows.shape[-1], generator=generator).to(rows)
        length = rows.float().norm(dim=-1).mean().to(rows)
        return (self.size * length * drawn / drawn.norm()).expand_as(rows).clone()

    def _retained(self, model: Model, problem: Problem, run: RunContext) -> list[str]:
        """List the prompts that should be encoded as before."""
        anchors = [concept.anchor for concept in problem.erase if concept.anchor]
        words = sample_words(model, problem.erase, self.num_retain_words, run.generator("words"))
        names = list(dict.fromkeys([*problem.retain, *anchors, *words]))
        # The empty prompt, too: guidance starts from it.
        return ["", *assemble_retained_prompts(names)]


def compare(found: Text, goal: Text, before: Text, *, behind: bool = False) -> Tensor:
    """Compute the mean of Σ ‖h − g‖² / Σ ‖h⁰‖² over prompts, and of their pooled vectors: ().

    Args:
        found: h, n prompts as they are encoded now.
        goal: g, what they are to say.
        before: h⁰, as they were encoded before training.
        behind: compare only the last own token of each prompt and what is behind it, in each encoder.
    """
    mask = found.read.clone()
    if behind:
        for row in range(len(found)):
            wanted = torch.zeros_like(mask[row])
            for span in found.from_last_token(row):
                wanted[span] = True
            mask[row] &= wanted
    pairs = [(found.embeddings, goal.embeddings, before.embeddings, mask)]
    if found.pooled is not None and goal.pooled is not None and before.pooled is not None:
        whole = torch.ones(len(found), 1, dtype=torch.bool, device=mask.device)
        vectors = (found.pooled[:, None], goal.pooled[:, None], before.pooled[:, None])
        pairs.append((*vectors, whole))
    total = torch.zeros((), device=mask.device)
    for h, g, h0, where in pairs:
        weights = where[..., None].float()
        apart = (weights * (h.float() - g.float()).square()).sum((1, 2))
        size = (weights * h0.float().square()).sum((1, 2))
        # Shares of what each was, so that one vector weighs as much as a prompt's many tokens.
        total = total + (apart / size.clamp(min=1e-12)).mean()
    return total
