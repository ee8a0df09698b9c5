"""Two ways to train a model on guidance losses: its weights in place, or a low-rank change a concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.changes import Change, Changes, Dense, Sparse, find_layer
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.trajectories import StoredTrajectories, TrainingConcept, TrajectorySample
from expunge.ops.finetune import KEEP_EVERY, diverged, frozen, minimise, warn_diverged
from expunge.ops.in_place import InPlace
from expunge.ops.low_rank import init_factors, use_own_factors
from expunge.ops.trajectory import Predictions
from expunge.runtime.context import RunContext, Tensors


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One weighted term of what weights are trained on."""

    steering: Steering
    subjects: Sequence[TrainingConcept]
    stored: Sequence[StoredTrajectories]
    """Trajectories of each concept that the original has drawn; empty to draw new ones at each step."""
    drawn_by_original: bool = False
    """Whether the original draws the new ones, not the network in training."""

    @staticmethod
    def of(
        steering: Steering,
        subject: TrainingConcept,
        samples: int,
        n_stored: int,
        drawn_by_original: bool,
    ) -> LossTerm:
        """Make the term of one concept.

        Args:
            steering: the trajectories and their losses.
            subject: the concept.
            samples: trajectories at each step.
            n_stored: how many trajectories the original draws once; 0 for new ones at each step.
            drawn_by_original: whether the original draws the new ones.
        """
        stored = [steering.store_trajectories(subject, n_stored)] * samples if n_stored else []
        return LossTerm(steering, [subject] * samples, stored, drawn_by_original)

    def draw(self, trained: InPlace) -> tuple[TrajectorySample, Predictions]:
        """Draw points to train on, with the original's predictions there.

        Args:
            trained: the weights in training, which the original is without.
        """
        if self.stored:
            return self.steering.pick_points(self.subjects, self.stored)
        if self.drawn_by_original:
            with trained.off():
                sample = self.steering.draw_points(self.subjects)
                return sample, self.steering.predict_original(sample)
        sample = self.steering.draw_points(self.subjects)
        with trained.off():
            return sample, self.steering.predict_original(sample)


def train_weights(
    steering: Steering,
    subject: TrainingConcept,
    trained: InPlace,
    run: RunContext,
    *,
    max_train_steps: int,
    learning_rate: float,
    samples: int = 1,
    n_stored: int = 0,
    drawn_by_original: bool = False,
    micro_batch: int = 0,
    retained: TrainingConcept | None = None,
    retain_weight: float = 0.0,
) -> Changes:
    """Train weights in place with Adam; the network is the original again when it is done.

    The state is saved every few steps, so that a killed run resumes from there and ends with the same
    edit. If the loss diverges, training stops, and the state last saved counts, with a warning.

    Args:
        steering: the trajectories and their losses.
        subject: the concept to erase; several may count as one, with the prompts of all.
        trained: the weights.
        run: the folder of saved states, and the progress.
        max_train_steps: training steps.
        learning_rate: Adam's learning rate.
        samples: trajectories a step.
        n_stored: how many trajectories the original draws once; 0 for new ones at each step.
        drawn_by_original: whether the original draws the new ones, too, and not the network in training.
        micro_batch: how many rows have gradients at once; 0 for all. It changes memory, not the edit.
        retained: prompts whose predictions stay as they are; their random numbers are the subject's.
        retain_weight: of that term.

    Returns:
        A sparse change of each parameter, or a dense one where all of it was trained.

    Raises:
        ExpungeError: the loss diverges before any state was saved.
    """
    # One tensor at a time: with foreach, temporaries of all of them would be in memory at once.
    optimiser = torch.optim.Adam(trained.values, lr=learning_rate, foreach=False)
    terms = [(1.0, LossTerm.of(steering, subject, samples, n_stored, drawn_by_original))]
    if retained is not None:
        other = LossTerm.of(steering.unreversed(), retained, samples, n_stored, drawn_by_original)
        terms.append((retain_weight, other))
    start, losses = _resumed(run, trained, optimiser, subject)
    good: list[Tensor] = []
    with frozen(steering.model.parameters()), trained:
        trained.write()
        run.progress(steering.title, start, max_train_steps)
        for step in range(start, max_train_steps):
            random_state = subject.generator.get_state()
            # All terms draw first: `off` writes into the weights, which a gradient's graph must find as
            # they were.
            drawn = [(weight, term.steering, term.draw(trained)) for weight, term in terms]
            loss = 0.0
            gradients: list[Tensor] = []
            for weight, one, (sample, original) in drawn:
                with torch.enable_grad():
                    for part in one.split_losses(sample, original, micro_batch):
                        summed = weight * part.sum() / len(sample.text)
                        loss += float(summed.detach())
                        found = trained.gradients(summed)
                        # Added in place: a second list of gradients would take as much memory as
                        # the weights.
                        for gradient, more in zip(gradients, found, strict=False):
                            gradient += more
                        gradients = gradients or found
                        del part, summed, found
            if diverged([*losses, loss]):
                _give_up(trained, good, step)
                break
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                good = [value.clone() for value in trained.values]
                run.save_checkpoint("training", _state(trained, optimiser, random_state, losses))
            losses.append(loss)
            for value, gradient in zip(trained.values, gradients, strict=True):
                value.grad = gradient
            optimiser.step()
            optimiser.zero_grad()
            trained.write()
            run.progress(steering.title, step + 1, max_train_steps)
    del optimiser, good  # as large as the weights: the changes take their place in memory
    return assemble_weight_changes(trained)


