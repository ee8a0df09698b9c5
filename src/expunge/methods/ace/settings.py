"""ACE's fields, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.erasing.prompt_templates import TEMPLATES, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.ops.noise_error import Loss
from expunge.problem import Concept

Stage = Literal["gate", "harden", "fortify"]
STAGES: tuple[Stage, ...] = ("gate", "harden", "fortify")

ATTENTION_REDUCTIONS = ("attention", "attention-by-head")
"""The reductions that read attention while images are drawn."""


@dataclass(frozen=True)
class ACESettings(Method):
    """The options of ACE's three stages."""

    stages: tuple[Stage, ...] = ("gate", "harden")
    """Which to run: "harden" starts from what "gate" finds, which always runs, and "fortify" from
    both."""
    reduction: Literal["shared", "layer", "damped", "attention", "attention-by-head"] = "shared"
    """Directions: one set for all layers; one for each layer; or K ⊙ (1 − s gᵀ), which turns channels
    down: those that tell concept and anchor apart; or, literally, those of QᵀΔAttn in drawn images,
    summed over a layer's heads or each head's own."""
    damping: float = bounded(4.0, above=0)
    """The largest channel of QᵀΔAttn's g, before g is cut at 1: larger turns more channels down, and 1
    leaves most of a concept."""
    pooled: bool = True
    """Edit the vector of the whole prompt, too, where the model has one."""
    projections: Literal["both", "keys", "values"] = "both"
    """What is changed."""
    gate_on: Literal["end", "phrase", "prompt"] = "end"
    """Open on the phrase's tokens, and on all behind them to the end of the padding; on the phrase's
    and what happens to be like them; or on every token of a prompt in which one of them opens it."""
    energy: float = bounded(0.95, above=0, at_most=1)
    """The share of what keys and values tell concept and anchor apart by that goes; larger erases
    more, and takes more of what stands beside it in the prompt."""
    rank: int = bounded(0, at_least=0)
    """The most directions a gate; 0 for no limit."""
    directions: Literal["anchor", "concept", "gate"] = "concept"
    """One set of directions for all concepts of a kind with the same anchor, hardened together; one for
    all gates of a concept; or one for each gate."""
    goal_ridge: float = bounded(1.0, above=0)
    """λ of e_anchor, foretold of e by an affine map: small values come close to the anchor's prompt and
    keep what else a prompt says, large values put a mean in its place, whatever an attack does to e."""
    gate_ridge: float = bounded(1.0, above=0)
    """λ of the gate's direction, in units of the mean variance: small values part near words best,
    large values hold best against perturbations."""
    margin: float = bounded(0.4, above=0, at_most=0.95)
    """Where between retained tokens (0) and the concept's (1) a gate is half open: small values catch
    more synonyms and perturbed tokens."""
    retain_openness: float = bounded(0.01, above=0, at_most=0.4)
    """How far a gate is open on the nearest retained token."""
    n_std: float = bounded(4.0, at_least=0)
    """How many standard deviations above the mean of general tokens still count as closed."""
    max_overlap: float = bounded(0.9, above=0, at_most=1)
    """How far into the concept, whose own mean is at 1, a retained prompt may lie; beyond, it cannot
    stay while the concept goes, and that is an error."""
    num_retain_words: int = bounded(200, at_least=1)
    """How many of the tokenizer's own words gates stay closed on."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    radius: float = bounded(0.2, at_least=0)
    """The inner attack's bound, as a share of each token's norm."""
    attack_steps: int = bounded(10, at_least=1)
    """Its steps."""
    rounds: int = bounded(8, at_least=0)
    """The most attacks a concept; hardening stops before if one fails."""
    recovery_threshold: float = bounded(0.1, at_least=0, at_most=1)
    """An attack fails if it brings back less than this share of what the anchor lacks, in keys and
    values."""
    max_train_steps: int = bounded(4, at_least=1)
    """Training steps after each attack."""
    learning_rate: float = bounded(0.003, above=0)
    """AdamW's learning rate, as a share of each tensor's own size."""
    retain_weight: float = bounded(1.0, at_least=0)
    """ρ, weight of what is retained. Both losses are in units of the concept's own distance from its
    anchor, so that one weight fits models that see much of their text and little."""
    anchor_hold_weight: float = bounded(0.0, at_least=0)
    """η, weight of what the closed form has made of the concept's own prompts, where nobody attacks:
    an anchor that draws no image of one kind is no good guide."""
    num_images: int = bounded(4, at_least=1)
    """Images drawn of a concept, from which z_t is made; for QᵀΔAttn as many of its anchor."""
    num_inference_steps: int = bounded(10, at_least=0, at_most=1000)
    """Denoising steps for each of them; 0 for the model's own."""

    fortify_steps: int = bounded(300, at_least=1)
    """Training steps of the cross-attentions, for all concepts together."""
    fortify_learning_rate: float = bounded(3e-4, above=0)
    """Adam's learning rate at first; it falls evenly to nothing."""
    fortify_noisiest: float = bounded(0.5, above=0, at_most=1)
    """The share of all times, from pure noise on, at which the concept is turned to its anchor: what an
    image shows is decided there, and training spread over all times holds less."""
    fortify_radius: float = bounded(0.8, above=0)
    """How far attacks may go from another word's prompt, as a share of each token's norm."""
    fortify_retain: float = bounded(4.0, at_least=0)
    """ρ there: large values keep more, and hold against less."""
    fortify_finetune_steps: int = bounded(0, at_least=0)
    """Fortify against training, too: after so many steps a user who trains the model further meanwhile
    begins anew; 0 for no such user. It takes about half as long again."""
    fortify_finetune_rate: float = bounded(1e-4, above=0)
    """That user's learning rate."""
    loss: Loss = "squared"
    """How an error of a prediction counts in both trainings: squared; or by the Hellinger distance,
    which is bounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # In the order in which stages run, however they were given; the dataclass is frozen.
        object.__setattr__(self, "stages", tuple(s for s in STAGES if s in self.stages))
        if "gate" not in self.stages:
            raise ExpungeError("stages must have 'gate': there is nothing to harden otherwise")
        if len(self.stages) > 1 and self.reduction != "shared":
            raise ExpungeError(
                f"only directions shared by all layers can be hardened or fortified: with reduction"
                f" {self.reduction!r}, set stages to 'gate'"
            )
        require_place(self.templates)

    def check_family(self, family: type[Model]) -> None:
        super().check_family(family)
        if self.reduction in ATTENTION_REDUCTIONS and "cross-attention" in family.missing_capabilities:
            raise ExpungeError(
                f"ACE's reduction {self.reduction!r} needs cross-attention, and {family.__name__} has"
                f" none: {family.missing_capabilities['cross-attention']}; set reduction to 'shared'"
            )

    def layers(self, model: Model) -> tuple[str, ...]:
        """Return the layers that are changed, by name.

        Raises:
            ExpungeError: the model has none of the kind that is asked for.
        """
        entries = model.text_entries()
        if self.projections != "both":
            role = {"keys": "key", "values": "value"}[self.projections]
            entries = tuple(entry for entry in entries if entry.role == role)
        if not entries:
            raise ExpungeError(
                f"text does not enter this model through {self.projections} of a cross-attention: set"
                " projections to 'both', which is all there is"
            )
        return tuple(entry.layer for entry in entries)

    def templates_for(self, concept: Concept) -> tuple[str, ...]:
        """Return the phrasings that a concept is erased in."""
        return self.templates or TEMPLATES[concept.kind]

    def first_prompt(self, concept: Concept, name: str | None = None) -> str:
        """Put a concept's name, or another, into the first of its phrasings: its images show that.

        Args:
            concept: the concept.
            name: by default the concept's.
        """
        return self.templates_for(concept)[0].format(concept.name if name is None else name)

    def anchor_prompt(self, concept: Concept) -> str:
        """Put a concept's anchor into the first of its phrasings; "" where it has none."""
        return self.first_prompt(concept, concept.anchor) if concept.anchor else ""
