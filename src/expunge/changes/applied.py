"""Apply changes to a pipeline, and remove them: parameters are exchanged, hooks registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.changes.contract import (
    Change,
    HookedChange,
    InputChange,
    OutputChange,
    PredictionChange,
    WeightChange,
)
from expunge.changes.layers import check_in_use, find_layer, find_layer_path
from expunge.changes.strength import check_strength, scale_difference


def require_finite(changes: Sequence[Change], what: str) -> None:
    """Check that changes contain neither NaN nor infinity.

    Args:
        changes: the changes.
        what: what the message calls their owner: "the edit".

    Raises:
        ExpungeError: a tensor contains one.
    """
    for change in changes:
        for name, tensor in change.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ExpungeError(
                    f"{what} contains NaN or infinity: {name} of its {change.kind}"
                    f" change of {change.layers[0]}"
                )


def check_fit(root: Any, changes: Sequence[Change]) -> None:
    """Check that a pipeline has the layers of all changes, in the shapes that these expect.

    Raises:
        ExpungeError: a layer is missing, has another shape, or is quantized.
    """
    for change in changes:
        for layer in change.layers:
            module = find_layer(root, layer)
            found = getattr(module, change.parameter, None)
            if not isinstance(found, Tensor):
                raise ExpungeError(f"the edit does not fit: {layer} has no {change.parameter}")
            # Eight-bit numbers are only stored so: something else computes with them in another dtype.
            small = found.dtype.itemsize < 2 or not found.is_floating_point()
            if change.parameter not in module._parameters or small:
                raise ExpungeError(
                    f"the edit does not fit: {layer} is a {type(module).__name__} that keeps its"
                    f" {change.parameter} in a form of its own"
                    f" ({str(found.dtype).removeprefix('torch.')})"
                )
            if not change.fits(found.shape):
                shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in change.tensors.items())
                raise ExpungeError(
                    f"the edit does not fit: {layer} is {tuple(found.shape)},"
                    f" and its {change.kind} change has {shapes}"
                )


class Applied:
    """Changes that are applied to a pipeline until `remove()`, or to the end of a `with` block.

    Nothing is touched if one of them does not fit. With tensors that require gradients, keep
    `backward()` inside the block: gradients then equal those of a real copy.

    Args:
        root: the pipeline.
        changes: the changes, in order.
        strength: how much of the changes counts. A parameter W becomes W + strength · (W′ − W), where W′
            is what all its changes make of it; the difference that a hooked change makes to its layer's
            input or output is scaled likewise. 1 applies the changes as they are, 0 changes nothing.

    Raises:
        ExpungeError: a layer is missing, has another shape, or is not called by the pipeline as it is
            set up; or the strength is no number of 0 or more.
    """

    def __init__(self, root: Any, changes: Sequence[Change], strength: float = 1.0) -> None:
        self._strength = check_strength(strength)
        check_fit(root, changes)
        for change in changes:
            for layer in change.layers:
                check_in_use(root, layer, hooked=isinstance(change, HookedChange))
                if getattr(find_layer(root, layer), change.parameter).is_meta:
                    raise ExpungeError(
                        f"the weights of {layer} are not in memory: where they are offloaded layer by"
                        " layer, use enable_model_cpu_offload() in place of the sequential one"
                    )
        self._swapped: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        if not self._strength:
            return
        try:
            for (module, name), weights in _group_by_parameter(root, changes).items():
                self._swap(module, name, weights)
            for change in changes:
                if isinstance(change, PredictionChange):
                    denoiser = find_layer_path(root, change.layers[0])[0]
                    hook = change.make_hook(self._strength)
                    self._hooks.append(denoiser.register_forward_hook(hook, with_kwargs=True))
                elif isinstance(change, HookedChange):
                    # On the wrapper: what a loaded LoRA adds then reads and returns the same.
                    modules = [find_layer_path(root, layer)[-1] for layer in change.layers]
                    self._hooks += _register_hooks(modules, change, self._strength)
        except BaseException:
            # An interrupt, too, must not leave the pipeline half changed.
            self.remove()
            raise

    def _swap(self, module: nn.Module, name: str, changes: Sequence[WeightChange]) -> None:
        """Replace a parameter by what its changes make of it, one after the other."""
        original = module._parameters[name]
        if original is None:  # checked before; for the type checker
            raise TypeError(f"{type(module).__name__} has no parameter {name}, which check_fit found")
        before = value = original.detach()
        if self._strength != 1:
            # Unrounded in between, so that a weight in half precision is rounded once, at the end.
            value = before.to(torch.promote_types(before.dtype, torch.float32))
        for change in changes:
            value = change.weight(value)
        if self._strength != 1:
            value = scale_difference(before, value, self._strength)
        # What overflows though every change is finite: half precision, and strengths beyond 1.
        risky = self._strength > 1 or value.dtype == torch.float16
        if risky and not bool(value.detach().isfinite().all()):
            raise ExpungeError(
                f"at strength {self._strength:g} the edit makes NaN or infinity of a weight of"
                f" {changes[0].layers[0]}, in {str(value.dtype).removeprefix('torch.')}"
            )
        if not value.requires_grad:
            value = nn.Parameter(value, original.requires_grad)
        # A tensor that requires gradients replaces the parameter as it is: wrapped, it would be a leaf.
        value.expunge_base = original  # type: ignore[attr-defined]
        module._parameters[name] = value  # type: ignore[assignment]
        self._swapped[module, name] = (original, value)

    def remove(self) -> None:
        """Put back the very same parameters that were there. A second call does nothing.

        Raises:
            ExpungeError: another edit was applied after this one and has to be removed first.
        """
        if any(
            module._parameters[name] is not ours for (module, name), (_, ours) in self._swapped.items()
        ):
            raise ExpungeError("another edit was applied on top of this one: remove that one first")
        for (module, name), (original, ours) in self._swapped.items():
            # The pipeline may have been moved in the meantime, and the original with nobody to move it.
            if (original.device, original.dtype) != (ours.device, ours.dtype):
                original.data = original.data.to(ours.device, ours.dtype)
            module._parameters[name] = original  # type: ignore[assignment]
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._hooks = {}, []

    def keep(self) -> None:
        """Make the changes the pipeline's own: nothing can be removed, and the originals are freed."""
        for _, value in self._swapped.values():
            del value.expunge_base  # type: ignore[attr-defined]
        self._swapped, self._hooks = {}, []

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _locate(root: Any, changes: Sequence[Change]) -> Iterator[tuple[nn.Module, Change]]:
    """Yield every change with each module it belongs to, in order."""
    for change in changes:
        for layer in change.layers:
            yield find_layer(root, layer), change


