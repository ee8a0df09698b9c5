"""What layers are given of text: how much of it lies along which directions."""

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
from expunge.base.files import cache_folder, read_header, replacing
from expunge.erasing.caption_gram import read_captions, text_hash
from expunge.erasing.prompt_templates import assemble_prompts
from expunge.model import Model
from expunge.ops.least_squares import gram
from expunge.problem import Problem

WORK = 4e12
"""How many multiplications reading texts may take: a minute on a slow machine."""

LARGEST = 1.5e9
"""Text encoders with more parameters than this are not read for the sake of a LoRA's rank."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The second moments of what layers are given."""

    erased: Tensor
    """Σ over concepts of the mean over its prompts of Σ e eᵀ: (d, d), float64."""
    kept: Tensor
    """The mean over captions and retained prompts of Σ e eᵀ: (d, d), float64."""

    @cached_property
    def metric(self) -> Tensor:
        """S, (d, d): what a change does to text is ‖Δ S^½‖².

        Each erased concept weighs as much as a mean caption. A thousandth of the mean stands for all
        directions in which nothing was read.
        """
        whole = self.erased + self.kept
        return whole + 1e-3 * whole.trace() / len(whole) * torch.eye(len(whole), dtype=whole.dtype)

    def widened(self, inputs: int) -> Seen:
        """The same for a layer that is given something else behind the text."""
        if inputs <= len(self.kept):
            return self
        return Seen(*(_widened(part, inputs) for part in (self.erased, self.kept)))


def seen(model: Model, problem: Problem) -> dict[str, Seen]:
    """What each layer through which text enters is given, by the layers' names.

    Prompts of the concepts and captions are read, each some hundreds at most, fewer the larger the text
    encoders are; nothing where they are very large.

    Args:
        model: whose text encoders read.
        problem: what is erased and retained.
    """
    parameters = sum(
        sum(p.numel() for p in part.parameters())
        for name, part in model.pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    )
    if parameters > LARGEST:
        return {}
    count = max(16, min(208, int(WORK / (2 * max(parameters, 1) * (model.window + 2)))))
    spread = [assemble_prompts(concept) for concept in problem.erase]
    most = max(1, count // max(len(spread), 1))
    spread = [_some(prompts, most) for prompts in spread]
    plain = ["", *_some(list(read_captions("general")), count), *_some(list(problem.retain), count)]
    encoders = text_hash(model, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpungeWarning)  # captions that are cut
        erased = _moments(model, spread, encoders)
        kept = _moments(model, [plain], encoders)
    found: dict[str, Seen] = {}
    for name, entries in (("tokens", model.text_entries()), ("pooled", model.pooled_entries())):
        if name in kept and entries:
            one = Seen(erased[name].double(), kept[name].double())
            found |= {entry.layer: one for entry in entries}
    return found


def _moments(model: Model, groups: Sequence[Sequence[str]], encoders: str) -> dict[str, Tensor]:
    """Of "tokens" and "pooled" the sum over groups of the mean over prompts of Σ e eᵀ, in float32.

    They are kept in the cache folder: another export of the edit reads no text.
    """
    key = hashlib.sha256(json.dumps([encoders, [list(group) for group in groups]]).encode())
    file = cache_folder() / "moments" / f"{key.hexdigest()}.safetensors"
    if file.is_file():
        try:
            read_header(file)
            return safetensors.torch.load_file(file)
        except (ExpungeError, safetensors.SafetensorError):
            pass  # broken: made again
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
        warnings.warn(
            f"what was read is not kept for another time: {error}", ExpungeWarning, stacklevel=2
        )
    return found


def _some(items: Sequence[str], most: int) -> list[str]:
    """At most so many, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _widened(moments: Tensor, inputs: int) -> Tensor:
    more = inputs - len(moments)
    mean = moments.trace() / len(moments)
    return torch.block_diag(moments, mean * torch.eye(more, dtype=moments.dtype))
