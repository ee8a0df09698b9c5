"""What a session has chosen, and `studio.json`, which holds it: checked when it is read."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.base.errors import ExpungeError
from expunge.base.fields import build, check_fields
from expunge.base.files import replacing
from expunge.base.shipped import DEFAULT_MODEL
from expunge.problem import Concept, Problem
from expunge.studio import recipes

FORMAT = 1
"""The version of the file."""

CARRIED = 16_000_000
"""The largest edit, in bytes, that the file carries along; a larger one is made again from it."""


@dataclass(frozen=True)
class View:
    """What to draw when looking: prompts, seeds, strength."""

    prompts: tuple[str, ...] = ()
    """By default what is proposed for the concepts."""
    seed: int = 0
    number: int = 2
    """Images a prompt."""
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Choice:
    """Everything that an erasure follows from."""

    model: str = DEFAULT_MODEL
    concepts: tuple[Concept, ...] = ()
    retain: tuple[str, ...] = ()
    method: str = recipes.FIRST
    preset: str = recipes.DEFAULTS
    seed: int = 0
    config: str = ""
    """For a single file: a folder or hub id of a model built like it; where none is told, the hub's."""
    view: View = field(default_factory=View)

    @property
    def problem(self) -> Problem:
        """What to erase and what to retain.

        Raises:
            ExpungeError: nothing is to be erased yet, or something twice, or both.
        """
        if not self.concepts:
            raise ExpungeError("choose at least one concept to erase")
        return Problem(self.concepts, self.retain)


def write(choice: Choice, path: str | Path, edit: str | Path | None = None) -> Path:
    """Write `studio.json`.

    Args:
        choice: what was chosen.
        path: the file.
        edit: the edit that was made of it, to be carried along where it is small.

    Raises:
        ExpungeError: it cannot be written.
    """
    data: dict[str, Any] = {"format": FORMAT, "expunge": __version__, **dataclasses.asdict(choice)}
    if edit is not None and Path(edit).is_file() and Path(edit).stat().st_size <= CARRIED:
        data["edit"] = base64.b64encode(Path(edit).read_bytes()).decode("ascii")
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(path: str | Path) -> tuple[Choice, bytes | None]:
    """Read `studio.json`: the choice, and the bytes of the edit in it, if there is one.

    Raises:
        ExpungeError: it is not such a file, of a newer format, or a value in it does not fit.
    """
    name = Path(path).name
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpungeError(f"cannot read {name}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ExpungeError(f"{name} is not JSON: it is no session of the studio") from None
    if not isinstance(data, dict) or "format" not in data or "concepts" not in data:
        raise ExpungeError(f"{name} is no session of the studio")
    if not isinstance(data["format"], int) or data["format"] > FORMAT:
        raise ExpungeError(f"{name} was written by a newer expunge; this one cannot read it")
    try:
        return _choice(data), _edit(data.get("edit"))
    except ExpungeError as error:
        raise ExpungeError(f"{name}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ExpungeError(f"{name} is no whole session of the studio") from None


def _choice(data: Mapping[str, Any]) -> Choice:
    plain = {key: data[key] for key in ("model", "config", "method", "preset", "seed") if key in data}
    for key in plain:
        kind = int if key == "seed" else str
        if type(plain[key]) is not kind:
            raise ExpungeError(f"{key} cannot be {plain[key]!r}")
    concepts = tuple(build(Concept, _table(one)) for one in data["concepts"])
    retain = data.get("retain", [])
    if not isinstance(retain, list) or not all(isinstance(one, str) for one in retain):
        raise ExpungeError(f"retain must be a list of prompts, not {retain!r}")
    view: View = build(View, _table(data.get("view", {})))
    choice = Choice(**plain, concepts=concepts, retain=tuple(retain), view=view)
    recipes.check_preset(choice.method, choice.preset)
    if concepts:
        _ = choice.problem  # says what is wrong with it
    return choice


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ExpungeError(f"a table is expected, not {value!r}")
    return value


def _edit(text: Any) -> bytes | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ExpungeError("the edit in it is not text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ExpungeError("the edit in it is broken") from None
