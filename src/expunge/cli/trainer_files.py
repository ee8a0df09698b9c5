"""Read what is to be erased from the files of other trainers: LECO's prompts, concept sliders.

LECO's prompts, as TOML (under `[[prompts]]`, with defaults at the top) or YAML (a list):

    [[prompts]]
    target = "van gogh"        # becomes the concept, where `positive` is left out or the same
    positive = "van gogh"      # what is erased
    neutral = ""               # becomes the anchor
    action = "erase"
    guidance_scale = 1.0

A concept slider of ai-toolkit: the whole configuration (`config.process`) or its `slider` alone, with
the fields in it or under `targets`. Of a slider, which has two ends, what it erases at its positive end
is taken, and drawn as the class it belongs to; its anchors are retained:

    slider:
      target_class: "person"
      positive_prompt: "person with short hair"
      negative_prompt: "person with long hair"   # the concept
      anchor_class: "dog"                        # retained
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError, UnknownNameError, find_nearest
from expunge.problem import Concept, Kind, normalize_name

SETTINGS = (
    "guidance_scale", "guidance_strength", "anchor_strength", "resolution", "resolutions", "batch_size",
    "dynamic_resolution", "dynamic_crops", "multiplier", "weight", "shuffle",
)  # fmt: skip
"""Fields that say how another trainer goes about it. They are no part of a problem."""

PROMPT = ("target", "positive", "unconditional", "neutral", "action", "guidance_scale")
"""The fields of one of LECO's prompts, but for settings."""

SLIDER = ("target_class", "positive", "negative", "anchor_class", "neutral")
"""The fields of a slider, but for settings; `_prompt` may follow positive and negative."""

KEYS = ("prompts", "slider", "targets", "target_class", "config")
"""Keys at the top of a table by which such a file is known."""


@dataclass
class TrainerFile:
    """What was read of a file: concepts, what is retained, and what has no place in a problem."""

    concepts: list[tuple[str, Concept]] = field(default_factory=list)
    """The concepts, each with its place: "prompt 2"."""
    retain: list[str] = field(default_factory=list)
    unmapped: dict[str, None] = field(default_factory=dict)
    """What could not be mapped, in the order of the file."""

    def add(self, where: str, concept: Concept) -> None:
        """Add a concept, unless it is there: such files repeat prompts at several resolutions."""
        if all(concept != other for _, other in self.concepts):
            self.concepts.append((where, concept))

    def keep(self, prompt: str) -> None:
        """Retain a prompt; the empty one needs no mention."""
        if prompt and normalize_name(prompt) not in map(normalize_name, self.retain):
            self.retain.append(prompt)


def is_trainer_file(data: Any) -> bool:
    """Whether what a TOML or YAML file holds looks like prompts or a slider of another trainer."""
    if isinstance(data, Mapping):
        return "concept" not in data and any(key in data for key in KEYS)
    return isinstance(data, list)


