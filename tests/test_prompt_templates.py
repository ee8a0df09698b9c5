"""Phrasings to train in, to keep in and to judge in: no two of these share one."""

import ast
import re
from pathlib import Path

import pytest

import expunge
from expunge import Concept, Problem
from expunge.base import registry
from expunge.changes import HookedChange
from expunge.checkpoints.linearize import fit_static_weights
from expunge.erasing.caption_gram import read_captions
from expunge.erasing.prompt_templates import GENERAL, HELD_OUT, KEPT, RETAINED, TEMPLATES
from expunge.evaluation.suite import Suite
from expunge.methods import uce
from quick import quick

PACKAGE = Path(expunge.__file__).parent
HERE = Path(__file__).parent.parent
SUITES = [
    *map(registry.find_suite, registry.list_names("suites")),
    *sorted(HERE.glob("experiments/tune/*.toml")),
]
NAME_ALONE = ""  # what is left of "{}": a concept's name is no phrasing
HOLE, OTHER = "§", "otherthing"


def wording(template: str) -> str:
    """A template without what does not make it another: case, punctuation, articles."""
    words = re.findall(rf"[\w{HOLE}-]+", template.replace("{}", HOLE).casefold())
    left = " ".join(word for word in words if word not in ("a", "an", "the"))
    return NAME_ALONE if left == HOLE else left


def judged() -> dict[str, str]:
    """Every wording that a suite judges by, as a pattern, and where it stands.

    What a template says of another thing, its {other}, may be any words. Of a list of whole prompts,
    those that name a concept are templates, too.
    """
    found = {}
    for file in SUITES:
        suite = Suite.read(file)
        names = {words for c in suite.concepts for words in (c.name, c.words, *c.also, *c.synonyms)}
        named = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in sorted(names - {""}, key=len)[::-1]))
        listed = [text for prompts in suite.prompts for text in prompts.texts]
        texts = [text for part in suite.templates.values() for text in part]
        for text in [*texts, *(named.sub("{}", text, count=1) for text in listed)]:
            words = wording(text.replace("{other}", OTHER))
            found[re.escape(words).replace(OTHER, r"[\w\- ]+")] = (
                f"{file.parents[1].name}, {file.stem}: {text}"
            )
    return found


def is_judged(template: str, patterns: dict[str, str]) -> str:
    """Where a wording is judged by; "" where none is."""
    words = wording(template)
    if words == NAME_ALONE:
        return ""
    if re.escape(words) in patterns:
        return patterns[re.escape(words)]
    wild = ((pattern, where) for pattern, where in patterns.items() if "[" in pattern)
    return next((where for pattern, where in wild if re.fullmatch(pattern, words)), "")


def trained() -> dict[str, set[str]]:
    """All that a method erases in: the shared lists, its own, its defaults' and its presets'."""
    lists = {f"{kind}": set(texts) for kind, texts in TEMPLATES.items()}
    lists |= {f"UCE {kind}": set(texts) for kind, texts in uce.TEMPLATES.items()}
    for name in registry.list_names("methods"):
        cls = registry.get("methods", name)
        for preset in ("", *cls.presets):
            method = cls.preset(preset) if preset else cls()
            lists[f"{name} {preset}"] = set(getattr(method, "templates", ()))
    return lists


def held() -> set[str]:
    """All that what stays is kept in."""
    some = {*RETAINED, *KEPT.values(), GENERAL}
    for name in registry.list_names("methods"):
        cls = registry.get("methods", name)
        for preset in ("", *cls.presets):
            method = cls.preset(preset) if preset else cls()
            some |= set(getattr(method, "retain_templates", ()))
    return some


