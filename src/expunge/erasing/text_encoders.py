"""The parts of a model's text encoders that can be trained, and the loop that trains them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.changes import Changes, iterate_layers
from expunge.erasing.in_place_training import assemble_weight_changes
from expunge.model import Model
from expunge.ops.finetune import KEEP_EVERY, diverged, frozen, warn_diverged
from expunge.ops.in_place import InPlace
from expunge.runtime.context import RunContext

BLOCKS = re.compile(r"(?!.*vis)(?:.*\.)?(?:layers|block)")
"""The lists of blocks in text encoders, by name: CLIP's, T5's, language models', not those that see."""


def select_text_parameters(
    model: Model, part: Literal["first block", "blocks"]
) -> dict[str, nn.Parameter]:
    """Select the weights of linear layers in the text encoders' blocks, by the names that changes use.

    Biases, norms and embeddings stay, so that the edit can leave as a LoRA.

    Args:
        model: whose text encoders.
        part: the first block of each, or all.

    Raises:
        ExpungeError: a text encoder has no list of blocks.
    """
    found: dict[str, nn.Parameter] = {}
    for component, network in sorted(model.pipe.components.items()):
        if not component.startswith("text_encoder") or network is None:
            continue
        layers = dict(iterate_layers(network))
        lists = (n for n, m in layers.items() if isinstance(m, nn.ModuleList) and BLOCKS.fullmatch(n))
        blocks = next(lists, None)
        if blocks is None:
            raise ExpungeError(
                f"the {component}, a {type(network).__name__}, has no list of blocks that is known"
                " here, so it cannot be trained"
            )
        begins = f"{blocks}.0." if part == "first block" else f"{blocks}."
        for name, module in layers.items():
            weight = getattr(module, "weight", None)
            if name.startswith(begins) and isinstance(module, nn.Linear):
                if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                    raise ExpungeError(f"{component}.{name} keeps its weight in a form of its own")
                found[f"{component}.{name}.weight"] = weight
    return found


def train_text_encoders(
    model: Model,
    parameters: dict[str, nn.Parameter],
    run: RunContext,
    loss: Callable[[int, InPlace], Iterator[Tensor]],
    *,
    max_train_steps: int,
    learning_rate: float,
    title: str,
) -> Changes:
    """Train weights in place with Adam; the text encoders are the original again when it is done.

    Training stops where the loss diverges, at the last sound state, with a warning.

    Args:
        model: whose parameters are frozen meanwhile, all but those trained.
        parameters: the weights, by the names that changes use.
        run: is told how far it is.
        loss: yields the parts of a step's loss, whose gradients add up; it may take the trained weights
            off for a while before the first.
        max_train_steps: how many steps.
        learning_rate: Adam's.
        title: of the progress.

    Returns:
        A dense change of each weight that the loss depends on.
    """
    trained = InPlace(parameters)
    optimiser = torch.optim.Adam(trained.values, lr=learning_rate, foreach=False)
    losses: list[float] = []
    good = [value.clone() for value in trained.values]
    with frozen(model.parameters()), trained:
        try:
            for step in range(max_train_steps):
                run.progress(title, step, max_train_steps)
                total, gradients = 0.0, [torch.zeros_like(value) for value in trained.values]
                with torch.enable_grad():
                    for part in loss(step, trained):
                        total += float(part.detach())
                        for gradient, more in zip(gradients, trained.gradients(part), strict=True):
                            gradient += more
                if diverged([*losses, total]):
                    warn_diverged(step, True, "the edit", stacklevel=5)
                    for value, before in zip(trained.values, good, strict=True):
                        value.copy_(before)
                    break
                if step % KEEP_EVERY == 0:  # the loss has just shown that this state is sound
                    good = [value.clone() for value in trained.values]
                losses.append(total)
                for value, gradient in zip(trained.values, gradients, strict=True):
                    value.grad = gradient
                optimiser.step()
                optimiser.zero_grad()
                model.encode([""])
                trained.write()
            run.progress(title, max_train_steps, max_train_steps)
        finally:
            # Where parts take turns on a device, running the encoders brings their weights back, so
            # that they can be written to.
            model.encode([""])
    # A weight that the loss does not depend on, such as another encoder's last block, has not moved.
    moved = {name for name, _, difference in trained.differences() if bool(difference.any())}
    changes = assemble_weight_changes(trained)
    return tuple(c for c in changes if f"{c.layers[0]}.{c.parameter}" in moved)
