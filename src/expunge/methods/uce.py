"""UCE: one closed-form refit of the keys and values; seconds on a CPU, no images, no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.prompt_templates import (
    RETAINED,
    assemble_anchor_prompts,
    assemble_prompts,
    assemble_retained_prompts,
    require_place,
)
from expunge.erasing.refit import Refit
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost

TEMPLATES = {
    "object": (
        "an image of the {}",
        "a snapshot of a {}",
        "one {} on a plain background",
        "a {} in a picture",
    ),
    "identity": ("an image of {}", "a snapshot of {}", "{} on a plain background", "{} in a picture"),
    "style": ("{} style", "a picture in the style of {}", "art by {}", "a drawing in {} style"),
    "explicit": ("an image of {}", "a photo with {}", "{} on a plain background", "{} in a picture"),
}
"""The prompts in which a concept of each kind is erased: none that a suite judges by, half of them with
words behind the concept."""

NAME = ("{}",)
"""The concept's name and nothing else: what the paper's code reads."""

Also = Literal["empty", "empty-if-alone", "anchors"]


@dataclass(frozen=True)
class UCE(Method):
    """Unified concept editing: send a concept's embeddings where its anchor's go, keep the rest.

        min_W'  Σ ‖W' e − W a‖² + ρ Σ_retained ‖W' r − W r‖² + κ E_general ‖W' v − W v‖² + λ ‖W' − W‖²

    e runs over the embeddings of the erased prompts, a over those of the same prompts with the
    anchor in the concept's place. One matrix M = (C + P + λI)(G + P + λI)⁻¹ solves it for every key
    and value projection at once, W' = W M. A concept's sum is a mean over its prompts, so more
    templates do not weigh more (`weigh`). The empty prompt and the anchors are retained, too
    (`also_retain`).

    Where a vector of the whole prompt enters too, the same is solved for it, λ in proportion to it.

    The defaults are ours; the presets `original` and `rewrite` are what was published. Every concept has
    an anchor of its own.

    The paper's "edit", "preserve" and "destination" are our erase, retain and anchor.

    Cost: encodes a few hundred short prompts; one Cholesky factorisation, of as many equations as the
    text is wide, or as there are tokens where these are fewer.

    Source: Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 7.
    """

    citation: ClassVar[str] = (
        "Gandikota, Orgad, Belinkov, Materzyńska, Bau: Unified Concept Editing in Diffusion Models."
        " WACV 2024, arXiv 2308.14761."
    )

    stronger: ClassVar[str] = "a smaller ridge"
    strength_field: ClassVar[str] = "ridge"

    presets: ClassVar[Presets] = read_presets(__file__)
    renamed: ClassVar[Mapping[str, str]] = {
        "general": "num_retain_words",
        "general_scale": "retain_words_scale",
    }

    ridge: float = bounded(50.0, above=0)
    """λ, pull to the original weights in every direction, in units of a squared embedding (about 600
    for one token of a CLIP); larger erases less and harms less."""
    retain_scale: float = bounded(1.0, at_least=0)
    """ρ, weight of each retained prompt, of each anchor, and of the empty prompt."""
    also_retain: tuple[Also, ...] = ("empty", "anchors")
    """What is retained beside the problem's own: the empty prompt, or that only where nothing else is;
    and the anchors."""
    num_retain_words: int = bounded(500, at_least=0)
    """How many of the tokenizer's own words are kept; more keeps more and takes longer to encode."""
    retain_words_scale: float = bounded(1.0, at_least=0)
    """κ, weight of those words, all together."""
    positions: Literal["last-and-after", "last"] = "last-and-after"
    """Tokens to move: the concept's last own token and the end and padding after it, or that one
    alone. The end and padding carry the concept too; moving them erases more."""
    retain_positions: Literal["all", "last"] = "all"
    """Tokens of the retained prompts and words that stay where they go: all, or the last own one alone.
    With "last" here and in `positions`, a text of many or wide tokens (FLUX, FLUX.2) is solved for in a
    fraction of the time and memory."""
    weigh: Literal["concept", "prompt"] = "concept"
    """What has the weight 1: all prompts of a concept together, or each of them."""
    templates: tuple[str, ...] = ()
    """Prompts to erase the concept in, with {} in its place; by default those of its kind."""
    retain_templates: tuple[str, ...] = RETAINED
    """Prompts to keep what is retained in, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)
        require_place(self.retain_templates)
        if not self.retain_templates:
            raise ExpungeError("retain_templates is empty: what is retained needs a prompt, such as {}")

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        return "text"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        templates = [len(self.templates or TEMPLATES[c.kind]) * len(c.names) for c in problem.erase]
        texts = [text for text in self._retained(problem) if text]
        retained = len(self.retain_templates) * len(texts) + 1
        return Cost(prompts=2 * sum(templates) + retained + self.num_retain_words, products=8)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        refit = Refit()
        for concept in problem.erase:
            templates = self.templates or TEMPLATES[concept.kind]
            erased = assemble_prompts(concept, templates)
            anchored = assemble_anchor_prompts(concept, templates) * len(concept.names)
            model.require_window(erased + anchored)
            # A mean over prompts, so that synonyms and templates do not weigh a concept up.
            weight = 1 / len(erased) if self.weigh == "concept" else 1.0
            refit.erase(model.encode(erased), model.encode(anchored), weight, self.positions)

        for text in self._retained(problem):
            # The empty prompt is itself; in a phrasing it would leave a gap.
            prompts = assemble_retained_prompts([text], self.retain_templates) if text else [""]
            # A mean here, too, by default: ρ weighs what is retained, not each of its phrasings.
            weight = self.retain_scale / (len(prompts) if self.weigh == "concept" else 1)
            refit.retain(model.encode(prompts), weight, self.retain_positions)

        refit.retain_words(
            model,
            problem.erase,
            self.num_retain_words,
            self.retain_words_scale,
            run,
            self.retain_positions,
        )
        return refit.solve(model, self.ridge)

    def _retained(self, problem: Problem) -> list[str]:
        """List what is retained, each once: names, prompts, and "" for the empty prompt."""
        texts = list(problem.retain)
        if "anchors" in self.also_retain:
            texts += [concept.anchor or "" for concept in problem.erase]
        # Asked last: whether it is alone depends on all others.
        if "empty" in self.also_retain or ("empty-if-alone" in self.also_retain and not texts):
            texts.insert(0, "")
        return list(dict.fromkeys(texts))
