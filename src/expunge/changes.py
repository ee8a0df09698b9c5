"""The kinds of change an edit is made of, and laying them on a pipeline.

A change belongs to named layers and says what their output becomes. A layer's name is the
pipeline's component and the module inside it: `unet.mid_block.attentions.0.…attn2.to_k`.
A change that is a weight takes the fast path, a parameter swap; one that depends on the token a
layer meets runs as a forward hook.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """What the output of some layers becomes. Its tensors are its tensor fields."""

    kind: ClassVar[str]
    layers: tuple[str, ...]
    """The layers it belongs to."""
    parameter: str = field(default="weight", kw_only=True)
    """Which of the layers' parameters it takes the place of."""

    @abstractmethod
    def fits(self, shape: torch.Size) -> bool:
        """Whether it can lie on a layer whose parameter has this shape."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors it consists of."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def spec(self) -> dict[str, Any]:
        """Everything else, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        return {"kind": self.kind, **plain}

    @property
    def label(self) -> str:
        """What `summary` calls it."""
        return self.kind


class WeightChange(Change):
    """A change that is a weight."""

    @abstractmethod
    def weight(self, original: Tensor) -> Tensor:
        """The weight that takes the place of `original`: same shape, dtype and device."""


class HookedChange(Change):
    """A change that looks at what a layer is given, and so is no weight."""

    def weight(self, original: Tensor) -> Tensor:
        """Refused: what it does hangs on the token.

        Raises:
            ExpungeError: always; names the way out.
        """
        raise ExpungeError(
            f"a {self.kind} change is switched by the token it meets, so no weight can hold it;"
            " `expunge.checkpoints.linearize.fit_static_weights` fits the nearest weights to it"
        )


class InputChange(HookedChange):
    """A change to what a layer is given."""

    @abstractmethod
    def given(self, x: Tensor) -> Tensor:
        """What takes the place of the input x."""


class OutputChange(HookedChange):
    """A change to what a layer answers."""

    @abstractmethod
    def output(self, given: Tensor, output: Tensor) -> Tensor:
        """What takes the place of `output`, the layer's answer to the input `given`."""


@dataclass(frozen=True, eq=False)
class Right(WeightChange):
    """W · M: the layer sees its input through one matrix, shared by all its layers."""

    kind: ClassVar[str] = "right"
    matrix: Tensor
    """M, (d, d), where d is the width of the layers' input."""

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) == 2 and self.matrix.shape == (shape[1], shape[1])

    def weight(self, original: Tensor) -> Tensor:
        matrix = self.matrix.to(original.device)
        wide = torch.promote_types(original.dtype, matrix.dtype)
        return (original.to(wide) @ matrix.to(wide)).to(original.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(WeightChange):
    """W + up · down, for linear layers and, flattened, for convolutions."""

    kind: ClassVar[str] = "low-rank"
    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in), or (rank, in · kernel height · kernel width)"""

    def fits(self, shape: torch.Size) -> bool:
        rows, columns = shape[0], shape[1:].numel()
        return (self.up.shape[0], self.down.shape[1]) == (rows, columns)

    def weight(self, original: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(original.dtype, self.up.dtype), torch.float32)
        up, down = (t.to(original.device, wide) for t in (self.up, self.down))
        return (original.to(wide) + (up @ down).reshape(original.shape)).to(original.dtype)


@dataclass(frozen=True, eq=False)
class Sparse(WeightChange):
    """W + a difference at some of its entries."""

    kind: ClassVar[str] = "sparse"
    index: Tensor
    """(n,), the entries' places in the flattened parameter, as int64 or int32"""
    difference: Tensor
    """(n,)"""

    def fits(self, shape: torch.Size) -> bool:
        inside = (self.index >= 0) & (self.index < shape.numel())
        return self.index.shape == self.difference.shape and bool(inside.all())

    def weight(self, original: Tensor) -> Tensor:
        index = self.index.to(original.device, torch.int64)
        difference = self.difference.to(original.device, original.dtype)
        return original.flatten().index_add(0, index, difference).reshape(original.shape)


