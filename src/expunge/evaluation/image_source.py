"""What draws an image: a request, and the model with the edit or attack that lies on it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.attack import Attack
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import encode_tensor
from expunge.edit import Edit
from expunge.fingerprint import config_as_read, hash_for_images
from expunge.model import Model
from expunge.probe import Probe
from expunge.runtime.context import RunContext
from expunge.text import Text

FORMAT = 2
"""The version of an image's address: another one draws everything again."""
BATCH = 64
"""Images drawn together."""


@dataclass(frozen=True)
class Request:
    """One image to draw."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    stand_in: str = ""
    """The prompt whose own tokens take the place of this prompt's (`encode_residual`)."""
    text: Text | None = field(default=None, compare=False, repr=False)
    """Encoded text, one row, to draw from in place of the prompt: an attacked one."""
    text_hash: str = ""
    """The hash of its embedding."""

    @property
    def record(self) -> dict[str, Any]:
        """All that its image hangs on, ready for JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "text"}
        # No key where it is empty: so the addresses of images from before there were attacks hold.
        return plain if self.text_hash else {k: v for k, v in plain.items() if k != "text_hash"}


@dataclass(frozen=True, eq=False)
class Condition:
    """An attack that changes the model, and what it changes it by."""

    attack: Attack
    edit: Edit
    """What is attacked; without changes, the original."""
    seed: int = 0
    """The number that the attack's random choices follow from."""

    @property
    def record(self) -> dict[str, Any]:
        """All that the changed model hangs on besides model and edits, ready for JSON."""
        cls, fields = type(self.attack), dataclasses.asdict(self.attack)
        problem = dataclasses.asdict(self.edit.record.problem)
        return {"attack": cls.__name__, "fields": fields, "problem": problem, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class Source:
    """A model with the edits that lie on it while it draws, or under a condition.

    Raises:
        ExpungeError: an edit lies on the model already: the cache would not know of it.
    """

    model: Model
    edits: tuple[Edit, ...] = ()
    condition: Condition | None = None
    """What changes the edited model; it lays the edit on by itself."""
    identity: str = field(init=False, default="")
    """Everything its images hang on, besides the request."""

    def __post_init__(self) -> None:
        identity: dict[str, Any] = {
            "format": FORMAT,
            "model": hash_for_images(self.model),
            "edits": [edit.hash for edit in self.edits],
            "sampler": describe_sampler(self.model),
            "schedule": _set_on(self.model.pipe.scheduler),
        }
        if self.condition:
            identity["condition"] = self.condition.record
        object.__setattr__(self, "identity", json.dumps(identity, sort_keys=True))

    def address(self, request: Request) -> str:
        """Return the address of one of its images."""
        return hashlib.sha256((self.identity + json.dumps(request.record)).encode()).hexdigest()

    def draw(self, requests: Sequence[Request], progress: Progress = ignore_progress) -> Tensor:
        """Draw images of one sampler setting afresh: (n, 3, height, width)."""
        first = requests[0]
        prompts = tuple(request.prompt for request in requests)
        seeds = tuple(request.seed for request in requests)
        with contextlib.ExitStack() as stack:
            held = self.__dict__.get("_held")
            model = held(progress) if held else self._enter(stack, progress)
            # Once the edits lie on it: they may change the text encoder.
            text = encode_residual(model, prompts, first.stand_in) if first.stand_in else None
            if first.text is not None:
                text = Text.joined([request.text for request in requests if request.text is not None])
            probe = Probe(prompts, seeds, first.num_inference_steps, first.guidance_scale, text)
            return model.draw(probe, batch_size=BATCH, progress=progress)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the changed model for a block, once something has been drawn with it.

        What a condition does, such as training, is done once for all images, and not at all where every
        image is found in the cache. Nothing else may draw with the model in the block.
        """
        with contextlib.ExitStack() as stack:
            entered: list[Model] = []

            def held(progress: Progress) -> Model:
                if not entered:
                    entered.append(self._enter(stack, progress))
                return entered[0]

            # Into `__dict__`, past the frozen dataclass: it is no part of what a source is.
            self.__dict__["_held"] = held
            try:
                yield
            finally:
                del self.__dict__["_held"]

    def _enter(self, stack: contextlib.ExitStack, progress: Progress) -> Model:
        """Apply the edits, or the condition, until the stack is closed; the model to draw with."""
        if one := self.condition:
            run = RunContext(one.seed, progress)
            # Measuring is in inference mode, in which a condition could not train.
            with torch.inference_mode(False):
                return stack.enter_context(one.attack.apply(self.model, one.edit, run))
        for edit in self.edits:
            stack.enter_context(edit.apply(self.model))
        return self.model


def describe_sampler(model: Model) -> dict[str, Any]:
    """Return the scheduler's class and settings.

    With them go the images' size and the number format where they are not the model's own.
    """
    scheduler = model.pipe.scheduler
    size = {} if model.sample_size is None else {"sample_size": model.sample_size}
    format = {} if model.autocast is None else {"autocast": str(model.autocast).removeprefix("torch.")}
    return {"class": type(scheduler).__name__, **config_as_read(scheduler.config), **size, **format}


def _set_on(scheduler: Any) -> dict[str, str]:
    """What can be set on a scheduler beside its configuration: a noise schedule, a shift."""
    found = {
        key: hashlib.sha256(encode_tensor(value)).hexdigest()[:16]
        # Users set these directly, as for zero terminal SNR; no configuration tells.
        for key in ("betas", "alphas_cumprod", "final_alpha_cumprod")
        if isinstance(value := getattr(scheduler, key, None), Tensor)
    }
    shift = getattr(scheduler, "_shift", None)
    return found if shift is None else {**found, "shift": str(shift)}


def encode_residual(model: Model, prompts: Sequence[str], stand_in: str) -> Text:
    """Encode the prompts' end and padding tokens alone, behind start and own tokens of the stand-in.

    A text encoder tells the end token what the whole prompt says. Where the two differ in length,
    the padding is cut, or its last token repeated.

    Args:
        model: what encodes.
        prompts: whose residual is wanted.
        stand_in: the prompt whose own tokens take the place of theirs.
    """
    text = model.encode(list(prompts))
    other = model.encode([stand_in])
    if text.eos_index is None or other.eos_index is None:
        raise TypeError("ends must be a tensor (n, parts), not None")
    cut, width = int(other.eos_index[0, 0]), text.embeddings.shape[1]
    parts: dict[str, list[Tensor]] = {"embeddings": [], "content_mask": [], "ids": [], "read": []}
    for row in range(len(text)):
        end = int(text.eos_index[row, 0])
        # Moved, so that the end token stands where the stand-in's would: positions were encoded before.
        place = torch.arange(end, end + width - cut).clamp(max=width - 1)
        place = place.to(text.embeddings.device)
        for name, found in parts.items():
            found.append(torch.cat([getattr(other, name)[0, :cut], getattr(text, name)[row, place]]))
    embeddings, own, ids, read = (torch.stack(found) for found in parts.values())
    return Text(
        tuple(prompts),
        embeddings,
        own,
        ids,
        # The pooled vector stays: it is read at the end token, and so is part of the residual.
        text.pooled,
        torch.full_like(text.eos_index[:, :1], cut),
        attention_mask=None if text.attention_mask is None else read,
    )
