"""The image cache: every image is drawn once, and each metric looks at it once.

An image's address is the hash of everything it hangs on: the model's weights, configurations and
tokenizers, what was set on its parts, the edits, the prompt, the seed and the sampler. Beside it lie
the numbers that metrics took of it:

    images/ab/cdef….png             the image, 8 bits a channel, with the digest of its pixels
    images/ab/cdef….safetensors     one tensor a metric

Every file is written beside and moved into place, so that a run killed anywhere goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import cache_folder, check_writable, is_dir, is_file, replacing
from expunge.base.quiet import Progress, quiet
from expunge.changes import content
from expunge.edit import Edit
from expunge.fingerprint import is_scalar, of_tokenizer, scalars
from expunge.model import Model
from expunge.probe import Probe
from expunge.text import Text

FORMAT = 2
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
    """The prompt whose own tokens take the place of this prompt's (`residual`)."""
    text: Text | None = field(default=None, compare=False, repr=False)
    """Encoded text, one row, to draw from in place of the prompt: an attacked one."""
    text_hash: str = ""
    """The hash of its embedding."""

    @property
    def record(self) -> dict[str, Any]:
        """All that its image hangs on, ready for JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "text"}
        return plain if self.text_hash else {k: v for k, v in plain.items() if k != "text_hash"}


@dataclass(frozen=True, eq=False)
class Source:
    """A model with the edits that lie on it while it draws.

    Raises:
        ExpungeError: an edit lies on the model already: the cache would not know of it.
    """

    model: Model
    edits: tuple[Edit, ...] = ()
    identity: str = field(init=False, default="")
    """Everything its images hang on, besides the request."""

    def __post_init__(self) -> None:
        identity = {
            "format": FORMAT,
            "model": model_hash(self.model),
            "edits": [edit.hash for edit in self.edits],
            "sampler": sampler(self.model),
            "schedule": _set_on(self.model.pipe.scheduler),
        }
        object.__setattr__(self, "identity", json.dumps(identity, sort_keys=True))

    def address(self, request: Request) -> str:
        """The address of one of its images."""
        return hashlib.sha256((self.identity + json.dumps(request.record)).encode()).hexdigest()

    def draw(self, requests: Sequence[Request], progress: Progress = quiet) -> Tensor:
        """Draw images of one sampler setting afresh: (n, 3, height, width)."""
        first = requests[0]
        prompts = tuple(request.prompt for request in requests)
        text = residual(self.model, prompts, first.stand_in) if first.stand_in else None
        if first.text is not None:
            text = Text.joined([request.text for request in requests if request.text is not None])
        seeds = tuple(request.seed for request in requests)
        probe = Probe(prompts, seeds, first.num_inference_steps, first.guidance_scale, text)
        with contextlib.ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.apply(self.model))
            return self.model.draw(probe, batch_size=BATCH, progress=progress)


class Cache:
    """Images and their numbers on the disk.

    >>> cache = Cache()                                 # doctest: +SKIP
    >>> images = cache.draw(Source(model), requests)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: int | None = None,
        *,
        required: bool = True,
    ) -> None:
        """Open the cache; nothing is written yet.

        Args:
            folder: where it is; by default `EXPUNGE_CACHE`, or among the user's caches.
            limit: how many bytes it may hold, give or take a twentieth.
            required: whether the work needs it; otherwise what cannot be kept is drawn all the same.

        Raises:
            ExpungeError: it is required, and there is no folder for it, and none can be made.
        """
        self.folder = Path(os.devnull) / "pictures"  # where nothing can be
        self.required = required
        self.trouble = ""
        """Why images cannot be kept; "" where they can."""
        try:
            self.folder = (cache_folder() if folder is None else Path(folder)) / "pictures"
            check_writable(self.folder / "ab" / "x.png")
        except ExpungeError as error:
            self.trouble = (
                f"the image cache cannot be kept ({error}): set EXPUNGE_CACHE to a folder that can be"
                " written"
            )
            if required and not is_dir(self.folder):
                raise ExpungeError(self.trouble) from None
        self.limit = limit
        self.drawn = 0
        """How many images had to be drawn so far."""
        self._fresh = 0  # bytes written since it was last pruned

    def path(self, address: str, ending: str = ".png") -> Path:
        return self.folder / address[:2] / f"{address[2:]}{ending}"

    def draw(self, source: Source, requests: Sequence[Request], progress: Progress = quiet) -> Tensor:
        """Images (n, 3, height, width) in [0, 1], in steps of 1/255: read where they are there,
        drawn where not. An image that holds a number that is none comes back as nan.

        Raises:
            ExpungeError: the cache cannot be written.
        """
        addresses = [source.address(request) for request in requests]
        images: dict[str, Tensor] = {}
        missing: dict[tuple[int, float, str, bool], dict[str, Request]] = {}
        for address, request in zip(addresses, requests, strict=True):
            image = self._read(address, request)
            if image is not None:
                images[address] = image
            else:
                attacked = bool(request.text_hash)
                key = (request.num_inference_steps, request.guidance_scale, request.stand_in, attacked)
                missing.setdefault(key, {})[address] = request
        total = sum(map(len, missing.values()))
        if total and self.trouble and self.required:
            raise ExpungeError(self.trouble)  # now, and not when a batch is drawn
        done = 0
        for group in missing.values():
            items = list(group.items())
            for start in range(0, len(items), BATCH):
                part = items[start : start + BATCH]

                def tell(label: str, step: int, of: int, at: int = done, n: int = len(part)) -> None:
                    progress(label, round(100 * (at + n * step / of)), 100 * total)

                drawn = quantised(source.draw([request for _, request in part], tell))
                for (address, _), image in zip(part, drawn, strict=True):
                    if not self.trouble:
                        self._fresh += self._write(address, image)
                    images[address] = image
                if self.limit is not None and self._fresh > self.limit / 20:
                    self.prune(self.limit)
                done += len(part)
                self.drawn += len(part)
        return torch.stack([_float(images[address]) for address in addresses])

    def scores(self, address: str) -> dict[str, Tensor]:
        """The numbers that lie beside an image, by the identity of their metric."""
        path = self.path(address, ".safetensors")
        try:
            return safetensors.torch.load(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError):
            path.unlink(missing_ok=True)
            return {}

    def keep_scores(self, address: str, scores: Mapping[str, Tensor]) -> None:
        """Put numbers beside an image, with those that are there."""
        merged = {**self.scores(address), **scores}
        tensors = {key: value.detach().float().cpu().clone() for key, value in merged.items()}
        with replacing(self.path(address, ".safetensors")) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))

    def prune(self, limit: int) -> int:
        """Remove what was used longest ago until the cache holds at most `limit` bytes.

        Returns:
            how many images went.
        """
        if self.trouble:
            return 0
        found: dict[Path, tuple[float, int]] = {}
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                state, stem = path.stat(), path.with_suffix("")
                used, size = found.get(stem, (0.0, 0))
                found[stem] = (max(used, state.st_mtime), size + state.st_size)
        total = sum(size for _, size in found.values())
        gone = self._fresh = 0
        for stem, (_, size) in sorted(found.items(), key=lambda item: item[1][0]):
            if total <= limit:
                break
            for ending in (".png", ".safetensors"):
                stem.with_suffix(ending).unlink(missing_ok=True)
            total, gone = total - size, gone + 1
        return gone

    def _read(self, address: str, request: Request) -> Tensor | None:
        """A whole image (3, height, width), uint8, or nan-marked; None if it is to be drawn."""
        path = self.path(address)
        if not is_file(path):
            return None
        try:
            with Image.open(path) as file:
                file.load()
                array = np.asarray(file.convert("RGB"))
                if file.info.get("pixels") != _digest(array):
                    raise ValueError("its pixels are not those that were drawn")
                broken = file.info.get("broken") == "yes"
            with contextlib.suppress(OSError):  # a cache that may only be read
                os.utime(path)
        except (OSError, ValueError, SyntaxError) as error:
            warnings.warn(
                f"a cached image of {request.prompt!r}, seed {request.seed}, is damaged; drawn again",
                ExpungeWarning,
                stacklevel=3,
            )
            del error
            for ending in (".png", ".safetensors"):
                self.path(address, ending).unlink(missing_ok=True)
            return None
        image = torch.from_numpy(array.copy()).permute(2, 0, 1)
        return torch.full(image.shape, -1, dtype=torch.int16) if broken else image

    def _write(self, address: str, image: Tensor) -> int:
        """Keep an image; returns how many bytes it takes."""
        broken = image.dtype == torch.int16
        array = image.clamp(min=0).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        notes = PngImagePlugin.PngInfo()
        notes.add_text("pixels", _digest(array))
        if broken:
            notes.add_text("broken", "yes")
        with replacing(self.path(address)) as temporary:
            Image.fromarray(array).save(temporary, "PNG", pnginfo=notes)
            return temporary.stat().st_size


