"""The miniature's suites: the papers' counts, nothing kept for tuning, and no phrasing of training."""

import re
from pathlib import Path

import pytest

from expunge import ExpungeError
from expunge.base import registry
from expunge.evaluation.suite import Suite
from training.miniature import captions, suites
from training.miniature.recogniser import Names
from training.miniature.world import read_world

HERE = Path(__file__).parents[1]
WORLD = read_world()
OWN = [name for name in registry.list_names("suites") if name.startswith("miniature/")]
TUNING = sorted(
    path for path in HERE.glob("experiments/tune/*.toml") if Suite.read(path).model == "miniature"
)
TRAINED = (
    captions.TEMPLATES, captions.PHOTOS, captions.PERSON_TEMPLATES, captions.ARTIST_ALONE,
    captions.ARTIST_TAILS, captions.STYLE_TAILS, captions.STYLE_ALONE, captions.GENERIC,
    captions.SOMEONE,
)  # fmt: skip


def kept_for_tuning() -> set[str]:
    objects = [label for label in WORLD.labels if label.name in WORLD.tuning]
    people = {one.name for one in WORLD.named if one.split == "tune"}
    artists = {one.name for one in WORLD.artists if one.split == "tune"}
    return people | artists | {name for label in objects for name in label.names}


def said(suite: Suite) -> str:
    """All that a suite names or draws, in one text."""
    concepts = [(*c.names, *c.labels, *c.near, *c.synonyms) for c in (*suite.concepts, *suite.others)]
    prompts = [(*texts,) for texts in suite.templates.values()] + [one.texts for one in suite.prompts]
    return "\n".join(text for texts in [*concepts, *prompts, suite.retain] for text in texts)


def images(suite: Suite, erased, role: str) -> int:
    cells = suite.cells(erased, full=True)
    return sum(len(cell.seeds) for cell in cells if cell.role == role)


def test_a_suite_lies_in_the_folder_of_its_model():
    assert {name.partition("/")[2] for name in OWN} == {
        "object", "identity", "style", "unsafe", "shared-terms", "residual", "pairs", "prompt-kinds"
    }  # fmt: skip
    assert all(Suite.read(name).model == "miniature" for name in OWN)
    assert Suite.read("object").model == Suite.read("object", "miniature").model == "miniature"
    assert Suite.read("object", "emoji").model == "emoji"
    assert Suite.read("mace-object", "miniature").name == "mace-object"  # one that it has not of its own
    with pytest.raises(ExpungeError, match="did you mean 'miniature/object'"):
        Suite.read("miniature/objcet")


@pytest.mark.parametrize(
    ("name", "erased"), [*(("identity", n) for n in (1, 5, 10, 100)), ("style", 1), ("style", 100)]
)
def test_counts_are_the_papers(name, erased):
    suite = Suite.read(name, "miniature")
    assert len(suite.erase) == len(suite.retain) == 100
    gone = suite.erase[:erased]
    assert images(suite, gone, "erased") == (2500 if erased == 100 else 250)
    assert images(suite, gone, "retained") == 2500
    quick = sum(len(cell.seeds) for cell in suite.cells(gone))
    assert quick <= 400  # minutes


def test_ten_words_have_two_hundred_images_each():
    suite = Suite.read("object", "miniature")
    assert images(suite, ["cat"], "erased") == 200
    assert images(suite, ["cat"], "retained") == 9 * 200
    assert images(suite, ["cat"], "synonyms") == 3 * 200


def test_what_is_kept_for_tuning_is_in_no_suite_and_alone_in_those_for_tuning():
    kept = kept_for_tuning()
    assert len(kept) >= 40 + 40 + 30
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in kept))
    for name in OWN:
        found = pattern.findall(said(Suite.read(name)))
        assert not found, (name, found)
    assert len(TUNING) == 4
    for path in TUNING:
        suite = Suite.read(path)
        named = {c.name for c in (*suite.concepts, *suite.others)}
        assert named - kept <= {"snack"}, path  # the word for a group, each of which is kept
        assert {label for c in suite.concepts for label in c.labels} <= kept, path


@pytest.mark.parametrize("name", [*OWN, *TUNING], ids=lambda name: Path(name).stem)
def test_no_prompt_is_a_caption_of_training(name):
    """Templates are held out; of whole prompts none is a phrasing in which something was trained."""
    suite = Suite.read(name)
    trained = {text.format("§") for texts in TRAINED for text in texts}
    for text in {text for texts in suite.templates.values() for text in texts}:
        assert captions.is_held_out(text.replace("{other}", "cat").format("cat")), text
    names = sorted({n for c in suite.concepts for n in (*c.names, *c.synonyms)}, key=len, reverse=True)
    pattern = re.compile("|".join(rf"\b(?:an? |the )?{re.escape(n)}\b" for n in names), re.IGNORECASE)
    for text in (text for one in suite.prompts for text in one.texts):
        assert text not in WORLD.implied
        # A name alone is no phrasing, and "a photo of a" is another than "a photo of the".
        if not pattern.fullmatch(text) and not captions.is_held_out(text):
            assert pattern.sub("§", text, count=1) not in trained, text


def test_the_recogniser_knows_what_they_ask_for():
    names = Names.of(WORLD)
    artists = {artist.name for artist in WORLD.artists}
    known = {*names.things, *names.people, *names.styles, *artists}
    for name in [*OWN, *TUNING]:
        suite = Suite.read(name)
        for concept in (*suite.concepts, *suite.others):
            assert {*concept.labels, *concept.near} <= known, (name, concept.name)


def test_those_who_share_a_name_share_a_word_of_it():
    suite = Suite.read("shared-terms", "miniature")
    for concept in suite.concepts[: suites.SHARED]:
        assert len(concept.retain) >= 5
        assert all(set(concept.name.split()) & set(other.split()) for other in concept.retain)


def test_written_files_are_what_the_rules_give():
    for path, text in suites.texts(WORLD).items():
        assert (HERE / path).read_text("utf-8") == text, path
