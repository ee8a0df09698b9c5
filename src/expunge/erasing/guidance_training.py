"""Steering a model's trajectories away from a concept: points on them, losses, and two ways to train.

The equation stands in `ops.trajectory`; this is where its points come from. An early and a late point
of an iteration come from one denoising run. Drawn by the network in training, they are new at each
iteration, and the original's predictions come from the same network with the changes taken off.
Drawn by the original, trajectories are drawn once and kept with all that it predicts along them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.changes import Change, Changes, Dense, Sparse, find_layer, iterate_layers
from expunge.model import Model
from expunge.ops.finetune import KEEP_EVERY, broke_off, diverged, frozen, minimise
from expunge.ops.in_place import InPlace
from expunge.ops.low_rank import each_its_own, first_factors
from expunge.ops.trajectory import Asked, Objective, Predictions
from expunge.ops.trajectory import Side as PointSide
from expunge.runtime.context import RunContext, Tensors
from expunge.runtime.schedulers import is_flow_matching
from expunge.text import Text

Part = Literal["denoiser", "cross-attention", "text", "rest"]
"""What is trained: the whole denoiser; the cross-attentions through which text enters, or of these only
the layers that read it; or all but the cross-attentions."""

Reverse = Literal["late", "early", "always"]
"""Where guidance is reversed: from t' on, as in the paper; until t'; or at all times."""


@dataclass(frozen=True)
class TrajectoryConfig:
    """How trajectories are drawn, and where they are met."""

    objective: Objective
    turn: float
    """t', as a log-SNR: steps with at least this are late."""
    reverse: Reverse = "late"
    num_inference_steps: int = 50
    """Denoising steps; 0 for the model's own."""
    guidance_scale: float = 3.0
    scheduler: str = ""
    """What draws, by diffusers' class: "" for the model's own, "auto" for DDIM where the model predicts
    noise and its own where it learns a flow."""


@dataclass(frozen=True, eq=False)
class TrainingConcept:
    """A concept in words, and the random numbers of its training."""

    name: str
    text: Text
    """The concept's prompts."""
    generator: torch.Generator
    anchor: Text | None = None
    """The same prompts with the anchor in the concept's place, row for row; None for empty ones."""


@dataclass(frozen=True, eq=False)
class Points:
    """Where some trajectories are met."""

    latents: Tensor
    """(n, c, h, w), as `predict` takes them."""
    t: Tensor
    """(n,), int64"""


@dataclass(frozen=True, eq=False)
class Sample:
    """What one iteration looks at."""

    text: Text
    """(n,) prompts."""
    late: Points
    early: Points | None
    """None where nothing is asked of early points."""
    anchor: Text | None = None
    """(n,) prompts of the anchor, or None for empty ones."""

    def points(self, asked: Asked) -> Points:
        """Where a prediction is asked for."""
        points = self.late if asked.startswith("late") else self.early
        if points is None:
            raise TypeError(f"early must be Points where {asked!r} is asked for, not None")
        return points

    def split(self, n: int) -> list[Sample]:
        """The same, at most n rows each."""
        parts = []
        for start in range(0, len(self.text), n):
            rows = list(range(len(self.text)))[start : start + n]
            points = [p and Points(p.latents[rows], p.t[rows]) for p in (self.late, self.early)]
            if points[0] is None:
                raise TypeError("late must be Points, not None")
            anchor = self.anchor and self.anchor[rows]
            parts.append(Sample(self.text[rows], points[0], points[1], anchor))
        return parts


@dataclass(frozen=True, eq=False)
class StoredTrajectories:
    """Trajectories of one subject, and what the original predicts along them."""

    text: Text
    """(trajectories,) prompts."""
    anchor: Text
    """(trajectories,) prompts of the anchor."""
    latents: Tensor
    """(steps, trajectories, c, h, w)"""
    prompted: Tensor
    """ε₀ for the prompts, as `latents`."""
    empty: Tensor
    """ε₀ for the empty prompt, as `latents`."""
    anchored: Tensor | None = None
    """ε₀ for the anchor's prompts, as `latents`, where the objective asks for it."""


