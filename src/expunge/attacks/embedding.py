"""A bounded attack on the prompt's embedding, by gradients through the edited model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.attack import Attack
from expunge.base.fields import bounded
from expunge.edit import Edit
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.pgd import draw_in_ball
from expunge.ops.pgd import minimise_in_ball as attacked
from expunge.probe import Probe
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True)
class Embedding(Attack):
    """The perturbation of a prompt's tokens that brings the original's image back.

        min_δ Σ_t ‖ε_edit(z_t, t, c + δ) − ε₀(z_t, t, c)‖²,    ‖δ_token‖ ≤ radius · ‖c_token‖

    z_t are points of the trajectory on which the original model draws the same prompt and seed, so
    each image is attacked by itself. The attack goes through the edited model as it stands, with its
    gates and their gradients, and starts anew for each edit. Every token's perturbation has its own
    Euclidean ball; the unconditional text stays as it is.

    Cost: one drawing by the original, and restarts · steps · times passes forward and back, for each
    image.

    Source: the bound and the steps are those of Madry et al., ICLR 2018, arXiv 1706.06083; the
    objective that of RACE (Kim et al., 2024, arXiv 2405.16341), on a whole trajectory.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"radius": [0.05, 0.1, 0.2, 0.4], "steps": 10},
        "restarts": {"restarts": [1, 4, 8], "radius": 0.2, "steps": 40, "num_timesteps": 6},
    }
    renamed: ClassVar[Mapping[str, str]] = {
        "times": "num_timesteps",
        "batch": "batch_size",
    }

    radius: float = bounded(0.1, at_least=0)
    """The bound, as a share of each token's norm; 0 changes nothing."""
    steps: int = bounded(10, at_least=0)
    """Gradient steps; 0 changes nothing."""
    num_timesteps: int = bounded(3, at_least=1)
    """Points of the trajectory that the objective sums over."""
    restarts: int = bounded(1, at_least=1)
    """Times that each image is attacked, first from the prompt itself and then from random places
    within the bound; the one with the smallest objective counts."""
    batch_size: int = bounded(8, at_least=1)
    """Images attacked together; it changes nothing but speed and memory."""

    @property
    def changes_nothing(self) -> bool:
        return not (self.steps and self.radius)

    def run(self, model: Model, edit: Edit, probe: Probe, run: RunContext) -> Probe:
        """Return the probe with perturbed embeddings, found for each image by itself.

        Args:
            model: the original.
            edit: what is attacked.
            probe: what is drawn unattacked; its encoded text, if any, is where the attack starts.
            run: the seed of the restarts, and the progress.
        """
        if self.changes_nothing:
            return probe
        # The original's, which the edited model is to be brought back to.
        original = probe.text or model.encode(probe.prompts)
        # What is attacked are the embeddings that the edited denoiser reads.
        with model.using(edit):
            text = probe.text or model.encode(probe.prompts)
        found = []
        for start in range(0, len(probe), self.batch_size):
            run.progress("attacking", start, len(probe))
            rows = list(range(start, min(start + self.batch_size, len(probe))))
            found.append(self._attacked(model, edit, original[rows], text[rows], probe, rows, run))
        run.progress("attacking", len(probe), len(probe))
        embeddings = torch.cat(found).to(text.embeddings)
        return dataclasses.replace(probe, text=dataclasses.replace(text, embeddings=embeddings))

    def objective(self, model: Model, text: Text, given: Tensor, points: list[Point]) -> Tensor:
        """Return Σ_t of the mean squared error for each row, (n,).

        Args:
            model: with the edit applied.
            text: the prompts as encoded; only their embeddings are replaced.
            given: (n, tokens, width), the embeddings to judge.
            points: of the original's trajectory, from `points`.
        """
        perturbed = dataclasses.replace(text, embeddings=given)
        errors = [
            (model.predict(z, t, perturbed) - goal).square().flatten(1).mean(1) for t, z, goal in points
        ]
        return torch.stack(errors).sum(0)

    def points(self, model: Model, text: Text, probe: Probe, rows: list[int]) -> list[Point]:
        """Return (t, z_t, ε₀) along the original's trajectories, evenly from the first noise on.

        Args:
            model: the original, without the edit.
            text: the prompts as encoded, a row an image.
            probe: the seeds and the sampler.
            rows: which of the probe's images.
        """
        seeds = [probe.seeds[i] for i in rows]
        steps = probe.num_inference_steps or model.num_inference_steps
        # The middles of equal parts of the trajectory, so that few points still cover all of it.
        chosen = {round((i + 0.5) * steps / self.num_timesteps - 0.5) for i in range(self.num_timesteps)}
        trajectory = model.trajectory(
            text, seeds, num_inference_steps=steps, guidance_scale=probe.guidance_scale
        )
        found = []
        with torch.no_grad():
            for step, (t, z) in enumerate(trajectory):
                if step in chosen:
                    found.append((t, z, model.predict(z, t, text)))
                if step == max(chosen):
                    break
        return found

    def _attacked(
        self,
        model: Model,
        edit: Edit,
        original: Text,
        text: Text,
        probe: Probe,
        rows: list[int],
        run: RunContext,
    ) -> Tensor:
        points = self.points(model, original, probe, rows)
        # The points are the original's, so they are found before the edit is applied.
        best, least = text.embeddings, torch.full((len(rows),), torch.inf)
        names = [(probe.prompts[row], str(probe.seeds[row])) for row in rows]
        with frozen(model.parameters()), model.using(edit):
            for start in range(self.restarts):
                # Each image has generators of its own, so that batches change nothing.
                own = [run.generator("embedding", *name, str(start)) for name in names]
                found, values = attacked(
                    lambda given: self.objective(model, text, given, points),
                    text.embeddings,
                    self.radius,
                    self.steps,
                    draw_in_ball(text.embeddings, self.radius, own) if start else None,
                )
                # Rows that an earlier start has served better keep what it found.
                better = values.cpu() < least
                best = torch.where(better.to(best.device)[:, None, None], found, best)
                least = torch.where(better, values.cpu(), least)
        return best


Point = tuple[int, Tensor, Tensor]
"""(t, z_t, ε₀(z_t, t, c)): (n, c, h, w) each."""