def _group_by_parameter(
    root: Any, changes: Sequence[Change]
) -> dict[tuple[nn.Module, str], list[WeightChange]]:
    """Return the weight changes of every parameter, in order."""
    grouped: dict[tuple[nn.Module, str], list[WeightChange]] = {}
    for module, change in _locate(root, changes):
        if isinstance(change, WeightChange):
            grouped.setdefault((module, change.parameter), []).append(change)
    return grouped


def _register_hooks(
    modules: Sequence[nn.Module], change: HookedChange, strength: float
) -> list[torch.utils.hooks.RemovableHandle]:
    """Register a change as a forward hook of some modules.

    Args:
        modules: the modules.
        change: the change.
        strength: how much of the difference that it makes counts.

    Raises:
        TypeError: the change acts neither on inputs nor on outputs.
    """
    # Gates are steep: without autocast they run in full precision, whatever the layers compute in.
    if isinstance(change, OutputChange):

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                changed = change.change_output(inputs[0], output)
                return changed if strength == 1 else scale_difference(output, changed, strength)

        return [module.register_forward_hook(after) for module in modules]
    if not isinstance(change, InputChange):
        raise TypeError(f"an InputChange or an OutputChange is expected, not a {type(change).__name__}")

    def change_input(x: Tensor) -> Tensor:
        replaced = change.change_input(x)
        return replaced if strength == 1 else scale_difference(x, replaced, strength)

    changed = _LastResult(change_input)

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return (changed(inputs[0]), *inputs[1:])

    return [module.register_forward_pre_hook(before) for module in modules]


class _LastResult:
    """A function that remembers its last result, as long as it is called with the very same tensor.

    The same text enters every layer at every step, so the gates run once for an image. Results that
    require gradients are not remembered: a second `backward()` could not go through them.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.argument: Tensor | None = None
        self.version: int | None = None
        self.result: Tensor | None = None

    def __call__(self, argument: Tensor) -> Tensor:
        # A tensor that was written to in place is the same object with another version.
        version = None if argument.is_inference() else argument._version
        if self.result is not None and argument is self.argument and version == self.version:
            return self.result
        result = self.function(argument)
        if not result.requires_grad:
            self.argument, self.version, self.result = argument, version, result
        return result
