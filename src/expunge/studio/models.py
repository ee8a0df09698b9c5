"""The models of a studio: checked before they are loaded, loaded once, shared by all sessions."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.base.files import format_bytes
from expunge.base.shipped import DEFAULT_MODEL
from expunge.checkpoints import loading
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.cost_estimate import CostEstimate, estimate, estimate_model
from expunge.checkpoints.load import load
from expunge.erasing.caption_gram import count_unread
from expunge.method import Method
from expunge.model import Model
from expunge.problem import Problem
from expunge.runtime.cost import Cost
from expunge.studio.jobs import Job
from expunge.studio.knowledge import Knowledge, of_model

SPARE = 0.9
"""The share of the free memory that weights may take."""

LARGE = Cost(prompts=100_000, predictions=100_000)
"""Work so large that a plan of it is worth timing the model for."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory, and how fast it is here."""

    model: Model
    """The model that works, in the desk's thread alone."""
    plan: CostEstimate
    asked: Model = field(init=False)
    """The same with tokenizers of its own, for questions while the model works: a tokenizer keeps the
    padding of its last call, so that two threads cannot share one."""
    lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    """Held while `asked` is asked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", with_own_tokenizers(self.model))

    def foresee(self, method: Method, problem: Problem) -> tuple[float, float | None]:
        """Bytes of weights in memory, and seconds that erasing takes; None where nobody can say."""
        work = method.estimate_cost(problem, self.model.num_inference_steps)
        if work is None:
            return self.plan.memory, None
        captions = count_unread(self.asked, work.captions, problem.erase)
        return self.plan.memory, dataclasses.replace(self.plan, captions=captions).seconds(work)


def with_own_tokenizers(model: Model) -> Model:
    """The same model with copies of its tokenizers; its weights are shared."""
    made = copy.copy(model)
    made.pipe = copy.copy(model.pipe)
    for name, part in model.pipe.components.items():
        if hasattr(part, "get_vocab"):
            setattr(made.pipe, name, copy.deepcopy(part))
    return made


def free_memory() -> float:
    """Bytes that a model could take where models work: the accelerator's, or the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024.0 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


class Models:
    """What is loaded, and what may be.

    Args:
        local_files: whether models may be named by their place on this machine: not where strangers
            can reach the page.
        memory: says how many bytes are free.
    """

    local_files: bool
    memory: Callable[[], float]

    def __init__(self, *, local_files: bool = True, memory: Callable[[], float] = free_memory) -> None:
        self.local_files, self.memory = local_files, memory
        self._loaded: dict[str, Loaded] = {}
        self._configs: dict[str, str] = {}
        self._known: dict[str, Knowledge] = {}
        self._lock = threading.Lock()

    def use_config(self, name: str, config: str) -> None:
        """Read a single file by another model's configuration from now on.

        Args:
            name: the file.
            config: a folder or a hub id of a model built like it; "" for the hub's.

        Raises:
            ExpungeError: the model is no single file, or there is no such configuration.
        """
        if config and not loading.find_source(name).is_file:
            raise ExpungeError(f"a configuration is for a single file, and {name} is none")
        if config:
            self._require_hub_id(config)
            Checkpoint.find(config, weights=False)
        if self._configs.get(name, "") != config:
            self._configs[name] = config
            self._loaded.pop(name, None)

    def config(self, name: str) -> str | None:
        """The configuration that a single file is read by; None for the hub's."""
        return self._configs.get(name) or None

    def _require_hub_id(self, name: str) -> None:
        if not self.local_files and not loading.is_hub_id(name):
            raise ExpungeError(
                "this studio can be reached from other machines, so it reads no files by their place:"
                " name a shipped model or a hub id"
            )

    def check(self, name: str) -> None:
        """Check that there is such a model and that its weights fit the memory; loads nothing.

        Raises:
            ExpungeError: there is none, it may not be named here, its files are pickled or broken, or
                it is too large.
        """
        if not name.strip():
            shipped = ", ".join(registry.list_names("models"))
            raise ExpungeError(f"name a model: {shipped}, a folder, a .safetensors file or a hub id")
        if name in self._loaded or name in registry.list_names("models"):
            return
        self._require_hub_id(name)
        found = Checkpoint.find(name, weights=False)
        needed, free = weights(found), SPARE * self.memory()
        if needed > free:
            raise ExpungeError(
                f"{found.name} has {format_bytes(needed)} of weights, and {format_bytes(free)} can be"
                " used here: close other programs, or take a smaller model; nothing was loaded"
            )

    def ready(self, name: str) -> Loaded | None:
        """A model that is in memory already; None otherwise."""
        return self._loaded.get(name)

    def get(self, name: str, job: Job | None = None) -> Loaded:
        """The model of a name, loaded if need be; the shipped one and the last other one stay.

        Raises:
            ExpungeError: as `check`.
        """
        if (there := self._loaded.get(name)) is not None:
            return there
        self.check(name)
        if job is not None:
            job.step = "loading the model"
        for other in [other for other in self._loaded if other != DEFAULT_MODEL]:
            del self._loaded[other]
        model = load(name, config=self.config(name))
        made = Loaded(model, estimate_model(model, work=LARGE))
        self._loaded[name] = made
        return made

    def knowledge(self, name: str) -> Knowledge:
        """What is known of a model; needs no weights."""
        with self._lock:
            if name not in self._known:
                self._known[name] = of_model(name)
            return self._known[name]


def weights(checkpoint: Checkpoint) -> float:
    """Bytes of a model's weights as they are loaded, in float32, by its files' headers alone."""
    return estimate(checkpoint, torch.float32).memory
