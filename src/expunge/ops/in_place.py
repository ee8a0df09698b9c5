"""Train some entries of a network's weights where they are, without a second network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class InPlace:
    """Some entries of some parameters, trained in place for the length of a `with` block.

    Beside the network, memory holds the original and the value of the trained entries alone, and
    (outside) the optimiser's state of them. Gradients are cut down to these entries parameter by
    parameter, during backpropagation. At the end of the block the network is as it was, bit for bit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None = None
    ) -> None:
        """Select the entries to train.

        Args:
            parameters: by name.
            masks: for each parameter a bool tensor of its shape; None trains all entries.
        """
        self.parameters: dict[str, nn.Parameter] = dict(parameters)
        if masks is not None:
            self.parameters = {k: p for k, p in self.parameters.items() if bool(masks[k].any())}
        self.masks = masks
        self._originals = [self._entries(k, p.detach()) for k, p in self.parameters.items()]
        self.values: list[Tensor] = [
            # Adam's small steps would vanish in half precision.
            original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
            for original in self._originals
        ]
        """The trained entries of each parameter, (n,), float32 or finer."""

    def _entries(self, name: str, tensor: Tensor) -> Tensor:
        """Copy the trained entries of a tensor, in the order of its flattened form: (n,)."""
        if self.masks is None:
            return tensor.flatten().clone()
        return tensor.masked_select(self.masks[name].to(tensor.device))

    def _put(self, values: Sequence[Tensor]) -> None:
        for (name, parameter), value in zip(self.parameters.items(), values, strict=True):
            value, data = value.detach().to(parameter), parameter.data
            if self.masks is None:
                data.copy_(value.reshape(data.shape))
            else:
                # Written through `data`: autograd must not record what restores or replaces
                # weights.
                data.masked_scatter_(self.masks[name].to(data.device), value)

    def write(self, moved: Sequence[Tensor] | None = None) -> None:
        """Write the values into the network, by default as they are; else with `moved` added to each."""
        if moved is None:
            self._put(self.values)
        else:
            self._put([value + away for value, away in zip(self.values, moved, strict=True)])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Restore the original network for the length of a block."""
        self._put(self._originals)
        try:
            yield
        finally:
            self.write()

    def __enter__(self) -> InPlace:
        self._before = [(p, p.requires_grad, p.grad) for p in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.requires_grad_()
            parameter.grad = None
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self._originals)
        for parameter, asked, gradient in self._before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Compute d loss / d values, each (n,), of a loss that depends on the network's parameters."""
        found: dict[str, Tensor] = {}

        def keep(name: str, gradient: Tensor) -> None:
            found[name] = self._entries(name, gradient)

        backward(loss, self.parameters, keep)
        return [
            # No hook is called of a parameter that the loss does not depend on.
            found[name].to(value) if name in found else torch.zeros_like(value)
            for name, value in zip(self.parameters, self.values, strict=True)
        ]

    def state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the values and the optimiser's state of each; `resume` takes them up."""
        state = {}
        for i, value in enumerate(self.values):
            state[f"{i}.value"] = value
            for key, tensor in optimiser.state[value].items():
                state[f"{i}.{key}"] = tensor
        return state

    def resume(self, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned; the mapping may hold other tensors, too."""
        for i, value in enumerate(self.values):
            value.copy_(state[f"{i}.value"])
            optimiser.state[value] = {
                # Adam counts its steps in a tensor on the CPU, wherever the weights are.
                key.partition(".")[2]: tensor if key.endswith(".step") else tensor.to(value.device)
                for key, tensor in state.items()
                if key.startswith(f"{i}.") and key != f"{i}.value"
            }

    def differences(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """Yield of each parameter its name, the places of its trained entries and their changes.

        One parameter at a time, since all take much memory.

        Returns:
            The places in the flattened parameter, (n,), or None for all; and the changes, (n,).
        """
        for name, value, original in zip(self.parameters, self.values, self._originals, strict=True):
            # Computed here and not kept: indices of all parameters would take more memory than the
            # weights.
            place = None if self.masks is None else self.masks[name].flatten().nonzero().flatten()
            yield name, place, value - original


def backward(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], hear: Callable[[str, Tensor], None]
) -> None:
    """Backpropagate, and free each parameter's gradient as soon as it has been used.

    A gradient that a parameter already has is added to the new one, and is freed with it.

    Args:
        loss: a scalar.
        parameters: by name.
        hear: takes a parameter's name and its gradient.
    """

    def listen(name: str) -> Callable[[Tensor], None]:
        def heard(parameter: Tensor) -> None:
            if parameter.grad is None:
                raise TypeError(f"{name} must have a gradient after backward, not None")
            hear(name, parameter.grad)
            parameter.grad = None

        return heard

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(listen(name)).remove)
        loss.backward()
