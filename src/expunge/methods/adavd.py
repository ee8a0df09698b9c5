"""AdaVD: take the concept's part out of the values while drawing; a second, no images, no gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.base.fields import bounded
from expunge.base.presets import Presets, read_presets
from expunge.changes import Changes, Projected
from expunge.erasing.moved_share import read_bias
from expunge.erasing.prompt_templates import assemble_prompts, require_place
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.context import RunContext
from expunge.runtime.cost import Cost
from expunge.text import Text


@dataclass(frozen=True)
class AdaVD(Method):
    """Adaptive value decomposer: while drawing, project values off the concept's, as far as they agree.

        v − δ(v) (v_tᵀ v / v_tᵀ v_t) v_t,      δ(v) = top · σ(slope (cos(v, v_t) − centre))

    v is a token's value in a cross-attention, v_t that of the concept's last own token, the same for
    all tokens of the prompt. The shift δ spares what is unlike the concept. The weights stay as they
    are: the edit acts where a layer's values come out (`changes.Projected`), and cannot be exported as
    weights.

    Of several concepts the paper projects on the complement of all; how each one's shift enters there is
    ours (`changes.Projected`), and so are more than one target a concept (`targets`).

    It reads neither anchors nor what is retained.

    Cost: encodes the names. Drawing takes one more product of a layer's values with the targets for each
    prompt, and, for the tokens that are like one, a system of as many equations as targets are open.

    Source: Wang et al., CVPR 2025, arXiv 2412.06143. The shift is a logistic function there, too; its
    three numbers are as we know them of the released code, and could not be compared with it.
    """

    citation: ClassVar[str] = (
        "Wang, Li, Mu, Hao, Liu, Wang, He: Precise, Fast, and Low-cost Concept Erasure in Value Space:"
        " Orthogonal Complement Matters. CVPR 2025, arXiv 2412.06143."
    )
    presets: ClassVar[Presets] = read_presets(__file__)

    slope: float = bounded(100.0, above=0)
    """How steeply the shift rises with the cosine of value and target."""
    centre: float = bounded(0.93, at_least=-1, at_most=1)
    """The cosine at which half of the shift is reached; lower erases more, and more of what is alike."""
    top: float = bounded(2.0, at_least=0)
    """The largest shift: 1 leaves nothing along the target, 2 turns it round, 0 changes nothing."""
    targets: Literal["last", "last-and-after"] = "last"
    """Whose values are targets: the concept's last own token; or that, the end token and the last of the
    padding, which carry the concept in a causal encoder."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts that name a concept, with {} in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_place(self.templates)

    @property
    def reads_anchor(self) -> bool:
        return False

    @property
    def reads_retain(self) -> bool:
        return False

    def estimate_cost(self, problem: Problem, num_inference_steps: int) -> Cost:
        return Cost(prompts=sum(len(concept.names) for concept in problem.erase) * len(self.templates))

    def fit(self, model: Model, problem: Problem, run: RunContext) -> Changes:
        prompts = [p for concept in problem.erase for p in assemble_prompts(concept, self.templates)]
        model.require_window(prompts)
        tokens = find_targets(model.encode(prompts), after=self.targets == "last-and-after")
        changes = []
        # Where text enters joint attention, its "context" is what stands in for values.
        for entry in (entry for entry in model.text_entries() if entry.role != "key"):
            weight = model.weight(entry.layer).double().cpu()
            # Values as they are before attention mixes them: the same at every pixel and every step.
            target = (tokens @ weight.T).float()
            # A bias is no concept's: values are compared without it, and it is left where it is.
            bias = read_bias(model, entry.layer)
            origin = torch.zeros_like(target[0]) if bias is None else bias.float().cpu()
            changes.append(
                Projected(
                    (entry.layer,),
                    target + origin,
                    slope=self.slope,
                    centre=self.centre,
                    top=self.top,
                    origin=origin,
                )
            )
        return tuple(changes)


def find_targets(text: Text, *, after: bool = False) -> Tensor:
    """Take the tokens whose values are targets: (targets, d), float64 on the CPU.

    Args:
        text: prompts that name the concepts.
        after: also take the token behind each prompt's last own one, and the last that is read.
    """
    found = []
    for row in range(len(text)):
        read = text.read[row].cpu()
        for span in text.from_last_token(row):
            places = [span.start]
            if after:
                rest = [place for place in range(span.start + 1, span.stop) if read[place]]
                # Where nothing is read behind the end token, first and last are one, which counts once.
                places += [*rest[:1], *rest[1:][-1:]]
            found += [text.embeddings[row, place] for place in places]
    return torch.stack(found).double().cpu()
