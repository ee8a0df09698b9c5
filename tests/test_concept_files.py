"""Concepts from files: the three forms, and what is said where one does not fit."""

import pytest

from expunge import Concept, ExpungeError
from expunge.cli import concept_files

EXPECTED = (
    Concept("airplane", "sky", synonyms=("aircraft", "jet")),
    Concept("flag of Côte d'Ivoire", "a flag", "identity"),
    Concept("Van Gogh", "art", "style"),
    Concept("Washington, D.C."),
)

TXT = """\ufeff# a comment

airplane|aircraft | jet = sky   # another
flag of Côte d'Ivoire=a flag, identity
Van Gogh = art , style
Washington, D.C., object
"""
CSV = """name, synonyms,anchor,kind

airplane,aircraft| jet,sky
flag of Côte d'Ivoire,,a flag,identity
Van Gogh,,art,style
"Washington, D.C.",,,
"""
TOML = """retain = ["bird", "a ship"]

[[concept]]
name = "airplane"
anchor = "sky"
synonyms = ["aircraft", "jet"]

[[concept]]
name = "flag of Côte d'Ivoire"
anchor = "a flag"
kind = "identity"

[[ concept ]]
name = "Van Gogh"
anchor = "art"
kind = "style"

[[concept]]
name = "Washington, D.C."
"""


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize(("name", "text"), [("c.txt", TXT), ("c.csv", CSV), ("c.toml", TOML)])
def test_three_forms_of_the_same(file, name, text):
    found, retain = concept_files.read_concepts(file(name, text))
    assert found == EXPECTED
    assert retain == (("bird", "a ship") if name == "c.toml" else ())
    found, _ = concept_files.read_concepts(file(name, text.replace("\n", "\r\n")), "explicit")
    assert [c.kind for c in found][1:3] == ["identity", "style"]
    assert found[0].kind == "explicit"


def test_the_empty_anchor(file):
    assert concept_files.read_concepts(file("c.txt", "cat=\ndog=, style"))[0] == (
        Concept("cat", ""),
        Concept("dog", "", "style"),
    )
    assert (
        concept_files.read_concepts(file("c.toml", '[[concept]]\nname="cat"\nanchor=""'))[0][0].anchor
        == ""
    )
    assert concept_files.read_concepts(file("c.csv", "name,anchor\ncat,\n"))[0][0].anchor is None


def test_retain_alone(file):
    assert concept_files.read_concepts(file("c.toml", 'retain = ["bird"]')) == ((), ("bird",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.txt",
            "cat\n\ndog, objct",
            "c.txt, line 3: there is no kind of concept 'objct'; did you mean",
        ),
        ("c.txt", "Washington, D.C.", "what follows the last comma is the kind"),
        ("c.txt", "cat\n=sky", "line 2: a concept needs a name"),
        ("c.txt", "cat=Cat", "line 1: the anchor of 'cat' is the concept itself"),
        ("c.txt", "cat\ndog|Cat", "line 2: 'Cat' was there on line 1"),
        ("c.txt", "# nothing\n", "c.txt names no concept"),
        ("c.txt", b"\xff\xfe\xfa", "not text in UTF-8"),
        ("c.csv", "name,anker\ncat,sky", "line 1: there is no column 'anker'; did you mean 'anchor'"),
        ("c.csv", "anchor,kind\nsky,object", "line 1: the header must name"),
        ("c.csv", "name,name\na,b", "line 1: the header must name"),
        ("c.csv", "name\ncat,sky", "line 2: 2 cells stand under 1 columns"),
        (
            "c.csv",
            "name,kind\ncat,\ndog,stlye",
            "line 3: kind must be .*, not 'stlye'; did you mean 'style'",
        ),
        ("c.csv", "name,anchor\n,sky", "line 2: a concept needs a name"),
        ("c.csv", 'name\n"cat', "line 2: unexpected end"),
        ("c.csv", "name\n", "names no concept"),
        ("c.toml", "[[concept]\n", "is not TOML: .*line 1"),
        ("c.toml", '[[concepts]]\nname="a"', "there is no key 'concepts'; did you mean 'concept'"),
        ("c.toml", '[concept]\nname="a"', r"under \[\[concept\]\]"),
        (
            "c.toml",
            '\n[[concept]]\nname="a"\nanker="b"',
            "line 2: a concept has no field 'anker'; did you mean",
        ),
        ("c.toml", "[[concept]]\nname=3", "line 1: name must be text, not 3"),
        ("c.toml", "[[concept]]\nanchor='a'", "line 1: a concept needs a name"),
        ("c.toml", "concept=[{name='a'}, {nam='b'}]", "concept 2: a concept has no field 'nam'"),
        ("c.toml", "retain='bird'", "retain must be a list of prompts, not 'bird'"),
        ("c.json", "{}", "from a .txt, .csv, .toml or .yaml file, not"),
    ],
)
def test_refused(file, name, text, message):
    with pytest.raises(ExpungeError, match=message):
        concept_files.read_concepts(file(name, text))


def test_unreadable(tmp_path):
    with pytest.raises(ExpungeError, match=r"cannot read .*absent.txt: No such file"):
        concept_files.read_concepts(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ExpungeError, match=r"cannot read"):
        concept_files.read_concepts(tmp_path / "folder.txt")