def quantised(images: Tensor) -> list[Tensor]:
    """Images in 8 bits, as files hold them; one with a nan in it becomes an int16 one of -1."""
    rounded = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    whole = images.isfinite().flatten(1).all(1)
    return [
        image if good else torch.full(image.shape, -1, dtype=torch.int16)
        for image, good in zip(rounded, whole.tolist(), strict=True)
    ]


def _float(image: Tensor) -> Tensor:
    """Back to [0, 1]; -1 stands for what was no number."""
    values = image.float() / 255
    return values.masked_fill(values < 0, float("nan"))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def residual(model: Model, prompts: Sequence[str], stand_in: str) -> Text:
    """The prompts' end and padding tokens alone, behind the start and own tokens of the stand-in.

    A text encoder tells the end token what the whole prompt says. Where the two differ in length,
    the padding is cut, or its last token repeated.
    """
    text = model.encode(list(prompts))
    other = model.encode([stand_in])
    own = int(other.content_mask[0].sum())
    rows: list[Tensor] = []
    marks: list[Tensor] = []
    ids: list[Tensor] = []
    for row in range(len(text)):
        end = 1 + int(text.content_mask[row].sum())
        last = text.embeddings.shape[1] - 1
        place = torch.arange(end, end + last - own).clamp(max=last)
        place = place.to(text.embeddings.device)
        for parts, mine, theirs in (
            (rows, text.embeddings[row], other.embeddings[0]),
            (marks, text.content_mask[row], other.content_mask[0]),
            (ids, text.ids[row], other.ids[0]),
        ):
            parts.append(torch.cat([theirs[: 1 + own], mine[place]]))
    return Text(tuple(prompts), torch.stack(rows), torch.stack(marks), torch.stack(ids), text.pooled)


