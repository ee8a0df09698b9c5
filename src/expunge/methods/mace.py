"""MACE: refit what a concept leaves around it, lower the attention to it, fuse it all in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.changes import Changes, Right, find_layer
from expunge.erasing import fusion, object_masks, reference_images
from expunge.erasing.fusion import LazyTensors
from expunge.erasing.guidance_training import (
    Steering,
    TrainingConcept,
    TrajectoryConfig,
    layers_of,
    train_factors,
)
from expunge.erasing.prompt_templates import TEMPLATES, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.ops.attention import AttentionReader, energy, grid
from expunge.ops.finetune import frozen, minimise
from expunge.ops.least_squares import FLOOR, SOLVABLE, floored, gram, outer, right_factor
from expunge.ops.low_rank import each_its_own, first_factors
from expunge.ops.noise_level import on_latents
from expunge.ops.prompt_alignment import match, phrase_positions
from expunge.ops.trajectory import Objective
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext, Tensors
from expunge.runtime.cost import Cost
from expunge.text import Text

Stage = Literal["refine", "suppress", "fuse"]
STAGES: tuple[Stage, ...] = ("refine", "suppress", "fuse")

COCO = 616_767
"""The captions of COCO, which the paper's prior is the sum over."""


def published(scale: float, domain: float = 0.0) -> dict[str, float]:
    """The paper's scales of a prior that is a sum, for one that is a mean.

    Both priors, scale · Σ_captions, are scale · 616,767 times the mean per caption. Within both stands
    domain · Σ_names, over 100 names and one prompt each as far as is known: 100 times the mean, to
    616,767.
    """
    return {
        "refine_prior": scale * COCO,
        "fuse_prior": scale * COCO,
        "domain_weight": domain * 100 / COCO,
    }


def identities(domain: float) -> dict[str, float]:
    """The paper's values for identities and styles: they differ in what the retained weigh."""
    return {"ridge": 0.0, "learning_rate": 1e-4, "focal_side": 64, **published(1e-4, domain)}


OURS = "1,040 captions of ours stand in for COCO's (captions)"
NO_PRIOR = "no prior"


@dataclass(frozen=True, eq=False)
class Group:
    """The concepts that have one kind and one anchor, in words."""

    read: Callable[[Sequence[str]], Text]
    """What prompts become. Those of a concept at a time are read: all do not fit in memory."""
    anchored: Sequence[str]
    """The anchor in the templates."""
    erased: Mapping[str, Sequence[str]]
    """For each concept its names in the templates, name after name, each template by template."""


@dataclass(frozen=True, eq=False)
class Sums:
    """What the closed forms need of all the prompts, (d, d) each, float64."""

    whole: Tensor
    """Σ e eᵀ over all tokens of the concepts' prompts."""
    contexts: Tensor
    """Σ eᶠ eᶠᵀ, over those around a phrase."""
    cross: Tensor
    """Σ eᵍ eᶠᵀ."""

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Sums:
        """Read every prompt once."""
        whole, alone, cross = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for group in groups:
            anchored = group.read(group.anchored)
            goals = anchored.embeddings.cpu()
            # What goes to the same rows is added up first: one product for all concepts of an anchor.
            moved = torch.zeros(goals.shape, dtype=torch.float64)
            for prompts in group.erased.values():
                text = group.read(prompts)
                whole = whole + gram(text.embeddings.flatten(0, 1).cpu())
                alone = alone + gram(_align(text, anchored, moved))
            cross = cross + outer(goals.flatten(0, 1), moved.flatten(0, 1))
        return cls(whole, whole - alone, cross)


