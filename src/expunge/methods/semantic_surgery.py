"""Semantic Surgery: subtract from a prompt the concepts it is found to hold; seconds, no gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Subtracted
from expunge.erasing.presence import count_prompts, fit_presence, list_other_prompts, prompt_rows
from expunge.erasing.prompt_templates import TEMPLATES, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class SemanticSurgery(Method):
    """Subtract a concept's direction from a prompt's embedding, by its estimated presence.

        e − Σ ρ_c Δ_c,    Δ_c = E(c) − E(neutral),    ρ_c = σ((α_c − centre) / width),   ρ_c ≥ threshold

    with α_c the cosine of the whole prompt's embedding e, all tokens one after the other, and Δ_c. It is
    asked for every prompt anew, when its text enters the denoiser (`changes.Subtracted`); the weights
    stay as they are.

    The paper encodes the concepts that are found together in one prompt, which takes the text encoder at
    drawing. Here their directions are solved for together, so that what they share is subtracted once
    (ours). The paper's second part, a detector that looks at images and corrects what is left, is not
    here: an edit holds no detector. Ours, too: a centre and a width fitted to each concept (`presence`),
    the anchor as what is neutral (`toward`), a direction averaged over prompts (`templates`), and the
    same subtraction on the vector of the whole prompt where a model reads one.

    Cost: encodes the names; with a fitted presence some hundred prompts. Drawing takes a product of the
    prompt with each direction. The edit's file holds a prompt's embedding for each name.

    Source: Xiong et al., NeurIPS 2025, arXiv 2510.22851, and the settings of its released code.
    """

    citation: ClassVar[str] = (
        "Xiong, Liu, Ye, Liu, Xu: Semantic Surgery: Zero-Shot Concept Erasure in Diffusion Models."
        " NeurIPS 2025, arXiv 2510.22851."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    needs: ClassVar[Mapping[str, str]] = {"semantic_surgery": "a prompt a row"}

    centre: float = bounded(-0.06, at_least=-1, at_most=1)
    """β, the cosine at which a concept's presence is a half."""
    width: float = bounded(0.02, above=0)
    """γ, how gradually the presence rises there; smaller is more of a switch."""
    threshold: float = bounded(0.5, at_least=0, at_most=1)
    """τ, the presence from which on a concept counts as found."""
    presence: Literal["given", "fitted"] = "given"
    """β and γ as given; or, for each name, between its own prompts and those of retained names, of
    anchors and of the tokenizer's own words."""
    toward: Literal["empty", "anchor"] = "empty"
    """What is neutral: the empty prompt, or the anchor. Presence is always asked against the empty."""
    num_retain_words: int = bounded(200, at_least=0)
    """How many of the tokenizer's own words a fitted presence is kept clear of."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts with {} in the name's place, over which a direction is averaged: the bare name, in the
    paper. Directions are subtracted position by position, so that prompts like those to come serve
    best; none is those of the concept's kind."""
    pooled: bool = True
    """Subtract from the vector of the whole prompt, too, where the model has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def reads_anchor(self) -> bool:
        return self.toward == "anchor" or self.presence == "fitted"

    @property
    def reads_retain(self) -> bool:
        return self.presence == "fitted"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        names = sum(len(concept.names) for concept in problem.erase)
        fitted = count_prompts(problem, self.num_retain_words) if self.presence == "fitted" else 0
        ways = len(self.templates) or len(TEMPLATES[problem.erase[0].kind])
        return Cost(prompts=(2 * ways + 1) * names + 1 + fitted)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        names = [name for concept in problem.erase for name in concept.names]
        neutral = [concept.anchor or "" for concept in problem.erase for _ in concept.names]
        text, empty = model.encode(names), model.encode([""] * len(names))
        if self.toward == "empty":
            neutral = [""] * len(names)
        kinds = [concept.kind for concept in problem.erase for _ in concept.names]
        ways = [self.templates or TEMPLATES[kind] for kind in kinds]
        pairs = [self._encode(model, *one) for one in zip(names, neutral, ways, strict=True)]
        others = list_other_prompts(model, problem, self.num_retain_words, run)
        changes = []
        for layers, pooled in _places(model, pooled=self.pooled):
            inputs = model.weight(layers[0]).shape[1]
            own, none = (prompt_rows(t, inputs, pooled=pooled) for t in (text, empty))
            # Averaged over the prompts: where the name stands varies, and what is behind it as well.
            means = [[prompt_rows(t, inputs, pooled=pooled).mean(0) for t in pair] for pair in pairs]
            direction = torch.stack([named - becomes for named, becomes in means])
            centre, width = (torch.full((len(names),), x) for x in (self.centre, self.width))
            if self.presence == "fitted":
                centre, width = fit_presence(
                    model, problem, own - none, others, least=2 * self.width, pooled=pooled
                )
            changes.append(
                Subtracted(
                    layers,
                    direction,
                    centre,
                    width,
                    threshold=self.threshold,
                    presence=own - none,
                )
            )
        return tuple(changes)

    def _encode(self, model: Model, name: str, neutral: str, ways: Sequence[str]) -> tuple[Text, Text]:
        """Encode a name in some phrasings, and what is neutral in the same; "" is the empty prompt.

        Args:
            model: whose text encoder reads.
            name: of the concept.
            neutral: its anchor, or "".
            ways: with {} in the name's place.
        """
        named = [way.format(name) for way in ways]
        becomes = [way.format(neutral) if neutral else "" for way in ways]
        model.require_window([*named, *becomes])
        return model.encode(named), model.encode(becomes)


def _places(model: Model, *, pooled: bool) -> list[tuple[tuple[str, ...], bool]]:
    """List the layers that text enters through: those given the same, and whether that is pooled.

    Args:
        model: whose layers.
        pooled: whether layers that read that vector are wanted.
    """
    places = [(tuple(entry.layer for entry in model.text_entries()), False)]
    return places + [((entry.layer,), True) for entry in model.pooled_entries() if pooled]