class Steering:
    """A course on a model.

    Raises:
        ExpungeError: the model cannot use the scheduler; t' lies outside the model's schedule; there
            are too few steps for a late and an early one; or early points are asked for where guidance
            is always reversed.
    """

    def __init__(self, model: Model, course: TrajectoryConfig) -> None:
        scheduler = course.scheduler
        if scheduler == "auto":
            scheduler = "" if is_flow_matching(model.pipe.scheduler) else "DDIM"
        model = model.with_scheduler(scheduler)
        self.model, self.course, self.objective = model, course, course.objective
        self.timesteps = model.timesteps(course.num_inference_steps or None)
        self.scale = model.noise_scale()
        self.empty = model.unconditional(1)
        level = model.log_snr()
        low, high = (float(f(level[level.isfinite()])) for f in (torch.min, torch.max))
        every = range(len(self.timesteps))
        self.late: tuple[int, ...] = tuple(every)
        self.early: tuple[int, ...] = ()
        if course.reverse == "always":
            if self.objective.meets_early:
                raise ExpungeError(
                    "where guidance is always reversed there are no early points: set preserve and"
                    " unconditional_early to 0"
                )
            return
        if not low < course.turn < high:
            raise ExpungeError(
                f"turn is t' as a log-SNR, on this model's schedule between {low:.2f} and {high:.2f},"
                f" not {course.turn:g}"
            )
        self.late = tuple(i for i in every if level[self.timesteps[i]] >= course.turn)
        self.early = tuple(i for i in every if level[self.timesteps[i]] < course.turn)
        if not (self.late and self.early):
            side = "at or after" if self.early else "before"
            raise ExpungeError(
                f"none of {len(self.timesteps)} steps lies {side} t' (turn {course.turn:g}): take more"
                " trajectory_steps"
            )

    @property
    def title(self) -> str:
        """Where guidance turns, in words, with steps counted from the first down to 1."""
        n, where = len(self.timesteps), self.course.reverse
        if where == "always":
            return "steering, reversed at all steps"
        words = "from step {} of {} on" if where == "late" else "until step {} of {}"
        return f"steering, reversed {words.format(n - self.late[0], n)}"

    def staying(self) -> Steering:
        """The course on which every prediction stays as it is: δ₀ is not reversed, at no step."""
        course = dataclasses.replace(self.course, objective=Objective(-1.0), reverse="always")
        return Steering(self.model, course)

    # Points.

    @torch.no_grad()
    def draw(self, subjects: Sequence[TrainingConcept]) -> Sample:
        """New points of one trajectory of each subject, drawn by the network as it stands."""
        rows = [self._below(s, len(s.text)) for s in subjects]
        seeds = [self._below(s, 2**31) for s in subjects]
        places = [self._places(s) for s in subjects]
        text = Text.joined([s.text[[row]] for s, row in zip(subjects, rows, strict=True)])
        anchor = [self._anchor(s)[[row]] for s, row in zip(subjects, rows, strict=True)]
        at = sorted({step for both in places for step in both})
        passed = dict(zip(at, self._run(text, seeds, at), strict=True))
        late, early = (
            Points(
                torch.stack([passed[step][i] for i, step in enumerate(steps)]),
                self._timesteps(steps, text),
            )
            for steps in zip(*places, strict=True)
        )
        met = early if self.objective.meets_early else None
        return Sample(text, late, met, Text.joined(anchor))

    @torch.no_grad()
    def walk(self, subject: TrainingConcept, n: int) -> Sample:
        """n times two points of one trajectory of a subject, drawn by the network as it stands."""
        row = self._below(subject, len(subject.text))
        text, anchor = subject.text[[row]], self._anchor(subject)[[row]]
        seed = self._below(subject, 2**31)
        places = [self._places(subject) for _ in range(n)]
        at = sorted({step for both in places for step in both})
        passed = dict(zip(at, self._run(text, [seed], at), strict=True))
        late, early = (
            Points(
                torch.cat([passed[step] for step in steps]),
                self._timesteps(steps, text),
            )
            for steps in zip(*places, strict=True)
        )
        met = early if self.objective.meets_early else None
        return Sample(text[[0] * n], late, met, anchor[[0] * n])

    @torch.no_grad()
    def keep(self, subject: TrainingConcept, n: int) -> StoredTrajectories:
        """Whole trajectories of a subject, drawn by the network as it stands, and its predictions."""
        rows = [self._below(subject, len(subject.text)) for _ in range(n)]
        text, anchor = subject.text[rows], self._anchor(subject)[rows]
        seeds = [self._below(subject, 2**31) for _ in range(n)]
        latents = torch.stack(self._run(text, seeds, range(len(self.timesteps))))
        asked = [text, self.empty[[0] * n]]
        if self.objective.anchored:
            asked.append(anchor)
        joined = Text.joined(asked)
        predicted = [
            self.model.predict(x.repeat(len(asked), 1, 1, 1), t, joined)
            for x, t in zip(latents, self.timesteps, strict=True)
        ]
        return StoredTrajectories(text, anchor, latents, *torch.stack(predicted).chunk(len(asked), 1))

    def pick(
        self, subjects: Sequence[TrainingConcept], kept: Sequence[StoredTrajectories]
    ) -> tuple[Sample, Predictions]:
        """Points of one kept trajectory of each subject, and the original's predictions there."""
        rows = [self._below(s, len(k.text)) for s, k in zip(subjects, kept, strict=True)]
        places = [self._places(s) for s in subjects]
        text, anchor = (
            Text.joined([getattr(k, what)[[row]] for k, row in zip(kept, rows, strict=True)])
            for what in ("text", "anchor")
        )
        late, early = zip(*places, strict=True)

        def at(steps: Sequence[int], what: str) -> Tensor:
            chosen = zip(kept, steps, rows, strict=True)
            return torch.stack([getattr(k, what)[step, row] for k, step, row in chosen])

        points = [Points(at(steps, "latents"), self._timesteps(steps, text)) for steps in (late, early)]
        original: Predictions = {
            "late": at(late, "prompted"),
            "late empty": at(late, "empty"),
            **({"late anchor": at(late, "anchored")} if self.objective.anchored else {}),
            "early": at(early, "prompted"),
            "early empty": at(early, "empty"),
        }
        met = points[1] if self.objective.meets_early else None
        return Sample(text, points[0], met, anchor), original

    def _anchor(self, subject: TrainingConcept) -> Text:
        """The anchor's prompts, one for each of the subject's."""
        return subject.anchor or self.empty[[0] * len(subject.text)]

    def _run(self, text: Text, seeds: Sequence[int], at: Sequence[int]) -> list[Tensor]:
        passed = self.model.denoise_at(
            text,
            seeds,
            at=at,
            num_inference_steps=self.course.num_inference_steps or None,
            guidance_scale=self.course.guidance_scale,
        )
        return [latents for _, latents in passed]

    def _below(self, subject: TrainingConcept, n: int) -> int:
        return int(torch.randint(n, (), generator=subject.generator))

    def _places(self, subject: TrainingConcept) -> tuple[int, int]:
        """A step at which guidance is reversed, and one at which it is not: our late and early."""
        late = self.late[self._below(subject, len(self.late))]
        early = self.early[self._below(subject, len(self.early))] if self.early else late
        erased, other = (early, late) if self.course.reverse == "early" else (late, early)
        return erased, other if self.objective.meets_early else erased

    def _timesteps(self, steps: Sequence[int], text: Text) -> Tensor:
        return torch.tensor([self.timesteps[step] for step in steps], device=text.embeddings.device)

    # Predictions and losses.

    def ask(self, asked: Sequence[Asked], sample: Sample) -> Predictions:
        """The network's predictions, all in one batch."""
        points, empty = [sample.points(one) for one in asked], self.empty[[0] * len(sample.text)]
        of = {"empty": empty, "anchor": sample.anchor or empty}
        text = Text.joined([of.get(one.rpartition(" ")[2], sample.text) for one in asked])
        latents, t = (torch.cat([getattr(p, name) for p in points]) for name in ("latents", "t"))
        return dict(zip(asked, self.model.predict(latents, t, text).chunk(len(asked)), strict=True))

    @torch.no_grad()
    def original(self, sample: Sample) -> Predictions:
        """What the objective needs of the original: the network, with its changes taken off."""
        return self.ask(self.objective.of_original, sample)

    def parts(
        self, sample: Sample, original: Predictions, most: int, together: int = 1
    ) -> Iterator[Tensor]:
        """The losses of rows, in parts that ask the network for few rows at a time.

        A part is one of the two points of some of the sample's rows, in their order; the losses of a
        row's parts sum to its loss, and so do their gradients. What cannot be parted is not: the
        prompt's and the empty prediction at one point, and rows that belong together.

        Args:
            sample: (n,) trajectories.
            original: the original's predictions there.
            most: how many rows the network is asked for at once, with gradients; 0 for all.
            together: rows come in groups of so many, which are not parted.

        Returns:
            of each part the losses of its rows.
        """
        n, sides = len(sample.text), self.objective.sides
        if not most or n * len(self.objective.of_student) <= most:
            yield self.losses(sample, original)
            return
        for side in sides:
            rows = max(1, sum(asked.startswith(side) for asked in self.objective.of_student))
            size = max(1, most // (rows * together)) * together
            for start, part in zip(range(0, n, size), sample.split(size), strict=True):
                at = slice(start, min(start + size, n))
                yield self.losses(part, {k: x[at] for k, x in original.items()}, (side,))

    def losses(
        self,
        sample: Sample,
        original: Predictions | None = None,
        sides: Sequence[PointSide] = ("late", "early"),
    ) -> Tensor:
        """The loss of each row, (n,), of the network as it stands; without `original`, it is that.

        Args:
            sample: (n,) trajectories.
            original: the original's predictions there.
            sides: the points whose terms are wanted.
        """
        asked_of_student = [one for one in self.objective.of_student if one.startswith(tuple(sides))]
        student = self.ask(asked_of_student, sample)
        if original is None:
            missing = [asked for asked in self.objective.of_original if asked not in student]
            with torch.no_grad():
                rest = self.ask(missing, sample) if missing else {}
            original = {**rest, **{asked: found.detach() for asked, found in student.items()}}
        wide = torch.promote_types(sample.late.latents.dtype, torch.float32)
        late, early = (
            self.scale[points.t.cpu()].to(points.latents.device, wide)
            for points in (sample.late, sample.early or sample.late)
        )
        return self.objective.loss(student, original, late, early, sides)


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A part of what weights are trained on."""

    steering: Steering
    subjects: Sequence[TrainingConcept]
    kept: Sequence[StoredTrajectories]
    """Of each subject, drawn by the original; none for new ones."""
    by_original: bool = False
    """Whether the original draws the new ones, not the network in training."""

    @staticmethod
    def of(
        steering: Steering, subject: TrainingConcept, samples: int, kept: int, by_original: bool
    ) -> LossTerm:
        """A number of trajectories of one subject at each step."""
        drawn = [steering.keep(subject, kept)] * samples if kept else []
        return LossTerm(steering, [subject] * samples, drawn, by_original)

    def meet(self, trained: InPlace) -> tuple[Sample, Predictions]:
        """Points to train on, and what the original predicts there."""
        if self.kept:
            return self.steering.pick(self.subjects, self.kept)
        if self.by_original:
            with trained.off():
                sample = self.steering.draw(self.subjects)
                return sample, self.steering.original(sample)
        sample = self.steering.draw(self.subjects)
        with trained.off():
            return sample, self.steering.original(sample)


def part_of(model: Model, part: Part) -> dict[str, nn.Parameter]:
    """The parameters of a part of the denoiser, by the names that changes use.

    Raises:
        ExpungeError: text does not enter this denoiser through attentions of its own.
    """
    entries = [entry.layer for entry in model.text_entries()]
    component = entries[0].partition(".")[0]
    found = {
        f"{component}.{layer}.{name}": parameter
        for layer, module in iterate_layers(getattr(model.pipe, component))
        for name, parameter in module.named_parameters(recurse=False)
    }
    if part == "denoiser":
        return found
    if part == "text":
        return {k: p for k, p in found.items() if k.rpartition(".")[0] in entries}
    crossings = tuple({f"{entry.rpartition('.')[0]}." for entry in entries})
    if f"{component}." in crossings:
        raise ExpungeError(
            f"this model has no cross-attentions apart from the rest: train the denoiser, not {part!r}"
        )
    return {k: p for k, p in found.items() if k.startswith(crossings) == (part == "cross-attention")}


BLOCKS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
"""The blocks of a U-Net in which the released code trains its changes, by diffusers' names."""

Layers = Literal["text", "blocks", "all"]
"""Where low-rank changes are trained: where text enters; in a U-Net's transformer, residual and sampler
blocks, so without its time embedding and its first and last convolution; or in all layers."""


def layers_of(model: Model, which: Layers) -> tuple[str, ...]:
    """The linear layers and convolutions of a part of the denoiser.

    Raises:
        ExpungeError: it has no such blocks.
    """
    entries = tuple(entry.layer for entry in model.text_entries())
    if which == "text":
        return entries
    component = entries[0].partition(".")[0]
    modules = dict(iterate_layers(getattr(model.pipe, component)))
    blocks = tuple(f"{k}." for k, m in modules.items() if type(m).__name__ in BLOCKS)
    if which == "blocks" and not blocks:
        raise ExpungeError(
            "this model's denoiser has no transformer, residual and sampler blocks of a U-Net: train"
            " layers 'text' or 'all'"
        )
    return tuple(
        f"{component}.{k}"
        for k, m in modules.items()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and (which == "all" or k.startswith(blocks))
    )


def train_weights(
    steering: Steering,
    subject: TrainingConcept,
    trained: InPlace,
    run: RunContext,
    *,
    max_train_steps: int,
    learning_rate: float,
    samples: int = 1,
    kept: int = 0,
    by_original: bool = False,
    micro_batch: int = 0,
    retained: TrainingConcept | None = None,
    retain_weight: float = 0.0,
) -> Changes:
    """Train weights in place with Adam, and take them off again: the changes, sparse or dense.

    The state is kept every few steps, so that a run that was killed goes on from there and ends the
    same. If the loss runs away, training stops, and the state last kept counts, with a warning.

    Args:
        steering: the course.
        subject: what is erased.
        trained: the weights.
        run: where the state is kept, and who is told.
        max_train_steps: training steps.
        learning_rate: Adam's learning rate.
        samples: trajectories a step.
        kept: how many trajectories the original draws once; 0 for new ones at each step.
        by_original: whether the original draws the new ones, too, and not the network in training.
        micro_batch: how many rows have gradients at once; 0 for all. It changes memory, not the edit.
        retained: prompts whose predictions stay as they are; their random numbers are the subject's.
        retain_weight: of that term.

    Raises:
        ExpungeError: the loss runs away before any state was kept.
    """
    optimiser = torch.optim.Adam(trained.values, lr=learning_rate, foreach=False)
    sides = [(1.0, LossTerm.of(steering, subject, samples, kept, by_original))]
    if retained is not None:
        other = LossTerm.of(steering.staying(), retained, samples, kept, by_original)
        sides.append((retain_weight, other))
    start, losses = _resumed(run, trained, optimiser, subject)
    good: list[Tensor] = []
    with frozen(steering.model.parameters()), trained:
        trained.write()
        run.progress(steering.title, start, max_train_steps)
        for step in range(start, max_train_steps):
            numbers = subject.generator.get_state()
            met = [(weight, side.steering, side.meet(trained)) for weight, side in sides]
            loss = 0.0
            gradients: list[Tensor] = []
            for weight, one, (sample, original) in met:
                with torch.enable_grad():
                    for part in one.parts(sample, original, micro_batch):
                        summed = weight * part.sum() / len(sample.text)
                        loss += float(summed.detach())
                        found = trained.gradients(summed)
                        for gradient, more in zip(gradients, found, strict=False):
                            gradient += more
                        gradients = gradients or found
                        del part, summed, found
            if diverged([*losses, loss]):
                _give_up(trained, good, step)
                break
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                good = [value.clone() for value in trained.values]
                run.save_checkpoint("training", _state(trained, optimiser, numbers, losses))
            losses.append(loss)
            for value, gradient in zip(trained.values, gradients, strict=True):
                value.grad = gradient
            optimiser.step()
            optimiser.zero_grad()
            trained.write()
            run.progress(steering.title, step + 1, max_train_steps)
    del optimiser, good  # the edit is made where they were
    return _changes(trained)


def _state(
    trained: InPlace, optimiser: torch.optim.Optimizer, numbers: Tensor, losses: Sequence[float]
) -> Tensors:
    """Everything that training goes on from; `numbers` is the state of its random numbers."""
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "numbers": numbers,
        **trained.state(optimiser),
    }