def parse_yaml(path: Path, text: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        ExpungeError: it is not YAML, or holds neither prompts nor a slider.
    """
    import yaml  # of huggingface_hub

    try:
        data = yaml.safe_load(text)
    except RecursionError:
        raise ExpungeError(f"{path}: not YAML: it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ExpungeError(f"{path}{place}: not YAML: {getattr(error, 'problem', error)}") from error
    if isinstance(data, Mapping) and "prompts_file" in data:
        raise ExpungeError(
            f"{path} says how to train; what to erase stands in its prompts_file,"
            f" {data['prompts_file']}: give that one"
        )
    if not is_trainer_file(data):
        raise ExpungeError(f"{path} holds neither LECO's prompts (a list) nor a slider of ai-toolkit")
    return data


def read_trainer_file(path: Path, data: Any, kind: Kind) -> TrainerFile:
    """Read the prompts or the slider of another trainer.

    Args:
        path: the file, for messages.
        data: what it holds: `is_trainer_file`.
        kind: the kind of the concepts.

    Raises:
        ExpungeError: a field is misspelt or of another type, or nothing is to be erased.
    """
    found = TrainerFile()
    try:
        if isinstance(data, Mapping) and "config" in data:
            for place, slider in enumerate(_list_sliders(data), 1):
                _read_slider(slider, f"slider {place}", kind, found)
        elif isinstance(data, Mapping) and "prompts" not in data:
            _read_slider(data.get("slider", data), "slider", kind, found)
        else:
            defaults = (
                {} if isinstance(data, list) else {k: v for k, v in data.items() if k != "prompts"}
            )
            _require_fields(defaults, (*PROMPT, *SETTINGS), "the top", "field")
            for place, entry in enumerate(_tables(data, "prompts"), 1):
                read = _read_target if "target_class" in entry else _read_prompt
                read({**defaults, **entry}, f"prompt {place}", kind, found)
    except ExpungeError as error:
        raise ExpungeError(f"{path}, {error}") from error
    if not found.concepts:
        why = f": {', '.join(found.unmapped)}" if found.unmapped else ""
        raise ExpungeError(f"{path} names no concept to erase{why}")
    return found


def _tables(data: Any, key: str) -> list[Mapping[str, Any]]:
    """Return the tables of a list, or of the list under a key.

    Raises:
        ExpungeError: it is no list of tables.
    """
    entries = data.get(key) if isinstance(data, Mapping) else data
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ExpungeError(f"{key}: a list of tables is expected, not {entries!r:.60}")
    return entries


def _list_sliders(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sliders of a configuration of ai-toolkit, in which `[name]` stands for its name.

    Raises:
        ExpungeError: there is none.
    """
    config = data["config"]
    processes = _tables(config, "process") if isinstance(config, Mapping) else []
    sliders = [process["slider"] for process in processes if isinstance(process.get("slider"), Mapping)]
    if not sliders:
        raise ExpungeError("config: no process in it has a slider")

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: named(one) for key, one in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        name = config.get("name")
        return (
            value.replace("[name]", name) if isinstance(value, str) and isinstance(name, str) else value
        )

    return [named(slider) for slider in sliders]


def _read_slider(slider: Any, where: str, kind: Kind, found: TrainerFile) -> None:
    """Read a slider: its own fields, or its targets and anchors."""
    if not isinstance(slider, Mapping):
        raise ExpungeError(f"{where}: a table is expected, not {slider!r:.60}")
    lists = ("targets", "anchors")
    own = {key: value for key, value in slider.items() if key not in lists}
    known = (*lists, *SETTINGS, *_fields(SLIDER))
    for key in own:
        if key not in known:  # a trainer has more settings than are known here
            if near := find_nearest(str(key), known, 0.75):
                raise ExpungeError(f"{where}: there is no field {key!r}; did you mean {near!r}?")
            found.unmapped[str(key)] = None
    own = {key: value for key, value in own.items() if key in known}
    if "targets" in slider:
        for place, target in enumerate(_tables(slider, "targets"), 1):
            read = _read_prompt if "target" in target else _read_target
            read({**own, **target}, f"{where}, target {place}", kind, found)
    else:
        _read_target(own, where, kind, found)
    for place, anchor in enumerate(_tables(slider, "anchors") if slider.get("anchors") else (), 1):
        at = f"{where}, anchor {place}"
        _require_fields(anchor, ("prompt", "neg_prompt", "multiplier"), at, "field")
        found.keep(_text(anchor, "prompt", at) or "")
        if _text(anchor, "neg_prompt", at):
            found.unmapped["neg_prompt"] = None


def _read_target(target: Mapping[str, Any], where: str, kind: Kind, found: TrainerFile) -> None:
    """Read one target of a slider: what its positive end erases, and what it anchors."""
    _require_fields(target, (*SETTINGS, *_fields(SLIDER)), where, "field")
    whole = _text(target, "target_class", where) or ""
    positive, negative = (
        _text(target, f"{name}_prompt", where) or _text(target, name, where) or ""
        for name in ("positive", "negative")
    )
    _note_settings(target, found)
    if _text(target, "neutral", where):
        found.unmapped["neutral"] = None
    if not (name := negative or positive):
        raise ExpungeError(f"{where}: a slider needs a negative_prompt, which is what it erases")
    if negative and positive:
        found.unmapped[f"{positive!r}, which a slider enhances"] = None
    elif positive:
        found.unmapped[f"the end that enhances {positive!r}"] = None
    same = normalize_name(name)
    anchor = next((one for one in (whole, positive) if normalize_name(one) != same), "")
    found.add(where, _make(where, name, anchor, kind))
    found.keep(_text(target, "anchor_class", where) or "")


def _read_prompt(entry: Mapping[str, Any], where: str, kind: Kind, found: TrainerFile) -> None:
    """Read one of LECO's prompts: the target goes away from `positive`, starting from `neutral`."""
    _require_fields(entry, (*PROMPT, *SETTINGS), where, "field")
    if (target := _text(entry, "target", where)) is None:
        raise ExpungeError(f"{where}: a target is missing")
    if (action := _text(entry, "action", where) or "erase") not in ("erase", "enhance"):
        raise ExpungeError(f"{where}: {UnknownNameError('action', action, ('erase', 'enhance'))}")
    guidance, multiplier = (_number(entry, name, where) for name in ("guidance_scale", "multiplier"))
    # Enhancing by less than nothing is erasing, and the other way round.
    if (action == "erase") is (guidance < 0):
        found.unmapped[f"{where} (it enhances, and expunge erases)"] = None
        return
    if multiplier < 0:
        found.unmapped[f"{where} (it is for the LoRA turned round, at multiplier {multiplier:g})"] = None
        return
    _note_settings(entry, found)
    unconditional = _text(entry, "unconditional", where) or ""
    if unconditional:
        found.unmapped["unconditional"] = None
    positive = _text(entry, "positive", where) or target
    neutral = _text(entry, "neutral", where)
    anchor = unconditional if neutral is None else neutral
    if normalize_name(positive) != normalize_name(target) and target and not anchor:
        # "person", less what makes it a "smiling person": the latter becomes the former.
        anchor = target
    found.add(where, _make(where, positive, anchor, kind))


def _make(where: str, name: str, anchor: str, kind: Kind) -> Concept:
    try:
        return Concept(name, anchor, kind)
    except ExpungeError as error:
        raise ExpungeError(f"{where}: {error}") from error


def _note_settings(entry: Mapping[str, Any], found: TrainerFile) -> None:
    """Note the settings of an entry that are given and are not what they would be anyway."""
    for name in SETTINGS:
        value = entry.get(name)
        if value is True or value not in (None, False, 1, -1):
            found.unmapped[name] = None


def _fields(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a slider's fields, in both spellings."""
    return (*names, *(f"{name}_prompt" for name in names if re.fullmatch("positive|negative", name)))


def _require_fields(entry: Mapping[str, Any], known: tuple[str, ...], where: str, what: str) -> None:
    """Check that an entry has no field but known ones.

    Raises:
        ExpungeError: it has another; the message gives the nearest.
    """
    for name in entry:
        if name not in known:
            raise ExpungeError(f"{where}: {UnknownNameError(what, str(name), known)}")


def _text(entry: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return a field that is text; None where it is left out.

    Raises:
        ExpungeError: it is something else.
    """
    value = entry.get(name)
    if value is None or isinstance(value, str):
        return value
    raise ExpungeError(f"{where}: {name} must be text, not {value!r:.60}")


def _number(entry: Mapping[str, Any], name: str, where: str) -> float:
    """Return a field that is a number; 1 where it is left out.

    Raises:
        ExpungeError: it is something else.
    """
    value = entry.get(name)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ExpungeError(f"{where}: {name} must be a number, not {value!r:.60}")
    return float(value)
