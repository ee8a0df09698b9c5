"""ACE: gates that open on a concept's tokens and take it away there, in closed form, then hardened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Gated
from expunge.erasing.gate_backgrounds import (
    encode_retained,
    keep_separable,
    read_backgrounds,
    retained_phrasings,
)
from expunge.erasing.gate_tokens import read_tokens
from expunge.methods.ace.attention_reduction import LEVELS, read_damping
from expunge.methods.ace.closed_form import check_memory, solve_gates
from expunge.methods.ace.fortify import FortifyConfig, train_against_attacks
from expunge.methods.ace.fortify_data import count_images, prepare_retained, prepare_targets
from expunge.methods.ace.harden import harden_all
from expunge.methods.ace.pooled import gate_vectors
from expunge.methods.ace.settings import ATTENTION_REDUCTIONS, ACESettings
from expunge.model import Model
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost


@dataclass(frozen=True)
class ACE(ACESettings):
    """Attentional concept erasure: in keys and values, take a concept away where its tokens are met.

    *gate*: for the concept's own tokens, and for the words, end and padding behind it, a gate
    s(e) = σ(slope (w · e − centre)) opens on them and stays closed on general and retained tokens
    (`ops/gates.py`), and with the leading left singular vectors U of W(e − e_anchor), over templates
    and names, and W the keys and values of all layers, one above the other,

        W̃ e = W e − s(e) U Uᵀ (W e − W e_anchor)

    This is one small change of e itself, shared by all layers (`changes.Gated`): what a gate costs
    does not grow with the layers, and a drawing asks it once. No images, no gradients.

    Where a vector of the whole prompt enters too (SDXL, SD 3, FLUX), it gets a gate and directions of
    its own, in the same closed form; what they leave is said, as a share.

    With *reduction* "attention" the published K ⊙ (1 − m gᵀ), V ⊙ (1 − m gᵀ) are taken literally:

        g ∝ |Σ Qᵀ (A_concept − A_anchor)|

    over heads, times and images of the concept and of its anchor, Q and A the queries and the
    attention to the phrase, for every layer its own, `damping` in its largest channel and cut at 1;
    m is the gate.

    *harden*: as long as a bounded attack brings the concept back,

        inner   min_δ ‖W ẽ(e + δ) − W e‖²,    ‖δ_token‖ ≤ radius ‖e_token‖
        outer   min E ‖ε(z_t, t, ẽ(e + δ)) − ε₀(z_t, t, e_anchor)‖² / a
                    + (ρ ‖W ẽ(r) − W r‖² + η ‖W ẽ(e) − W ẽ₀(e)‖²) / b

    with ε what the denoiser itself predicts (v where it predicts v, not turned into noise), z_t from
    images of the concept, over gates, directions and goals, ẽ₀ the closed form, r
    general and retained tokens, and the anchor's, and a and b how far concept and anchor are apart in
    the same units, predictions and keys and values. The denoiser sees the text through W alone, so the
    inner attack needs no denoiser.

    *fortify*, ours and off unless asked for: a word learnt against the gates stands outside the region
    they close. So the cross-attentions are trained, against attacks that start at other words' prompts
    (`fortify.py`).

    The paper's "neutral" is our anchor. It states the aim, a closed-form gated low-rank nullification
    and adversarial fine-tuning, and leaves the rest open: `docs/explanation/ace.md` says what is ours.

    Source: ACE, arXiv 2504.11850, after its abstract and public summaries; reductions, gates and the
    closed form are this project's reading.
    """

    citation: ClassVar[str] = (
        "Attentional Concept Erasure (ACE). 2025, arXiv 2504.11850; written from its abstract and"
        " public summaries."
    )

    absent: ClassVar[Mapping[str, str]] = {
        "train_on": "ACE's gates, which it hardens, stand before the layer through which text enters and"
        " see text alone in every family, so leave it out"
    }

    stronger: ClassVar[str] = "a smaller margin, a smaller goal_ridge or more energy"

    presets: ClassVar[Presets] = read_presets(__file__)

    needs: ClassVar[Mapping[str, str]] = {"fortify": "cross-attention"}

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_train_steps",
        "rate": "learning_rate",
        "pictures": "num_images",
        "picture_steps": "num_inference_steps",
        "leak": "retain_openness",
        "deviations": "n_std",
        "most_overlap": "max_overlap",
        "hold": "anchor_hold_weight",
        "general": "num_retain_words",
        "recovered": "recovery_threshold",
        "fortify_rate": "fortify_learning_rate",
    }

    @property
    def measured_in(self) -> Literal["text", "predictions", ""]:
        # Channels that are turned down go toward nothing.
        return "" if self.reduction in ("damped", *ATTENTION_REDUCTIONS) else "text"

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        read = sum(len(self.templates_for(c)) * (len(c.names) + 1) for c in problem.erase)
        ways, sorts = len(retained_phrasings(problem)), len({c.kind for c in problem.erase})
        staying = ways * (len(problem.retain) + len({c.anchor for c in problem.erase}))
        prompts = read + staying + self.num_retain_words * sorts
        predictions = trained = 0
        if self.reduction in ATTENTION_REDUCTIONS:
            guided = 2 * (self.num_inference_steps or num_inference_steps)
            predictions = 2 * len(problem.erase) * self.num_images * (guided + 2 * LEVELS)
        if "harden" in self.stages:
            # Twice: guidance predicts with and without the prompt; concept and anchor are compared.
            drawn = 2 * self.num_images * ((self.num_inference_steps or num_inference_steps) + LEVELS)
            trained = len(problem.erase) * self.num_images * self.rounds * self.max_train_steps
            # The anchor's noise is predicted at every step, too.
            predictions += len(problem.erase) * drawn + trained
        if "fortify" in self.stages:
            shown = count_images(len(problem.erase), len(problem.retain))
            rows = 4 * FortifyConfig.batch_size * self.fortify_steps
            predictions += 2 * shown * num_inference_steps + rows
            trained += rows
        # The spread of the general words and its root, for each kind; directions for each concept.
        return Cost(prompts, predictions, trained, products=40 + 10 * sorts + 8 * len(problem.erase))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        retained = encode_retained(model, problem)
        tokens, vectors = read_tokens(self, model, problem, retained)
        layers = self.layers(model)
        grounds = read_backgrounds(self, model, problem, retained, run)
        backgrounds = {name: ground.tokens for name, ground in grounds.items()}
        tokens = keep_separable(self, model, problem, tokens, backgrounds, retained)
        width = len(next(iter(backgrounds.values())).mean)
        # Before anything is solved: a system that runs out of memory ends a process without a word.
        check_memory(sum(map(len, tokens.values())), self.rank or 8, width)
        shared = self.share_directions(problem)
        # In the order of the shared sets, into which `counts` cuts the gates.
        tokens = {c.name: tokens[c.name] for members in shared for c in members}
        weights = {name: model.weight(name) for name in layers}
        damping = None
        if self.reduction in ATTENTION_REDUCTIONS:
            damping = read_damping(self, model, problem, run)
        counts = [len(members) for members in shared]
        changes = solve_gates(self, tokens, backgrounds, weights, counts, damping)
        pooled = gate_vectors(self, model, vectors, grounds)
        if "harden" in self.stages and self.rounds:
            closed = _only_gated(changes)
            changes = (harden_all(self, model, closed, tokens, shared, backgrounds, pooled, run),)
        if "fortify" in self.stages:
            # Last: it trains behind the gates as they then are.
            changes = (*changes, *self.fortify(model, problem, _only_gated(changes), run))
        return (*changes, *pooled.values())

    def share_directions(self, problem: Problem) -> list[list[Concept]]:
        """Gather the concepts of each set of directions."""
        if self.directions != "anchor":
            return [[concept] for concept in problem.erase]
        alike: dict[tuple[str, str | None], list[Concept]] = {}
        for concept in problem.erase:
            alike.setdefault((concept.kind, concept.anchor), []).append(concept)
        return list(alike.values())

    def fortify(self, model: Model, problem: Problem, gates: Gated, run: RunContext) -> Changes:
        """Train the cross-attentions behind the gates.

        Args:
            model: as in `fit`.
            problem: as in `fit`.
            run: as in `fit`.
            gates: of the first two stages.

        Returns:
            Their new weights.

        Raises:
            ExpungeError: this model has no cross-attentions apart from the rest.
        """
        retained = prepare_retained(self, model, problem, gates, run)
        targets = prepare_targets(self, model, problem, run)
        config = FortifyConfig(
            self.fortify_steps,
            self.fortify_learning_rate,
            self.fortify_radius,
            self.fortify_noisiest,
            self.fortify_retain,
            finetune_steps=self.fortify_finetune_steps,
            finetune_rate=self.fortify_finetune_rate,
            loss=self.loss,
        )
        return train_against_attacks(model, gates, targets, retained, run, config)


def _only_gated(changes: Changes) -> Gated:
    """Return the one change that the closed form is, where directions are shared by all layers."""
    (change,) = changes
    if not isinstance(change, Gated):
        raise TypeError(f"a Gated change is expected, not a {type(change).__name__}")
    return change
