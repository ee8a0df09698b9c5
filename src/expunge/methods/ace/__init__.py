"""ACE: gates that open on a concept's tokens and take it away there, in closed form, then hardened."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning, join_names
from expunge.base.fields import bounded
from expunge.changes import Changes, Damped, Gated, find_layer
from expunge.erasing import pooled_gates, reference_images
from expunge.erasing.caption_gram import words
from expunge.erasing.prompt_templates import KEPT, TEMPLATES, require_place
from expunge.method import Method
from expunge.methods.ace import fortify as fortifying
from expunge.model import Model
from expunge.ops.attention import read_with_queries
from expunge.ops.finetune import frozen, minimise
from expunge.ops.gates import Background, affine, directions, gate, stacked
from expunge.ops.pgd import bounded as attacked
from expunge.ops.prompt_alignment import match, phrase_positions
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext, Tensors
from expunge.runtime.cost import Cost
from expunge.text import Text

Stage = Literal["gate", "harden", "fortify"]
STAGES: tuple[Stage, ...] = ("gate", "harden", "fortify")

SHOWN, WORDS = 24, 200
"""To fortify: images of each concept, and of how many general words one is drawn to hold. Of what is
retained by name half as many are drawn in all, so that it is met more often than any general word."""

EMOJI = {"directions": "anchor", "general": 1000, "goal_ridge": 0.1, "anchor_hold_weight": 3.0}
"""What the emoji model's presets share."""

BANDS = (0, 3, 9, 27)
"""Where the gates of the end and the padding begin, in tokens from the end token on: what these
tokens say of a prompt fades as they go on, so that one gate for all would fit none. The phrase's own
tokens and the words behind it have a gate each, too."""

REMAINDER = 0.3
"""The share of a concept that may be left in the vector of a whole prompt without a word."""

ATTENDED = ("attention", "attention-by-head")
"""The reductions that look at attention in drawn images."""

LEVELS = 8
"""At how many times, evenly spaced, the noise that concept and anchor call for is compared."""

FACTORS = ("direction", "centre", "slope", "up", "down", "toward", "goal")
"""What hardening trains."""


@dataclass(frozen=True, eq=False)
class Group:
    """The tokens of one gate: where it opens, and what they should become."""

    rows: Tensor
    """(n, d), the concept's tokens."""
    neutral: Tensor
    """(n, d), those of the same prompts with the anchor in it."""
    differences: Tensor
    """(prompts, d), their mean in a prompt less that of its neutral ones."""

    @property
    def differs(self) -> bool:
        """Whether they are not the same tokens."""
        return bool(self.differences.norm(dim=1).max() > 1e-3 * self.neutral.norm(dim=1).mean())


@dataclass(frozen=True, eq=False)
class Grounds:
    """What a concept's gates stay shut on."""

    tokens: Background
    """Tokens."""
    vectors: Background | None
    """Vectors of whole prompts, where the model has them."""


