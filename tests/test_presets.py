"""Presets, read from TOML beside the class they are for."""

import pytest

from expunge import ExpungeError
from expunge.base import registry
from expunge.base.presets import read_presets

BASE = """
[_base]
about = "not handed down"
steps = 3
names = ["a", "b"]
[_other]
extends = "_base"
steps = 4
"""


@pytest.fixture
def read(tmp_path):
    def read(text, module="own.py"):
        file = "presets.toml" if module == "__init__.py" else "own.toml"
        (tmp_path / file).write_text(text, encoding="utf-8")
        return read_presets(tmp_path / module)

    return read


def test_a_preset_starts_from_what_it_extends(read):
    presets = read(BASE + '[one]\nabout = "one"\nextends = ["_base", "_other"]\nrate = 0.5\n')
    assert list(presets) == ["one"]  # what is only extended is no preset
    assert presets["one"] == {"about": "one", "steps": 4, "names": ("a", "b"), "rate": 0.5}


def test_order_is_that_of_the_file_and_a_package_has_its_own(read):
    text = '[two]\nabout = "2"\n[one]\nabout = "1"\n'
    assert list(read(text)) == list(read(text, "__init__.py")) == ["two", "one"]


def test_presets_cannot_be_changed_by_accident(read):
    presets = read('[one]\nabout = "1"\nrate = 0.5\n')
    with pytest.raises(TypeError):
        presets["one"]["rate"] = 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rate = 0.5\n", "rate must be a table of field values, \\[rate\\]"),
        ("[one]\nrate = 0.5\n", "the preset 'one' lacks about"),
        (BASE + '[one]\nabout = "1"\nextends = "_bose"\n', "extends of 'one': .* did you mean '_base'"),
        ('[a]\nabout = "1"\nextends = "b"\n[b]\nabout = "2"\nextends = "a"\n', "circle: a → b → a"),
        ("[one\n", "is not a TOML file"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(read, text, says):
    with pytest.raises(ExpungeError, match=says) as said:
        read(text)
    assert "own.toml" in str(said.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ExpungeError, match="cannot read .*absent.toml"):
        read_presets(tmp_path / "absent.py")


@pytest.mark.parametrize("name", registry.list_names("methods"))
def test_every_preset_that_ships_is_a_method(name):
    method = registry.get("methods", name)
    for preset in method.presets:
        assert isinstance(method.preset(preset), method)