@dataclass(frozen=True, eq=False)
class Sample:
    """What one training step shows of one concept."""

    text: Text
    """One prompt."""
    tokens: Tensor
    """(tokens,), bool: those that should get no attention."""
    latents: Tensor
    """(c, h, w), clean."""
    mask: Tensor
    """(h, w), 1 where the concept is."""
    t: int
    """The time."""
    noise: Tensor
    """(c, h, w)"""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one concept's change is trained on, and its own random numbers."""

    concept: str
    """Its name."""
    text: Text
    """The concept's prompts."""
    tokens: Tensor
    """(prompts, tokens), bool."""
    latents: Tensor
    """(images, c, h, w), clean."""
    masks: Tensor
    """(images, h, w)"""
    generator: torch.Generator

    def sample(self, chances: Tensor) -> Sample:
        """A prompt, an image, a time by its chance, and noise."""
        row, image = (
            int(torch.randint(n, (), generator=self.generator))
            for n in (len(self.text), len(self.latents))
        )
        t = int(torch.multinomial(chances, 1, generator=self.generator))
        noise = torch.randn(self.latents.shape[1:], generator=self.generator)
        latents = self.latents[image]
        return Sample(
            self.text[[row]], self.tokens[row], latents, self.masks[image], t, noise.to(latents)
        )


