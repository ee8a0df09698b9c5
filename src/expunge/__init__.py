"""Erase concepts from text-to-image diffusion models.

    model = expunge.load("miniature")
    problem = expunge.Problem(erase=(expunge.Concept("airplane", anchor="sky"),))
    edit = expunge.erase(model, problem, "uce")
    edit.save("no-airplane.safetensors")

Importing this module is fast: torch is only imported by what needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.probe import Probe
from expunge.problem import Concept, Problem

if TYPE_CHECKING:
    from expunge.checkpoints.load import load as load
    from expunge.edit import Edit as Edit
    from expunge.erasure import erase as erase
    from expunge.evaluation.evaluate import evaluate as evaluate
    from expunge.model import Model as Model
    from expunge.tuning import autotune as autotune
    from expunge.unlearning import unlearn as unlearn

__version__ = "0.1.0"

__all__ = [
    "Concept",
    "Edit",
    "ExpungeError",
    "ExpungeWarning",
    "Model",
    "Probe",
    "Problem",
    "autotune",
    "erase",
    "evaluate",
    "load",
    "unlearn",
]

_HEAVY = {
    "autotune": "expunge.tuning",
    "Edit": "expunge.edit",
    "erase": "expunge.erasure",
    "evaluate": "expunge.evaluation.evaluate",
    "load": "expunge.checkpoints.load",
    "Model": "expunge.model",
    "unlearn": "expunge.unlearning",
}


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        # Imported at first use (PEP 562): torch and diffusers take seconds.
        return getattr(importlib.import_module(_HEAVY[name]), name)
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")
