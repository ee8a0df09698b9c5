"""Train a model's weights where they are, on any loss, and return what became of them as changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from expunge.changes import Change, Changes, Dense, Sparse
from expunge.model import Model
from expunge.ops.finetune import KEEP_EVERY, diverged, frozen, warn_diverged
from expunge.ops.in_place import InPlace
from expunge.ops.noise_error import Loss, measure_error
from expunge.runtime.context import RunContext, Tensors
from expunge.text import Text


def train_in_place(
    model: Model,
    trained: InPlace,
    losses: Callable[[], Iterable[Tensor]],
    run: RunContext,
    generator: torch.Generator,
    *,
    max_train_steps: int,
    learning_rate: float,
    title: str,
    label: str = "training",
) -> Changes:
    """Train weights in place with Adam; the network is the original again when it is done.

    The state is saved every few steps, so that a killed run resumes from there and ends with the same
    edit. If the loss diverges, training stops, and the state last saved counts, with a warning.

    Args:
        model: the network.
        trained: the weights.
        losses: yields parts of a step's loss, scalars, which sum to it; whatever it draws comes from
            the generator, before the first part.
        run: the folder of saved states, and the progress.
        generator: the random numbers of the training.
        max_train_steps: training steps.
        learning_rate: Adam's learning rate.
        title: what the progress is called.
        label: of the saved state, where a method trains several times.

    Returns:
        A sparse change of each parameter, or a dense one where all of it was trained.

    Raises:
        ExpungeError: the loss diverges before any state was saved.
    """
    # One tensor at a time: with foreach, temporaries of all of them would be in memory at once.
    optimiser = torch.optim.Adam(trained.values, lr=learning_rate, foreach=False)
    start, history = _resumed(run, trained, optimiser, generator, label)
    good: list[Tensor] = []
    with frozen(model.parameters()), trained:
        trained.write()
        run.progress(title, start, max_train_steps)
        for step in range(start, max_train_steps):
            random_state = generator.get_state()
            loss = 0.0
            gradients: list[Tensor] = []
            with torch.enable_grad():
                for part in losses():
                    loss += float(part.detach())
                    found = trained.gradients(part)
                    # Added in place: a second list of gradients would take as much memory as the
                    # weights.
                    for gradient, more in zip(gradients, found, strict=False):
                        gradient += more
                    gradients = gradients or found
                    del part, found
            if diverged([*history, loss]):
                _give_up(trained, good, step)
                break
            if step and step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                good = [value.clone() for value in trained.values]
                run.save_checkpoint(label, _state(trained, optimiser, random_state, history))
            history.append(loss)
            for value, gradient in zip(trained.values, gradients, strict=True):
                value.grad = gradient
            optimiser.step()
            optimiser.zero_grad()
            trained.write()
            run.progress(title, step + 1, max_train_steps)
    del optimiser, good  # as large as the weights: the changes take their place in memory
    return assemble_weight_changes(trained)


def measure_drift(
    model: Model, trained: InPlace, latents: Tensor, t: Tensor, text: Text, scale: Tensor, loss: Loss
) -> Tensor:
    """Compute how far predictions for prompts that stay are from the original's: (n,).

    Args:
        model: the network.
        trained: the weights in training, which the original is without.
        latents: (n, c, h, w), noisy.
        t: (n,), their timesteps.
        text: (n,) prompts.
        scale: (n,), what an error of a prediction is worth in ε.
        loss: how an error counts.
    """
    with trained.off(), torch.no_grad():
        goal = model.predict(latents, t, text)
    return measure_error(model.predict(latents, t, text), goal, scale, loss)


def _state(
    trained: InPlace, optimiser: torch.optim.Optimizer, random_state: Tensor, losses: Sequence[float]
) -> Tensors:
    """Gather everything that training resumes from.

    Args:
        trained: the weights.
        optimiser: Adam.
        random_state: of the generator, before the step.
        losses: of the steps so far.
    """
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "numbers": random_state,
        **trained.state(optimiser),
    }


def _resumed(
    run: RunContext,
    trained: InPlace,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    label: str,
) -> tuple[int, list[float]]:
    """Resume from the state that was saved, if any.

    Args:
        run: where states are saved.
        trained: takes up the weights.
        optimiser: takes up its state.
        generator: takes up its state.
        label: of the saved state.

    Returns:
        How many steps were done, and their losses.
    """
    state = run.checkpoint(label)
    if state is None:
        return 0, []
    trained.resume(optimiser, state)
    generator.set_state(state["numbers"])
    losses = state["losses"].tolist()
    return len(losses), losses


def _give_up(trained: InPlace, good: Sequence[Tensor], step: int) -> None:
    """Go back to the last sound state, and warn."""
    warn_diverged(step, bool(good), "the edit", stacklevel=7)
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
