"""Training some entries of a network's weights where they are, without a second network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class InPlace:
    """Some entries of some parameters, trained in place for the length of a `with` block.

    Besides the network there is, for the trained entries alone, their original, their value and
    (outside) the optimiser's state; gradients are cut down to them parameter by parameter, as
    backpropagation comes by. At the end of the block all is as it was, to the last bit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None = None
    ) -> None:
        """All entries of the parameters, or where `masks` has a bool tensor for each, those."""
        self.parameters = dict(parameters)
        if masks is not None:
            self.parameters = {k: p for k, p in self.parameters.items() if bool(masks[k].any())}
        self.masks = masks
        self._originals = [self._entries(k, p.detach()) for k, p in self.parameters.items()]
        self.values = [
            original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
            for original in self._originals
        ]
        """The trained entries of each parameter, (n,), float32 or finer."""

    def _entries(self, name: str, tensor: Tensor) -> Tensor:
        """The trained entries of a tensor, in the order of its flattened form: a copy, (n,)."""
        if self.masks is None:
            return tensor.flatten().clone()
        return tensor.masked_select(self.masks[name].to(tensor.device))

    def _put(self, values: Sequence[Tensor]) -> None:
        for (name, parameter), value in zip(self.parameters.items(), values, strict=True):
            value, data = value.detach().to(parameter), parameter.data
            if self.masks is None:
                data.copy_(value.reshape(data.shape))
            else:
                data.masked_scatter_(self.masks[name].to(data.device), value)

    def write(self) -> None:
        """Let the network have the values."""
        self._put(self.values)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network as it was, for the length of a block."""
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
        """d loss / d values, each (n,); the loss must hang on the network's parameters."""
        found: dict[str, Tensor] = {}

        def keep(name: str, gradient: Tensor) -> None:
            found[name] = self._entries(name, gradient)

        backward(loss, self.parameters, keep)
        return [
            found[name].to(value) if name in found else torch.zeros_like(value)
            for name, value in zip(self.parameters, self.values, strict=True)
        ]

    def state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The values and the optimiser's state of each, to go on from; `go_on` takes it up."""
        state = {}
        for i, value in enumerate(self.values):
            state[f"{i}.value"] = value
            for key, tensor in optimiser.state[value].items():
                state[f"{i}.{key}"] = tensor
        return state

    def go_on(self, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave; other tensors may lie beside it."""
        for i, value in enumerate(self.values):
            value.copy_(state[f"{i}.value"])
            optimiser.state[value] = {
                key.partition(".")[2]: tensor if key.endswith(".step") else tensor.to(value.device)
                for key, tensor in state.items()
                if key.startswith(f"{i}.") and key != f"{i}.value"
            }

    def differences(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """Of each parameter its name, where its trained entries are, (n,) (None: everywhere), and by
        how much they have changed, (n,); one parameter at a time, since all take much memory."""
        for name, value, original in zip(self.parameters, self.values, self._originals, strict=True):
            place = None if self.masks is None else self.masks[name].flatten().nonzero().flatten()
            yield name, place, value - original


def backward(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], hear: Callable[[str, Tensor], None]
) -> None:
    """Backpropagate, and let go of each parameter's gradient as soon as `hear` has had it.

    A gradient that lies on a parameter already is added to it, and goes with it.
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