@dataclass(frozen=True, eq=False)
class Dense(WeightChange):
    """Another parameter in the place of W."""

    kind: ClassVar[str] = "dense"
    value: Tensor
    """The parameter's new value."""

    def fits(self, shape: torch.Size) -> bool:
        return self.value.shape == shape

    def weight(self, original: Tensor) -> Tensor:
        return self.value.to(original.device, original.dtype)


@dataclass(frozen=True, eq=False)
class Switch:
    """Gates on text tokens: s_i(x) = σ(slope_i (direction_i · x − centre_i)), between 0 and 1."""

    direction: Tensor
    """(gates, in)"""
    centre: Tensor
    """(gates,), where each is half open."""
    slope: Tensor
    """(gates,), how steep each is there."""
    whole: bool = field(default=False, kw_only=True)
    """One value for a whole prompt, the largest of its tokens', instead of one for each token."""

    def gates(self, x: Tensor) -> Tensor:
        """The gates' values on tokens x (…, tokens, in): (…, tokens, gates), in [0, 1]."""
        return self.logits(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        """slope (direction · x − centre), which the gates are the logistic function of."""
        direction, centre, slope = (t.to(x) for t in (self.direction, self.centre, self.slope))
        values = slope * (x @ direction.T - centre)
        return values.amax(-2, keepdim=True).expand_as(values) if self.whole else values

    def _switches(self, width: int) -> bool:
        n = self.direction.shape[0]
        shapes = (self.direction.shape, self.centre.shape, self.slope.shape)
        return shapes == ((n, width), (n,), (n,))


@dataclass(frozen=True, eq=False)
class Gated(Switch, InputChange):
    """x − Σ_k a_k(x) · up_k (down_k · x − toward_k · x − goal_k): some directions brought to a goal.

    Direction k belongs to a concept c, which is as open as the widest of its gates: S_k = max s_i over
    the gates of c. Where several concepts are open at once, what their directions have in common is
    divided between them, most of it to the concept that is surest,

        a_k = S_k w_k / (w_k + Σ_{l of others} w_l |down_k · up_l|),     w = S (S / (1 − S))^sharpness,

    so that nothing is subtracted twice: if the overlaps down_k · up_l are the inner products of
    vectors of length 1, those of one concept at right angles, then the eigenvalues of Σ a_k up_k down_k
    lie in [0, 1] whatever the gates (its row sums, weighted by w, are at most 1). Where all gates are
    closed nothing changes. Stacked changes follow one another: the second sees what the first made.
    """

    kind: ClassVar[str] = "gated"
    sharpness: ClassVar[float] = 0.2
    up: Tensor
    """(in, directions)"""
    down: Tensor
    """(directions, in)"""
    goal: Tensor
    """(directions,), what down · x becomes where the gate is open."""
    owner: Tensor
    """(directions,), int64: the concept of each direction."""
    toward: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(directions, in): the part of the goal that hangs on x; by default 0."""
    concept: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(gates,), int64: the concept of each gate, counted from 0; by default one for each."""

    def __post_init__(self) -> None:
        if self.concept is None:
            object.__setattr__(self, "concept", torch.arange(len(self.centre)))
        if self.toward is None:
            object.__setattr__(self, "toward", torch.zeros_like(self.down))

    def fits(self, shape: torch.Size) -> bool:
        n = self.owner.shape[0]
        gates = self.direction.shape[0]
        inside = torch.isin(self.owner, self.concept)
        return (
            len(shape) == 2
            and self._switches(shape[1])
            and self.concept.shape == (gates,)
            and bool(((self.concept >= 0) & (self.concept < gates)).all())
            and (self.up.shape, self.down.shape) == ((shape[1], n), (n, shape[1]))
            and (self.toward.shape, self.goal.shape) == (self.down.shape, (n,))
            and bool(inside.all())
        )

    @property
    def label(self) -> str:
        return f"gated by {self.direction.shape[0]}"

    def given(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        up, down, toward, goal = (t.to(wide) for t in (self.up, self.down, self.toward, self.goal))
        owner, concept = self.owner.to(x.device), self.concept.to(x.device)
        logits = self.logits(wide)
        closed = torch.full_like(logits, -torch.inf)
        widest = closed.scatter_reduce(-1, concept.expand_as(logits), logits, "amax")[..., owner]
        weight = torch.nn.functional.logsigmoid(widest) + self.sharpness * widest
        weight = (weight - weight.amax(-1, keepdim=True)).clamp(min=-60).exp()
        overlap = (down @ up).abs() * (owner[:, None] != owner)
        share = widest.sigmoid() * weight / (weight + weight @ overlap.T)
        return (wide - (share * (wide @ (down - toward).T - goal)) @ up.T).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Damped(Switch, OutputChange):
    """y ⊙ Π_c (1 − max_i s_i(x) g_i), i over the gates of concept c: channels of a layer's answer are
    turned down, by no two gates of one concept twice."""

    kind: ClassVar[str] = "damped"
    damping: Tensor
    """g, (gates, out), each between 0, untouched, and 1, silent."""
    concept: Tensor = field(default=None, kw_only=True)  # type: ignore[assignment]
    """(gates,), int64: the concept of each gate, counted from 0; by default one for each."""

    def __post_init__(self) -> None:
        if self.concept is None:
            object.__setattr__(self, "concept", torch.arange(len(self.centre)))

    def fits(self, shape: torch.Size) -> bool:
        n = self.direction.shape[0]
        return (
            len(shape) == 2
            and self._switches(shape[1])
            and self.damping.shape == (n, shape[0])
            and self.concept.shape == (n,)
        )

    def output(self, given: Tensor, output: Tensor) -> Tensor:
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        gates, damping = self.gates(wide), self.damping.to(wide)
        concept = self.concept.to(given.device)
        for c in concept.unique().tolist():
            most = torch.zeros(())  # one after the other: all at once would need gates · out numbers
            for i in (concept == c).nonzero()[:, 0].tolist():
                most = torch.maximum(most.to(wide), gates[..., i, None] * damping[i])
            output = output * (1 - most).to(output.dtype)
        return output


Changes = Sequence[Change]
"""What a method returns: changes, laid on in order."""

KINDS: dict[str, type[Change]] = {c.kind: c for c in (Right, LowRank, Sparse, Dense, Gated, Damped)}


def from_spec(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    """The change that `spec` and `tensors` were taken from."""
    plain = {name: value for name, value in spec.items() if name != "kind"}
    return KINDS[spec["kind"]](**{**plain, "layers": tuple(plain["layers"]), **tensors})


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer or network inside what others have put around it.

    That is `torch.compile`, data parallelism, or peft, which loads LoRAs so. Names and weights are those
    inside: an edit made on a wrapped pipeline fits the bare one.
    """
    while True:
        inner = module._modules.get("_orig_mod")  # of torch.compile
        if inner is None:
            inner = module._modules.get("base_layer")  # of peft
        if inner is None and isinstance(module, PARALLEL):
            inner = module.module
        if inner is None:
            return module
        module = inner


PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""What spreads a network over several devices."""


def named_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a network by its own name, whatever has been put around it or parts of it."""

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)

    return walk(network, "")


def find(root: Any, layer: str) -> nn.Module:
    """The module of a pipeline that a layer's name stands for, without what is around it.

    Raises:
        ExpungeError: there is none.
    """
    return unwrapped(path_to(root, layer)[-1])


def path_to(root: Any, layer: str) -> list[nn.Module]:
    """The modules of a pipeline on the way to a layer, each with what is around it; the layer is last.

    Raises:
        ExpungeError: there is none.
    """
    component, _, inside = layer.partition(".")
    start = getattr(root, component, None)
    # Up to transformers 5.5 CLIP's layers lie in `text_model`, from 5.6 on they do not.
    for name in (inside, f"text_model.{inside}", inside.removeprefix("text_model.")):
        path: list[Any] = [start]
        for key in filter(None, name.split(".")):
            module = unwrapped(path[-1])._modules.get(key) if path[-1] is not None else None
            path.append(module)
        if path[-1] is not None:
            return path
    raise ExpungeError(f"the edit does not fit: this model has no layer {layer}")


FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""The projections that `fuse_qkv_projections()` puts into one layer, and asks no more."""


def check_asked(root: Any, layer: str, *, hooked: bool = False) -> None:
    """Check that a layer's own weight, and hooks on it, have a say in what the pipeline answers.

    Args:
        root: the pipeline.
        layer: the layer's name.
        hooked: whether hooks are what matters.

    Raises:
        ExpungeError: the pipeline asks another layer in its place, or skips hooks.
    """
    path = path_to(root, layer)
    if layer.rpartition(".")[2] in FUSED and len(path) > 1 and _fused(unwrapped(path[-2])):
        raise ExpungeError(
            f"{layer} is fused with its neighbours and not asked: undo it first, with"
            " unfuse_qkv_projections()"
        )
    if hooked and any(map(compiled, path)):
        raise ExpungeError(
            f"{layer} is compiled, and compiled code may skip what is hooked to a layer: use the"
            " pipeline without torch.compile"
        )


def _fused(attention: nn.Module) -> bool:
    """Whether an attention asks its projections fused into one."""
    if "Fused" in type(getattr(attention, "processor", None)).__name__:
        return True
    # The older attentions keep their mark when they are unfused, and change their processor.
    marked = getattr(attention, "fused_projections", False)
    return bool(marked) and hasattr(attention, "unfuse_projections")


def compiled(module: nn.Module) -> bool:
    """Whether a module runs as compiled code."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def base_parameter(root: Any, layer: str, parameter: str) -> Tensor:
    """A layer's parameter as it is beneath everything that is applied."""
    tensor = getattr(find(root, layer), parameter)
    while hasattr(tensor, "beneath"):
        tensor = tensor.beneath
    return tensor


def content(tensor: Tensor) -> bytes:
    """What a hash of a tensor is taken of: its dtype, its shape and its values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def check_numbers(changes: Changes, what: str) -> None:
    """Check that changes hold numbers.

    Raises:
        ExpungeError: a tensor of `what` has nan or infinity in it.
    """
    for change in changes:
        for name, tensor in change.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ExpungeError(
                    f"{what} holds numbers that are none (nan or infinite): {name} of its {change.kind}"
                    f" change of {change.layers[0]}"
                )


def check_fit(root: Any, changes: Changes) -> None:
    """Check the names and shapes of everything that changes.

    Raises:
        ExpungeError: a layer is missing, has another shape, or holds its weight in a form of its own.
    """
    for change in changes:
        for layer in change.layers:
            module = find(root, layer)
            found = getattr(module, change.parameter, None)
            if not isinstance(found, Tensor):
                raise ExpungeError(f"the edit does not fit: {layer} has no {change.parameter}")
            if change.parameter not in module._parameters or not found.is_floating_point():
                raise ExpungeError(
                    f"the edit does not fit: {layer} is a {type(module).__name__} that keeps its"
                    f" {change.parameter} in a form of its own ({_form(found)})"
                )
            if not change.fits(found.shape):
                shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in change.tensors.items())
                raise ExpungeError(
                    f"the edit does not fit: {layer} is {tuple(found.shape)},"
                    f" and its {change.kind} change has {shapes}"
                )


def _form(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Applied:
    """Changes that lie on a pipeline until `remove()`, or to the end of a `with` block.

    Nothing is touched if one of them does not fit. With tensors that require gradients, keep
    `backward()` inside the block: gradients then equal those of a real copy.

    Raises:
        ExpungeError: a layer is missing, has another shape, or is not asked by the pipeline as it is set
            up.
    """

    def __init__(self, root: Any, changes: Changes) -> None:
        check_fit(root, changes)
        for change in changes:
            for layer in change.layers:
                check_asked(root, layer, hooked=isinstance(change, HookedChange))
                if getattr(find(root, layer), change.parameter).is_meta:
                    raise ExpungeError(
                        f"the weights of {layer} are not in memory: where they are offloaded layer by"
                        " layer, use enable_model_cpu_offload() in place of the sequential one"
                    )
        self._swapped: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for (module, name), weights in _by_parameter(root, changes).items():
                self._swap(module, name, weights)
            for change in changes:
                if isinstance(change, HookedChange):
                    # On the outside: what a loaded LoRA adds is given, and answers, the same.
                    self._hooks += _hooks([path_to(root, layer)[-1] for layer in change.layers], change)
        except BaseException:
            self.remove()
            raise

    def _swap(self, module: nn.Module, name: str, changes: Sequence[WeightChange]) -> None:
        original = module._parameters[name]
        if original is None:
            raise TypeError(f"{type(module).__name__} has no parameter {name}, which check_fit found")
        value = original.detach()
        for change in changes:
            value = change.weight(value)
        if not value.requires_grad:
            value = nn.Parameter(value, original.requires_grad)
        # A tensor that requires gradients takes the parameter's place as it is.
        value.beneath = original  # type: ignore[attr-defined]
        module._parameters[name] = value  # type: ignore[assignment]
        self._swapped[module, name] = (original, value)

    def remove(self) -> None:
        """Put back what was there: the very same parameters. A second call does nothing.

        Raises:
            ExpungeError: another edit was applied on top and has to be taken off first.
        """
        if any(
            module._parameters[name] is not ours for (module, name), (_, ours) in self._swapped.items()
        ):
            raise ExpungeError("another edit lies on top of this one; take it off first")
        for (module, name), (original, ours) in self._swapped.items():
            if (original.device, original.dtype) != (ours.device, ours.dtype):
                original.data = original.data.to(ours.device, ours.dtype)
            module._parameters[name] = original  # type: ignore[assignment]
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._hooks = {}, []

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _placed(root: Any, changes: Changes) -> Iterator[tuple[nn.Module, Change]]:
    """Every change with each module it belongs to, in order."""
    for change in changes:
        for layer in change.layers:
            yield find(root, layer), change


def _by_parameter(root: Any, changes: Changes) -> dict[tuple[nn.Module, str], list[WeightChange]]:
    """The weight changes of every parameter, in order."""
    grouped: dict[tuple[nn.Module, str], list[WeightChange]] = {}
    for module, change in _placed(root, changes):
        if isinstance(change, WeightChange):
            grouped.setdefault((module, change.parameter), []).append(change)
    return grouped


def _hooks(
    modules: Sequence[nn.Module], change: HookedChange
) -> list[torch.utils.hooks.RemovableHandle]:
    # Gates are steep: they are asked in full precision, whatever the layers around them compute in.
    if isinstance(change, OutputChange):

        def after(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                return change.output(given[0], output)

        return [module.register_forward_hook(after) for module in modules]
    if not isinstance(change, InputChange):
        raise TypeError(f"an InputChange or an OutputChange is expected, not a {type(change).__name__}")
    changed = _Once(change.given)

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.autocast(given[0].device.type, enabled=False):
            return (changed(given[0]), *given[1:])

    return [module.register_forward_pre_hook(before) for module in modules]


class _Once:
    """A function's last answer, kept while it is given the very same tensor.

    The same text enters every layer at every step, so a drawing asks its gates once. What holds
    gradients is never kept: a second `backward()` could not go through it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.given: Tensor | None = None
        self.version: int | None = None
        self.answer: Tensor | None = None

    def __call__(self, given: Tensor) -> Tensor:
        version = None if given.is_inference() else given._version
        if self.answer is not None and given is self.given and version == self.version:
            return self.answer
        answer = self.function(given)
        if not answer.requires_grad:
            self.given, self.version, self.answer = given, version, answer
        return answer


def summary(changes: Changes) -> str:
    """In words: "right on 22 layers, low-rank on 4 layers"."""
    counts: Counter[str] = Counter()
    for change in changes:
        counts[change.label] += len(change.layers)
    return ", ".join(f"{kind} on {n} layer{'s' * (n > 1)}" for kind, n in counts.items())
