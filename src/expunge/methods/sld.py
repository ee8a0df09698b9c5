"""SLD: guide away from the concept while drawing; the weights stay, no images, no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Guided
from expunge.erasing.presence import count_prompts, fit_presence, list_other_prompts, prompt_rows
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class SLD(Method):
    """Safe latent diffusion: classifier-free guidance with a third prediction, for the unsafe text s.

        ε(∅) + g (ε(c) − ε(∅) − γ),    γ = μ (ε(s) − ε(∅)) + s_m ν,    ν ← β_m ν + (1 − β_m) γ,
        μ = bound(|s_S (ε(c) − ε(s))|) where ε(c) − ε(s) < λ, else 0

    from a warm-up on (`changes.Guided`). s is one text of all names, separated by commas.

    The paper has bound = max(1, ·), its released code min(1, ·); with the latter a prompt that is the
    concept's name itself is not led away at all, since then ε(c) = ε(s). Differences are compared as
    noise, whatever the network predicts (ours). Ours, too, and off in the paper's presets, is
    `presence`: prompts in which no concept is found are left as they are.

    It reads no anchor. It needs a denoiser whose pipeline predicts with and without the prompt in one
    batch.

    Cost: encodes the names. Drawing takes one more prediction a step: half as much again with guidance.

    Source: Schramowski et al., CVPR 2023, arXiv 2211.05105, eq. 3 to 8.
    """

    citation: ClassVar[str] = (
        "Schramowski, Brack, Deiseroth, Kersting: Safe Latent Diffusion: Mitigating Inappropriate"
        " Degeneration in Diffusion Models. CVPR 2023, arXiv 2211.05105."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    needs: ClassVar[Mapping[str, str]] = {"sld": "guidance in one batch"}

    safety_scale: float = bounded(1000.0, at_least=0)
    """s_S, how large a difference of noise brings the full guidance away: 1 / s_S."""
    threshold: float = 0.01
    """λ, the difference of noise up to which an entry counts as unsafe; larger leads more of the image
    away."""
    momentum_scale: float = bounded(0.3, at_least=0)
    """s_m, weight of the momentum."""
    momentum_beta: float = bounded(0.4, at_least=0, at_most=1)
    """β_m, how much of the momentum lasts to the next step."""
    warmup: float = bounded(0.2, at_least=0, at_most=1)
    """The share of all times, from pure noise on, at which nothing is led away yet: δ of 50 steps."""
    bound: Literal["released", "paper"] = "released"
    """min(1, ·), as in the released code, or max(1, ·), as in the paper."""
    presence: Literal["always", "fitted"] = "always"
    """Lead every prompt away, as published; or only those in which a concept is found."""
    num_retain_words: int = bounded(200, at_least=0)
    """How many of the tokenizer's own words a fitted presence is kept clear of."""

    @property
    def reads_anchor(self) -> bool:
        return self.presence == "fitted"

    @property
    def reads_retain(self) -> bool:
        return self.presence == "fitted"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        fitted = count_prompts(problem, self.num_retain_words) if self.presence == "fitted" else 0
        return Cost(prompts=2 + fitted)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        names = [name for concept in problem.erase for name in concept.names]
        # Not the empty prompt but what this pipeline guides from: that is the ε(∅) of the equation.
        text, none = model.encode([", ".join(names)]), model.unconditional(1)
        more: dict[str, Any] = {}
        if text.pooled is not None and none.pooled is not None:
            more["pooled"] = torch.cat([text.pooled, none.pooled]).float().cpu()
        if self.presence == "fitted":
            inputs = text.embeddings.shape[-1]
            # Name by name: the direction of the joined text would be no concept's own.
            own, empty = (prompt_rows(model.encode(x), inputs) for x in (names, [""] * len(names)))
            others = list_other_prompts(model, problem, self.num_retain_words, run)
            more["presence"] = own - empty
            # The gap that Semantic Surgery's default width makes, 2 · 0.02.
            more["centre"], more["width"] = fit_presence(
                model, problem, more["presence"], others, least=0.04
            )
        noise_scale = model.noise_scale().float()
        change = Guided(
            tuple(entry.layer for entry in model.text_entries()),
            text.embeddings.float().cpu(),
            none.embeddings.float().cpu(),
            noise_scale,
            scale=self.safety_scale,
            threshold=self.threshold,
            momentum_scale=self.momentum_scale,
            momentum_beta=self.momentum_beta,
            # Times fall while drawing: the warm-up is the highest of them.
            until=(1 - self.warmup) * len(noise_scale),
            at_most=self.bound == "released",
            **more,
        )
        return (change,)
