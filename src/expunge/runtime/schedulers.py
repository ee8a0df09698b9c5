"""Replace a model's scheduler, for evaluation protocols that demand a certain one."""

from __future__ import annotations

import difflib
import re
from typing import Any

from expunge.base.errors import ExpungeError

DIFFUSION = (
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    "DEISMultistep", "UniPCMultistep",
)  # fmt: skip
"""The diffusers schedulers for networks that predict noise, velocity or the clean latents."""
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
"""The diffusers schedulers for flow matching."""
LATENTS: dict[str, bool | int] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""Defaults for latents, in place of diffusers' own, which are for pixels."""


def parse_scheduler(name: str) -> str:
    """Return the short name of a scheduler: its diffusers class, without "Scheduler".

    >>> parse_scheduler("ddim"), parse_scheduler("DDIMScheduler"), parse_scheduler("")
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
    """Whether a scheduler is for flow matching."""
    # SANA-Sprint's "trigflow" is a flow but for the length of its latents.
    told = scheduler.config.get("prediction_type") in ("flow_prediction", "trigflow")
    return told or type(scheduler).__name__.startswith("FlowMatch")


def replace_scheduler(scheduler: Any, name: str, model: str) -> Any:
    """Return a scheduler of another class with the same noise schedule, or itself if of that class.

    Args:
        scheduler: the pipeline's scheduler.
        name: the class wanted, as `parse_scheduler` reads it; "" for its own.
        model: what the message calls the model.

    Raises:
        ExpungeError: there is no such scheduler, or it is for models that predict something else.
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

    # Values that stand in the configuration by default only are defaults of the old class.
    config = dict(scheduler.config)
    unsaid = ("_use_default_values", *config.get("_use_default_values", ()))
    said = {key: value for key, value in config.items() if key not in unsaid}
    if wanted in FLOW and "flow_shift" in config:
        said["shift"] = config["flow_shift"]  # the same, as solvers for both kinds call it
    try:
        return getattr(diffusers, f"{wanted}Scheduler").from_config({**LATENTS, **said})
    except ImportError as error:
        needs = re.search(r"requires the (\S+)", str(error))
        package = needs[1] if needs else "another package"
        raise ExpungeError(
            f"the scheduler {wanted} needs {package}: pip install {package}, or take another scheduler"
        ) from None