def _resumed(
    run: RunContext, trained: InPlace, optimiser: torch.optim.Optimizer, subject: TrainingConcept
) -> tuple[int, list[float]]:
    """Take up the state that was kept, if any: the steps done, and their losses."""
    state = run.checkpoint("training")
    if state is None:
        return 0, []
    trained.go_on(optimiser, state)
    subject.generator.set_state(state["numbers"])
    losses = state["losses"].tolist()
    return len(losses), losses


def _give_up(trained: InPlace, good: Sequence[Tensor], step: int) -> None:
    """Go back to the last good state, and say so."""
    broke_off(step, bool(good), "the edit", stacklevel=6)
    for value, before in zip(trained.values, good, strict=True):
        value.copy_(before)


def _changes(trained: InPlace) -> Changes:
    """A sparse change of each parameter, or a dense one where all of it was trained."""
    changes: list[Change] = []
    for name, place, difference in trained.differences():
        layer, _, parameter = name.rpartition(".")
        if place is None:
            original = trained.parameters[name].detach()
            value = (original.flatten() + difference).to(original.dtype).reshape(original.shape)
            changes.append(Dense((layer,), value, parameter=parameter))
        else:
            sparse = Sparse((layer,), place.int(), difference.half(), parameter=parameter)
            changes.append(sparse)
    return tuple(changes)


