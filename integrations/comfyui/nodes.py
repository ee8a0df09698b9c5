"""The three nodes: load an erasure, erase concepts, compare images."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.changes import WeightChange
from expunge.edit import Edit
from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet
from expunge.problem import Concept, Problem
from expunge.runtime.context import RunContext

from .adapter import ComfyStableDiffusion
from .patches import add_weights, apply_edit

CLOSED_FORMS = ("uce", "oce", "speed")
"""Methods that need no images and no gradients: they finish while one waits."""


class LoadErasure:
    """Apply an edit file to a MODEL."""

    CATEGORY: ClassVar[str] = "expunge"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    FUNCTION: ClassVar[str] = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs, as ComfyUI asks."""
        strength = {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}
        path = {"default": "", "tooltip": "The .safetensors file that `expunge erase` wrote."}
        return {
            "required": {
                "model": ("MODEL",),
                "edit": ("STRING", path),
                "strength": ("FLOAT", strength),
            }
        }

    def load(self, model: Any, edit: str, strength: float) -> tuple[Any]:
        """Return the MODEL without what the edit erases."""
        return (apply_edit(model, Edit.load(edit.strip()), strength),)


class EraseConcepts:
    """Erase concepts from the loaded MODEL in closed form: seconds, no images."""

    CATEGORY: ClassVar[str] = "expunge"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    FUNCTION: ClassVar[str] = "erase"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs, as ComfyUI asks."""
        tip = "One concept a line: NAME, NAME=ANCHOR or NAME|SYNONYM=ANCHOR."
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "concepts": ("STRING", {"multiline": True, "default": "", "tooltip": tip}),
                "retain": ("STRING", {"multiline": True, "default": "", "tooltip": "One name a line."}),
                "method": (list(CLOSED_FORMS),),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            }
        }

    def erase(
        self, model: Any, clip: Any, concepts: str, retain: str, method: str, strength: float
    ) -> tuple[Any]:
        """Return the MODEL without the concepts."""
        problem = read_problem(concepts, retain)
        adapter = ComfyStableDiffusion(model, clip)
        problem = problem.with_anchors(adapter.anchors)
        changes = registry.get("methods", method)().fit(adapter, problem, RunContext())
        patched = model.clone()
        for change in changes:
            if not isinstance(change, WeightChange):
                raise TypeError(f"a closed form returns weights, not a {type(change).__name__}")
            # The adapter's layers have the MODEL's own names.
            names = {layer: layer for layer in change.layers}
            add_weights(patched, change, names, adapter.weights, strength)
        return (patched,)


class Compare:
    """Put images before an erasure above those after it, with the same prompts and seeds."""

    CATEGORY: ClassVar[str] = "expunge"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)
    FUNCTION: ClassVar[str] = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs, as ComfyUI asks."""
        title = {"default": "before and after"}
        return {"required": {"before": ("IMAGE",), "after": ("IMAGE",), "title": ("STRING", title)}}

    def compare(self, before: Tensor, after: Tensor, title: str) -> tuple[Tensor]:
        """Return one image of both batches, (1, height, width, 3) in [0, 1]."""
        if before.shape != after.shape:
            raise ExpungeError(
                f"before and after must be as many images of one size, not {tuple(before.shape[:3])}"
                f" and {tuple(after.shape[:3])}"
            )
        rows = [
            (name, list(x.movedim(-1, 1).cpu())) for name, x in (("before", before), ("after", after))
        ]
        sheet = draw_contact_sheet([Strip(title, [""] * len(before), rows)], 256)
        return (torch.from_numpy(np.asarray(sheet.convert("RGB"), np.float32) / 255)[None],)


def read_problem(concepts: str, retain: str) -> Problem:
    """Read what to erase and what to retain from the node's texts, one a line.

    Raises:
        ExpungeError: no concept is named.
    """
    erase = tuple(Concept.parse(line) for line in map(str.strip, concepts.splitlines()) if line)
    if not erase:
        raise ExpungeError("no concept is named; write one a line, such as: airplane=the sky")
    return Problem(erase, tuple(filter(None, map(str.strip, retain.splitlines()))))


NODE_CLASS_MAPPINGS = {
    "ExpungeLoadErasure": LoadErasure,
    "ExpungeEraseConcepts": EraseConcepts,
    "ExpungeCompare": Compare,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ExpungeLoadErasure": "Load erasure (expunge)",
    "ExpungeEraseConcepts": "Erase concepts (expunge)",
    "ExpungeCompare": "Compare before and after (expunge)",
}
