"""MACE's fields, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.base.errors import ExpungeError
from expunge.base.fields import bounded
from expunge.erasing.prompt_templates import assemble_prompts, require_place
from expunge.method import Method
from expunge.ops.least_squares import FLOOR
from expunge.problem import Concept

Stage = Literal["refine", "suppress", "fuse"]
STAGES: tuple[Stage, ...] = ("refine", "suppress", "fuse")

COCO = 616_767
"""How many captions the paper's prior is the sum over: all of COCO's."""


@dataclass(frozen=True)
class MACESettings(Method):
    """The options of MACE's three stages."""

    stages: tuple[Stage, ...] = STAGES
    """Which of the three to run; "fuse" has nothing to do without another."""
    ridge: float = bounded(100.0, at_least=0)
    """λ, pull to the weight before, in units of a squared embedding (about 600 for one token of a
    CLIP); the sums it stands against run over all tokens of 30 prompts. Larger erases less."""
    ridge_floor: float = bounded(FLOOR, at_least=0)
    """The least λ in *refine*, as a share of the mean of the diagonal of Σ eᶠ eᶠᵀ, so that a small ridge
    and a light prior do not let go of everything else. With 0, λ is the ridge alone, as in the paper."""
    refine_prior: float = bounded(0.0, at_least=0)
    """λ₁, weight of the prior in *refine*, for a mean per caption."""
    refine_scale: Literal["once", "as-released"] = "once"
    """Whether λ₁ is the prior's scale, as in equation 2, or its square, as the released first stage has
    it for few concepts. The square leaves the prior next to no weight."""
    fuse_prior: float = bounded(0.0, at_least=0)
    """λ₂, weight of the prior in *fuse*, for a mean per caption."""
    domain_weight: float = bounded(0.0, at_least=0)
    """ω, how much more than the mean of the captions the mean of the retained prompts weighs."""
    captions: str = "general"
    """The prior's captions: "general", 1,040 that ship, where the paper has COCO's 616,767;
    "vocabulary", the tokenizer's own words; a text file with one a line, or OWNER/NAME:COLUMN:SPLIT, a
    data set of the Hub; "" for none, the retained alone."""
    rank: int = bounded(1, at_least=1)
    """The rank of each concept's change."""
    combine: Literal["average", "sum"] = "average"
    """What becomes of the concepts' changes without *fuse*: W' + Σ BᵢDᵢ / n, weights that sum to one;
    or W' + Σ BᵢDᵢ, each as strong as alone."""
    max_train_steps: int = bounded(50, at_least=0)
    """Training steps a concept."""
    learning_rate: float = bounded(1e-5, above=0)
    """AdamW's learning rate; larger erases more, and more of what is near."""
    weight_decay: float = bounded(0.01, at_least=0)
    """AdamW's weight decay."""
    max_grad_norm: float = bounded(1.0, above=0)
    """The largest norm of one concept's gradient."""
    objective: Literal["attention", "trajectory"] = "attention"
    """What a change is trained on: the attention it should lower, or ANT's objective, on as many
    trajectories as there would be images, with its weights for identities and styles."""
    norm: Literal["joint", "squared"] = "joint"
    """One norm over heads, pixels and tokens of a layer, as released, or its square, as printed."""
    end_tokens: bool = True
    """Lower the attention of the end and padding tokens too, which carry the concept as well."""
    focal: bool = True
    """Draw timesteps where a concept's detail takes shape; otherwise, all alike."""
    focal_high: float = 1.12
    """Where that begins, as a log-SNR: t₁ = 200 of Stable Diffusion's 1000."""
    focal_low: float = -0.30
    """Where that ends, as a log-SNR: t₂ = 400."""
    focal_slope: float = bounded(7.0, above=0)
    """How sharply, per unit of log-SNR: γ = 0.05 a time."""
    focal_side: int = bounded(0, at_least=0)
    """The side of the latents that the window is meant for, 64 for Stable Diffusion 1.x: on larger ones
    it moves to more noise, see `ops.noise_level`. 0 takes it as it stands on every size."""
    num_images: int = bounded(8, at_least=1)
    """Images drawn of a concept."""
    num_inference_steps: int = bounded(0, at_least=0, at_most=1000)
    """Denoising steps for each of them; 0 for the model's own."""
    images_from: str = ""
    """A folder of images to use instead, one folder in it for each concept, named as it is."""
    masks: str = "attention"
    """Where the concept is in its images: "attention", the model's own; "none", everywhere;
    "grounded-sam"; or a folder of PNGs named as the images. Styles are everywhere."""
    batch_size: int = bounded(4, at_least=1)
    """Concepts trained together; more is faster and takes more memory."""
    templates: tuple[str, ...] = ()
    """Prompts to erase a concept in, with {} in its place; by default those of its kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # In the order in which stages run, however they were given; the dataclass is frozen.
        object.__setattr__(self, "stages", tuple(s for s in STAGES if s in self.stages))
        if not {"refine", "suppress"} & set(self.stages):
            raise ExpungeError(
                "stages must have 'refine' or 'suppress': there is nothing to do otherwise"
            )
        if self.focal and not self.focal_high > self.focal_low:
            raise ExpungeError(
                f"focal_high must be above focal_low, not {self.focal_high:g} to {self.focal_low:g}"
            )
        require_place(self.templates)

    @property
    def refine_weight(self) -> float:
        """λ₁ for a mean per caption."""
        # Its scale s for COCO's sum is λ₁ / 616,767; s² for the sum is s² · 616,767 for the mean.
        return self.refine_prior**2 / COCO if self.refine_scale == "as-released" else self.refine_prior

    def prompts(self, concept: Concept) -> list[str]:
        """Put a concept's names into its templates: name after name."""
        return assemble_prompts(concept, self.templates)
