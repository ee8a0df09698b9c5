"""STEREO: find words that bring the concept back, round after round, then erase all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.guidance_training import train_weights
from expunge.erasing.in_place_training import measure_drift, train_in_place
from expunge.erasing.parameters import Part, select_parameters
from expunge.erasing.prompt_templates import assemble_anchor_prompts, require_place
from expunge.erasing.reference_images import draw_examples
from expunge.erasing.trajectories import TrainingConcept, TrajectoryConfig
from expunge.erasing.word_inversion import choose_word, learn_word
from expunge.method import Method
from expunge.model import Model
from expunge.ops.in_place import InPlace
from expunge.ops.noise_error import Loss, measure_error
from expunge.ops.trajectory import Objective
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class STEREO(Method):
    """Search thoroughly enough, robustly erase once: adversarial in two stages.

    Search, `rounds` times: train the network a little against the prompt that worked last (ESD's loss),
    then learn by textual inversion a word that brings the concept back from it. Then, once, from the
    original network, for the concept's prompt and those of all words found, c_0 … c_k:

        min ‖ε(z, c_i) − [ε₀(z, ∅) + η (ε₀(z, c_anchor) − ε₀(z, ∅)) − η Σ_j (ε₀(z, c_j) − ε₀(z, ∅))]‖²

    z lies on a trajectory that the network in training draws with c_i.

    The paper's anchors are prompts that a language model writes; here they are the concept's prompts
    with its anchor in its place (ours). The released code projects the guidance before it adds it up;
    here it is added as the equation says, or averaged over the words (`compose`), since parallel
    directions add up (ours). The paper knows no retain; `retain_weight` adds, at the same points, the
    distance from what the original predicts for retained prompts and the empty one (ours).

    The attack `inversion` is this method's own kind of attack, though with words, images and a target
    that training never sees.

    Cost: `rounds` times ESD's short training and an inversion, then ESD's training with as many more
    predictions a step as there are words. One denoiser in memory.

    Source: Srivatsan, Shamshad, Naseer, Patel, Nandakumar, CVPR 2025, arXiv 2408.16807.
    """

    citation: ClassVar[str] = (
        "Srivatsan, Shamshad, Naseer, Patel, Nandakumar: STEREO: A Two-Stage Framework for"
        " Adversarially Robust Concept Erasing from Text-to-Image Diffusion Models. CVPR 2025,"
        " arXiv 2408.16807."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    part: Part = "cross-attention"
    """What is trained: "cross-attention", for styles; "rest", all else, for objects and explicit
    content; "text", keys and values alone; or the whole denoiser."""
    rounds: int = bounded(2, at_least=0)
    """Words that are looked for, one after the other, for each concept; 0 erases the prompt alone."""
    search_steps: int = bounded(200, at_least=0)
    """Training steps against the last word, before the next is looked for."""
    search_rate: float = bounded(5e-6, above=0)
    """Adam's learning rate there."""
    inversion_steps: int = bounded(3000, at_least=0)
    """Training steps of each word."""
    inversion_rate: float = bounded(0.1, above=0)
    """Adam's learning rate of a word, as a share of the embedding's own size."""
    inversion_images: int = bounded(6, at_least=1)
    """Images of the concept that the words are learnt from."""
    inversion_batch: int = bounded(1, at_least=1)
    """Noisy images in a step of an inversion."""
    max_train_steps: int = bounded(200, at_least=0)
    """Training steps of the one erasure at the end."""
    learning_rate: float = bounded(2e-5, above=0)
    """Adam's learning rate there; larger erases more, and more of what is near."""
    negative_guidance: float = bounded(1.0, above=0)
    """η, how far predictions turn from the words, and to the anchor."""
    compose: Literal["mean", "sum"] = "mean"
    """Whether the directions of all words are averaged, or summed as in the equation."""
    retain_weight: float = bounded(0.0, at_least=0)
    """Weight of what the original predicts for retained prompts and the empty one, in the erasure at the
    end; 0 is the paper's."""
    trajectory_guidance: float = bounded(3.0, at_least=1)
    """Guidance of the trajectories."""
    trajectory_steps: int = bounded(50, at_least=0, at_most=1000)
    """Denoising steps of a trajectory; 0 for the model's own."""
    samples: int = bounded(1, at_least=1)
    """Trajectories in a training step."""
    loss: Loss = "squared"
    """How an error of a prediction counts: squared, as in the paper; or by the Hellinger distance, which
    is bounded."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts to erase a concept in, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)
        if not self.templates:
            raise ExpungeError("templates is empty: STEREO needs a prompt, such as {}")

    @property
    def reads_retain(self) -> bool:
        return self.retain_weight > 0

    @property
    def trajectory_config(self) -> TrajectoryConfig:
        """How trajectories are drawn, and the search's objective on them."""
        objective = Objective(self.negative_guidance, error=self.loss)
        steps, guidance = self.trajectory_steps, self.trajectory_guidance
        # Without a step to turn at: "always" does not read t', here 0.
        return TrajectoryConfig(objective, 0.0, "always", steps, guidance, "auto")

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        n = len(problem.erase)
        steps = self.trajectory_steps or num_inference_steps
        along = steps * (1 + (self.trajectory_guidance > 1)) // 2  # half the way on average
        searched = n * self.rounds * self.search_steps * self.samples
        erased = self.max_train_steps * self.samples
        learnt = n * self.rounds * self.inversion_steps * self.inversion_batch
        shown = n * bool(self.rounds) * self.inversion_images * 2 * num_inference_steps
        # The empty prompt and the anchor beside the words; where concepts differ, the most.
        composed = max(len(c.names) for c in problem.erase) + self.rounds + 2
        prompts = sum(len(c.names) + self.rounds + 1 for c in problem.erase) * len(self.templates)
        kept = bool(self.retain_weight)
        predicted = searched * (along + 2) + erased * (along + composed + kept) + shown
        return Cost(prompts, predicted, searched + learnt + erased * (1 + kept))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        groups = []
        for concept in problem.erase:
            model.require_window([t.format(name) for name in concept.names for t in self.templates])
            groups.append(self._search(model, concept, problem, run))
        anchors = [
            model.encode(assemble_anchor_prompts(concept, self.templates)) for concept in problem.erase
        ]
        return self._erase(model, groups, anchors, model.encode([*problem.retain, ""]), run)

    def _search(self, model: Model, concept: Concept, problem: Problem, run: RunContext) -> list[Text]:
        """Find words that bring a concept back from networks that were trained against it.

        Args:
            model: the original.
            concept: the concept.
            problem: as in `fit`.
            run: as in `fit`.

        Returns:
            The templates with each name of the concept and with each word found, a text each.
        """
        texts = [model.encode([t.format(name) for t in self.templates]) for name in concept.names]
        if not self.rounds:
            return texts
        word = choose_word(model, concept, problem.erase, self.templates)
        said = [t.format(word) for t in self.templates]
        prompt = self.templates[0].format(concept.name)
        shown = draw_examples(model, concept.name, prompt, self.inversion_images, run).latents
        changes: Changes = ()
        # The first round is against all names, each later one against the word found last.
        last = Text.joined(texts)
        for k in range(self.rounds):
            name = f"{concept.name} {k + 1}"
            # Trained from where the last round ended, which is also its teacher.
            with model.using(changes):
                found = train_weights(
                    Steering(model, self.trajectory_config),
                    TrainingConcept(name, last, run.generator("search", name)),
                    InPlace(select_parameters(model, self.part)),
                    run,
                    max_train_steps=self.search_steps,
                    learning_rate=self.search_rate,
                    samples=self.samples,
                    label=f"search {name}",
                )
            changes = found  # whole parameters: they hold what the rounds before made of them
            vectors = learn_word(
                model,
                changes,
                said,
                word,
                shown,
                run,
                run.generator("inversion", name),
                steps=self.inversion_steps,
                learning_rate=self.inversion_rate,
                batch_size=self.inversion_batch,
            )
            with torch.no_grad():
                last = model.encode_with(said, word, vectors)
            texts.append(last)
        return texts

    def _erase(
        self,
        model: Model,
        groups: Sequence[Sequence[Text]],
        anchors: Sequence[Text],
        kept: Text,
        run: RunContext,
    ) -> Changes:
        """Train the original against all words at once.

        Args:
            model: the original.
            groups: of each concept the texts of its names and words, each a row a template.
            anchors: of each concept the anchor's prompts, a row a template.
            kept: the prompts that stay.
            run: as in `fit`.
        """
        steering = Steering(model, self.trajectory_config)
        generator = run.generator("training")
        trained = InPlace(select_parameters(model, self.part))

        def losses() -> Iterator[Tensor]:
            def below(n: int) -> int:
                return int(torch.randint(n, (), generator=generator))

            for _ in range(self.samples):
                # The concept first, then its word: a concept of many names is met no more often.
                place, way = below(len(groups)), [below(len(self.templates))]
                words, anchor = [text[way] for text in groups[place]], anchors[place][way]
                chosen = words[below(len(words))]
                subject = TrainingConcept("stereo", chosen, generator, anchor)
                point = steering.draw_points([subject]).late
                # Before the student's graph is built: `off` writes into the weights that it needs.
                with trained.off(), torch.no_grad():
                    goal = self.compose_target(model, point.latents, point.t, words, anchor)
                wide = torch.promote_types(goal.dtype, torch.float32)
                scale = steering.scale[point.t.cpu()].to(goal.device, wide)
                found = model.predict(point.latents, point.t, chosen)
                # One sample at a time, so that one graph is in memory.
                yield measure_error(found, goal, scale, self.loss).sum() / self.samples
                if self.retain_weight:
                    stay = kept[[below(len(kept))]]
                    drift = measure_drift(model, trained, point.latents, point.t, stay, scale, self.loss)
                    yield self.retain_weight * drift.sum() / self.samples

        return train_in_place(
            model,
            trained,
            losses,
            run,
            generator,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            title="erasing all words at once",
        )

    def compose_target(
        self, model: Model, latents: Tensor, t: Tensor, words: Sequence[Text], anchor: Text
    ) -> Tensor:
        """Compose what is to be predicted for any of the words, of the network as it stands.

        Args:
            model: the network.
            latents: z, (1, c, h, w).
            t: its timestep, (1,).
            words: c_0 … c_k, (1,) each.
            anchor: (1,), the anchor's prompt.

        Returns:
            (1, c, h, w).
        """
        asked = Text.joined([model.unconditional(1), anchor, *words])
        n = len(asked)
        # All in one batch: a call costs more than its rows.
        empty, toward, *away = model.predict(latents.repeat(n, 1, 1, 1), t.repeat(n), asked).split(1)
        pushed = torch.stack([one - empty for one in away])
        pushed = pushed.sum(0) if self.compose == "sum" else pushed.mean(0)
        return empty + self.negative_guidance * (toward - empty - pushed)
