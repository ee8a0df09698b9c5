"""Methods and presets to choose from, a sentence each, and the same done without the page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.base import registry
from expunge.base.errors import ExpungeError, UnknownNameError
from expunge.base.files import make_slug
from expunge.base.shipped import DEFAULT_MODEL
from expunge.method import Method
from expunge.problem import Concept, Problem

FIRST = "uce"
"""The method for a first answer: seconds, whatever the model."""

DEFAULTS = "default"
"""What the page calls a method without a preset."""

EVERYWHERE = ("gate",)
"""Presets that are for no model in particular."""


@dataclass(frozen=True)
class Option:
    """Something to choose, and what it is in a sentence."""

    name: str
    about: str


def methods() -> list[Option]:
    """Every method; the first answer's first."""
    names = sorted(registry.list_names("methods"), key=lambda name: (name != FIRST, name))
    return [Option(name, registry.describe("methods", name)) for name in names]


def presets(method: str, model: str, kind: str = "object") -> list[Option]:
    """A method's presets for a model, the one to begin with first.

    Args:
        method: its name.
        model: the model's name; what is made for a shipped model is offered for it alone.
        kind: of the concepts; presets named after it come first.
    """
    cls = _method(method)
    shipped = model in registry.list_names("models")
    found = [Option(DEFAULTS, "The method's own settings.")]
    for name, preset in cls.presets.items():
        meant = next((one for one in registry.list_names("models") if name.startswith(one)), "")
        if name in EVERYWHERE or (meant == model if shipped else not meant):
            found.append(Option(name, _as_sentence(str(preset.get("about", "")))))

    def fit(option: Option) -> int:
        if option.name == DEFAULTS:
            return 2
        if option.name in EVERYWHERE:
            return 3
        own = option.name.removeprefix(f"{model}-")
        return 0 if own in (kind, model) else 1

    return sorted(found, key=fit)


def build(method: str, preset: str) -> Method:
    """The method with a preset's values.

    Raises:
        ExpungeError: there is no such method or preset.
    """
    cls = _method(method)
    return cls() if preset in ("", DEFAULTS) else cls.preset(preset)


def _method(name: str) -> type[Method]:
    if name not in registry.list_names("methods"):
        raise UnknownNameError("method", name, registry.list_names("methods"))
    found: type[Method] = registry.get("methods", name)
    return found


def _as_sentence(about: str) -> str:
    text = about.strip() or "No more is said of it"
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def file_name(problem: Problem) -> str:
    """What to call an edit: "no-airplane-cat"."""
    names = [make_slug(concept.name, 24) for concept in problem.erase[:3]]
    return "-".join(["no", *(name for name in names if name)]) if any(names) else "edit"


def command(model: str, problem: Problem, method: str, preset: str, seed: int, config: str = "") -> str:
    """Return the command that makes the same edit.

    Args:
        model: the model's name.
        problem: what to erase and to retain.
        method: the method's name.
        preset: the preset's name; "" for the method's own values.
        seed: the edit's.
        config: for a single file, a folder or hub id of a model built like it; "" for the hub's.
    """
    words = ["expunge", "erase", method]
    lead = ""
    if preset not in ("", DEFAULTS):
        words += ["--preset", preset]
    if model != DEFAULT_MODEL:
        words += ["--model", model]
    if config:
        words += ["--config", config]
    kinds = {concept.kind for concept in problem.erase}
    if len(kinds) == 1 and all(_fits_a_line(c) for c in problem.erase):
        for concept in problem.erase:
            words += ["--concept", _line(concept)]
        if (kind := kinds.pop()) != "object":
            words += ["--kind", kind]
    else:  # several kinds: from a file
        lines = [f"{_line(concept)}, {concept.kind}" for concept in problem.erase]
        lead = "\n".join(["cat > concepts.txt <<'END'", *lines, "END", ""])
        words += ["--concepts", "concepts.txt"]
    for text in problem.retain:
        words += ["--retain", text]
    if seed:
        words += ["--seed", str(seed)]
    words += ["-o", f"{file_name(problem)}.safetensors"]
    return lead + _wrapped(words)


def _fits_a_line(concept: Concept) -> bool:
    return not any("|" in name or "=" in name for name in concept.names)


def _line(concept: Concept) -> str:
    return "|".join(concept.names) + ("" if concept.anchor is None else f"={concept.anchor}")


def _wrapped(words: Sequence[str]) -> str:
    """A command, an option a line."""
    quoted = [shlex.quote(word) for word in words]
    lines = [quoted[:3]]
    for raw, word in zip(words[3:], quoted[3:], strict=True):
        if raw.startswith("-"):
            lines.append([word])
        else:
            lines[-1].append(word)
    return " \\\n  ".join(" ".join(line) for line in lines)


def python(model: str, problem: Problem, method: str, preset: str, seed: int, config: str = "") -> str:
    """Return the lines of Python that make the same edit.

    Args:
        model: the model's name.
        problem: what to erase and to retain.
        method: the method's name.
        preset: the preset's name; "" for the method's own values.
        seed: the edit's.
        config: for a single file, a folder or hub id of a model built like it; "" for the hub's.
    """
    concepts = ", ".join(_call(concept) for concept in problem.erase)
    comma = "," if len(problem.erase) == 1 else ""
    retain = f", retain={problem.retain!r}" if problem.retain else ""
    imports, made = ["import expunge", "from expunge import Concept, Problem"], repr(method)
    if preset not in ("", DEFAULTS):
        name = _method(method).__name__
        imports.append(f"from expunge.methods.{method} import {name}")
        made = f"{name}.preset({preset!r})"
    seeded = f", seed={seed}" if seed else ""
    built = f", config={config!r}" if config else ""
    return "\n".join(
        [
            *imports,
            "",
            f"model = expunge.load({model!r}{built})",
            f"problem = Problem(erase=({concepts}{comma}){retain})",
            f"edit = expunge.erase(model, problem, {made}{seeded})",
            f"edit.save({file_name(problem) + '.safetensors'!r})",
        ]
    )


def _call(concept: Concept) -> str:
    parts = [repr(concept.name)]
    if concept.anchor is not None:
        parts.append(f"anchor={concept.anchor!r}")
    if concept.kind != "object":
        parts.append(f"kind={concept.kind!r}")
    if concept.synonyms:
        parts.append(f"synonyms={concept.synonyms!r}")
    return f"Concept({', '.join(parts)})"


def kind_of(concepts: Sequence[Concept]) -> str:
    """The kind that most of some concepts are of."""
    kinds = [concept.kind for concept in concepts]
    return max(kinds, key=kinds.count) if kinds else "object"


def check_preset(method: str, preset: str) -> None:
    """Check that a method has a preset.

    Raises:
        ExpungeError: it has not.
    """
    known = [DEFAULTS, *_method(method).presets]
    if preset and preset not in known:
        raise ExpungeError(str(UnknownNameError(f"preset of {method}", preset, known)))
