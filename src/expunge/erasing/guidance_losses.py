"""The losses that turn a model's trajectories away from a concept, and the points they are taken at.

The equation stands in `ops.trajectory`; this is where its points come from. The early and the late point
of one training step lie on one denoising run. The network in training draws new ones at each step, and
the original's predictions come from the same network with its changes taken off. Or the original draws
whole trajectories once, and they are stored with all that it predicts along them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError
from expunge.erasing.trajectories import (
    LatentPoints,
    StoredTrajectories,
    TrainingConcept,
    TrajectoryConfig,
    TrajectorySample,
)
from expunge.model import Model
from expunge.ops.trajectory import Asked, Objective, Predictions, Side
from expunge.runtime.schedulers import is_flow_matching
from expunge.text import Text


class Steering:
    """A model's trajectories with a step t' where guidance turns: their points, predictions and losses.

    Args:
        model: the network; drawing and training share it.
        config: how its trajectories are drawn, and where guidance turns.

    Raises:
        ExpungeError: the model cannot use the scheduler; t' lies outside the model's schedule; there
            are too few steps for a late and an early one; or early points are asked for where guidance
            is always reversed.
    """

    model: Model
    config: TrajectoryConfig
    objective: Objective

    def __init__(self, model: Model, config: TrajectoryConfig) -> None:
        scheduler = config.scheduler
        if scheduler == "auto":
            scheduler = "" if is_flow_matching(model.pipe.scheduler) else "DDIM"
        model = model.with_scheduler(scheduler)
        self.model, self.config, self.objective = model, config, config.objective
        self.timesteps: tuple[int, ...] = model.timesteps(config.num_inference_steps or None)
        self.scale: Tensor = model.noise_scale()
        self.empty: Text = model.unconditional(1)
        # As a log-SNR t' means the same noise on every schedule; a step number would not.
        level = model.log_snr()
        # Schedules that end without noise or signal have infinite ends.
        low, high = (float(f(level[level.isfinite()])) for f in (torch.min, torch.max))
        every = range(len(self.timesteps))
        self.late: tuple[int, ...] = tuple(every)
        self.early: tuple[int, ...] = ()
        if config.reverse == "always":
            if self.objective.meets_early:
                raise ExpungeError(
                    "where guidance is always reversed there are no early points: set preserve and"
                    " unconditional_early to 0"
                )
            return
        if not low < config.turn < high:
            raise ExpungeError(
                f"turn is t' as a log-SNR, on this model's schedule between {low:.2f} and {high:.2f},"
                f" not {config.turn:g}"
            )
        self.late = tuple(i for i in every if level[self.timesteps[i]] >= config.turn)
        self.early = tuple(i for i in every if level[self.timesteps[i]] < config.turn)
        if not (self.late and self.early):
            side = "at or after" if self.early else "before"
            raise ExpungeError(
                f"none of {len(self.timesteps)} steps lies {side} t' (turn {config.turn:g}): take more"
                " trajectory_steps"
            )

    @property
    def title(self) -> str:
        """Say where guidance turns, as a label for progress; steps count from the first down to 1."""
        n, where = len(self.timesteps), self.config.reverse
        if where == "always":
            return "steering, reversed at all steps"
        words = "from step {} of {} on" if where == "late" else "until step {} of {}"
        return f"steering, reversed {words.format(n - self.late[0], n)}"

    def unreversed(self) -> Steering:
        """Make the steering whose targets are the original's own predictions, at every step.

        It trains a network to predict for some prompts what it always did.
        """
        # With η = −1 the target ε₀(∅) − η δ₀ is ε₀(c).
        objective = Objective(-1.0, error=self.objective.error)
        config = dataclasses.replace(self.config, objective=objective, reverse="always")
        return Steering(self.model, config)

    # Points.

    @torch.no_grad()
    def draw_points(self, subjects: Sequence[TrainingConcept]) -> TrajectorySample:
        """Draw a trajectory of each concept with the network as it stands, and take two points of it."""
        # Each concept draws from its own generator, so that its numbers do not depend on the batch.
        rows = [self._below(s, len(s.text)) for s in subjects]
        seeds = [self._below(s, 2**31) for s in subjects]
        places = [self._places(s) for s in subjects]
        text = Text.joined([s.text[[row]] for s, row in zip(subjects, rows, strict=True)])
        anchor = [self._anchor(s)[[row]] for s, row in zip(subjects, rows, strict=True)]
        # One denoising run passes through the points of all concepts.
        at = sorted({step for both in places for step in both})
        passed = dict(zip(at, self._run(text, seeds, at), strict=True))
        late, early = (
            LatentPoints(
                torch.stack([passed[step][i] for i, step in enumerate(steps)]),
                self._timesteps(steps, text),
            )
            for steps in zip(*places, strict=True)
        )
        met = early if self.objective.meets_early else None
        return TrajectorySample(text, late, met, Text.joined(anchor))

    @torch.no_grad()
    def draw_points_along(self, subject: TrainingConcept, n: int) -> TrajectorySample:
        """Draw a trajectory of a concept with the network as it stands, and take n pairs of points."""
        row = self._below(subject, len(subject.text))
        text, anchor = subject.text[[row]], self._anchor(subject)[[row]]
        seed = self._below(subject, 2**31)
        places = [self._places(subject) for _ in range(n)]
        at = sorted({step for both in places for step in both})
        passed = dict(zip(at, self._run(text, [seed], at), strict=True))
        late, early = (
            LatentPoints(
                torch.cat([passed[step] for step in steps]),
                self._timesteps(steps, text),
            )
            for steps in zip(*places, strict=True)
        )
        met = early if self.objective.meets_early else None
        return TrajectorySample(text[[0] * n], late, met, anchor[[0] * n])

    @torch.no_grad()
    def store_trajectories(self, subject: TrainingConcept, n: int) -> StoredTrajectories:
        """Draw n trajectories of a concept with the network as it stands, and predict along them."""
        rows = [self._below(subject, len(subject.text)) for _ in range(n)]
        text, anchor = subject.text[rows], self._anchor(subject)[rows]
        seeds = [self._below(subject, 2**31) for _ in range(n)]
        latents = torch.stack(self._run(text, seeds, range(len(self.timesteps))))
        # All predictions of a step in one batch: a call costs more than its rows.
        asked = [text, self.empty[[0] * n]]
        if self.objective.anchored:
            asked.append(anchor)
        joined = Text.joined(asked)
        predicted = [
            self.model.predict(x.repeat(len(asked), 1, 1, 1), t, joined)
            for x, t in zip(latents, self.timesteps, strict=True)
        ]
        return StoredTrajectories(text, anchor, latents, *torch.stack(predicted).chunk(len(asked), 1))

    def pick_points(
        self, subjects: Sequence[TrainingConcept], stored: Sequence[StoredTrajectories]
    ) -> tuple[TrajectorySample, Predictions]:
        """Take two points of a stored trajectory of each concept, with the original's predictions."""
        rows = [self._below(s, len(k.text)) for s, k in zip(subjects, stored, strict=True)]
        places = [self._places(s) for s in subjects]
        text, anchor = (
            Text.joined([getattr(k, what)[[row]] for k, row in zip(stored, rows, strict=True)])
            for what in ("text", "anchor")
        )
        late, early = zip(*places, strict=True)

        def at(steps: Sequence[int], what: str) -> Tensor:
            chosen = zip(stored, steps, rows, strict=True)
            return torch.stack([getattr(k, what)[step, row] for k, step, row in chosen])

        points = [
            LatentPoints(at(steps, "latents"), self._timesteps(steps, text)) for steps in (late, early)
        ]
        original: Predictions = {
            "late": at(late, "prompted"),
            "late empty": at(late, "empty"),
            **({"late anchor": at(late, "anchored")} if self.objective.anchored else {}),
            "early": at(early, "prompted"),
            "early empty": at(early, "empty"),
        }
        met = points[1] if self.objective.meets_early else None
        return TrajectorySample(text, points[0], met, anchor), original

    def _anchor(self, subject: TrainingConcept) -> Text:
        """Return the anchor's prompts, one for each of the concept's: empty ones where it has none."""
        return subject.anchor or self.empty[[0] * len(subject.text)]

    def _run(self, text: Text, seeds: Sequence[int], at: Sequence[int]) -> list[Tensor]:
        passed = self.model.denoise_at(
            text,
            seeds,
            at=at,
            num_inference_steps=self.config.num_inference_steps or None,
            guidance_scale=self.config.guidance_scale,
        )
        return [latents for _, latents in passed]

    def _below(self, subject: TrainingConcept, n: int) -> int:
        return int(torch.randint(n, (), generator=subject.generator))

    def _places(self, subject: TrainingConcept) -> tuple[int, int]:
        """Draw a step at which guidance is reversed, and one at which it is not.

        The first is what the objective calls late, the second early, whichever side is reversed.
        """
        late = self.late[self._below(subject, len(self.late))]
        early = self.early[self._below(subject, len(self.early))] if self.early else late
        erased, other = (early, late) if self.config.reverse == "early" else (late, early)
        return erased, other if self.objective.meets_early else erased

    def _timesteps(self, steps: Sequence[int], text: Text) -> Tensor:
        return torch.tensor([self.timesteps[step] for step in steps], device=text.embeddings.device)

    # Predictions and losses.

    def predict(self, asked: Sequence[Asked], sample: TrajectorySample) -> Predictions:
        """Predict with the network as it stands, all in one batch."""
        points, empty = [sample.points(one) for one in asked], self.empty[[0] * len(sample.text)]
        of = {"empty": empty, "anchor": sample.anchor or empty}
        text = Text.joined([of.get(one.rpartition(" ")[2], sample.text) for one in asked])
        latents, t = (torch.cat([getattr(p, name) for p in points]) for name in ("latents", "t"))
        return dict(zip(asked, self.model.predict(latents, t, text).chunk(len(asked)), strict=True))

    @torch.no_grad()
    def predict_original(self, sample: TrajectorySample) -> Predictions:
        """Predict what the objective needs of the original.

        The caller removes the network's changes first.
        """
        return self.predict(self.objective.of_original, sample)

    def split_losses(
        self, sample: TrajectorySample, original: Predictions, micro_batch: int, group: int = 1
    ) -> Iterator[Tensor]:
        """Compute the losses in parts, so that few rows have gradients in memory at once.

        A part holds one of the two points of some of the sample's rows, in their order. The losses of a
        row's parts sum to its loss, and so do their gradients. Two things stay in one part: the
        predictions for the prompt and for the empty prompt at one point, and the rows of a group.

        Args:
            sample: (n,) trajectories.
            original: the original's predictions at its points.
            micro_batch: the most rows that the network predicts at once with gradients; 0 for all.
            group: how many neighbouring rows stay in one part.

        Returns:
            Of each part the losses of its rows.
        """
        n, sides = len(sample.text), self.objective.sides
        if not micro_batch or n * len(self.objective.of_student) <= micro_batch:
            yield self.compute_losses(sample, original)
            return
        for side in sides:
            rows = max(1, sum(asked.startswith(side) for asked in self.objective.of_student))
            size = max(1, micro_batch // (rows * group)) * group
            for start, part in zip(range(0, n, size), sample.split(size), strict=True):
                at = slice(start, min(start + size, n))
                yield self.compute_losses(part, {k: x[at] for k, x in original.items()}, (side,))

    def compute_losses(
        self,
        sample: TrajectorySample,
        original: Predictions | None = None,
        sides: Sequence[Side] = ("late", "early"),
    ) -> Tensor:
        """Compute the loss of each row, (n,), of the network as it stands.

        Args:
            sample: (n,) trajectories.
            original: the original's predictions at its points; if None, the network's own, detached:
                it is its own teacher, as it is before any training.
            sides: the points whose terms are wanted.
        """
        asked_of_student = [one for one in self.objective.of_student if one.startswith(tuple(sides))]
        # In one batch, since the graph of the network is built once for all terms.
        student = self.predict(asked_of_student, sample)
        if original is None:
            missing = [asked for asked in self.objective.of_original if asked not in student]
            with torch.no_grad():
                rest = self.predict(missing, sample) if missing else {}
            original = {**rest, **{asked: found.detach() for asked, found in student.items()}}
        # Losses of half-precision models are summed in float32.
        wide = torch.promote_types(sample.late.latents.dtype, torch.float32)
        late, early = (
            self.scale[points.t.cpu()].to(points.latents.device, wide)
            for points in (sample.late, sample.early or sample.late)
        )
        return self.objective.loss(student, original, late, early, sides)
