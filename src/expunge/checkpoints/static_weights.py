"""Make an edit static weights, for programs that know nothing else: fit its gates, and cache the fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expunge.base.errors import ExpungeError, ExpungeWarning
from expunge.base.files import find_cache_folder
from expunge.changes import WeightChange
from expunge.checkpoints.checkpoint import Checkpoint
from expunge.checkpoints.linearize import LinearFit, fit_static_weights
from expunge.checkpoints.load import load
from expunge.checkpoints.text_moments import TextMoments, read_text_moments
from expunge.checkpoints.weight_changes import require_weights
from expunge.edit import Edit
from expunge.erasing.caption_gram import text_hash
from expunge.model import Model
from expunge.problem import Problem


@dataclass(eq=False)
class TextEncoders:
    """A checkpoint's text encoders, loaded when they are first needed."""

    checkpoint: Checkpoint
    config: str | Path | None = None
    """For a single file: a diffusers folder of a model built like it."""

    @cached_property
    def model(self) -> Model:
        """The model with its text encoders, at least.

        Raises:
            ExpungeError: it is a single file without text encoders, and `config` is None.
        """
        if self.checkpoint.is_file:  # diffusers reads a single file whole
            return load(self.checkpoint.path, config=self.config)
        # Every weight is checked where it is read, so that the file need not be read twice.
        return self.checkpoint.load_text_model(check=False)

    def read_moments(self, problem: Problem) -> Mapping[str, TextMoments]:
        """Read the second moments of the text layers' input; empty where there are no text encoders."""
        if self.checkpoint.is_file and self.config is None:
            return {}
        try:
            return read_text_moments(self.model, problem)
        except ExpungeError:  # the LoRA is then truncated in norm, and its notes say so
            return {}


def make_static(
    edit: Edit, checkpoint: Checkpoint, texts: TextEncoders | None = None
) -> tuple[Sequence[WeightChange], tuple[str, ...]]:
    """Make an edit's changes static weights, fitted to its gates where it has any.

    Args:
        edit: the edit.
        checkpoint: the model it is for.
        texts: the model's text encoders, for the fit.

    Returns:
        the changes, and notes of what was lost.

    Raises:
        ExpungeError: no weights can be fitted.
    """
    if all(isinstance(change, WeightChange) for change in edit.changes):
        return require_weights(edit.changes), ()
    fit = _fit_cached((texts or TextEncoders(checkpoint)).model, edit)
    return require_weights(fit.changes), (f"gates became weights: {fit}",)


def _fit_cached(model: Model, edit: Edit) -> LinearFit:
    """The weights fitted to an edit's gates, read from the cache folder or written there."""
    problem = json.dumps(dataclasses.asdict(edit.record.problem), sort_keys=True)
    key = "\n".join([text_hash(model, ()), edit.hash, edit.record.base, problem])
    file = find_cache_folder() / "plain" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if file.is_file():
        try:
            cached = Edit.load(file)
            return LinearFit(
                cached.changes, *(float(cached.record.fields[name]) for name in ("lost", "moved"))
            )
        except (ExpungeError, KeyError, TypeError, ValueError):
            pass  # a broken file is computed anew and replaced
    fit = fit_static_weights(model, edit.changes, edit.record.problem)
    fields = {"lost": fit.lost, "moved": fit.moved}
    try:
        Edit(tuple(fit.changes), dataclasses.replace(edit.record, fields=fields)).save(file)
    except ExpungeError as error:
        warnings.warn(f"the fit is not cached: {error}", ExpungeWarning, stacklevel=2)
    return fit
