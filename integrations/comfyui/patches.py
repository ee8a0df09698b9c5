"""Turn an edit's changes into patches of a ComfyUI MODEL.

ComfyUI's side of the contract, as its published patcher has it:

* `model.clone()` copies the patcher, not the weights;
* `model.add_patches({key: ("diff", (tensor,))}, strength)` adds strength · tensor to a weight, and
  returns the keys that it found;
* `model.set_model_attn2_patch(f)` calls `f(n, context_k, context_v, options)` in every cross-attention
  before the projections, and goes on with the three tensors that it returns;
* `model.set_model_unet_function_wrapper(f)` calls `f(apply_model, {"input", "timestep", "c"})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.changes import Change, HookedChange, InputChange, WeightChange
from expunge.changes.strength import scale_difference
from expunge.edit import Edit

PREFIX = "diffusion_model."
"""What ComfyUI puts before the names of the denoiser's layers."""


def apply_edit(model: Any, edit: Edit, strength: float = 1.0) -> Any:
    """Return a copy of a ComfyUI MODEL with an edit applied.

    Static weights become weight patches; gated changes become a patch of the cross-attentions' context.

    Args:
        model: ComfyUI's ModelPatcher.
        edit: the edit; its family must be one whose layers ComfyUI names as single files do.
        strength: 1 is the edit as it was made, 0 none of it.

    Raises:
        ExpungeError: the edit is for another model, or holds a change that ComfyUI cannot carry.
    """
    weights = model.model_state_dict()
    names = name_layers(edit, list(weights))
    patched = model.clone()
    hooked = [change for change in edit.changes if isinstance(change, InputChange)]
    for change in edit.changes:
        if isinstance(change, WeightChange):
            add_weights(patched, change, names, weights, strength)
        elif not isinstance(change, InputChange):
            way = "export the edit as weights: expunge export EDIT --to comfyui"
            if isinstance(change, HookedChange) and change.unfittable:
                way = "nor can weights: draw with expunge or diffusers"
            raise ExpungeError(f"ComfyUI cannot carry a {change.kind} change; {way}")
    tokens = [change for change in hooked if _is_cross_attention(change)]
    for change in tokens:
        _require_all_layers(change, edit, weights)
    vectors = [change for change in hooked if not _is_cross_attention(change)]
    if tokens:
        patched.set_model_attn2_patch(make_context_patch(tokens, strength))
    if vectors:
        _wrap_vector(patched, vectors, strength)
    return patched


def name_layers(edit: Edit, keys: Sequence[str]) -> dict[str, str]:
    """Map the layers of an edit to the names of a ComfyUI MODEL's weights, without ".weight".

    Raises:
        ExpungeError: a layer is not in the model.
    """
    families = {
        cls.__name__: cls
        for cls in (registry.get("families", n) for n in registry.list_names("families"))
    }
    family = families.get(edit.record.family)
    if family is None:
        raise ExpungeError(f"the edit is for the family {edit.record.family!r}, which is not known here")
    config = family.infer_config([f"model.{key}" for key in keys])
    found: dict[str, str] = {}
    for change in edit.changes:
        for layer in change.layers:
            component, _, inside = layer.partition(".")
            original = family.ldm_layer_name(inside, config) if component == family.denoiser else None
            if original is None or f"{PREFIX}{original}.{change.parameter}" not in keys:
                raise ExpungeError(
                    f"the edit does not fit: it changes {layer}, which this MODEL does not have; it is"
                    f" for {edit.record.family}, made from {edit.record.model or 'an unnamed model'}"
                )
            found[layer] = PREFIX + original
    return found


def make_context_patch(changes: Sequence[InputChange], strength: float) -> Callable[..., Any]:
    """Make ComfyUI's attn2 patch of gated changes.

    Args:
        changes: changes of the input of all keys, of all values, or of both.
        strength: how much of the difference to apply, 1 for all.

    Returns:
        f(n, context_k, context_v, options) → the same three, contexts changed.
    """
    sides = []
    for change in changes:
        keys = [layer for layer in change.layers if layer.endswith(".to_k")]
        values = [layer for layer in change.layers if layer.endswith(".to_v")]
        sides.append((change, bool(keys), bool(values)))

    def patch(n: Tensor, context_k: Tensor, context_v: Tensor, options: Any) -> tuple[Tensor, ...]:
        for change, on_keys, on_values in sides:
            same = context_v is context_k
            changed = _mix(change, context_k, strength) if on_keys else context_k
            if on_values:
                # One computation serves both sides where they read the same context.
                context_v = changed if same and on_keys else _mix(change, context_v, strength)
            context_k = changed
        return n, context_k, context_v

    return patch


def _mix(change: InputChange, x: Tensor, strength: float) -> Tensor:
    changed = change.change_input(x)
    return changed if strength == 1 else scale_difference(x, changed, strength)


def add_weights(
    patched: Any,
    change: WeightChange,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    strength: float,
) -> None:
    """Add a static change to a MODEL's weight patches.

    Args:
        patched: ComfyUI's ModelPatcher, a copy of the user's.
        change: the change.
        names: what the MODEL calls the change's layers, without ".weight".
        weights: the MODEL's weights, by name.
        strength: 1 is the change as it was made, 0 none of it.

    Raises:
        ExpungeError: the MODEL takes no patch for a layer.
    """
    patches = {}
    for layer in change.layers:
        key = f"{names[layer]}.{change.parameter}"
        original = weights[key]
        # Float32: a small difference of two half-precision weights would be rounded away.
        patches[key] = ("diff", (change.weight(original.float()) - original.float(),))
    missing = set(patches) - set(patched.add_patches(patches, strength))
    if missing:
        raise ExpungeError(f"ComfyUI took no patch for {', '.join(sorted(missing)[:3])}")


def _require_all_layers(change: InputChange, edit: Edit, weights: Mapping[str, Tensor]) -> None:
    """Check that a change reaches every cross-attention, since ComfyUI's patch does.

    Raises:
        ExpungeError: it reaches some only.
    """
    for side in ("to_k", "to_v"):
        reached = sum(layer.endswith(side) for layer in change.layers)
        there = sum(name.endswith(f"attn2.{side}.weight") for name in weights)
        if reached not in (0, there):
            raise ExpungeError(
                f"the edit gates {reached} of {there} cross-attentions, and ComfyUI's patch reaches all;"
                " export it as weights: expunge export EDIT --to comfyui"
            )


def _is_cross_attention(change: Change) -> bool:
    return all(layer.endswith((".to_k", ".to_v")) for layer in change.layers)


def _wrap_vector(patched: Any, changes: Sequence[InputChange], strength: float) -> None:
    """Change the vector of the whole prompt, which ComfyUI calls y."""

    def wrapper(apply_model: Callable[..., Tensor], given: Mapping[str, Any]) -> Tensor:
        c = dict(given["c"])
        for change in changes:
            if c.get("y") is not None:
                c["y"] = _mix(change, c["y"], strength)
        return apply_model(given["input"], given["timestep"], **c)

    patched.set_model_unet_function_wrapper(wrapper)
