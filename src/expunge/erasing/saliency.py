"""Saliency masks: which weights of a denoiser are trained. Made from many maps, stored in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.base.errors import ExpungeError
from expunge.base.files import read_header, replacing
from expunge.erasing.guidance_losses import Steering
from expunge.erasing.trajectories import TrainingConcept
from expunge.fingerprint import hash_base, make_base_reader
from expunge.model import Model
from expunge.ops.finetune import frozen
from expunge.ops.in_place import backward
from expunge.ops.saliency import Intersection, pack_bits, unpack_bits
from expunge.runtime.context import RunContext
from expunge.text import Text


@dataclass(frozen=True, eq=False)
class Mask:
    """The weights that matter to a concept in every one of some maps."""

    masks: Mapping[str, Tensor]
    """For each parameter, by its name, a bool tensor of its shape."""
    counts: tuple[int, ...]
    """How many weights were left after each map."""
    base: str
    """The hash of the parameters."""
    method: str
    """The method that the mask was made for."""

    def save(self, path: str | Path) -> None:
        """Write the mask to one `.safetensors` file, a bit a weight.

        Raises:
            ExpungeError: the file cannot be written.
        """
        shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        about = {"counts": self.counts, "base": self.base, "method": self.method, "shapes": shapes}
        tensors = {name: pack_bits(mask) for name, mask in self.masks.items()}
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, {"expunge mask": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask.

        Raises:
            ExpungeError: the file is missing or cut short, or is no mask.
        """
        text = read_header(path).get("__metadata__", {}).get("expunge mask")
        if text is None:
            raise ExpungeError(f"{path} is a safetensors file, but not a saliency mask")
        about = json.loads(text)
        shapes = about.pop("shapes")
        bits = safetensors.torch.load(Path(path).read_bytes())
        masks = {name: unpack_bits(tensor, shapes[name]) for name, tensor in bits.items()}
        return cls(masks, tuple(about["counts"]), about["base"], about["method"])

    def require_fit(
        self, model: Model, parameters: Mapping[str, nn.Parameter], method: str, path: str | Path
    ) -> None:
        """Check that the mask was made for these parameters and this method.

        Args:
            model: whose parameters they are.
            parameters: by name.
            method: its name.
            path: of the mask, for messages.

        Raises:
            ExpungeError: the mask was made for others.
        """
        if self.method != method:
            raise ExpungeError(f"the mask {path} was made for the method {self.method}, not {method}")
        if self.masks.keys() != parameters.keys():
            raise ExpungeError(
                f"the mask {path} was made for another model or another part of it: it knows"
                f" {len(self.masks)} parameters, and {len(parameters)} are to be trained"
            )
        if self.base != _hash(model, parameters):
            raise ExpungeError(f"the mask {path} was made for another model, of other weights")


def make_mask(
    steering: Steering,
    parameters: Mapping[str, nn.Parameter],
    prompts: Sequence[str],
    run: RunContext,
    *,
    anchors: Text | None,
    method: str,
    maps: int,
    samples: int,
    settle: float,
    batch_size: int,
    half: str = "largest",
) -> Mask:
    """Make a mask from maps, each of one prompt and one noise, prompts in turn, until it settles.

    A map is the gradient of the loss summed over points of one trajectory of the original. It is
    computed where training starts: there, the terms that keep predictions as they are have no gradient.

    Args:
        steering: the trajectories and their losses.
        parameters: the parameters to mask, by name.
        prompts: the concept and its augmentations.
        run: its seed; is told how far it is.
        anchors: the same prompts with the anchor in the concept's place, row for row; None for
            empty ones.
        method: the name of the method that the mask is for.
        maps: how many maps, at most.
        samples: points a map.
        settle: stop when the last ten maps removed at most this share of the weights; 0 never stops.
        batch_size: points in one batch.
        half: which half of each tensor's gradients a map keeps, "largest" or "smallest".

    Raises:
        ExpungeError: no weight is left.
    """
    model, pulls = steering.model, steering.objective.negative_guidance != 1
    # Before training the network predicts as the original: terms that keep its predictions have errors
    # of 0 and no gradient. For η = 1 the early term is one of these.
    objective = dataclasses.replace(
        steering.objective,
        unconditional_late=0.0,
        unconditional_early=0.0,
        preserve=steering.objective.preserve if pulls else 0.0,
    )
    steering = Steering(model, dataclasses.replace(steering.config, objective=objective))
    text, intersection = model.encode(prompts), Intersection(half)
    # Gradients add up on the parameters themselves; what was there is put back.
    asked = {p: (p.requires_grad, p.grad) for p in parameters.values()}
    try:
        with frozen(model.parameters()):
            for parameter in parameters.values():
                parameter.requires_grad_()
                parameter.grad = None
            for i in range(maps):
                run.progress("saliency", i, maps)
                # One for each map, so that a map does not depend on how many there are.
                generator = run.generator("saliency", str(i))
                row = [i % len(prompts)]
                anchor = anchors[row] if anchors is not None else None
                subject = TrainingConcept(prompts[row[0]], text[row], generator, anchor)
                _add_map(steering, subject, parameters, intersection, samples, batch_size)
                if settle and intersection.settled(settle):
                    break
    finally:
        for parameter, (asks, gradient) in asked.items():
            parameter.requires_grad_(asks)
            parameter.grad = gradient
    run.progress("saliency", maps, maps)
    for name, parameter in parameters.items():  # what the loss does not depend on is not trained
        intersection.masks.setdefault(name, torch.zeros_like(parameter, dtype=torch.bool))
    if not intersection.counts[-1]:
        where = {"largest": "upper", "smallest": "lower"}[half]
        raise ExpungeError(f"no weight is in the {where} half of all {maps} maps; take fewer maps")
    return Mask(intersection.masks, tuple(intersection.counts), _hash(model, parameters), method)


def _add_map(
    steering: Steering,
    subject: TrainingConcept,
    parameters: Mapping[str, nn.Parameter],
    intersection: Intersection,
    samples: int,
    batch_size: int,
) -> None:
    """Make one map: gradients of all samples add up on the parameters, and are then freed one by one."""
    parts = steering.draw_points_along(subject, samples).split(batch_size)
    for part in parts:
        with torch.enable_grad():
            # A sum, so that the map does not depend on how points are split into batches.
            loss = steering.compute_losses(part).sum()
        # Only with the last part is a gradient complete, and can be compared and freed.
        if part is not parts[-1]:
            loss.backward()
        else:
            backward(loss, parameters, intersection.add)
    intersection.done()


def _hash(model: Model, parameters: Mapping[str, nn.Parameter]) -> str:
    return hash_base(
        make_base_reader(model), ((n.rpartition(".")[0], n.rpartition(".")[2]) for n in parameters)
    )