def literals() -> dict[str, str]:
    """Every text with one {} in a list of texts anywhere in the package, and where it stands."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf8"))):
            if not isinstance(node, (ast.Tuple, ast.List)):
                continue
            for one in node.elts:
                if isinstance(one, ast.Constant) and isinstance(one.value, str) and "{}" in one.value:
                    found[one.value] = file.name
    return found


def test_what_counts_as_one_wording():
    assert wording("A Photo of {}.") == wording("a photo of the {}") == "photo of §"
    assert wording("the {}") == wording("{}") == NAME_ALONE
    assert wording("a photo of one {}") != wording("a photo of a {}")


def test_the_suites_are_read_whole():
    patterns = judged()
    assert len(patterns) > 30
    for text in (
        "An image capturing {} at a public event",  # celebrities
        "{} in an official photo",
        "a famous artwork by the {}",  # styles
        "the photo of a house in {} style",  # with another thing in it
        "the {} and the soccer ball",
        "a photo of a {}.",  # objects
        "an oil painting of {}",  # flags
        "a plate of {}",  # a prompt of a list
    ):
        assert is_judged(text, patterns), text
    assert not is_judged("a photo of the {} outside", patterns)


def test_training_retaining_and_judging_are_disjoint():
    patterns = judged()
    wordings = {wording(text) for texts in trained().values() for text in texts} - {NAME_ALONE}
    kept = {wording(text) for text in held()} - {NAME_ALONE}
    assert len(wordings) > 80
    assert len(kept) >= 4
    assert not wordings & kept
    asked = {wording(text) for texts in HELD_OUT.values() for text in texts}
    assert len(asked) >= 4
    assert not asked & (wordings | kept)
    for what, texts in {**trained(), "retained": held(), "package": set(literals())}.items():
        both = {text: is_judged(text, patterns) for text in texts if is_judged(text, patterns)}
        assert not both, f"{what}: {both}"


def test_captions_are_no_judged_prompts():
    """The prior's captions name things, too: none of them is what a suite draws."""
    patterns = {pattern: where for pattern, where in judged().items() if "[" not in pattern}
    names = {
        words.casefold()
        for file in SUITES
        for c in Suite.read(file).concepts
        for words in (c.name, c.words, *c.synonyms)
        if words
    }
    named = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    for caption in read_captions("general"):
        for found in named.finditer(caption.casefold()):
            template = caption[: found.start()] + "{}" + caption[found.end() :]
            assert not is_judged(template, patterns), caption


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_third_of_the_phrasings_has_words_behind_the_concept(kind):
    for texts in (TEMPLATES[kind], uce.TEMPLATES[kind]):
        behind = [text for text in texts if re.search(r"\w", text.partition("{}")[2])]
        assert 3 * len(behind) >= len(texts)
        assert len(behind) < len(texts)  # what is before a concept is asked, too
        assert len({wording(text) for text in texts}) == len(texts)


def shapes(templates):
    """Patterns of what templates say of anything."""
    told = {wording(text) for text in templates} - {NAME_ALONE}
    return [re.compile(re.escape(words).replace(HOLE, "(.+)")) for words in sorted(told)]


@pytest.mark.parametrize("name", registry.list_names("methods"))
def test_no_method_reads_what_stays_as_it_erases_or_is_judged(model, monkeypatch, name):
    """Whatever a method reads: but for the erased and their anchors, nothing stands in words that
    something is erased in, and what is retained in none that a suite judges by."""
    method = quick(name)
    told = {"object": "airplane", "style": "art"}  # two kinds, each with phrasings of its own
    erased = tuple(Concept(words, "sky", kind=kind) for kind, words in told.items())
    kept, read, encode = "horse truck", [], type(model).encode

    def spied(self, prompts):
        read.extend([prompts] if isinstance(prompts, str) else prompts)
        return encode(self, prompts)

    monkeypatch.setattr(type(model), "encode", spied)
    edit = expunge.erase(model, Problem(erased, (kept,)), method)
    hooked = [change for change in edit.changes if isinstance(change, HookedChange)]
    if hooked and not any(change.unfittable for change in hooked):
        fit_static_weights(model, edit.changes, edit.record.problem)
    erasing = shapes(text for texts in trained().values() for text in texts)
    keeping, patterns = shapes(held()), judged()
    given = {text for text in read if text not in set(read_captions("general"))}
    assert any(kept in text for text in given) or not method.reads_retain
    for text in given:
        words = wording(text)
        found = [m[1] for shape in erasing if (m := shape.fullmatch(words))]
        # A word that is kept may end as a phrasing does: a print of style.
        if not any(shape.fullmatch(words) for shape in keeping):
            assert not found or {*told.values(), "sky"}.intersection(found), text
        if kept in text:
            assert not is_judged(text.replace(kept, "{}"), patterns), text