@dataclass(frozen=True)
class MACE(Method):
    """Mass concept erasure: a hundred concepts at once, each with a low-rank change of its own.

    *refine*: what stands around a concept's phrase carries it too: the words behind it, the end and the
    padding. (A causal text encoder, as CLIP's is, says nothing of it in the words before; these are
    the same with the anchor and hold still.) So keys and values W are refitted to send all that is
    around it (eᶠ) where it goes (eᵍ) when the anchor stands in the phrase's place:

        min_W'  Σ ‖W' eᶠ − W eᵍ‖² + λ₁ (E_captions ‖(W' − W) e‖² + ω E_retained ‖…‖²) + λ ‖W' − W‖²

    W' = W M, one matrix M for every layer, since no embedding depends on the layer.

    *suppress*: for each concept a change B D of W' is trained to lower the attention A that its
    tokens S get inside the object's mask in images of it:

        min_{B,D}  Σ_layers (Σ_{i∈S} ‖Aⁱ ⊙ mask‖²)^½

    at times drawn where a concept's detail takes shape (`focal`). Many concepts train in one batch,
    each with its own factors, random numbers and clipping: the result is that of one by one.

    *fuse*: one W* that does to each concept's words what its own change does:

        min_W*  Σᵢ Σ ‖W* eᶠ − (W' + BᵢDᵢ) eᶠ‖² + λ₂ (as above) + λ ‖W* − W'‖²

    with W* = W M₂ + Σᵢ Bᵢ (DᵢGᵢK): one matrix and one low-rank change a layer, however many concepts.
    Without *fuse*, the changes are averaged, as in the second row of the paper's ablation (`combine`).

    The paper's "target", "destination" and "preservation" are our erase, anchor and retain. λ and the
    sums are as published: a sum over templates and names, each of 77 tokens.

    Cost: closed forms take seconds on a CPU; drawing 8 images and 50 short training steps a concept.

    Source: Lu et al., CVPR 2024, arXiv 2403.06135, eq. 1–7.
    """

    citation: ClassVar[str] = (
        "Lu, Wang, Li, Liu, Kong: MACE: Mass Concept Erasure in Diffusion Models."
        " CVPR 2024, arXiv 2403.06135."
    )

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {"about": f"the paper's, on SD 1.x; ridge 10 to 1000 by object; {NO_PRIOR}",
                   "ridge": 100.0, "learning_rate": 1e-5, "focal_side": 64, **published(0)},
        "identity-1": {"about": f"the paper's, on SD 1.x, for one; {OURS}", **identities(8e3)},
        "identity-5": {"about": f"the paper's, on SD 1.x, for about 5; {OURS}", **identities(5e4)},
        "identity-10": {"about": f"the paper's, on SD 1.x, for about 10; {OURS}", **identities(8e4)},
        "identity-100": {"about": f"the paper's, on SD 1.x, for about 100; {OURS}", **identities(2e5)},
        "style": {"about": f"the paper's, on SD 1.x; {OURS}", **identities(8e4)},
        "explicit": {"about": f"the paper's, on SD 1.x, but for a floor under its ridge of 0; {OURS}",
                     "ridge": 0.0, "ridge_floor": 3.0, "learning_rate": 1e-5, "max_train_steps": 120, "focal": False,
                     **published(7e-7)},
        "emoji": {"about": "everything on the emoji model; refine erases, suppress is all but off",
                  "ridge": 100.0, "learning_rate": 1e-4, "refine_prior": 100.0, "fuse_prior": 100.0,
                  "domain_weight": 10.0, "batch_size": 16},
        "fast": {"about": "a rough try in a few steps", "ridge": 1.0, "refine_prior": 10.0,
                 "fuse_prior": 10.0, "domain_weight": 50.0, "captions": "", "learning_rate": 0.03, "max_train_steps": 5,
                 "num_images": 2, "num_inference_steps": 3},
    }  # fmt: skip

    needs: ClassVar[Mapping[str, str]] = {"suppress": "cross-attention"}

    renamed: ClassVar[Mapping[str, str]] = {
        "steps": "max_train_steps",
        "rate": "learning_rate",
        "clip": "max_grad_norm",
        "batch": "batch_size",
        "pictures": "num_images",
        "picture_steps": "num_inference_steps",
        "pictures_from": "images_from",
    }
    stages: tuple[Stage, ...] = STAGES
    """Which of the three to run; "fuse" has nothing to do without another."""
    ridge: float = bounded(100.0, at_least=0)
    """λ, pull to the weight before, in units of a squared embedding (about 600 for one token of a
    CLIP); the sums it stands against run over all tokens of 30 prompts. Larger erases less."""
    ridge_floor: float = bounded(FLOOR, at_least=0)
    """The least λ in *refine*, as a share of the mean of the diagonal of Σ eᶠ eᶠᵀ, so that a small ridge
    and a light prior do not let go of everything else. With 0, λ is the ridge alone, as in the paper."""
    refine_prior: float = bounded(0.0, at_least=0)
    """λ₁, weight of the prior in *refine*, for a mean per caption."""
    refine_scale: Literal["once", "as-released"] = "once"
    """Whether λ₁ is the prior's scale, as in equation 2, or its square, as the released first stage has
    it for few concepts. The square leaves the prior next to no weight."""
    fuse_prior: float = bounded(0.0, at_least=0)
    """λ₂, weight of the prior in *fuse*, for a mean per caption."""
    domain_weight: float = bounded(0.0, at_least=0)
    """ω, how much more than the mean of the captions the mean of the retained prompts weighs."""
    captions: str = "general"
    """The prior's captions: "general", 1,040 that ship, where the paper has COCO's 616,767;
    "vocabulary", the tokenizer's own words; a text file with one a line, or OWNER/NAME:COLUMN:SPLIT, a
    data set of the Hub; "" for none, the retained alone."""
    rank: int = bounded(1, at_least=1)
    """The rank of each concept's change."""
    combine: Literal["average", "sum"] = "average"
    """What becomes of the concepts' changes without *fuse*: W' + Σ BᵢDᵢ / n, weights that sum to one;
    or W' + Σ BᵢDᵢ, each as strong as alone."""
    max_train_steps: int = bounded(50, at_least=0)
    """Training steps a concept."""
    learning_rate: float = bounded(1e-5, above=0)
    """AdamW's learning rate; larger erases more, and more of what is near."""
    weight_decay: float = bounded(0.01, at_least=0)
    """AdamW's weight decay."""
    max_grad_norm: float = bounded(1.0, above=0)
    """The largest norm of one concept's gradient."""
    lesson: Literal["attention", "trajectory"] = "attention"
    """What a change is trained on: the attention it should lower, or ANT's objective, on as many
    trajectories as there would be images, with its weights for identities and styles."""
    norm: Literal["joint", "squared"] = "joint"
    """One norm over heads, pixels and tokens of a layer, as released, or its square, as printed."""
    end_tokens: bool = True
    """Lower the attention of the end and padding tokens too, which carry the concept as well."""
    focal: bool = True
    """Draw times where a concept's detail takes shape; otherwise, all alike."""
    focal_high: float = 1.12
    """Where that begins, as a log-SNR: t₁ = 200 of Stable Diffusion's 1000."""
    focal_low: float = -0.30
    """Where that ends, as a log-SNR: t₂ = 400."""
    focal_slope: float = bounded(7.0, above=0)
    """How sharply, per unit of log-SNR: γ = 0.05 a time."""
    focal_side: int = bounded(0, at_least=0)
    """The side of the latents that the window is meant for, 64 for Stable Diffusion 1.x: on larger ones
    it moves to more noise, see `ops.noise_level`. 0 takes it as it stands on every size."""
    num_images: int = bounded(8, at_least=1)
    """Images drawn of a concept."""
    num_inference_steps: int = bounded(0, at_least=0, at_most=1000)
    """Denoising steps for each of them; 0 for the model's own."""
    images_from: str = ""
    """A folder of images to use instead, one folder in it for each concept, named as it is."""
    masks: str = "attention"
    """Where the concept is in them: "attention", the model's own; "none", everywhere; "grounded-sam";
    or a folder of PNGs named as the images. Styles are everywhere."""
    batch_size: int = bounded(4, at_least=1)
    """Concepts trained together; more is faster and takes more memory."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stages", tuple(s for s in STAGES if s in self.stages))
        if not {"refine", "suppress"} & set(self.stages):
            raise ExpungeError(
                "stages must have 'refine' or 'suppress': there is nothing to do otherwise"
            )
        if self.focal and not self.focal_high > self.focal_low:
            raise ExpungeError(
                f"focal_high must be above focal_low, not {self.focal_high:g} to {self.focal_low:g}"
            )
        require_place(self.templates)

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        concepts = len(problem.erase)
        prompts = sum(len(self._prompts(concept)) for concept in problem.erase)
        told = {(c.kind, c.anchor): len(self.templates or TEMPLATES[c.kind]) for c in problem.erase}
        weighs = self.refine_prior > 0 or self.fuse_prior > 0
        staying = len(fusion.RETAINED) * len(problem.retain) if weighs and self.domain_weight else 0
        products = 8 * (1 + ("fuse" in self.stages)) + concepts
        captions = self.captions if weighs else ""
        prompts += sum(told.values()) + staying
        if "suppress" not in self.stages:
            return Cost(prompts, captions=captions, products=products)
        # Those of what is trained are read for it, and again to fuse.
        prompts += sum(len(self._prompts(c)) for c in problem.erase) * (1 + ("fuse" in self.stages))
        drawn = 2 * (self.num_inference_steps or num_inference_steps)
        of_one = 1 if self.images_from else drawn  # what is read is encoded
        of_one += len(object_masks.LOG_SNRS) if self.masks == "attention" else 0
        predictions = concepts * self.num_images * of_one
        return Cost(prompts, predictions, concepts * self.max_train_steps, captions, products)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        groups = self._groups(model, problem)
        sums = Sums.of(groups)
        kept = self._kept(model, problem, run)
        matrix, factors = torch.eye(len(kept), dtype=torch.float64), {}
        if "refine" in self.stages:
            matrix = self.refine(sums, kept)
        if "suppress" in self.stages:
            factors = self.suppress(model, problem, matrix, run)
        if "fuse" in self.stages:
            matrix, factors = self.fuse(groups, sums, kept, matrix, factors)
        layers = [entry.layer for entry in model.text_entries()]
        averaged = factors and "fuse" not in self.stages and self.combine == "average"
        scale = 1 / len(factors) if averaged else 1.0
        return fusion.assemble_changes(
            layers, None if self.stages == ("suppress",) else matrix, factors, scale
        )

    def refine(self, sums: Sums, kept: Tensor) -> Tensor:
        """M, (d, d), float64: sends what is around a concept where it goes around its anchor.

        Args:
            sums: over the concepts' prompts.
            kept: the prior's sum, (d, d).
        """
        prior = self.refine_weight * kept
        ridge = floored(self.ridge, self.ridge_floor, sums.contexts)
        return right_factor(sums.cross, sums.contexts, prior, ridge)

    def suppress(
        self, model: Model, problem: Problem, matrix: Tensor, run: RunContext
    ) -> dict[str, Tensors]:
        """For each concept B and D of every layer: `LAYER.up` (out, rank), `LAYER.down` (rank, d).

        Args:
            model: the model as it was.
            problem: the concepts.
            matrix: M, on which the changes are laid.
            run: its seed, and where pieces of work are kept.
        """
        # Bound to plain data, so that it can run elsewhere, too.
        train = partial(self._train, model, problem, matrix, run.seed)
        return run.map_cached(
            train, [c.name for c in problem.erase], batch_size=self.batch_size, label="training"
        )

    def fuse(
        self,
        groups: Sequence[Group],
        sums: Sums,
        kept: Tensor,
        matrix: Tensor,
        factors: Mapping[str, Tensors],
    ) -> tuple[Tensor, dict[str, Tensors]]:
        """M₂, and the factors with D replaced by D G K: together they act on each concept alone.

        Args:
            groups: the concepts' prompts, of which those with factors are read.
            sums, kept: as in `refine`.
            matrix: M.
            factors: what `suppress` found.
        """
        return fusion.fuse(
            factors,
            _rows(groups),
            matrix=matrix,
            whole=sums.whole,
            prior=self.fuse_prior * kept,
            ridge=self.ridge,
            floor=SOLVABLE if self.ridge_floor else 0.0,
        )

    @property
    def refine_weight(self) -> float:
        """λ₁, for a mean per caption."""
        # Its scale s for COCO's sum is λ₁ / 616,767; s² for the sum is s² · 616,767 for the mean.
        return self.refine_prior**2 / COCO if self.refine_scale == "as-released" else self.refine_prior

    # What the stages stand on.

    def _prompts(self, concept: Concept) -> list[str]:
        """A concept's names in its templates, name after name."""
        templates = self.templates or TEMPLATES[concept.kind]
        return [template.format(name) for name in concept.names for template in templates]

    def _groups(self, model: Model, problem: Problem) -> list[Group]:
        """The concepts and their anchors, in words."""
        sorts: dict[tuple[str, str], list[Concept]] = {}
        for concept in problem.erase:
            sorts.setdefault((concept.kind, concept.anchor or ""), []).append(concept)
        groups = []
        for (kind, anchor), concepts in sorts.items():
            templates = self.templates or TEMPLATES[kind]
            goals = [template.format(anchor) if anchor else "" for template in templates]
            prompts = {concept.name: self._prompts(concept) for concept in concepts}
            model.require_window([*goals, *(p for some in prompts.values() for p in some)])
            groups.append(Group(model.encode, goals, prompts))
        return groups

    def _kept(self, model: Model, problem: Problem, run: RunContext) -> Tensor:
        """P + ω P_retained, (d, d): means of Σ_positions e eᵀ over captions and retained prompts."""
        return fusion.retained_gram(
            model,
            problem,
            run,
            captions_from=self.captions,
            weighs=self.refine_prior > 0 or self.fuse_prior > 0,
            domain_weight=self.domain_weight,
        )

    def _train(
        self, model: Model, problem: Problem, matrix: Tensor, seed: int, names: Sequence[str]
    ) -> dict[str, Tensors]:
        """`suppress` for the concepts of these names."""
        run = RunContext(seed)
        concepts = [concept for concept in problem.erase if concept.name in names]
        if self.lesson == "trajectory":
            return self._train_on_trajectories(model, concepts, matrix, run)
        return self.train(model, [self._lesson(model, c, run) for c in concepts], matrix, run)

    def _train_on_trajectories(
        self, model: Model, concepts: Sequence[Concept], matrix: Tensor, run: RunContext
    ) -> dict[str, Tensors]:
        """`suppress` with ANT's objective, on trajectories of the original."""
        subjects = [
            TrainingConcept(c.name, model.encode(self._prompts(c)), run.generator("training", c.name))
            for c in concepts
        ]
        layers = layers_of(model, "text")
        course = TrajectoryConfig(
            # ANT's weights for identities and styles; it turns at step 40 of 50.
            Objective(preserve=0.4, unconditional_late=0.5, unconditional_early=0.2),
            turn=on_latents(-3.18, self.focal_side, model.latents_side),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=model.guidance_scale,
        )
        return train_factors(
            Steering(model, course),
            subjects,
            layers,
            run,
            rank=self.rank,
            alpha=self.rank,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            kept=self.num_images,
            on=[Right(layers, matrix)] if "refine" in self.stages else [],
        )

    def train(
        self, model: Model, lessons: Sequence[Lesson], matrix: Tensor, run: RunContext
    ) -> dict[str, Tensors]:
        """`suppress` for some concepts in one batch, once what they are trained on is there."""
        layers = tuple(entry.layer for entry in model.text_entries())
        modules = [find_layer(model.pipe, layer) for layer in layers]
        generators = [run.generator("factors", lesson.concept) for lesson in lessons]
        ups, downs = first_factors(modules, self.rank, generators)
        refined = [Right(layers, matrix)] if "refine" in self.stages else []
        chances = self._chances(model)

        def losses(_: int) -> Tensor:
            return self._attention(model, reader, [lesson.sample(chances) for lesson in lessons])

        # Nothing after the last cross-attention is needed, but checkpointed parts cannot be left early.
        whole = model.network.is_gradient_checkpointing
        with (
            frozen(model.parameters()),
            model.using(refined),
            each_its_own(modules, ups, downs),
            AttentionReader(model.cross_attentions(), whole=whole) as reader,
        ):
            minimise(
                [*ups, *downs],
                losses,
                max_train_steps=self.max_train_steps,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                max_grad_norm=self.max_grad_norm,
                names=[lesson.concept for lesson in lessons],
            )
        return {
            lesson.concept: {
                f"{layer}.{part}": tensor[b].cpu()
                for part, tensors in (("up", ups), ("down", downs))
                for layer, tensor in zip(layers, tensors, strict=True)
            }
            for b, lesson in enumerate(lessons)
        }

    def _lesson(self, model: Model, concept: Concept, run: RunContext) -> Lesson:
        """A concept's prompts, images and masks: found once, used at every step."""
        prompts, templates = self._prompts(concept), self.templates or TEMPLATES[concept.kind]
        text = model.encode(prompts)
        sides = [template.split("{}") for template in templates] * len(concept.names)
        before, after = (
            [model.count_tokens(side.strip()) for side in x] for x in zip(*sides, strict=True)
        )
        phrase = phrase_positions(before, after, text.content_mask)
        place = torch.arange(phrase.shape[1], device=phrase.device)
        ending = place > text.content_mask.sum(1, keepdim=True)

        if self.images_from:
            shown = reference_images.read(model, concept.name, prompts[0], self.images_from)
        else:
            steps = self.num_inference_steps or None
            shown = reference_images.drawn(model, concept.name, prompts[0], self.num_images, run, steps)
        source = "none" if concept.kind == "style" else self.masks
        mask = object_masks.find(source, model, shown, (phrase | ending)[:1], run)
        return Lesson(
            concept.name,
            text,
            phrase | ending if self.end_tokens else phrase,
            shown.latents,
            _resized(mask.to(shown.latents), shown.latents.shape[-2:]),
            run.generator("training", concept.name),
        )

    def _attention(self, model: Model, reader: AttentionReader, samples: Sequence[Sample]) -> Tensor:
        """The loss of each sample, (n,): how much attention its tokens get inside its mask."""
        latents, noise, mask, tokens = (
            torch.stack([getattr(sample, name) for sample in samples])
            for name in ("latents", "noise", "mask", "tokens")
        )
        t = torch.tensor([sample.t for sample in samples], device=latents.device)
        noisy = model.add_noise(latents, noise, t)
        text = Text.joined([sample.text for sample in samples])

        def inside(attention: Tensor) -> Tensor:
            size = grid(attention.shape[2], *latents.shape[-2:])
            return energy(attention, tokens, _resized(mask, size).flatten(1))

        parts = torch.stack(reader.read(inside, lambda: model.predict(noisy, t, text)))
        # A root has no slope at 0, where a small mask misses a whole layer.
        return (parts.clamp_min(1e-30).sqrt() if self.norm == "joint" else parts).sum(0)

    def _chances(self, model: Model) -> Tensor:
        """How likely each time is: (T,), summing to 1."""
        log_snr = model.log_snr()
        if not self.focal:
            return torch.full_like(log_snr, 1 / len(log_snr))
        high, low = (
            on_latents(level, self.focal_side, model.latents_side)
            for level in (self.focal_high, self.focal_low)
        )
        return focal(log_snr, high, low, self.focal_slope)


