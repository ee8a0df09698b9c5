"""Second moments of what text layers are given: along which directions of their input text lies."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import find_cache_folder, read_header, replacing
from expunge.erasing.caption_gram import read_captions, text_hash
from expunge.erasing.prompt_templates import TEMPLATES
from expunge.model import Model
from expunge.ops.least_squares import gram
from expunge.problem import Problem

MAX_MULTIPLICATIONS = 4e12
"""The budget for encoding prompts, in multiplications: a minute on a slow machine."""

MAX_PARAMETERS = 1.5e9
"""Text encoders with more parameters are not run for the sake of a LoRA's rank."""


@dataclass(frozen=True, eq=False)
class TextMoments:
    """Second moments of a layer's input e over text."""

    erased: Tensor
    """Σ e eᵀ over each concept's prompts, averaged over prompts and summed over concepts: (d, d),
    float64."""
    retained: Tensor
    """Σ e eᵀ averaged over captions and retained prompts: (d, d), float64."""

    @cached_property
    def metric(self) -> Tensor:
        """S, (d, d), such that ‖Δ S^½‖² is what a change Δ does to text.

        Each erased concept weighs as much as a mean caption.
        """
        whole = self.erased + self.retained
        # The prompts span some directions only; a thousandth of the mean stands for the others, so that
        # S can be inverted and nothing is free there.
        return whole + 1e-3 * whole.trace() / len(whole) * torch.eye(len(whole), dtype=whole.dtype)

    def widen(self, inputs: int) -> TextMoments:
        """Widen the moments to a layer that has other inputs after the text: (inputs, inputs)."""
        if inputs <= len(self.retained):
            return self
        return TextMoments(*(_widen(part, inputs) for part in (self.erased, self.retained)))


def read_text_moments(model: Model, problem: Problem) -> dict[str, TextMoments]:
    """Encode prompts and captions, and return the second moments of each text layer's input.

    At most some hundred prompts are encoded, fewer the larger the text encoders are. The sums are cached
    in the cache folder.

    Args:
        model: the model whose text encoders run.
        problem: the concepts that are erased and the prompts that are retained.

    Returns:
        the moments by the layers' names; empty where the text encoders are too large.
    """
    parameters = sum(
        sum(p.numel() for p in part.parameters())
        for name, part in model.pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    )
    if parameters > MAX_PARAMETERS:
        return {}
    # Each parameter is multiplied once a token.
    a_prompt = 2 * max(parameters, 1) * (model.window + 2)
    count = max(16, min(208, int(MAX_MULTIPLICATIONS / a_prompt)))
    groups = [
        [t.format(name) for name in concept.names for t in TEMPLATES[concept.kind]]
        for concept in problem.erase
    ]
    most = max(1, count // max(len(groups), 1))
    groups = [_thin_out(prompts, most) for prompts in groups]
    retained = [
        "",
        *_thin_out(list(read_captions("general")), count),
        *_thin_out(list(problem.retain), count),
    ]
    encoders = text_hash(model, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpungeWarning)  # captions longer than the window are cut
        erased_sums = _sum_moments(model, groups, encoders)
        retained_sums = _sum_moments(model, [retained], encoders)
    found: dict[str, TextMoments] = {}
    for name, entries in (("tokens", model.text_entries()), ("pooled", model.pooled_entries())):
        if name in retained_sums and entries:
            one = TextMoments(erased_sums[name].double(), retained_sums[name].double())
            found |= {entry.layer: one for entry in entries}
    return found


def _sum_moments(model: Model, groups: Sequence[Sequence[str]], encoders: str) -> dict[str, Tensor]:
    """Return Σ e eᵀ of "tokens" and "pooled", averaged over a group's prompts and summed over groups.

    Each is (d, d), float32, read from the cache folder or written there.

    Args:
        model: the model whose text encoders run.
        groups: the prompts of each group.
        encoders: the hash of the text encoders, part of the cache's key.
    """
    key = hashlib.sha256(json.dumps([encoders, [list(group) for group in groups]]).encode())
    file = find_cache_folder() / "moments" / f"{key.hexdigest()}.safetensors"
    if file.is_file():
        try:
            read_header(file)
            return safetensors.torch.load_file(file)
        except (ExpungeError, safetensors.SafetensorError):
            pass  # a broken file is computed anew and replaced
    sums: dict[str, Tensor] = {}
    for prompts in groups:
        for start in range(0, len(prompts), 32):
            text = model.encode(prompts[start : start + 32])
            rows = {"tokens": text.embeddings.flatten(0, 1), "pooled": text.pooled}
            for name, some in rows.items():
                if some is not None:
                    part = gram(some.cpu()) / len(prompts)
                    sums[name] = sums[name] + part if name in sums else part
    found = {name: total.float() for name, total in sums.items()}
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(safetensors.torch.save(found))
    except ExpungeError as error:
        warnings.warn(f"the text's moments are not cached: {error}", ExpungeWarning, stacklevel=2)
    return found


def _thin_out(items: Sequence[str], most: int) -> list[str]:
    """At most so many of the items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _widen(moments: Tensor, inputs: int) -> Tensor:
    more = inputs - len(moments)
    # Nothing is known of the other inputs: as large as text on average, uncorrelated.
    mean = moments.trace() / len(moments)
    return torch.block_diag(moments, mean * torch.eye(more, dtype=moments.dtype))
