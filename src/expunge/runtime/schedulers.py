"""Another scheduler for a model, where a protocol demands one."""

from __future__ import annotations

import difflib
from typing import Any

from expunge.base.errors import ExpungeError

DIFFUSION = (
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    "DEISMultistep", "UniPCMultistep",
)  # fmt: skip
"""diffusers' schedulers for networks that predict noise, velocity or the clean latents."""
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
"""Those for flow matching."""
LATENTS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""What a configuration that does not say so means for latents, in place of the defaults for pixels."""


def parse_scheduler(name: str) -> str:
    """The short name of a scheduler: diffusers' class, without "Scheduler".

    >>> scheduler_name("ddim"), parse_scheduler("DDIMScheduler"), parse_scheduler("")
    ('DDIM', 'DDIM', '')

    Raises:
        ExpungeError: there is none; the nearest is named.
    """
    short = name.strip().casefold().removesuffix("scheduler")
    known = {one.casefold(): one for one in (*DIFFUSION, *FLOW)}
    if not short or short in known:
        return known.get(short, "")
    near = difflib.get_close_matches(short, known, n=1, cutoff=0.5)
    hint = f"; did you mean {known[near[0]]!r}?" if near else f"; known: {', '.join(known.values())}"
    raise ExpungeError(f"there is no scheduler {name!r}{hint}")


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler is one for flow matching."""
    return type(scheduler).__name__.startswith("FlowMatch")


def replace_scheduler(scheduler: Any, name: str, model: str) -> Any:
    """A scheduler of another class with the same noise schedule; the same one where it is of that class.

    Args:
        scheduler: the pipeline's.
        name: as `parse_scheduler` reads it.
        model: what to call the model in an error.

    Raises:
        ExpungeError: there is none of that name, or it is not for the kind of model that this is.
    """
    wanted = parse_scheduler(name)
    own = type(scheduler).__name__
    if not wanted or own == f"{wanted}Scheduler":
        return scheduler
    if is_flow_matching(scheduler) != (wanted in FLOW):
        kinds = ("predict noise", "learn a flow")
        mine, theirs = kinds if wanted in FLOW else reversed(kinds)
        raise ExpungeError(
            f"the scheduler {wanted} is for models that {theirs}, and {model} is one of those that"
            f" {mine}: take its own, {own.removesuffix('Scheduler')}"
        )
    import diffusers

    # What was never said, and only stands there by default, was meant for another class.
    config = dict(scheduler.config)
    unsaid = ("_use_default_values", *config.get("_use_default_values", ()))
    said = {key: value for key, value in config.items() if key not in unsaid}
    return getattr(diffusers, f"{wanted}Scheduler").from_config({**LATENTS, **said})