def focal(log_snr: Tensor, high: float, low: float, slope: float) -> Tensor:
    """The chance of each time, ξ(λ) · |dλ/dt| for its log-SNR λ: (T,), summing to 1.

        ξ(λ) ∝ σ(slope (λ − low)) − σ(slope (λ − high))

    The paper's ξ(t) ∝ σ(γ(t − t₁)) − σ(γ(t − t₂)), said in noise instead of in time: in its window, the
    log-SNR of Stable Diffusion falls almost evenly, by 0.0072 a time. The width |dλ/dt| makes it the
    same distribution of noise on every schedule.

    Source: MACE (Lu et al., CVPR 2024, arXiv 2403.06135), eq. 5.
    """
    level = log_snr.clamp(-50, 50)
    (width,) = torch.gradient(level)
    chances = (slope * (level - low)).sigmoid() - (slope * (level - high)).sigmoid()
    chances = chances * width.abs()
    return chances / chances.sum()


def _align(text: Text, goal: Text, moved: Tensor) -> Tensor:
    """Add each token of a concept's prompts to `moved`, where it should go among the rows of `goal`.

    Returns:
        The tokens that have no place to go: the phrases and surplus padding, (n, width).
    """
    ids, goal_ids, alone = text.ids.cpu(), goal.ids.cpu(), []
    for row, embeddings in enumerate(text.embeddings.cpu()):
        there = row % len(goal)
        for (own, end), (_, goal_end) in zip(text.segments(row), goal.segments(there), strict=True):
            e, place = embeddings[own], moved[there, own]
            m = match(ids[row, own], goal_ids[there, own], (end - own.start, goal_end - own.start))
            place[: m.head] += e[: m.head]
            place[m.second : m.second + m.tail] += e[m.first : m.first + m.tail]
            alone += [e[positions] for positions in m.alone]
    return torch.cat(alone)


def _rows(groups: Sequence[Group]) -> LazyTensors:
    """For each concept all its tokens, (n, width)."""
    of = {name: group for group in groups for name in group.erased}
    return LazyTensors(
        of, lambda name: of[name].read(of[name].erased[name]).embeddings.flatten(0, 1).cpu()
    )


def _resized(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (n, h, w) in another size, each pixel the nearest one's."""
    return interpolate(mask[:, None], tuple(size), mode="nearest-exact")[:, 0]
