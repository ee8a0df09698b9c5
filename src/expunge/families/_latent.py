"""What all families share: guided sampling in the latents of an autoencoder."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.quiet import Progress, ignore_progress
from expunge.families import _text
from expunge.families._lora import LoraNaming
from expunge.model import Model, check_unicode, warn_truncated
from expunge.probe import Probe
from expunge.text import Text

FEWER = (900, 750, 500, 250, 100, 50, 25, 10, 5, 2, 1)
"""Numbers of steps to try where a sampler cannot take more."""


class LatentModel(Model):
    """A denoiser of an autoencoder's latents."""

    lora_naming: ClassVar[LoraNaming] = LoraNaming()
    contrasts: bool = True
    """Whether guidance extrapolates from the unconditional prediction to the prompt's: two a step."""
    takes_guidance: bool = True
    """Whether guidance changes anything; it does not where a model was distilled without it."""

    @property
    def window(self) -> int:
        return self.pipe.tokenizer.model_max_length - 2  # less the start and the end

    def count_tokens(self, prompt: str) -> int:
        return _text.count(self.pipe.tokenizer, prompt)

    def encode(self, prompts: Sequence[str]) -> Text:
        with torch.no_grad():
            return self._encoded(prompts)

    def _encoded(self, prompts: Sequence[str]) -> Text:
        distinct = list(dict.fromkeys(prompts))
        check_unicode(distinct)
        for prompt in distinct:
            if len(prompt) > self.window and (n := self.count_tokens(prompt)) > self.window:
                warn_truncated(prompt, n, self.window)
        # Suites ask for a prompt once for each seed: it is encoded once.
        return self._read(distinct)[[distinct.index(prompt) for prompt in prompts]]

    def _ahead(self, states: Tensor) -> Tensor:
        """A text encoder's states, (n, tokens, width), as the text entries read them."""
        for name in self.read_ahead:
            # A functional call: while a checkpoint is streamed, the module has no weights (`stored`).
            weights = self.read_ahead_parameters(name)
            at = next(iter(weights.values()))
            module = self.network.get_submodule(name)
            states = functional_call(module, weights, (states.to(at.device, at.dtype),))
        return states.to(self.device, self.dtype)

    @contextmanager
    def _past(self) -> Iterator[None]:
        """For a block, the layers that `encode` has applied already answer with what they are given."""
        modules = [self.network.get_submodule(name) for name in self.read_ahead]
        before = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.forward = _same
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                # An instance's own `forward` is a hook of accelerate; deleting it would undo offloading.
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    @abstractmethod
    def _read(self, prompts: list[str]) -> Text:
        """Encode distinct prompts for the denoiser, with gradients where they are enabled."""

    def knows(self, prompt: str) -> bool:
        return _text.knows(self.pipe.tokenizer, prompt)

    def vocabulary(self) -> tuple[str, ...]:
        return _text.vocabulary(self.pipe.tokenizer)

    def timesteps(self, num_inference_steps: int | None = None) -> tuple[int, ...]:
        """Return the timesteps at which `trajectory` calls the denoiser, from noise on."""
        scheduler = self._sampler(num_inference_steps or self.num_inference_steps)
        return tuple(round(float(t)) for t in scheduler.timesteps)

    def trajectory(
        self,
        text: Text,
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        guided = self.contrasts and guidance > 1
        if guided:
            # Unconditional and prompted rows in one batch: one call of the denoiser a step.
            text = Text.joined([self.unconditional(len(seeds)), text])
        scheduler = self._sampler(num_inference_steps or self.num_inference_steps)
        # One generator an image, on the CPU: its noise depends on neither batch nor device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.cat([torch.randn((1, *self._latent_shape), generator=g) for g in generators])
        latents, timesteps = self._start(noise.to(self.device, self.dtype), seeds, scheduler)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"generator": generators} if takes_generator else {}
        scales = hasattr(scheduler, "scale_model_input")
        autocast = partial(torch.autocast, self.device.type, self.autocast, enabled=bool(self.autocast))
        for t in timesteps:
            given = scheduler.scale_model_input(latents, t) if scales else latents
            # Yielded before the prediction, so that whoever stops at a step does not pay for it.
            yield round(float(t)), given
            with autocast():
                output = self._guided(torch.cat([given] * 2) if guided else given, t, text, guidance)
            # Samplers accumulate over steps: autocast's precision is for the denoiser alone.
            output = output.to(latents.dtype)
            if guided:
                empty, prompt = output.chunk(2)
                # ε = ε_∅ + guidance · (ε_c − ε_∅), classifier-free guidance as diffusers writes it.
                output = self._contrasted(empty, prompt, guidance)
            latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
        yield 0, latents

    def _start(self, noise: Tensor, seeds: Sequence[int], scheduler: Any) -> tuple[Tensor, Tensor]:
        """Return the latents that denoising starts from, and the timesteps that it then takes.

        Args:
            noise: (n, c, h, w), of unit variance.
            seeds: of the images, n.
            scheduler: with its timesteps set.
        """
        return noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps

    def draw(
        self, probe: Probe, *, batch_size: int = 16, progress: Progress = ignore_progress
    ) -> Tensor:
        warn_of_guidance(self, probe.guidance_scale)
        return super().draw(probe, batch_size=batch_size, progress=progress)

    def _sampler(self, steps: int) -> Any:
        """Make the model's sampler with so many steps.

        Raises:
            ExpungeError: the sampler cannot take so many; the nearest number is named.
        """
        asked = (type(self.pipe.scheduler), str(self.pipe.scheduler.config))
        # Remembered on the model: trying a sampler takes as many steps as drawing.
        known: dict[Any, bool] = self.__dict__.setdefault("_samplers", {})
        if (asked, steps) not in known:
            known[asked, steps] = self._takes(steps)
        if not known[asked, steps]:
            # PNDM takes no fewer than four, others not as many as they were trained with.
            close = (*range(steps - 1, steps - 6, -1), *range(steps + 1, steps + 6), *FEWER)
            near = next((n for n in close if 0 < n <= 1000 and self._takes(n)), None)
            raise ExpungeError(
                f"this model's sampler, {type(self.pipe.scheduler).__name__}, cannot take {steps}"
                f" step{'s' * (steps != 1)}" + (f"; {near} it can" if near else "")
            )
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        self._set_timesteps(scheduler, steps)
        return scheduler

    @torch.no_grad()
    def _takes(self, steps: int) -> bool:
        """Try on one small latent whether the sampler takes so many steps and ends with finite numbers.

        Samplers fail in their own ways, and some not before the last step, or with nan alone.
        """
        try:
            scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
            self._set_timesteps(scheduler, steps)
            scales = hasattr(scheduler, "scale_model_input")
            takes_generator = "generator" in inspect.signature(scheduler.step).parameters
            extra = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
            # Two by two: whether the sampler takes the steps does not depend on the size.
            latents = torch.ones((1, self._latent_shape[0], 2, 2), device=self.device)
            for t in scheduler.timesteps:
                if scales:
                    scheduler.scale_model_input(latents, t)
                none = torch.zeros_like(latents)
                latents = scheduler.step(none, t, latents, **extra, return_dict=False)[0]
        except Exception:  # index errors, assertions, divisions by zero
            return False
        return bool(latents.isfinite().all())

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        dtype = vae.dtype
        # SDXL's autoencoder has activations beyond 65504, half precision's largest number.
        overflows = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        cast = partial(torch.nn.Module.to, vae)  # diffusers' own `to` warns
        if overflows:
            cast(torch.float32)
        try:
            images = self._decoded(self._unscaled(latents.to(vae.dtype)))
        finally:
            if overflows:
                cast(dtype)
        return (images / 2 + 0.5).clamp(0, 1).float().cpu()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        height, width = self._pixels
        if images.shape[-2:] != (height, width):
            found = " × ".join(map(str, images.shape[:-3:-1]))
            raise ExpungeError(f"an image is {found} pixels; this model draws {width} × {height}")
        given = images.to(self.device, vae.dtype) * 2 - 1
        return self._scaled(self._coded(given)).to(self.device, self.dtype)

    def _decoded(self, latents: Tensor) -> Tensor:
        """The images in [-1, 1] of the autoencoder's latents."""
        found: Tensor = self.pipe.vae.decode(latents, return_dict=False)[0]
        return found

    def _coded(self, images: Tensor) -> Tensor:
        """The autoencoder's latents of images in [-1, 1]."""
        found = self.pipe.vae.encode(images, return_dict=False)[0]
        # SANA's deterministic autoencoder returns latents. Elsewhere the mode: sampling would add noise.
        return found if isinstance(found, Tensor) else found.mode()

    def _contrasted(self, empty: Tensor, prompt: Tensor, guidance: float) -> Tensor:
        """The guided prediction, from that for no prompt and that for the prompt."""
        return empty + guidance * (prompt - empty)

    def _guided(self, latents: Tensor, t: Tensor, text: Text, guidance: float) -> Tensor:
        """Predict for a sampler's step; a denoiser distilled from guidance takes the scale here."""
        return self.predict(latents, t, text)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Set the timesteps of a sampler."""
        scheduler.set_timesteps(steps, device=self.device)

    @property
    def latents_side(self) -> int:
        # The side of a square of equal area: images need not be square.
        return round(math.prod(self._latent_shape[1:]) ** 0.5)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        """The channels, height and width of the latents that the model was trained on."""
        config = self.network.config
        size = self.sample_size or config.sample_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return config.in_channels, height, width

    @property
    def _pixels(self) -> tuple[int, int]:
        """The height and width of the images that the model was made for."""
        _, height, width = self._latent_shape
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def _scaled(self, latents: Tensor) -> Tensor:
        """Scale the autoencoder's latents for the denoiser."""
        config = self.pipe.vae.config
        # The shift came with SD 3; earlier configurations have none, or None.
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Invert `_scaled`."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


def warn_of_guidance(model: Model, scale: float | None) -> None:
    """Warn where a guidance scale is asked of a model that was distilled without guidance."""
    if not getattr(model, "takes_guidance", True) and (scale or 0) > 1:
        warnings.warn(
            f"this model was distilled to draw without guidance: the guidance_scale of {scale:g}"
            " changes nothing",
            ExpungeWarning,
            stacklevel=3,
        )


def _same(states: Tensor) -> Tensor:
    return states
