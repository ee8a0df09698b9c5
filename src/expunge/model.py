"""A text-to-image model: what every family of them answers, and `load`."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, ExpungeWarning, nearest
from expunge.base.quiet import Progress, quiet
from expunge.changes import PARALLEL, Applied, Change, Changes, compiled, find, path_to
from expunge.ops.attention import CrossAttention
from expunge.ops.cached_layers import cache_outputs
from expunge.probe import Probe
from expunge.runtime.schedulers import replaced
from expunge.text import Text, TextEntry

if TYPE_CHECKING:
    from expunge.families._lora import FusedLayers, LayerRows, LoraNaming

ANCHORS = {
    "object": "sky",
    "identity": "a person",
    "style": "art",
    "explicit": "a person wearing clothes",
}
"""What a concept of each kind becomes where neither the user nor the model says otherwise."""


class HasChanges(Protocol):
    """Anything made of changes: an edit."""

    @property
    def changes(self) -> Changes: ...


class Model(ABC):
    """A diffusers pipeline, asked the few questions that erasing needs. One subclass a family.

    The pipeline is neither copied nor changed.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """The diffusers classes of this family, the one that single files become first."""
    denoiser: ClassVar[str]
    """The pipeline's component that predicts: "unet" or "transformer"."""
    single_files: ClassVar[tuple[str, ...]] = ()
    """What diffusers calls the kinds of single-file checkpoints of this family."""
    single_file_key: ClassVar[str] = ""
    """Part of a tensor's name that every single-file checkpoint of this family has."""
    most_tokens: ClassVar[int] = 77
    """How many tokens of a prompt its longest text encoder reads."""
    ldm_layers: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Regular expressions of the denoiser's layers, and what the original code calls each of them."""
    ldm_fused_layers: ClassVar[FusedLayers] = ()
    """The original code's layers that are several here, or one with its rows in another order."""
    lora_naming: ClassVar[LoraNaming]
    """Which programs read LoRAs of this family, and how their metadata name its base models; by default
    diffusers alone. See `expunge.families._lora`."""
    missing_capabilities: ClassVar[Mapping[str, str]] = {}
    """What this family does not have of what a method may need, and why."""

    def __init__(self, pipe: Any, name: str = "", settings: Mapping[str, Any] | None = None) -> None:
        settings = settings or {}
        self.pipe = pipe
        self.name = name
        self.num_inference_steps = int(settings.get("num_inference_steps", 50))
        self.guidance_scale = float(settings.get("guidance_scale", 7.5))
        self.anchors = {**ANCHORS, **settings.get("anchors", {})}
        self.stored: Callable[[str, str], Tensor] | None = None
        """Reads a layer's parameter, by the names of both, where the denoiser was left on the disk."""
        self.sample_size: int | None = settings.get("sample_size")
        """Height and width of the latents to draw, where it is not the family's own."""
        self.autocast: torch.dtype | None = None
        """What `trajectory` computes its predictions in, where it is not the weights' own format."""

    # What a family answers.

    @property
    @abstractmethod
    def window(self) -> int:
        """How many tokens of its own a prompt may have."""

    @abstractmethod
    def count_tokens(self, prompt: str) -> int:
        """How many tokens of its own a prompt has, uncut."""

    @abstractmethod
    def knows(self, prompt: str) -> bool:
        """Whether the tokenizer makes anything of a prompt: a token that stands for some of it."""

    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The whole words that the tokenizer knows, in the order of their numbers."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Text:
        """The prompts as the denoiser sees them, each distinct one encoded once.

        A prompt longer than the window is cut, as diffusers does, with an `ExpungeWarning`.
        """

    def _encoded(self, prompts: Sequence[str]) -> Text:
        """As `encode`, with gradients where they are enabled."""
        raise NotImplementedError

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor | int, text: Text) -> Tensor:
        """The denoiser's raw prediction for latents (n, c, h, w) at time t and n rows of text."""

    @abstractmethod
    def trajectory(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Denoise n images from noise; yields (t, latents) before every step, as `predict` takes them,
        and, with t = 0, the clean latents at the end. Row i starts from the noise of `seeds[i]`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The images of clean latents: (n, 3, height, width), float32 in [0, 1]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """The clean latents of images (n, 3, height, width) in [0, 1], those the model draws in size.

        The inverse of `decode`, as near as the autoencoder comes to it.

        Raises:
            ExpungeError: the images are of another size than the model draws.
        """

    @abstractmethod
    def log_snr(self) -> Tensor:
        """log(signal variance / noise variance) at each of the denoiser's times 0, 1, …: (T,), float64.

        It falls with time; the last may be -inf. Times that mean the same to two models have the
        same log-SNR.
        """

    @property
    def latents_side(self) -> int:
        """Height and width of the latents that are drawn; of oblong ones, the root of their product."""
        raise NotImplementedError

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents (n, c, h, w) as they are at the times t (n,), as `predict` takes them."""

    @abstractmethod
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Where images attend to text tokens, for `read_attention`."""

    @abstractmethod
    def text_entries(self) -> tuple[TextEntry, ...]:
        """The linear layers through which `Text.embeddings` enters."""

    def pooled_entries(self) -> tuple[TextEntry, ...]:
        """The linear layers through which `Text.pooled` enters, as the first of a layer's inputs."""
        return ()

    @classmethod
    def ldm_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        """What the model's first code, and so single files, call a layer of the denoiser.

        None where it has no place of its own there: it is part of a larger layer.

        Args:
            layer: its name inside the denoiser.
            config: the denoiser's configuration, or what `layout` makes of a single file.
        """
        for pattern, name in cls.ldm_layers:
            if found := re.fullmatch(pattern, layer):
                return found.expand(name)
        return None

    @classmethod
    def find_ldm_layers(cls, name: str, config: Mapping[str, Any]) -> tuple[LayerRows, ...]:
        """Find the denoiser's layers that the original code calls `name`; inverts `ldm_layer_name`.

        Args:
            name: a layer's name in the original code, without the prefix of the denoiser.
            config: the denoiser's configuration, or what `infer_config` makes of a single file.

        Returns:
            each layer, and how its rows are selected from the original layer's; empty if there is none.
        """
        number = r"(\d+)"
        for pattern, original in cls.ldm_layers:
            wanted = re.escape(original).replace(r"\\1", number)
            if found := re.fullmatch(wanted, name):
                block = found[1] if found.groups() else ""
                return ((pattern.replace(number, block).replace("\\.", "."), None),)
        for pattern, parts in cls.ldm_fused_layers:
            if found := re.fullmatch(pattern, name):
                return tuple((found.expand(layer), pick) for layer, pick in parts)
        return ()

    @classmethod
    def infer_variant(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], prediction_type: str = ""
    ) -> str:
        """Tell apart the base models of a family, as keys of `lora_naming.bases`; "" is the usual one.

        Args:
            config: the denoiser's configuration, or what `infer_config` makes of a single file.
            tensors: the names of a checkpoint's tensors, as its files call them, and their shapes.
            prediction_type: what the scheduler's configuration says; "" if there is none.
        """
        return ""

    @classmethod
    def infer_config(cls, tensors: Sequence[str]) -> Mapping[str, Any]:
        """What the names of a single file's tensors tell of the denoiser's configuration."""
        return {}

    @classmethod
    def kohya_layer_name(cls, layer: str, config: Mapping[str, Any]) -> str | None:
        """What a layer of the denoiser is called in a LoRA of kohya's naming; None where nothing is."""
        original = cls.ldm_layer_name(layer, config)
        return None if original is None else "lora_unet_" + original.replace(".", "_")

    # What follows from the answers.

    @property
    def network(self) -> Any:
        """The denoiser, whole: never spread over several devices."""
        network = getattr(self.pipe, self.denoiser)
        return network.module if isinstance(network, PARALLEL) else network

    @property
    def device(self) -> torch.device:
        """Where the model works; some of its parts may lie elsewhere between their calls."""
        if self.stored:
            return next(p.device for p in self.parameters() if not p.is_meta)
        # A pipeline has none where its denoiser is spread over several.
        device: torch.device | None = getattr(self.pipe, "_execution_device", None)
        return device or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the denoiser."""
        return self.network.dtype

    def unconditional(self, n: int) -> Text:
        """What guidance leads away from, n rows: the empty prompt, unless the family says otherwise."""
        return self.encode([""] * n)

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer as it stands, without its gradient."""
        if self.stored:
            return self.stored(layer, "weight")
        return find(self.pipe, layer).weight.detach()  # type: ignore[operator]

    def require_window(self, prompts: Sequence[str]) -> None:
        """Check that no prompt would be cut.

        Raises:
            ExpungeError: one would.
        """
        require_unicode(prompts)
        for prompt in dict.fromkeys(prompts):
            if (n := self.count_tokens(prompt)) > self.window:
                shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
                raise ExpungeError(
                    f"{shown!r} has {n} tokens, and this model reads no more than {self.window}"
                )

    def require_words(self, prompts: Sequence[str]) -> None:
        """Check that something of every prompt survives the tokenizer.

        Raises:
            ExpungeError: nothing of one does: to the model it is the empty prompt.
        """
        for prompt in dict.fromkeys(prompts):
            if not self.knows(prompt):
                raise ExpungeError(
                    f"this model's tokenizer knows no character of {prompt!r}; say it in other words"
                )

    def unfamiliar(self, prompt: str) -> list[str]:
        """The words of a prompt, of three letters or more, that the tokenizer can only spell."""
        known = {word.casefold() for word in self.vocabulary()}
        words = re.findall(r"[a-z]{3,}", prompt.casefold())
        return [word for word in dict.fromkeys(words) if word not in known]

    def near(self, word: str) -> str:
        """The word of the tokenizer's own that is spelled most like one; "" where none is."""
        return nearest(word.casefold(), (known.casefold() for known in self.vocabulary()), 0.75)

    @contextlib.contextmanager
    def using(self, *edits: HasChanges | Changes) -> Iterator[None]:
        """Lay edits (or bare changes) on the model for a block; always takes them off again.

        Raises:
            ExpungeError: a layer is missing or has another shape.
        """
        changes: list[Change] = []
        for edit in edits:
            changes.extend(edit if isinstance(edit, Sequence) else edit.changes)
        with Applied(self.pipe, changes):
            yield

    @contextlib.contextmanager
    def autocasting(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Draw with `torch.autocast` for a block: faster on hardware that has the format.

        Latents, text and weights stay as they are, so that edits are found and gates switched in
        full precision; only the denoiser's answers while drawing are rounded.

        Args:
            dtype: bfloat16 or float16; None changes nothing.
        """
        before, self.autocast = self.autocast, dtype or self.autocast
        try:
            yield
        finally:
            self.autocast = before

    def sampled_by(self, scheduler: str) -> Model:
        """The same model drawing with another scheduler; its weights are shared, and this one stays.

        Args:
            scheduler: diffusers' class, with "Scheduler" at its end or without; "" for its own.

        Raises:
            ExpungeError: there is no such scheduler, or it is not for a model of this kind.
        """
        other = replaced(self.pipe.scheduler, scheduler, type(self).__name__)
        if other is self.pipe.scheduler:
            return self
        model = copy.copy(self)
        model.pipe = copy.copy(self.pipe)  # the parts are the same, and so are edits laid on them
        model.pipe.scheduler = other
        return model

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Every parameter of the pipeline."""
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                yield from part.parameters()

    def timesteps(self, num_inference_steps: int | None = None) -> tuple[int, ...]:
        """The times at which `trajectory` asks the denoiser, from noise on."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps or self.num_inference_steps)
        return tuple(int(t) for t in scheduler.timesteps)

    def noise_scale(self) -> Tensor:
        """dε/dprediction: what an error of the prediction is worth in ε, at each time: (T,), float64.

        With signal variance ᾱ it is 1 where the network predicts ε, √ᾱ where v, √(ᾱ/(1 − ᾱ)) where
        the clean latents, and 1 − σ = √ᾱ' / (√ᾱ' + √(1 − ᾱ')) where a flow's velocity.
        """
        level = self.log_snr()
        kind = getattr(self.pipe.scheduler.config, "prediction_type", "flow_prediction")
        return {
            "epsilon": torch.ones_like(level),
            "v_prediction": level.sigmoid().sqrt(),
            "sample": (level / 2).exp(),
            "flow_prediction": (level / 2).sigmoid(),
        }[kind]

    def word_vectors(self, word: str) -> list[Tensor]:
        """The token embedding of a word, (width,), in each text encoder.

        Raises:
            ExpungeError: it is more than one token.
        """
        return [layers[0].weight[i].detach().clone() for layers, i in self._word(word)]

    def encode_with(self, prompts: Sequence[str], word: str, vectors: Sequence[Tensor]) -> Text:
        """The prompts, with other token embeddings in the place of a word's own.

        Gradients flow to `vectors`, one for each text encoder, where they are enabled.

        Raises:
            ExpungeError: the word is more than one token.
        """
        with contextlib.ExitStack() as stack:
            for (layers, i), vector in zip(self._word(word), vectors, strict=True):

                def spoken(
                    _: Any, given: tuple[Tensor, ...], output: Tensor, i: int = i, v: Tensor = vector
                ) -> Tensor:
                    return torch.where((given[0] == i)[..., None], v.to(output), output)

                for layer in layers:
                    stack.callback(layer.register_forward_hook(spoken).remove)
            return self._encoded(prompts)

    def _word(self, word: str) -> list[tuple[list[Any], int]]:
        """For each text encoder the layers of its token embeddings (T5's is there twice), and the word's
        number."""
        found = []
        for name, part in sorted(self.pipe.components.items()):
            if name.startswith("text_encoder") and part is not None:
                tokenizer = self.pipe.components[name.replace("text_encoder", "tokenizer")]
                ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
                if len(ids) != 1:
                    raise ExpungeError(
                        f"{word!r} is {len(ids)} tokens to this model; take one of one token"
                    )
                weight = part.get_input_embeddings().weight
                layers = [m for m in part.modules() if getattr(m, "weight", None) is weight]
                found.append((layers, ids[0]))
        return found

    def denoise(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        until: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[int, Tensor]:
        """The time and latents after `until` steps from noise: (t, (n, c, h, w))."""
        (passed,) = self.passing(
            text,
            seeds,
            at=[until],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return passed

    def passing(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        at: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[tuple[int, Tensor]]:
        """The time and latents after each of some numbers of steps of one denoising run.

        It ends with the last of them.

        Args:
            text: n rows, one for each image.
            seeds: the numbers of their noises, n.
            at: numbers of steps, rising.
        """
        steps = self.trajectory(
            text, seeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        passed = []
        with self._text_read_once():
            for done, point in enumerate(steps):
                if done in at:
                    passed.append(point)
                if done == at[-1]:
                    return passed
        raise ExpungeError(f"until must be 0 to {done}, not {at[-1]}")

    @torch.inference_mode()
    def draw(self, probe: Probe, *, batch_size: int = 16, progress: Progress = quiet) -> Tensor:
        """The images of a probe: (n, 3, height, width), float32 on the CPU, in [0, 1].

        Args:
            probe: what to draw.
            batch_size: images denoised together; larger is faster and takes more memory.
            progress: told of every denoising step.
        """
        distinct = list(dict.fromkeys(probe.prompts))
        text = probe.text or self.encode(distinct)[[distinct.index(p) for p in probe.prompts]]
        steps = probe.num_inference_steps or self.num_inference_steps
        images = []
        for start in range(0, len(probe), batch_size):
            rows = range(start, min(start + batch_size, len(probe)))
            trajectory = self.trajectory(
                text[rows],
                [probe.seeds[i] for i in rows],
                num_inference_steps=steps,
                guidance_scale=probe.guidance_scale,
            )
            with self._text_read_once():
                for step, (_, latents) in enumerate(trajectory):
                    done = start * steps + min(step, steps) * len(rows)
                    progress("drawing", min(done, len(probe) * steps - 1), len(probe) * steps)
            images.append(self.decode(latents))
        progress("drawing", len(probe) * steps, len(probe) * steps)
        return torch.cat(images)

    def _text_read_once(self) -> contextlib.AbstractContextManager[None]:
        """For a block in which the text is the same at every step, and so is what layers make of it."""
        entries = (*self.text_entries(), *self.pooled_entries())
        if any(compiled(module) for entry in entries for module in path_to(self.pipe, entry.layer)):
            return contextlib.nullcontext()  # what was compiled is left as it is
        layers = [entry.layer.rpartition(".") for entry in entries]
        return cache_outputs([(find(self.pipe, parent), name) for parent, _, name in layers])


def require_unicode(prompts: Sequence[str]) -> None:
    """Check that every prompt is text: bytes that are no UTF-8 come from a command line as surrogates.

    Raises:
        ExpungeError: one is not.
    """
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            shown = prompt.encode("utf-8", "backslashreplace").decode()
            raise ExpungeError(f"'{shown}' is not text in UTF-8; see what encoding it is in") from None


def warn_cut(prompt: str, tokens: int, window: int) -> None:
    """Say that a prompt is longer than the window and will be cut."""
    warnings.warn(
        f"{prompt[:40]!r}… has {tokens} tokens; the model reads the first {window}",
        ExpungeWarning,
        stacklevel=3,
    )