def _state(
    trained: InPlace, optimiser: torch.optim.Optimizer, random_state: Tensor, losses: Sequence[float]
) -> Tensors:
    """Gather everything that training resumes from.

    Args:
        trained: the weights.
        optimiser: Adam.
        random_state: of the concept's generator, before the step.
        losses: of the steps so far.
    """
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "numbers": random_state,
        **trained.state(optimiser),
    }


def _resumed(
    run: RunContext, trained: InPlace, optimiser: torch.optim.Optimizer, subject: TrainingConcept
) -> tuple[int, list[float]]:
    """Resume from the state that was saved, if any.

    Args:
        run: where states are saved.
        trained: takes up the weights.
        optimiser: takes up its state.
        subject: takes up the state of its random numbers.

    Returns:
        How many steps were done, and their losses.
    """
    state = run.checkpoint("training")
    if state is None:
        return 0, []
    trained.resume(optimiser, state)
    subject.generator.set_state(state["numbers"])
    losses = state["losses"].tolist()
    return len(losses), losses


def _give_up(trained: InPlace, good: Sequence[Tensor], step: int) -> None:
    """Go back to the last sound state, and warn."""
    warn_diverged(step, bool(good), "the edit", stacklevel=6)
    for value, before in zip(trained.values, good, strict=True):
        value.copy_(before)


def assemble_weight_changes(trained: InPlace) -> Changes:
    """Make a sparse change of each parameter, or a dense one where all of it was trained."""
    changes: list[Change] = []
    for name, place, difference in trained.differences():
        layer, _, parameter = name.rpartition(".")
        if place is None:
            original = trained.parameters[name].detach()
            value = (original.flatten() + difference).to(original.dtype).reshape(original.shape)
            changes.append(Dense((layer,), value, parameter=parameter))
        else:
            # Differences in half precision: they are small, and lie on weights of any precision.
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
    n_stored: int = 0,
    drawn_by_original: bool = False,
    micro_batch: int = 0,
    base_changes: Changes = (),
    through: Sequence[Tensor] = (),
) -> dict[str, Tensors]:
    """Train a low-rank change of each concept, all in one batch.

    Each ends where it would end alone: it has factors, random numbers and a gradient norm of its own.

    Args:
        steering: the trajectories and their losses.
        subjects: the concepts.
        layers: the layers that are trained.
        run: its seed.
        rank: of the changes (alpha/rank) B D.
        alpha: their scale.
        max_train_steps: training steps.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: the largest norm of one concept's gradient.
        samples: trajectories a step, of each concept.
        n_stored: as in `train_weights`; the concepts' rows stay
            together.
        drawn_by_original: as in `train_weights`; the concepts' rows stay
            together.
        micro_batch: as in `train_weights`; the concepts' rows stay
            together.
        base_changes: changes that the low-rank ones are trained upon. The original is the model without
            them, and it must draw the trajectories.
        through: for each concept A, (d, d), for tokens d wide: where text enters, the network is given
            B D A, which a later step will make of B D; B D is returned.

    Returns:
        For each concept, B (out, rank) as `LAYER.up` and D (rank, d) as `LAYER.down` of every layer that
        text enters through; other layers are dropped.
    """
    model, n = steering.model, len(subjects)
    modules = [find_layer(model.pipe, layer) for layer in layers]
    ups, downs = init_factors(modules, rank, [run.generator("factors", s.name) for s in subjects])
    entries = {entry.layer for entry in model.text_entries()}
    between = torch.stack(list(through)).to(downs[0]) if through else None
    used = list(downs)
    everyone = list(subjects) * samples
    with frozen(model.parameters()):
        once = [steering.store_trajectories(s, n_stored) for s in subjects] if n_stored else []
        stored = once * samples
        with model.using(base_changes), use_own_factors(modules, ups, used, alpha / rank) as switch:

            def renew_used() -> None:
                """Compute D A anew: the product is part of each part's graph, and is freed with it."""
                if between is not None:
                    used[:] = [
                        down @ between if layer in entries else down
                        for layer, down in zip(layers, downs, strict=True)
                    ]

            def draw() -> tuple[TrajectorySample, Predictions]:
                if stored:
                    return steering.pick_points(everyone, stored)
                if drawn_by_original:
                    with switch.off():
                        sample = steering.draw_points(everyone)
                        return sample, steering.predict_original(sample)
                sample = steering.draw_points(everyone)
                with switch.off():
                    return sample, steering.predict_original(sample)

            def losses(_: int) -> Iterator[Tensor]:
                renew_used()
                for part in steering.split_losses(*draw(), micro_batch, n):
                    # Rows come concept by concept within a sample, and sample after sample.
                    yield part.unflatten(0, (-1, n)).sum(0) / samples
                    renew_used()

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
            # The other layers only helped to train: the fusion is defined where text enters.
            if layer in entries:
                factors[subject.name][f"{layer}.up"] = alpha / rank * up[b].cpu()
                factors[subject.name][f"{layer}.down"] = down[b].cpu()
    return factors