@dataclass(frozen=True)
class ACE(Method):
    """Attentional concept erasure: in keys and values, take a concept away where its tokens are met.

    *gate*: for the concept's own tokens, and for the words, end and padding behind it, a gate
    s(e) = σ(slope (w · e − centre)) opens on them and stays shut on general and retained tokens
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

    with z_t from images of the concept, over gates, directions and goals, ẽ₀ the closed form, r
    general and retained tokens, and the anchor's, and a and b how far concept and anchor are apart in
    the same units, the noise and keys and values. The denoiser sees the text through W alone, so the
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

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gate": {"about": "the closed form alone, seconds for dozens", "stages": ("gate",)},
        "emoji": {"about": "the emoji model", **EMOJI},
        "emoji-fortified": {"about": "the emoji model, held against learnt words, too; minutes",
                            "stages": STAGES, **EMOJI},
        "fast": {"about": "a rough try in a few steps", "general": 20, "num_images": 1, "num_inference_steps": 2,
                 "max_overlap": 1.0,
                 "rounds": 1, "max_train_steps": 2, "attack_steps": 2},
    }  # fmt: skip

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
        "fortify_rate": "fortify_learning_rate",
    }

    stages: tuple[Stage, ...] = ("gate", "harden")
    """Which to run; "harden" goes on from "gate", which always runs, and "fortify" from both."""
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
    """How many standard n_std above the mean of general tokens count as closed."""
    max_overlap: float = bounded(0.9, above=0, at_most=1)
    """How far into the concept, whose own mean is at 1, a retained prompt may lie; beyond, it cannot
    stay while the concept goes, and that is an error."""
    general: int = bounded(200, at_least=1)
    """How many of the tokenizer's own words gates are kept shut on."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    radius: float = bounded(0.2, at_least=0)
    """The inner attack's bound, as a share of each token's norm."""
    attack_steps: int = bounded(10, at_least=1)
    """Its steps."""
    rounds: int = bounded(8, at_least=0)
    """The most attacks a concept; hardening stops before if one fails."""
    recovered: float = bounded(0.1, at_least=0, at_most=1)
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
    """The share of all times, from pure noise on, at which the concept is turned to its anchor: what a
    image shows is decided there, and training spread over all times holds less."""
    fortify_radius: float = bounded(0.8, above=0)
    """How far attacks may go from another word's prompt, as a share of each token's norm."""
    fortify_retain: float = bounded(4.0, at_least=0)
    """ρ there: large values keep more, and hold against less."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.reduction in ATTENDED and "cross-attention" in family.missing_capabilities:
            raise ExpungeError(
                f"ACE's reduction {self.reduction!r} needs cross-attention, and {family.__name__} has"
                f" none: {family.missing_capabilities['cross-attention']}; set reduction to 'shared'"
            )

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        told = sum(len(self._templates(c)) * (len(c.names) + 1) for c in problem.erase)
        ways, sorts = len(self._ways(problem)), len({c.kind for c in problem.erase})
        staying = ways * (len(problem.retain) + len({c.anchor for c in problem.erase}))
        prompts = told + staying + self.general * sorts
        predictions = trained = 0
        if self.reduction in ATTENDED:
            guided = 2 * (self.num_inference_steps or num_inference_steps)
            predictions = 2 * len(problem.erase) * self.num_images * (guided + 2 * LEVELS)
        if "harden" in self.stages:
            drawn = 2 * self.num_images * ((self.num_inference_steps or num_inference_steps) + LEVELS)
            trained = len(problem.erase) * self.num_images * self.rounds * self.max_train_steps
            # The anchor's noise is foretold at every step, too.
            predictions += len(problem.erase) * drawn + trained
        if "fortify" in self.stages:
            named = len(problem.retain) + len(problem.erase) + 1
            shown = SHOWN * len(problem.erase) + WORDS + named * _times(named)
            batch = fortifying.BATCH
            predictions += 2 * shown * num_inference_steps + 4 * batch * self.fortify_steps
            trained += 4 * batch * self.fortify_steps
        # The spread of the general words and its root, for each kind; directions for each concept.
        return Cost(prompts, predictions, trained, products=40 + 10 * sorts + 8 * len(problem.erase))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        staying = self._staying(model, problem)
        groups, vectors = self._read(model, problem, staying)
        layers = self._layers(model)
        grounds = self._backgrounds(model, problem, staying, run)
        tokens = {name: ground.tokens for name, ground in grounds.items()}
        groups = self._told_apart(model, problem, groups, tokens, staying)
        shared = self._shared(problem)
        groups = {c.name: groups[c.name] for members in shared for c in members}
        weights = {name: model.weight(name) for name in layers}
        damping = self.attended(model, problem, run) if self.reduction in ATTENDED else None
        counts = [len(members) for members in shared]
        changes = self.gate(groups, tokens, weights, counts, damping)
        whole = self._of_whole_prompts(model, problem, vectors, grounds)
        if "harden" in self.stages and self.rounds:
            changes = (self._hardened(model, changes, groups, shared, tokens, whole, run),)
        if "fortify" in self.stages:
            changes = (*changes, *self.fortify(model, problem, changes, run))
        return (*changes, *whole.values())

    def _hardened(
        self,
        model: Model,
        changes: Changes,
        groups: Mapping[str, Sequence[Group]],
        shared: Sequence[Sequence[Concept]],
        backgrounds: Mapping[str, Background],
        whole: Mapping[str, Gated],
        run: RunContext,
    ) -> Gated:
        """The closed form after attacks on it."""
        (closed,) = changes
        if not isinstance(closed, Gated):
            raise TypeError(f"a Gated change is expected, not a {type(closed).__name__}")
        counts = [sum(len(groups[c.name]) for c in members) for members in shared]
        parts = {m[0].name: part for m, part in zip(shared, _parted(closed, counts), strict=True)}
        rows = {
            m[0].name: (ground.retained.float()[:, None], ground.general.float()[:, None])
            for m in shared
            for ground in [backgrounds[m[0].name]]
        }
        train = partial(self._harden, model, [_one(m) for m in shared], parts, rows, whole, run.seed)
        found = run.map_cached(train, list(parts), label="hardening")
        hardened: dict[str, Any] = found
        return _joined([dataclasses.replace(parts[n], **hardened[n]) for n in hardened])

    def _shared(self, problem: Problem) -> list[list[Concept]]:
        """The concepts of each set of directions."""
        if self.directions != "anchor":
            return [[concept] for concept in problem.erase]
        alike: dict[tuple[str, str | None], list[Concept]] = {}
        for concept in problem.erase:
            alike.setdefault((concept.kind, concept.anchor), []).append(concept)
        return list(alike.values())

    # Stage 1.

    def read(
        self, model: Model, problem: Problem, staying: Mapping[str, Text]
    ) -> dict[str, list[Group]]:
        """For each concept the tokens of each of its gates, in its prompts and its anchor's."""
        return self._read(model, problem, staying)[0]

    def _read(
        self, model: Model, problem: Problem, staying: Mapping[str, Text]
    ) -> tuple[dict[str, list[Group]], dict[str, Group]]:
        """As `read`, and for each concept the vectors of its whole prompts, where there are any."""
        known = torch.cat([text.embeddings[text.content_mask] for text in staying.values()]).double()
        groups, vectors = {}, {}
        for concept in problem.erase:
            text, anchored = self._encoded(model, concept)
            groups[concept.name] = self._groups(model, concept, known, text, anchored)
            if text.pooled is not None and anchored.pooled is not None:
                goals = anchored.pooled.repeat(len(concept.names), 1)
                pairs = zip(text.pooled.double().split(1), goals.double().split(1), strict=True)
                vectors[concept.name] = _group(list(pairs))
        return groups, vectors

    def gate(
        self,
        groups: Mapping[str, Sequence[Group]],
        background: Background | Mapping[str, Background],
        weights: Mapping[str, Tensor],
        shared: Sequence[int] = (),
        damping: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Changes:
        """The closed form: one `Gated` change of all layers, or one a layer.

        Args:
            groups: for each concept the tokens of its gates.
            background: what the gates stay shut on; for all concepts, or for each its own.
            weights: W of each layer.
            shared: of how many concepts, one after the other, each set of directions is; by default one.
            damping: g of each layer, (out,), for each concept, where it comes from attention.
        """
        flat = [group for members in groups.values() for group in members]
        of = [name for name, members in groups.items() for _ in members]
        grounds = [background[n] if isinstance(background, Mapping) else background for n in of]
        gates = [
            gate(g.rows, ground, margin=self.margin, retain_openness=self.retain_openness)
            for g, ground in zip(flat, grounds, strict=True)
        ]
        switch = {
            name: torch.stack([getattr(one, name) for one in gates]).float().cpu()
            for name in ("direction", "centre", "slope")
        }
        whole = self.gate_on == "prompt"
        if self.reduction == "damped" or self.reduction in ATTENDED:
            found = {
                layer: _damping(weight, flat)
                if damping is None
                else torch.stack([damping[name][layer] for name in of])
                for layer, weight in weights.items()
            }
            # Literally, m is 0 or 1 on a token, however many of a concept's gates open there.
            numbers = {name: i for i, name in enumerate(groups)}
            concepts = torch.tensor([numbers[name] for name in of])
            own = {} if damping is None else {"concept": concepts}
            return tuple(
                Damped((layer,), **_own({**switch, **own}), damping=g, whole=whole)
                for layer, g in found.items()
            )
        roots = (
            {tuple(weights): stacked(list(weights.values()))}
            if self.reduction == "shared"
            else {(layer,): weight for layer, weight in weights.items()}
        )
        members = iter(groups.values())
        together = [
            [group for one in islice(members, n) for group in one] for n in shared or [1] * len(groups)
        ]
        if self.directions == "gate":
            together = [[group] for group in flat]
        changes = []
        for layers, root in roots.items():
            factors = [self._factors(root, members) for members in together]
            up, down, toward, goal = zip(*factors, strict=True)
            owner = [i for i, one in enumerate(down) for _ in one]
            concept = [i for i, members in enumerate(together) for _ in members]
            changes.append(
                Gated(
                    layers,
                    **_own(switch),
                    up=torch.cat(up, 1).float().cpu(),
                    down=torch.cat(down).float().cpu(),
                    toward=torch.cat(toward).float().cpu(),
                    goal=torch.cat(goal).float().cpu(),
                    owner=torch.tensor(owner),
                    concept=torch.tensor(concept),
                    whole=whole,
                )
            )
        return tuple(changes)

    def _factors(self, root: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up, down, toward and goal of some groups: U Uᵀ W (e − what e foretells of e_anchor)."""
        differences = torch.cat([g.differences for g in groups])
        up, down = directions(root, differences, energy=self.energy, rank=self.rank)
        rows, neutral = (torch.cat([getattr(g, n) for g in groups]) for n in ("rows", "neutral"))
        weights = torch.cat([torch.full((len(g.rows),), 1 / len(g.rows)) for g in groups]).to(rows)
        line, goal = affine(rows, neutral.double() @ down.T, weights, self.goal_ridge)
        return up, down, line, goal

    def _layers(self, model: Model) -> tuple[str, ...]:
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

    def _templates(self, concept: Concept) -> tuple[str, ...]:
        return self.templates or TEMPLATES[concept.kind]

    def _encoded(self, model: Model, concept: Concept) -> tuple[Text, Text]:
        """A concept's prompts, name after name, and its anchor's, one a template."""
        templates = self._templates(concept)
        prompts = [template.format(name) for name in concept.names for template in templates]
        goals = [template.format(concept.anchor) if concept.anchor else "" for template in templates]
        model.require_window([*prompts, *goals])
        return model.encode(prompts), model.encode(goals)

    def _groups(
        self, model: Model, concept: Concept, known: Tensor, text: Text, anchored: Text
    ) -> list[Group]:
        """The tokens of a concept's gates: its phrase's, the words' behind it, each band's.

        Raises:
            ExpungeError: the concept is its anchor to the model.
        """
        templates = self._templates(concept)
        phrase = _phrases(model, templates, text, len(concept.names))
        theirs = _phrases(model, templates, anchored, 1)
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2 + len(BANDS))]
        for row in range(len(text)):
            there = row % len(templates)
            e, n = text.embeddings[row].double(), anchored.embeddings[there].double()
            word = int(theirs[there].nonzero().max()) if concept.anchor else 1
            places = phrase[row].nonzero()[:, 0]
            found[0].append((e[places], n[word].expand(len(places), -1)))
            ends = tuple(int(x.content_mask[i].sum()) + 1 for x, i in ((text, row), (anchored, there)))
            m = match(text.ids[row].cpu(), anchored.ids[there].cpu(), (ends[0], ends[1]))
            after, last = max(m.first, int(places[-1]) + 1), m.first + m.tail
            marks = [after, *(min(ends[0] + start, last) for start in BANDS), last]
            for band, (start, stop) in enumerate(pairwise(marks), 1):
                if start < stop:
                    there_from = m.second - m.first
                    found[band].append((e[start:stop], n[start + there_from : stop + there_from]))
        found[0] = _distinct(found[0], known)
        if self.gate_on == "phrase":
            found = found[:1]
        groups = [group for group in (_group(pairs) for pairs in found if pairs) if group.differs]
        # Within one phrase the words differ from one another, so that `differs` would not tell.
        alone = text.embeddings - anchored.embeddings.repeat(len(concept.names), 1, 1)
        if not groups or bool(alone.norm() <= 1e-6 * text.embeddings.norm()):
            raise ExpungeError(
                f"{concept.name!r} and its anchor {concept.anchor!r} are the same to this model,"
                " so there is no direction to take away: choose another anchor"
            )
        return groups

    def _backgrounds(
        self, model: Model, problem: Problem, staying: Mapping[str, Text], run: RunContext
    ) -> dict[str, Grounds]:
        """For each concept general words in the phrasing kept for its own kind, and what is retained."""
        kept = torch.cat([_thinned(text) for text in staying.values()])
        shut = torch.cat([text.embeddings.flatten(0, 1) for text in staying.values()])
        whole = [text.pooled for text in staying.values() if text.pooled is not None]
        # Guidance may lead away from another text than the empty prompt: gates are shut on that, too.
        nothing = model.unconditional(1)
        if nothing.pooled is not None:
            whole.append(nothing.pooled)
        if not torch.equal(nothing.embeddings, model.encode([""]).embeddings):
            shut = torch.cat([shut, nothing.embeddings[0]])
        general, found = self._general(model, problem, run), dict[str, Grounds]()
        for concept in problem.erase:
            if concept.kind not in found:
                template = KEPT[concept.kind]
                chosen = ["", *(template.format(word) for word in general)]
                tokens, vectors = self._tokens(model, chosen, f"reading {concept.kind} words", run)
                found[concept.kind] = Grounds(
                    Background(tokens, kept, self.gate_ridge, self.n_std, shut),
                    None
                    if vectors is None
                    else Background(vectors, torch.cat(whole), self.gate_ridge, self.n_std),
                )
        return {concept.name: found[concept.kind] for concept in problem.erase}

    def _general(self, model: Model, problem: Problem, run: RunContext) -> list[str]:
        """Some words of the tokenizer's that are in no concept's name."""
        found = words(model, problem.erase)
        order = torch.randperm(len(found), generator=run.generator("words"))
        return [found[i] for i in order[: self.general].tolist()]

    def _tokens(
        self, model: Model, prompts: Sequence[str], label: str, run: RunContext
    ) -> tuple[Tensor, Tensor | None]:
        """Those that tell a gate enough of the prompts, (n, d), and the vectors of whole prompts."""
        tokens, vectors = [], []
        for start in range(0, len(prompts), 64):
            run.progress(label, start, len(prompts))
            text = model.encode(prompts[start : start + 64])
            tokens.append(_thinned(text))
            if text.pooled is not None:
                vectors.append(text.pooled)
        run.progress(label, len(prompts), len(prompts))
        return torch.cat(tokens), torch.cat(vectors) if vectors else None

    def _ways(self, problem: Problem) -> list[str]:
        """The prompts in which gates are kept closed on what a problem retains: the bare name, and for
        each kind that it erases a phrasing in which nothing is erased."""
        return list(dict.fromkeys(["{}", *(KEPT[c.kind] for c in problem.erase)]))

    def _staying(self, model: Model, problem: Problem) -> dict[str, Text]:
        """What is retained, and the anchors, in a few prompts each."""
        names = dict.fromkeys((*problem.retain, *(c.anchor or "" for c in problem.erase)))
        told = self._ways(problem)
        ways = {name: [way.format(name) for way in told] if name else [""] for name in names}
        text = model.encode([prompt for prompts in ways.values() for prompt in prompts])
        rows = iter(range(len(text)))
        return {name: text[[next(rows) for _ in prompts]] for name, prompts in ways.items()}

    def _of_whole_prompts(
        self,
        model: Model,
        problem: Problem,
        vectors: Mapping[str, Group],
        grounds: Mapping[str, Grounds],
    ) -> dict[str, Gated]:
        """The changes of the vectors of whole prompts, by layer; says what of a concept they leave."""
        changes: dict[str, Gated] = {}
        for entry in model.pooled_entries() if vectors else ():
            weight = model.weight(entry.layer)
            groups, left = {}, {}
            for name, group in vectors.items():
                ground = grounds[name].vectors
                if ground is None:
                    raise TypeError("a background of vectors is expected where a concept has vectors")
                # One that cannot be told from what is retained stays as it is.
                apart = ground.reach(ground.direction(group.rows), ground.retained) <= self.max_overlap
                if self.pooled and group.differs and apart:
                    groups[name] = [group]
            width = next(iter(vectors.values())).rows.shape[1]
            narrow: Gated | None = None
            if groups:
                found = {name: g for name in groups if (g := grounds[name].vectors) is not None}
                method = dataclasses.replace(
                    self, stages=("gate",), reduction="shared", gate_on="end", directions="concept"
                )
                (made,) = method.gate(groups, found, {entry.layer: weight[:, :width]})
                if not isinstance(made, Gated):
                    raise TypeError(f"a Gated change is expected, not a {type(made).__name__}")
                narrow = made
                changes[entry.layer] = pooled_gates.widened(made, weight.shape[1])
            for name, group in vectors.items():
                if group.differs:
                    left[name] = pooled_gates.remainder(
                        weight[:, :width], group.rows, group.neutral, narrow
                    )
            told = [
                f"{100 * share:.0f} % of what parts {name!r} from its anchor"
                for name, share in left.items()
                if share > REMAINDER
            ]
            if told:
                warnings.warn(
                    f"the vector of the whole prompt keeps {join_names(told, 3)}",
                    ExpungeWarning,
                    stacklevel=4,
                )
        return changes

    # QᵀΔAttn.

    def attended(self, model: Model, problem: Problem, run: RunContext) -> dict[str, dict[str, Tensor]]:
        """g of each concept and layer, (out,), at least 0 and at most 1.

            g ∝ |Σ Qᵀ (A_concept − A_anchor)|

        A is the attention to the phrase's own tokens, in the concept's prompt and in its anchor's (0
        where there is none), Q the queries beside the first; the sum runs over pixels, over `LEVELS`
        times and over images drawn with either prompt; with reduction "attention" over heads, too.

        Args:
            model: the original.
            problem: the concepts.
            run: its seed.
        """
        layers, found = self._layers(model), {}
        for place, concept in enumerate(problem.erase):
            run.progress("reading attention", place, len(problem.erase))
            summed = self._attended(model, concept, run)
            found[concept.name] = {
                layer: next(g for key, g in summed.items() if _attention_of(key) == _attention_of(layer))
                for layer in layers
            }
        run.progress("reading attention", len(problem.erase), len(problem.erase))
        return found

    @torch.no_grad()
    def _attended(self, model: Model, concept: Concept, run: RunContext) -> dict[str, Tensor]:
        """g of each attention, (heads · width,), by the name of its layer of keys."""
        template = self._templates(concept)[0]
        prompts = template.format(concept.name), self._goal(concept)
        text = model.encode(prompts)
        before, after = (model.count_tokens(side.strip()) for side in template.split("{}"))
        counted = phrase_positions([before] * 2, [after] * 2, text.content_mask).float()
        if not concept.anchor:
            counted[1] = 0
        n, steps = self.num_images, self.num_inference_steps or None
        drawn = [reference_images.drawn(model, concept.name, p, n, run, steps).latents for p in prompts]
        shown = torch.cat(drawn)
        attentions = model.cross_attentions()
        sums = [torch.zeros(()) for _ in attentions]
        levels, generator = len(model.log_snr()), run.generator("attention", concept.name)
        for at in range(LEVELS):
            noise = torch.randn(shown.shape, generator=generator).to(shown)
            t = torch.full((len(shown),), (2 * at + 1) * levels // (2 * LEVELS))
            noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
            heard = [
                read_with_queries(
                    attentions,
                    partial(_attention_to, counted[row]),
                    partial(model.predict, noisy, t, text[[row] * len(shown)]),
                )
                for row in (0, 1)
            ]
            for i, ((q, one), (_, other)) in enumerate(zip(*heard, strict=True)):
                sums[i] = sums[i] + torch.einsum("nhpw,nhp->hw", q, one - other).cpu()
        keys = [entry.layer for entry in model.text_entries() if entry.role == "key"]
        named = {layer: find_layer(model.pipe, layer) for layer in keys}
        found = {}
        for attention, total in zip(attentions, sums, strict=True):
            g = total if self.reduction == "attention-by-head" else total.sum(0).expand_as(total)
            size = g.abs().flatten()
            layer = next(name for name, module in named.items() if module is attention.key)
            found[layer] = (self.damping * size / size.max().clamp(min=1e-20)).clamp(max=1)
        return found

    def _told_apart(
        self,
        model: Model,
        problem: Problem,
        groups: Mapping[str, Sequence[Group]],
        backgrounds: Mapping[str, Background],
        staying: Mapping[str, Text],
    ) -> dict[str, list[Group]]:
        """The groups that can be told from what is retained; of the padding, that may not be all.

        Raises:
            ExpungeError: a retained prompt lies in a concept's phrase, or the gates need more memory
                than there is.
        """
        apart: dict[str, list[Group]] = {}
        names = {concept.name: concept.names for concept in problem.erase}
        for concept, members in groups.items():
            apart[concept], background = [], backgrounds[concept]
            bare = model.encode(names[concept]).embeddings
            one = {n for n in problem.retain if _among(bare, staying[n].embeddings[0])}
            for group in members:
                way = background.direction(group.rows)
                overlaps = {
                    name: max(
                        background.reach(way, _thinned(staying[name]).double()), float(name in one)
                    )
                    for name in problem.retain
                }
                nearest = max(overlaps, key=lambda name: overlaps[name], default="")
                if not nearest or overlaps[nearest] <= self.max_overlap:
                    apart[concept].append(group)
                elif group is members[0]:
                    raise ExpungeError(
                        f"{nearest!r} to retain lies in what is erased with {concept!r}: their overlap"
                        f" is {overlaps[nearest]:.2f}, and {self.max_overlap:g} is the most allowed"
                    )
        width = len(next(iter(backgrounds.values())).mean)
        check_memory(sum(map(len, apart.values())), self.rank or 8, width)
        return apart

    # Stage 2.

    def _harden(
        self,
        model: Model,
        concepts: Sequence[Concept],
        parts: Mapping[str, Gated],
        rows: Mapping[str, tuple[Tensor, Tensor]],
        whole: Mapping[str, Gated],
        seed: int,
        names: Sequence[str],
    ) -> dict[str, Tensors]:
        """`harden` for the concepts of these names."""
        run, found = RunContext(seed), {}
        for concept in concepts:
            if concept.name in names:
                part, staying = parts[concept.name], rows[concept.name]
                found[concept.name] = self.harden(model, concept, part, *staying, run, whole)
        return found

    def harden(
        self,
        model: Model,
        concept: Concept,
        gated: Gated,
        retained: Tensor,
        general: Tensor,
        run: RunContext,
        whole: Mapping[str, Gated] | None = None,
    ) -> dict[str, Tensor]:
        """A concept's gates, directions and goals after attacks on them.

        Args:
            model: the model as it was.
            concept: the concept.
            gated: its closed form.
            retained: (n, 1, d), tokens that must stay.
            general: (n, 1, d), tokens that must, but for those the closed form opens on: other names of
                the concept are among the words of a vocabulary.
            run: its seed.
            whole: what lies on the layers that read the vector of a whole prompt; it stays as it is.
        """
        kept = torch.cat([retained, general[gated.gates(general).amax((1, 2)) < 0.5]])
        names, template = concept.names, self._templates(concept)[0]
        text = model.encode([template.format(name) for name in names])
        anchored = model.encode([self._goal(concept)])
        shown = reference_images.drawn(
            model, concept.name, text.prompts[0], self.num_images, run, self.num_inference_steps or None
        ).latents
        root = stacked([model.weight(layer) for layer in gated.layers]).to(text.embeddings)
        generator = run.generator("hardening", concept.name)
        weigh = 1 / _apart(root, text.embeddings, anchored.embeddings).mean()
        noises = 1 / _noises_apart(model, text, anchored, shown, generator)
        # Each factor is a share of its own size, so that one rate fits all.
        sizes = {name: getattr(gated, name).square().mean().sqrt() for name in FACTORS}
        shifts = {name: torch.zeros(1, *getattr(gated, name).shape).to(kept) for name in FACTORS}

        def now() -> Gated:
            moved: Any = {
                name: getattr(gated, name).to(kept) + sizes[name].to(kept) * shift[0]
                for name, shift in shifts.items()
            }
            return dataclasses.replace(gated, **moved)

        def lack(e: Tensor) -> Tensor:
            """How much of the concept is missing: 0 none, 1 as much as the anchor lacks."""
            return _apart(root, now().change_input(e), text.embeddings) * weigh

        levels, closed = model.log_snr(), gated.change_input(text.embeddings)
        vectors = pooled_gates.given(whole or {}, text)
        for done in range(self.rounds):
            run.progress(f"hardening {concept.name}", done, self.rounds)
            hard, missing = attacked(lack, text.embeddings, self.radius, self.attack_steps)
            if bool((1 - missing.clamp(min=0).sqrt() < self.recovered).all()):
                break

            def losses(_: int, hard: Tensor = hard) -> Tensor:
                rows = torch.randint(len(text), (len(shown),), generator=generator).tolist()
                t = torch.randint(len(levels), (len(shown),), generator=generator)
                noise = torch.randn(shown.shape, generator=generator).to(shown)
                noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
                with torch.no_grad():
                    goal = model.predict(noisy, t, anchored[[0] * len(shown)])
                step = now()
                given = dataclasses.replace(
                    text[rows],
                    embeddings=step.change_input(hard[rows]),
                    pooled=None if vectors is None else vectors[rows],
                )
                error = (model.predict(noisy, t, given) - goal).square().mean() * noises
                harm = _apart(root, step.change_input(kept), kept).mean() * weigh
                lost = _apart(root, step.change_input(text.embeddings), closed).mean() * weigh
                return (error + self.retain_weight * harm + self.anchor_hold_weight * lost)[None]

            with frozen(model.parameters()):
                minimise(
                    list(shifts.values()),
                    losses,
                    max_train_steps=self.max_train_steps,
                    learning_rate=self.learning_rate,
                    weight_decay=0,
                )
        return {name: getattr(now(), name).detach().cpu() for name in FACTORS}

    # Stage 3.

    def fortify(self, model: Model, problem: Problem, changes: Changes, run: RunContext) -> Changes:
        """New weights of the cross-attentions, behind the gates.

        Raises:
            ExpungeError: this model has no cross-attentions apart from the rest.
        """
        (gates,) = changes
        if not isinstance(gates, Gated):
            raise TypeError(f"a Gated change is expected, not a {type(gates).__name__}")
        told = list(dict.fromkeys(KEPT[concept.kind] for concept in problem.erase))
        # Kind after kind in turn, so that each has as many.
        general = enumerate(self._general(model, problem, run))
        ways = [told[i % len(told)].format(word) for i, word in general]
        own = model.encode(ways)
        # Other names of a concept are among the words of a vocabulary.
        closed = (gates.gates(own.embeddings).amax((1, 2)) < 0.5).nonzero()[:, 0].tolist()
        retained = [way.format(name) for name in problem.retain for way in told]
        anchors = [self._goal(concept) for concept in problem.erase]
        named = list(dict.fromkeys([*retained, *anchors, ""]))
        texts = named * _times(len(named)) + [ways[i] for i in closed[:WORDS]]
        held = reference_images.each(model, "what stays", texts, run)
        return fortifying.fortify(
            model,
            gates,
            [
                fortifying.Target(
                    concept.name,
                    model.encode([prompt]),
                    model.encode([goal]),
                    reference_images.drawn(model, concept.name, prompt, SHOWN, run).latents,
                )
                for concept, goal in zip(problem.erase, anchors, strict=True)
                for prompt in [self._templates(concept)[0].format(concept.name)]
            ],
            fortifying.Held(model.encode(texts), held, own[closed]),
            run,
            max_train_steps=self.fortify_steps,
            learning_rate=self.fortify_learning_rate,
            radius=self.fortify_radius,
            noisiest=self.fortify_noisiest,
            retain_weight=self.fortify_retain,
        )

    def _goal(self, concept: Concept) -> str:
        """The anchor's prompt."""
        return self._templates(concept)[0].format(concept.anchor) if concept.anchor else ""


def _attention_of(layer: str) -> str:
    """What layers of one attention have in common."""
    return layer.rpartition(".")[0]


def _attention_to(counted: Tensor, attention: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (n, heads, pixels, width), and the attention to some tokens (n, heads, pixels)."""
    return query.float(), attention.float() @ counted


def _times(named: int) -> int:
    """How many images are drawn of each prompt that is held by name."""
    return max(1, WORDS // (2 * named))


def check_memory(gates: int, rank: int, width: int, free: int | None = None) -> None:
    """Check that so many gates can be held beside the model.

    Args:
        gates: how many.
        rank: directions a gate.
        width: of the text embeddings.
        free: the bytes that are free; by default what the system says.

    Raises:
        ExpungeError: they cannot.
    """
    n = gates * rank
    needed = 8 * (4 * n * width + 3 * n * n)
    if free is None:
        free = _free()
    if needed > free:
        raise ExpungeError(
            f"{gates} gates of {rank} directions need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are"
            " free: erase fewer concepts at once, or lower the rank"
        )


def _free() -> int:
    """The bytes of memory that could be had; without limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**62


def _phrases(model: Model, templates: Sequence[str], text: Text, names: int) -> Tensor:
    """Where the phrase stands in each prompt, (n, tokens), bool; prompts run name after name."""
    sides = [template.split("{}") for template in templates] * names
    before, after = ([model.count_tokens(side.strip()) for side in x] for x in zip(*sides, strict=True))
    return phrase_positions(before, after, text.content_mask)


def _thinned(text: Text) -> Tensor:
    """Start, own and end tokens, and a few of the padding, (n, d): it is much the same all along."""
    end = text.content_mask.sum(1, keepdim=True) + 1
    behind = torch.arange(text.content_mask.shape[1], device=end.device) - end
    few = torch.isin(behind, torch.tensor([1, 2, 4, 8, 16, 32, 64], device=end.device))
    return text.embeddings[(behind <= 0) | few]


def _distinct(pairs: Sequence[tuple[Tensor, Tensor]], known: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The tokens of a phrase that are the concept's alone.

    Words before the last may be anybody's: the "flag" and the "of" of a country's flag. Those that
    stand nearer to a token of the anchor's or a retained prompt than half as far as the last token
    stands from the anchor are left out.
    """
    if not len(known):
        return list(pairs)
    far = torch.stack([(e[-1] - n[-1]).norm() for e, n in pairs]).median()
    found = []
    for e, n in pairs:
        alone = torch.cdist(e, known).amin(1) > far / 2
        alone[-1] = True
        found.append((e[alone], n[alone]))
    return found


def _among(texts: Tensor, other: Tensor) -> bool:
    """Whether a text, (tokens, d), is one of some, (n, tokens, d).

    What is erased and what is retained stand in different phrasings, and a text encoder tells tokens in
    different places apart: that two names are one shows where both stand alone.
    """
    return bool(((texts - other).norm(dim=2) <= 1e-3 * other.norm(dim=1)).all(1).any())


def _one(concepts: Sequence[Concept]) -> Concept:
    """Concepts with the same anchor as one with all their names."""
    first, *names = (name for concept in concepts for name in concept.names)
    return dataclasses.replace(concepts[0], name=first, synonyms=tuple(names))


def _group(pairs: Sequence[tuple[Tensor, Tensor]]) -> Group:
    means = torch.stack([(e - n).mean(0) for e, n in pairs])
    rows, neutral = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Group(rows, neutral, means)


def _damping(weight: Tensor, groups: Sequence[Group]) -> Tensor:
    """g of each gate, (gates, out): how much of the difference each channel carries, 1 at the most."""
    carried = torch.stack([(g.differences @ weight.double().T).abs().mean(0) for g in groups])
    return (carried / carried.amax(1, keepdim=True)).float().cpu()


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies, since two changes in one file share no memory."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _apart(root: Tensor, given: Tensor, other: Tensor) -> Tensor:
    """The mean over tokens of ‖W a − W b‖² summed over layers, for each row: (n,)."""
    return ((given - other) @ root.T).square().sum(-1).mean(-1)


@torch.no_grad()
def _noises_apart(
    model: Model, text: Text, anchored: Text, shown: Tensor, generator: torch.Generator
) -> Tensor:
    """E ‖ε₀(z_t, t, e) − ε₀(z_t, t, e_anchor)‖², a number's mean, at `LEVELS` times of each image."""
    levels, rows = len(model.log_snr()), [i % len(text) for i in range(len(shown))]
    squares = []
    for at in range(LEVELS):
        noise = torch.randn(shown.shape, generator=generator).to(shown)
        t = torch.full((len(shown),), (2 * at + 1) * levels // (2 * LEVELS))
        noisy, t = model.add_noise(shown, noise, t), t.to(shown.device)
        one, other = (model.predict(noisy, t, x) for x in (text[rows], anchored[[0] * len(shown)]))
        squares.append((one - other).square().mean())
    return torch.stack(squares).mean().clamp(min=1e-12)


def _parted(gated: Gated, counts: Sequence[int]) -> list[Gated]:
    """One change for each concept, of so many gates."""
    parts, start = [], 0
    for n in counts:
        gates = slice(start, start + n)
        first = int(gated.concept[start])
        mine = torch.isin(gated.owner, gated.concept[gates])
        parts.append(
            dataclasses.replace(
                gated,
                direction=gated.direction[gates],
                centre=gated.centre[gates],
                slope=gated.slope[gates],
                up=gated.up[:, mine],
                down=gated.down[mine],
                toward=gated.toward[mine],
                goal=gated.goal[mine],
                owner=gated.owner[mine] - first,
                concept=gated.concept[gates] - first,
            )
        )
        start += n
    return parts


def _joined(parts: Sequence[Gated]) -> Gated:
    """One change with the gates of several."""
    counts = torch.tensor([int(part.concept.max()) + 1 for part in parts])
    starts = (counts.cumsum(0) - counts).tolist()
    joined: Any = {n: torch.cat([getattr(p, n) for p in parts], int(n == "up")) for n in FACTORS}
    for name in ("owner", "concept"):
        joined[name] = torch.cat([getattr(p, name) + s for p, s in zip(parts, starts, strict=True)])
    return dataclasses.replace(parts[0], **joined)
