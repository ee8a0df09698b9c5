"""Which programs read which form of a LoRA. The facts stand in each family's `lora_naming`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expunge.base import registry
from expunge.base.errors import ExpungeError
from expunge.families._lora import ALL, LoraNaming

if TYPE_CHECKING:
    from expunge.model import Model

PROGRAMS = {
    "diffusers": "diffusers",
    "comfyui": "ComfyUI",
    "a1111": "A1111",
    "forge": "Forge",
    "sd-scripts": "sd-scripts",
}
"""The programs that are told apart, and what they call themselves."""

FORMS = ("lora", "kohya")
"""The forms of a LoRA: diffusers' naming, and kohya's."""


def find_support(form: str, family: type[Model], program: str) -> str:
    """Find what a program reads of a LoRA: "all", a phrase that says which part, or "" for nothing.

    Args:
        form: one of `FORMS`.
        family: the model's family.
        program: one of `PROGRAMS`.
    """
    return get_naming(family).readers.get(form, {}).get(program, "")


def get_naming(family: type[Model]) -> LoraNaming:
    """Return a family's `lora_naming`, or the default where a family states none."""
    return getattr(family, "lora_naming", None) or LoraNaming()


def describe_support(form: str, family: type[Model]) -> str:
    """Describe in a sentence which programs read a LoRA of this form, and which do not."""
    support = {title: find_support(form, family, program) for program, title in PROGRAMS.items()}
    whole = [title for title, text in support.items() if text == ALL]
    parts = [f"{title} reads {text}" for title, text in support.items() if text not in (ALL, "")]
    none = [title for title, text in support.items() if not text]
    first = f"Loads whole in {_join(whole)}" if whole else "Loads whole nowhere"
    return "; ".join([first, *parts, *([f"not in {_join(none)}"] if none else [])]) + "."


def choose_form(program: str, family: type[Model], has_names: bool) -> str:
    """Choose the form of a LoRA of which a program reads most.

    Args:
        program: one of `PROGRAMS`, without diffusers.
        family: the model's family.
        has_names: whether kohya's naming has a name for every layer that changes.

    Raises:
        ExpungeError: the program reads no form; the message says what to export instead.
    """
    if sentence := get_naming(family).unsupported.get(program):
        raise ExpungeError(sentence)
    forms = ("kohya", "lora") if has_names else ("lora",)
    found = {form: find_support(form, family, program) for form in forms}
    for form in forms:
        # All of a LoRA in whichever form, before a part of it in the first.
        if found[form] == ALL:
            return form
    for form in forms:
        if found[form]:
            return form
    raise ExpungeError(
        f"{PROGRAMS[program]} reads no LoRA of this edit for {family.__name__}: export a single file"
        " (--to safetensors) or, for diffusers, --to diffusers"
    )


def make_table() -> str:
    """Make the table of which program reads which form of a LoRA, in Markdown."""
    heads = ["family", "`--to`", *PROGRAMS.values()]
    rows = [heads, ["---"] * len(heads)]
    for name in registry.list_names("families"):
        family = registry.get("families", name)
        if not (title := get_naming(family).title):
            continue
        for form in FORMS:
            support = [find_support(form, family, program) for program in PROGRAMS]
            cells = ["yes" if text == ALL else text or "–" for text in support]
            rows.append([title, f"`{form}`", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