def model_hash(model: Model) -> str:
    """The hash of all that a model's images and edits hang on, but for the sampler: weights,
    configurations, tokenizers, and what was set on its parts.

    Weights are read once, and again when one was replaced or written to: under a second a GB.

    Raises:
        ExpungeError: an edit lies on it.
    """
    parts = sorted(
        (name, part) for name, part in model.pipe.components.items() if isinstance(part, torch.nn.Module)
    )
    tensors = [(f"{name}.{key}", t) for name, part in parts for key, t in _tensors(part)]
    if any(hasattr(tensor, "beneath") for _, tensor in tensors):
        raise ExpungeError("an edit lies on this model; take it off and give it along instead")
    state = [(key, id(tensor), _version(tensor)) for key, tensor in tensors]
    known, seen = model.__dict__.get("_hash"), model.__dict__.get("_hashed")
    # Weights that were sent to the disk meanwhile cannot be read, nor written to.
    if known is None or (seen != state and not any(tensor.is_meta for _, tensor in tensors)):
        digest = hashlib.sha256()
        for key, tensor in tensors:
            digest.update(key.encode() + content(tensor))
        known = model.__dict__["_hash"] = digest.hexdigest()
        model.__dict__["_hashed"] = state
    others = sorted(
        (name, of_tokenizer(part))
        for name, part in model.pipe.components.items()
        if hasattr(part, "get_vocab")
    )
    settings = {
        "weights": known,
        "family": type(model).__name__,
        "model": scalars(model, ("name", "num_inference_steps", "guidance_scale", "sample_size")),
        "pipe": {k: v for k, v in scalars(model.pipe).items() if v is not None},
        "config": {
            key: value
            for key, value in model.pipe.config.items()
            if not key.startswith("_") and key != "requires_safety_checker" and is_scalar(value)
        },
        "parts": [(name, _plain(getattr(part, "config", {})), _switches(part)) for name, part in parts],
        "tokenizers": others,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def _switches(part: torch.nn.Module) -> list[Any]:
    """What was set on the modules of a part, which no configuration tells: FreeU's factors, tiles of the
    autoencoder, the paddings of convolutions, LoRAs that are switched on and their strengths."""
    # How they compute, or where they were read, says nothing of what.
    but = ("training", "gradient_checkpointing", "name_or_path", "is_parallelizable", "model_parallel")
    found: list[Any] = []
    for name, module in part.named_modules():
        values = scalars(module, but)
        lora = {
            key: getattr(module, key)
            for key in ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
            if hasattr(module, "lora_A") and hasattr(module, key)
        }
        if values or lora:
            found.append([name, values, {key: str(value) for key, value in lora.items()}])
    return found


def _tensors(part: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


def sampler(model: Model) -> dict[str, Any]:
    """The scheduler's class and settings, and the images' size and the number format where they are
    not the model's own."""
    scheduler = model.pipe.scheduler
    size = {} if model.sample_size is None else {"sample_size": model.sample_size}
    format = {} if model.autocast is None else {"autocast": str(model.autocast).removeprefix("torch.")}
    return {"class": type(scheduler).__name__, **_plain(scheduler.config), **size, **format}


def _set_on(scheduler: Any) -> dict[str, str]:
    """What can be set on a scheduler beside its configuration: a noise schedule, a shift."""
    found = {
        key: hashlib.sha256(content(value)).hexdigest()[:16]
        for key in ("betas", "alphas_cumprod", "final_alpha_cumprod")
        if isinstance(value := getattr(scheduler, key, None), Tensor)
    }
    shift = getattr(scheduler, "_shift", None)
    return found if shift is None else {**found, "shift": str(shift)}


def _plain(config: object) -> dict[str, str]:
    """A configuration without the names of files and versions."""
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    dropped = ("transformers_version", "dtype", "torch_dtype", "architectures", "model_type")
    kept = {k: v for k, v in sorted(items) if not k.startswith("_") and k not in dropped}
    return {k: str(list(v) if isinstance(v, tuple) else v) for k, v in kept.items()}  # as files read
