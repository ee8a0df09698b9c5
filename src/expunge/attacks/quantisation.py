"""The erased denoiser in 8 or 4 bits, the edit rounded with it or kept beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from expunge.attack import Attack
from expunge.changes import iterate_layers
from expunge.edit import Edit
from expunge.model import Model
from expunge.ops.quantisation import quantise_int8, quantise_nf4
from expunge.runtime.context import RunContext

ROUND = {"int8": quantise_int8, "nf4": quantise_nf4}


@dataclass(frozen=True)
class Quantisation(Attack):
    """Round the weights of the denoiser's linear layers and convolutions to few bits.

    `merged` rounds the weights that the edit has changed, as when a published folder is loaded in 4
    bits; `beside` rounds the original's and lays the edit on them in full precision, as when an edit
    or a LoRA is loaded onto a quantised model.

    The rounding is simulated (`ops.quantisation`): the images are those of a quantised model up to the
    order of its sums, on any hardware. Gated edits read the text as it is; their gates stay as made.

    Cost: no more than drawing.

    Source: LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339) for one scale a channel; QLoRA
    (Dettmers et al., NeurIPS 2023, arXiv 2305.14314) for NormalFloat-4.
    """

    ladders: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"format": ["int8", "nf4"]},
        "beside": {"format": ["int8", "nf4"], "edit": "beside"},
    }

    format: Literal["int8", "nf4"] = "int8"
    """int8, one scale an output channel; nf4, NormalFloat-4 in blocks of 64."""
    edit: Literal["merged", "beside"] = "merged"
    """Whether the edit is rounded with the weights or applied to rounded ones."""

    @contextmanager
    def apply(self, model: Model, edit: Edit, run: RunContext) -> Iterator[Model]:
        with contextlib.ExitStack() as stack:
            if self.edit == "merged":
                stack.enter_context(model.using(edit))
            stack.enter_context(quantised(model, self.format))
            if self.edit == "beside":
                stack.enter_context(model.using(edit))
            yield model


@contextmanager
def quantised(model: Model, format: Literal["int8", "nf4"]) -> Iterator[None]:
    """Round the denoiser's weights for a block; afterwards they are as before, bit for bit."""
    before: list[tuple[Any, Any]] = []
    try:
        for _, module in iterate_layers(model.network):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                weight = module.weight
                before.append((module, weight))
                # Another parameter, not other numbers in this one: an edit's tensors may be its data.
                rounded = ROUND[format](weight.detach())
                module.weight = nn.Parameter(rounded, requires_grad=weight.requires_grad)
        yield
    finally:
        with torch.no_grad():
            for module, weight in before:
                module.weight = weight
