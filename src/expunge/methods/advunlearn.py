"""AdvUnlearn: train the text encoder against a prefix that brings the concept back; minutes to hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.prompt_templates import (
    assemble_prompts,
    assemble_retained_prompts,
    require_place,
)
from expunge.erasing.text_encoders import select_text_parameters, train_text_encoders
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.trajectory import Objective
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class AdvUnlearn(Method):
    """Adversarial unlearning: ESD's target, for the prompt with the worst prefix, in the text encoder.

        inner   p* = argmin_p ‖ε(z, p c) − ε₀(z, c)‖²,      p ← p − α sign(∇), a few steps
        outer   min_θ ‖ε(z, p* c) − [ε₀(z, ∅) − η (ε₀(z, c) − ε₀(z, ∅))]‖² + γ ‖ε(z, k) − ε₀(z, k)‖²

    on points z of trajectories that the model in training draws with the concept's prompt c. p is the
    embedding of one token before the prompt, which begins at a random word's in each step; k are prompts
    of what is retained. θ are the weights of the linear layers in the text encoders' blocks; ε₀ is the
    original. The denoiser stays.

    The paper retains the names of COCO's objects; here they are the problem's retained names and words
    of the tokenizer (ours). Ours, too: embeddings, biases and norms are not trained, so that the edit
    can leave as a LoRA.

    It reads no anchor. Swapping the text encoder undoes the edit.

    Cost: each step a denoising run to a point of it, then a forward and a backward pass of the denoiser
    for every attack step and for the two terms.

    Source: Zhang et al., NeurIPS 2024, arXiv 2405.15234, eq. 4 to 6.
    """

    citation: ClassVar[str] = (
        "Zhang, Chen, Jia, Zhang, Fan, Liu, Hong, Ding, Liu: Defensive Unlearning with Adversarial"
        " Training for Robust Concept Erasure in Diffusion Models. NeurIPS 2024, arXiv 2405.15234."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    attack_steps: int = bounded(30, at_least=0)
    """Sign steps of the inner attack; 0 trains on the prompt as it is, without the prefix."""
    attack_rate: float = bounded(1e-3, at_least=0)
    """α, how far each number of the prefix goes in a step."""
    warmup_steps: int = bounded(0, at_least=0)
    """The first steps train on the prompt as it is, before the attack begins."""
    negative_guidance: float = bounded(1.0, above=0)
    """η, how far past the empty prediction guidance is turned."""
    retain_scale: float = bounded(0.3, at_least=0)
    """γ, weight of what is retained."""
    retain_batch: int = bounded(5, at_least=1)
    """Retained prompts in a step."""
    num_retain_words: int = bounded(200, at_least=0)
    """How many of the tokenizer's own words are retained."""
    trajectory_guidance: float = bounded(3.0, at_least=1)
    """Guidance of the trajectories."""
    trajectory_steps: int = bounded(50, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    max_train_steps: int = bounded(1000, at_least=0)
    """Training steps."""
    learning_rate: float = bounded(1e-5, above=0)
    """Adam's learning rate."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts to erase a concept in, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def reads_anchor(self) -> bool:
        return False

    @property
    def reads_retain(self) -> bool:
        return self.retain_scale > 0

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        steps = self.trajectory_steps or num_inference_steps
        drawn = steps * (1 + (self.trajectory_guidance > 1)) // 2
        kept = self.retain_batch if self.retain_scale else 0
        prompts = sum(len(concept.names) for concept in problem.erase) * len(self.templates)
        n, trained = self.max_train_steps, self.attack_steps + 1 + kept
        return Cost(prompts + self.num_retain_words, n * (drawn + 2 + kept), n * trained)

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        prompts = [p for concept in problem.erase for p in assemble_prompts(concept, self.templates)]
        words = vocabulary_words(model, problem.erase)
        steering = Steering(
            model,
            TrajectoryConfig(
                Objective(self.negative_guidance),
                turn=0.0,  # always reversed: there is no turn
                reverse="always",
                num_inference_steps=self.trajectory_steps,
                guidance_scale=self.trajectory_guidance,
            ),
        )
        # The embedding takes the word's place wherever it stands, so no prompt may hold it.
        free = [word for word in words if word not in " ".join(prompts).lower().split()]
        word = _find_prefix(steering.model, free) if self.attack_steps else ""
        model.require_window([f"{word} {prompt}".strip() for prompt in prompts])
        kept = self._retained(model, problem, words, run) if self.retain_scale else []
        kept_text = model.encode(kept) if kept else None
        draw = run.generator("training")
        # The original's text, encoded before anything is trained.
        original = model.encode(prompts)

        def loss(step: int, trained: InPlace) -> Iterator[Tensor]:
            # Encoded anew at each step: trajectories are drawn with the text encoder as it stands.
            now = TrainingConcept(problem.erase[0].name, model.encode(prompts), draw)
            sample = steering.draw_points([now])
            z, t = sample.late.latents, sample.late.t
            row = prompts.index(sample.text.prompts[0])
            with torch.no_grad():
                # The denoiser is not trained: given the original's text it predicts as the original.
                named = steering.model.predict(z, t, original[[row]])
                empty = steering.model.predict(z, t, steering.empty)
            target = empty - self.negative_guidance * (named - empty)
            scale = float(steering.scale[int(t)])
            attack = word if step >= self.warmup_steps else ""
            attacked = self._attack(steering.model, prompts[row], attack, words, (z, t, named), draw)
            yield error(steering.model.predict(z, t, attacked()), target, scale)
            if kept_text is not None:
                rows = torch.randint(len(kept), (self.retain_batch,), generator=draw).tolist()
                many, at = z.expand(len(rows), *z.shape[1:]), t.expand(len(rows))
                with torch.no_grad():
                    before = steering.model.predict(many, at, kept_text[rows])
                text = steering.model.encode_in_training([kept[i] for i in rows])
                found = steering.model.predict(many, at, text)
                yield self.retain_scale * error(found, before, scale)

        return train_text_encoders(
            steering.model,
            select_text_parameters(model, "blocks"),
            run,
            loss,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            title="training the text encoder",
        )

    def _attack(
        self,
        model: Model,
        prompt: str,
        word: str,
        words: list[str],
        point: tuple[Tensor, Tensor, Tensor],
        draw: torch.Generator,
    ) -> _Prefixed:
        """Find the prefix that brings the concept back at a point.

        Args:
            model: in training.
            prompt: of the concept.
            word: the word whose place the prefix takes; "" for no attack.
            words: those that it may begin at.
            point: z, t and the original's prediction there for the prompt.
            draw: chooses the word.
        """
        if not word:
            return _Prefixed(model, prompt, "", [])
        z, t, goal = point
        # Where parts take turns on a device, running the encoders brings their weights back.
        model.encode([prompt])
        vectors: list[Tensor] = []
        while not vectors:
            first = words[int(torch.randint(len(words), (), generator=draw))]
            vectors = _vectors(model, first)
        for _ in range(self.attack_steps):
            moved = [vector.detach().requires_grad_() for vector in vectors]
            found = model.predict(z, t, _Prefixed(model, prompt, word, moved)())
            away = (found.float() - goal.float()).square().mean()
            # Asked for the prefix alone: the weights in training get no gradient from the attack.
            gradients = torch.autograd.grad(away, moved, allow_unused=True)
            vectors = [
                v.detach() - (0 if g is None else self.attack_rate * g.sign())
                for v, g in zip(moved, gradients, strict=True)
            ]
        return _Prefixed(model, prompt, word, [vector.detach() for vector in vectors])

    def _retained(self, model: Model, problem: Problem, words: list[str], run: RunContext) -> list[str]:
        """List the prompts whose predictions are kept."""
        order = torch.randperm(len(words), generator=run.generator("words")).tolist()
        names = [*problem.retain, *(words[i] for i in order[: self.num_retain_words])]
        if not names:
            raise ExpungeError(
                "AdvUnlearn's second term needs something to retain: name it, set"
                " num_retain_words above 0, or retain_scale to 0"
            )
        return assemble_retained_prompts(list(dict.fromkeys(names)))


@dataclass(frozen=True, eq=False)
class _Prefixed:
    """A prompt with a token before it whose embedding is given; encoded when called."""

    model: Model
    prompt: str
    word: str
    """The word whose place the embedding takes; "" for no prefix."""
    vectors: list[Tensor]
    """The embedding, (width,) in each text encoder."""

    def __call__(self) -> Text:
        if not self.word:
            return self.model.encode_in_training([self.prompt])
        return self.model.encode_with([f"{self.word} {self.prompt}"], self.word, self.vectors)


def error(found: Tensor, target: Tensor, scale: float) -> Tensor:
    """Compute the mean squared error of predictions, as one of noise: ().

    Args:
        found: (n, c, h, w).
        target: (n, c, h, w).
        scale: dε/dprediction at their time.
    """
    return (scale * (found.float() - target.float())).square().mean()


def _find_prefix(model: Model, words: list[str]) -> str:
    """Find a word that is one token in every text encoder; its place is the prefix's.

    Raises:
        ExpungeError: there is none.
    """
    for word in words:
        if _vectors(model, word):
            return word
    raise ExpungeError(
        "the text encoders have no word of one token in common, whose place a prefix could take: set"
        " attack_steps to 0"
    )


def _vectors(model: Model, word: str) -> list[Tensor]:
    """Return a word's embedding in each text encoder; none where it is more than one token somewhere."""
    try:
        return model.word_vectors(word)
    except ExpungeError:
        return []
