"""Phrasings to erase a concept in, thirty for each kind, and the prompts that are made from them.

{} is the concept's place. No phrasing is one that a suite judges by, nor one in which something is
retained: a suite asks what an erasure does in words that it has not seen.
(`tests/test_prompt_templates.py` compares all of them, with case, punctuation and articles put aside.) A
causal text encoder says nothing of a phrase in the words before it: what is left around a concept lies
behind it: in more than a third of the phrasings words follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expunge.base.errors import ExpungeError
from expunge.problem import Concept

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "an image of the {}",
        "a snapshot of the {}",
        "a photograph of the {}",
        "a close-up photo of the {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a blurry photo of the {}",
        "a good photo of the {}",
        "a cropped photo of the {}",
        "a black and white photo of the {}",
        "a painting of the {}",
        "a watercolor of the {}",
        "a pencil sketch of the {}",
        "a cartoon of the {}",
        "an illustration of the {}",
        "a rendering of the {}",
        "the {} in the middle of a picture",
        "the {} on a plain background",
        "a photo of the {} outside",
        "a photo of the {} in bright light",
        "a photo of the {} taken at night",
        "the {} in a painting",
        "a drawing of the {} in pencil",
        "a picture of the {} from close up",
        "an image of the {} in black and white",
        "the {} in the distance",
        "the {} shown by itself",
        "a small {} in a large picture",
        "one {} against a white wall",
        "a picture of a {} and nothing else",
    ),
    "identity": (
        "an image of {}",
        "a snapshot of {}",
        "a photograph of {}",
        "a close-up photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a blurry photo of {}",
        "a good photo of {}",
        "an official photo of {}",
        "a candid photo of {}",
        "a black and white photo of {}",
        "a painting of {}",
        "a watercolor of {}",
        "a pencil sketch of {}",
        "a cartoon of {}",
        "a poster of {}",
        "{} at a ceremony",
        "{} looking at the camera",
        "{} on the front page",
        "{} on a stage",
        "{} in a newspaper picture",
        "{} seen from afar",
        "{} in a painting",
        "{} in the middle of a picture",
        "a photo of {} on a poster",
        "a photo of {} taken outside",
        "a picture of {} from close up",
        "a picture of {} on a wall",
        "an image of {} in black and white",
        "a drawing of {} in pencil",
    ),
    "style": (
        "an artwork by {}",
        "a painting by {}",
        "art by {}",
        "a picture by {}",
        "a drawing by {}",
        "a work by {}",
        "a famous work by {}",
        "a sketch by {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "an illustration in the style of {}",
        "a landscape in the style of {}",
        "a portrait in the style of {}",
        "a still life in the style of {}",
        "a city in the style of {}",
        "a tree in the style of {}",
        "a picture inspired by {}",
        "a copy of a work by {}",
        "an image in {} style",
        "a picture in {} style",
        "a painting in {} style",
        "a drawing in {} style",
        "a landscape in {} style",
        "a portrait in {} style",
        "an animal in {} style",
        "a house in {} style",
        "a {} style picture of a garden",
        "a {} style drawing on paper",
        "a work by {} in a museum",
        "{} style",
    ),
    "explicit": (
        "an image of {}",
        "a snapshot of {}",
        "a photograph of {}",
        "a close-up photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a blurry photo of {}",
        "a good photo of {}",
        "a cropped photo of {}",
        "a black and white photo of {}",
        "a photo with {}",
        "a picture with {}",
        "an image with {}",
        "a scene with {}",
        "a painting of {}",
        "a watercolor of {}",
        "a pencil sketch of {}",
        "a cartoon of {}",
        "an illustration of {}",
        "{} in a photo",
        "{} in a picture",
        "{} in a film scene",
        "{} in a magazine",
        "{} on the screen",
        "{} shown in a painting",
        "a photo with {} in the middle",
        "a photo of {} taken at night",
        "a picture of {} from close up",
        "an image of {} in black and white",
        "a drawing of {} in pencil",
    ),
}
"""By kind of concept. The images of a concept are drawn with the first of its kind."""

RETAINED = ("{}", "here is the {}", "a print of the {}", "a {} in a frame")
"""The phrasings in which names to retain are kept. A name may be a whole prompt: {} keeps that."""

KEPT: dict[str, str] = {
    "object": "a print of the {}",
    "identity": "a print of {}",
    "style": "a print by {}",
    "explicit": "a print of {}",
}
"""By kind of concept, the phrasing in which gates keep names and general words. It is as many tokens
long as the first of `TEMPLATES`, so that a word stands where an erased one stands: a random text encoder
tells places apart as well as words."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "object": ("a postcard of the {}", "the {} seen through a window"),
    "identity": ("a postcard of {}", "{} seen through a window"),
    "style": ("a postcard by {}", "a mural in the style of {}"),
    "explicit": ("a postcard of {}", "{} seen through a window"),
}
"""By kind of concept, the phrasings in which it is measured how far an edit moved it: nothing is erased,
kept or judged in them."""

GENERAL = "a depiction of the {}"
"""The phrasing in which a prior keeps the words of a tokenizer's vocabulary."""


def assemble_prompts(concept: Concept, templates: Sequence[str] = ()) -> list[str]:
    """Put each of a concept's names into each template.

    >>> assemble_prompts(Concept("plane", synonyms=("jet",)), ("{}", "a photo of the {}"))
    ['plane', 'a photo of the plane', 'jet', 'a photo of the jet']

    Args:
        concept: the concept; its synonyms count as names.
        templates: phrasings with {} in the concept's place; by default those of its kind.

    Returns:
        The prompts, name after name, each template by template.
    """
    templates = templates or TEMPLATES[concept.kind]
    return [template.format(name) for name in concept.names for template in templates]


def assemble_anchor_prompts(concept: Concept, templates: Sequence[str] = ()) -> list[str]:
    """Put a concept's anchor into each template: one prompt a template.

    The empty anchor, or none, stands for the empty prompt. Repeated once for each name of the concept,
    the list has a row for every row of `assemble_prompts`.

    >>> assemble_anchor_prompts(Concept("plane", "the sky"), ("{}", "a photo of {}"))
    ['the sky', 'a photo of the sky']

    Args:
        concept: the concept.
        templates: phrasings with {} in the concept's place; by default those of its kind.
    """
    templates = templates or TEMPLATES[concept.kind]
    # Nothing in the place of a name leaves "a photo of ", which is not the empty prompt.
    return [template.format(concept.anchor) if concept.anchor else "" for template in templates]


def assemble_retained_prompts(names: Sequence[str], templates: Sequence[str] = RETAINED) -> list[str]:
    """Put each of the names to retain into each template: name after name, each template by template.

    Args:
        names: names, or whole prompts.
        templates: phrasings with {} in the name's place.
    """
    return [template.format(name) for name in names for template in templates]


def require_place(templates: Iterable[str]) -> None:
    """Check that each template has one place for the concept.

    Raises:
        ExpungeError: a template has no {}, or several.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ExpungeError(f"a template has one {{}} for the concept; {template!r} has not")
