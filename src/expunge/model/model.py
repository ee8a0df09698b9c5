"""A diffusers pipeline as a model: what follows from a family's answers, and drawing."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from expunge.base.errors import ExpungeError, find_nearest
from expunge.base.quiet import Progress, ignore_progress
from expunge.changes import PARALLEL, Applied, Change, Changes, find_layer, find_layer_path, is_compiled
from expunge.model.contract import FamilyContract
from expunge.model.prompt_checks import check_unicode
from expunge.ops.cached_layers import cache_outputs
from expunge.probe import Probe
from expunge.runtime.schedulers import replace_scheduler
from expunge.text import Text


class HasChanges(Protocol):
    """Anything that has changes, such as an edit."""

    @property
    def changes(self) -> Changes:
        """The changes, in the order in which they are applied."""
        ...


class Model(FamilyContract):
    """A text-to-image model: a diffusers pipeline with what erasing needs of it. One subclass a family.

    The pipeline is neither copied nor changed.
    """

    @property
    def network(self) -> Any:
        """The denoiser, without a wrapper that spreads it over several devices."""
        network = getattr(self.pipe, self.denoiser)
        return network.module if isinstance(network, PARALLEL) else network

    @property
    def device(self) -> torch.device:
        """The device that the model computes on; with offloading, idle parts lie elsewhere."""
        if self.stored:
            # The denoiser is on the meta device then; the text encoders say where work is done.
            return next(p.device for p in self.parameters() if not p.is_meta)
        # diffusers knows no execution device where the denoiser is spread over several.
        device: torch.device | None = getattr(self.pipe, "_execution_device", None)
        return device or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser."""
        return self.network.dtype

    def unconditional(self, n: int) -> Text:
        """Return n rows of the negative prompt: the empty one, unless a family overrides it."""
        return self.encode([""] * n)

    def weight(self, layer: str) -> Tensor:
        """Return the weight of a layer, detached, with the changes that are applied to it."""
        if self.stored:
            return self.stored(layer, "weight")
        return find_layer(self.pipe, layer).weight.detach()  # type: ignore[operator]

    def require_window(self, prompts: Sequence[str]) -> None:
        """Check that no prompt would be truncated.

        Raises:
            ExpungeError: one would be.
        """
        check_unicode(prompts)
        for prompt in dict.fromkeys(prompts):
            if (n := self.count_tokens(prompt)) > self.window:
                shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
                raise ExpungeError(
                    f"{shown!r} has {n} tokens, and this model reads no more than {self.window}"
                )

    def require_words(self, prompts: Sequence[str]) -> None:
        """Check that the tokenizer has a token for some part of every prompt.

        Raises:
            ExpungeError: it has none for one, which the model would read as the empty prompt.
        """
        for prompt in dict.fromkeys(prompts):
            if not self.knows(prompt):
                raise ExpungeError(
                    f"this model's tokenizer knows no character of {prompt!r}; say it in other words"
                )

    def find_unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt, of three letters or more, that are not in the vocabulary."""
        known = {word.casefold() for word in self.vocabulary()}
        # Shorter words, digits and other scripts are pieced together in every tokenizer.
        words = re.findall(r"[a-z]{3,}", prompt.casefold())
        return [word for word in dict.fromkeys(words) if word not in known]

    def find_near_word(self, word: str) -> str:
        """Return the word of the vocabulary spelled most like one; "" where none is near."""
        return find_nearest(word.casefold(), (known.casefold() for known in self.vocabulary()), 0.75)

    def read_ahead_parameters(self, name: str) -> dict[str, Tensor]:
        """The parameters of one of the layers of `read_ahead`, by their names inside it."""
        found = self.network.get_submodule(name).named_parameters()
        if self.stored is None:
            return dict(found)
        places = {key: f"{self.denoiser}.{name}.{key}".rpartition(".") for key, _ in found}
        return {key: self.stored(layer, parameter) for key, (layer, _, parameter) in places.items()}

    @contextlib.contextmanager
    def using(self, *edits: HasChanges | Changes, strength: float = 1.0) -> Iterator[None]:
        """Apply edits (or changes) to the model for a block, and always remove them at its end.

        Args:
            edits: the edits.
            strength: how much of what they change together counts: see `Edit.apply`.

        Raises:
            ExpungeError: a layer is missing or has another shape, or the strength is no number of 0 or
                more.
        """
        # All in one `Applied`: several would each check the fit and swap the same parameters again.
        changes: list[Change] = []
        for edit in edits:
            changes.extend(edit if isinstance(edit, Sequence) else edit.changes)
        with Applied(self.pipe, changes, strength):
            yield

    @contextlib.contextmanager
    def autocasting(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Draw with `torch.autocast` for a block: faster on hardware that has the dtype.

        Latents, text and weights keep their dtype, so that edits are found and gates computed in full
        precision; only the denoiser's predictions while drawing are rounded.

        Args:
            dtype: bfloat16 or float16; None changes nothing.
        """
        # Nested blocks: None inside keeps the dtype of the outer block.
        before, self.autocast = self.autocast, dtype or self.autocast
        try:
            yield
        finally:
            self.autocast = before

    def with_scheduler(self, scheduler: str) -> Model:
        """Return a model that draws with another scheduler and shares this one's weights.

        Args:
            scheduler: the diffusers class, with or without "Scheduler" at its end; "" for its own.

        Raises:
            ExpungeError: there is no such scheduler, or it is for models that predict something else.
        """
        other = replace_scheduler(self.pipe.scheduler, scheduler, type(self).__name__)
        if other is self.pipe.scheduler:
            return self
        model = copy.copy(self)
        model.pipe = copy.copy(
            self.pipe
        )  # a shallow copy: the components, and edits applied to them, are shared
        model.pipe.scheduler = other
        return model

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield every parameter of the pipeline."""
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                yield from part.parameters()

    def timesteps(self, num_inference_steps: int | None = None) -> tuple[int, ...]:
        """Return the timesteps of `trajectory`, from noise to image."""
        # A copy: `set_timesteps` would change the pipeline's own scheduler.
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps or self.num_inference_steps)
        return tuple(int(t) for t in scheduler.timesteps)

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, in diffusers' word; flows, which have none, "flow_prediction"."""
        return str(getattr(self.pipe.scheduler.config, "prediction_type", "flow_prediction"))

    def noise_scale(self) -> Tensor:
        """Return dε/dprediction at each timestep, (T,), float64: the scale of a prediction's error in ε.

        With signal variance ᾱ it is 1 where the network predicts ε, √ᾱ where it predicts v,
        √(ᾱ/(1 − ᾱ)) where it predicts the clean latents, and 1 − σ = √ᾱ' / (√ᾱ' + √(1 − ᾱ')) where it
        predicts a flow's velocity.
        """
        level = self.log_snr()
        # ᾱ = σ(log-SNR), so every factor is a function of the log-SNR alone.
        kind = self.prediction_type
        return {
            "epsilon": torch.ones_like(level),
            "v_prediction": level.sigmoid().sqrt(),
            "sample": (level / 2).exp(),
            "flow_prediction": (level / 2).sigmoid(),
        }[kind]

    def word_vectors(self, word: str) -> list[Tensor]:
        """Return the token embedding of a word, (width,), in each text encoder.

        Raises:
            ExpungeError: it is more than one token.
        """
        return [layers[0].weight[i].detach().clone() for layers, i in self._word(word)]

    def encode_with(self, prompts: Sequence[str], word: str, vectors: Sequence[Tensor]) -> Text:
        """Encode prompts with other token embeddings in place of a word's own.

        Args:
            prompts: the prompts.
            word: a word that is one token.
            vectors: its embedding (width,) in each text encoder; gradients flow to them.

        Raises:
            ExpungeError: the word is more than one token.
        """
        # Hooks on the embedding layers, not changed weights: gradients then reach `vectors` alone.
        with contextlib.ExitStack() as stack:
            for (layers, i), vector in zip(self._word(word), vectors, strict=True):

                def replace(
                    _: Any, given: tuple[Tensor, ...], output: Tensor, i: int = i, v: Tensor = vector
                ) -> Tensor:
                    return torch.where((given[0] == i)[..., None], v.to(output), output)

                for layer in layers:
                    stack.callback(layer.register_forward_hook(replace).remove)
            return self._encoded(prompts)

    def _word(self, word: str) -> list[tuple[list[Any], int]]:
        """Return, for each text encoder, its token embedding layers (T5 has two) and the word's id.

        Raises:
            ExpungeError: the word is more than one token.
        """
        found = []
        for name, part in sorted(self.pipe.components.items()):
            if name.startswith("text_encoder") and part is not None:
                tokenizer = self.pipe.components[name.replace("text_encoder", "tokenizer")]
                tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one of its own
                # A language model's token of a word behind others has the space before it.
                alone, behind = (
                    tokenizer(said, add_special_tokens=False, verbose=False).input_ids
                    for said in ("a", f"a {word}")
                )
                ids = behind[len(alone) :]
                if len(ids) != 1:
                    raise ExpungeError(
                        f"{word!r} is {len(ids)} tokens to this model; take one of one token"
                    )
                weight = part.get_input_embeddings().weight
                # T5 holds the same weight in `shared` and in the encoder's own embedding.
                # A head that scores words may share it with them.
                layers = [
                    m for m in part.modules() if isinstance(m, torch.nn.Embedding) and m.weight is weight
                ]
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
        """Return the timestep and the latents (n, c, h, w) after some steps from noise.

        Args:
            text: n rows of encoded prompts.
            seeds: the seed of each image's noise.
            until: how many steps to take.
            num_inference_steps: number of steps of the whole run; by default the model's own.
            guidance_scale: scale of classifier-free guidance; by default the model's own.

        Raises:
            ExpungeError: `until` is not between 0 and the number of steps.
        """
        (passed,) = self.denoise_at(
            text,
            seeds,
            at=[until],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return passed

    def denoise_at(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        at: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[tuple[int, Tensor]]:
        """Return the timestep and the latents (n, c, h, w) at several points of one denoising run.

        The run ends at the last of them.

        Args:
            text: n rows of encoded prompts.
            seeds: the seed of each image's noise.
            at: numbers of steps from noise, rising.
            num_inference_steps: number of steps of the whole run; by default the model's own.
            guidance_scale: scale of classifier-free guidance; by default the model's own.

        Raises:
            ExpungeError: a number is not between 0 and the number of steps.
        """
        steps = self.trajectory(
            text, seeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        passed = []
        with self._cache_text():
            for done, point in enumerate(steps):
                if done in at:
                    passed.append(point)
                if done == at[-1]:
                    return passed
        raise ExpungeError(f"until must be 0 to {done}, not {at[-1]}")

    @torch.inference_mode()
    def draw(
        self, probe: Probe, *, batch_size: int = 16, progress: Progress = ignore_progress
    ) -> Tensor:
        """Draw the images of a probe: (n, 3, height, width), float32 on the CPU, in [0, 1].

        Args:
            probe: prompts and seeds, one an image.
            batch_size: how many images are denoised together; more are faster and take more memory.
            progress: called at every denoising step.
        """
        # Many images share a prompt: encode each once and repeat the rows.
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
            with self._cache_text():
                for step, (_, latents) in enumerate(trajectory):
                    done = start * steps + min(step, steps) * len(rows)
                    # The last unit is reported after `decode`, which takes time, too.
                    progress("drawing", min(done, len(probe) * steps - 1), len(probe) * steps)
            images.append(self.decode(latents))
        progress("drawing", len(probe) * steps, len(probe) * steps)
        return torch.cat(images)

    def _cache_text(self) -> contextlib.AbstractContextManager[None]:
        """Cache the text projections (keys, values) for a block in which the text stays the same."""
        entries = (*self.text_entries(), *self.pooled_entries())
        if any(
            is_compiled(module)
            for entry in entries
            for module in find_layer_path(self.pipe, entry.layer)
        ):
            return contextlib.nullcontext()  # compiled code cannot be intercepted
        layers = [entry.layer.rpartition(".") for entry in entries]
        return cache_outputs([(find_layer(self.pipe, parent), name) for parent, _, name in layers])
