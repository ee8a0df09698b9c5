"""A probe: prompts and seeds for a model to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.base.errors import ExpungeError

if TYPE_CHECKING:
    from expunge.text import Text


@dataclass(frozen=True)
class Probe:
    """One prompt and one seed an image, and how to sample them.

    The seed alone determines the noise of an image: the same row gives the same image in any batch.

    >>> Probe(("a cat", "a dog"), (0, 7)).seeds
    (0, 7)

    Raises:
        ExpungeError: there is no image, prompts and seeds differ in number, or a value is out of range.
    """

    prompts: tuple[str, ...]
    """The prompt of each image."""
    seeds: tuple[int, ...]
    """The seed of each image, 0 or more."""
    num_inference_steps: int | None = None
    """Number of denoising steps, 1 to 1000; None is the model's default."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance, 0 or more; 1 is none; None is the model's default."""
    text: Text | None = None
    """Encoded text to draw from in place of the prompts, one row an image; attacks set it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        steps, guidance = self.num_inference_steps, self.guidance_scale
        if not self.prompts:
            raise ExpungeError("a probe needs at least one image")
        if len(self.prompts) != len(self.seeds):
            raise ExpungeError(f"a probe of {len(self.prompts)} prompts has {len(self.seeds)} seeds")
        if self.text is not None and len(self.text) != len(self.prompts):
            raise ExpungeError(f"a probe of {len(self.prompts)} prompts has {len(self.text)} texts")
        # torch maps negative seeds onto the largest ones: in this range each noise has one seed.
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ExpungeError("a seed must be at least 0 and below 2**63")
        if steps is not None and not 1 <= steps <= 1000:
            raise ExpungeError(f"num_inference_steps must be 1 to 1000, not {steps}")
        # Written so that nan fails it, too.
        if guidance is not None and not 0 <= guidance < float("inf"):
            raise ExpungeError(f"guidance_scale must be at least 0 and finite, not {guidance}")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Probe:
        """Return a probe of `n` images of every prompt, with the seeds `seed`, `seed + 1`, … for each.

        >>> Probe.of(["a cat", "a dog"], n=2).prompts
        ('a cat', 'a cat', 'a dog', 'a dog')

        Args:
            prompts: one prompt or several.
            n: how many images of each.
            seed: the seed of the first.
            num_inference_steps: number of denoising steps; None is the model's default.
            guidance_scale: scale of classifier-free guidance; None is the model's default.

        Raises:
            ExpungeError: `n` is less than 1, or a setting is out of range.
        """
        if n < 1:
            raise ExpungeError(f"the number of images must be at least 1, not {n}")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        # The same seeds for every prompt: images then differ by the prompt alone.
        rows = [(prompt, seed + i) for prompt in prompts for i in range(n)]
        return cls(
            tuple(p for p, _ in rows), tuple(s for _, s in rows), num_inference_steps, guidance_scale
        )