def train_factors(
    steering: Steering,
    subjects: Sequence[TrainingConcept],
    layers: Sequence[str],
    run: RunContext,
    *,
    rank: int,
    alpha: float,
    max_train_steps: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    samples: int = 1,
    kept: int = 0,
    by_original: bool = False,
    micro_batch: int = 0,
    on: Changes = (),
    through: Sequence[Tensor] = (),
) -> dict[str, Tensors]:
    """Train a low-rank change of each subject, all in one batch: B and D of every text entry.

    Args:
        steering: the course.
        subjects: the concepts; each ends where it would alone.
        layers: the layers that are trained.
        run: its seed.
        rank, alpha: of the changes (alpha/rank) B D.
        max_train_steps: training steps.
        rate, weight_decay: AdamW's.
        max_grad_norm: the largest norm of one subject's gradient.
        samples: trajectories a step, of each subject.
        kept, by_original, micro_batch: as in `train_weights`; the subjects' rows stay together.
        on: changes that lie beneath; the original is the model without them, and must be the drawer.
        through: for each subject A, (d, d), for tokens d wide: where text enters, B D A is trained, what
            a later step will make of B D, and B D is returned.
    """
    model, n = steering.model, len(subjects)
    modules = [find_layer(model.pipe, layer) for layer in layers]
    ups, downs = first_factors(modules, rank, [run.generator("factors", s.name) for s in subjects])
    entries = {entry.layer for entry in model.text_entries()}
    between = torch.stack(list(through)).to(downs[0]) if through else None
    laid = list(downs)
    everyone = list(subjects) * samples
    with frozen(model.parameters()):
        drawn = [steering.keep(subject, kept) for subject in subjects] * samples if kept else []
        with model.using(on), each_its_own(modules, ups, laid, alpha / rank) as switch:

            def lay() -> None:
                """What is between is part of each graph, and is let go with it."""
                if between is not None:
                    laid[:] = [
                        down @ between if layer in entries else down
                        for layer, down in zip(layers, downs, strict=True)
                    ]

            def met() -> tuple[Sample, Predictions]:
                if drawn:
                    return steering.pick(everyone, drawn)
                if by_original:
                    with switch.off():
                        sample = steering.draw(everyone)
                        return sample, steering.original(sample)
                sample = steering.draw(everyone)
                with switch.off():
                    return sample, steering.original(sample)

            def losses(_: int) -> Iterator[Tensor]:
                lay()
                for part in steering.parts(*met(), micro_batch, n):
                    yield part.unflatten(0, (-1, n)).sum(0) / samples
                    lay()

            minimise(
                [*ups, *downs],
                losses,
                max_train_steps=max_train_steps,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                names=[subject.name for subject in subjects],
            )
    factors: dict[str, Tensors] = {subject.name: {} for subject in subjects}
    for layer, up, down in zip(layers, ups, downs, strict=True):
        for b, subject in enumerate(subjects):
            if layer in entries:
                factors[subject.name][f"{layer}.up"] = alpha / rank * up[b].cpu()
                factors[subject.name][f"{layer}.down"] = down[b].cpu()
    return factors
