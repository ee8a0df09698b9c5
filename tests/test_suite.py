"""Suites: what ships reads, what is wrong is said, and cells follow from what is erased."""

from dataclasses import replace
from pathlib import Path

import pytest

from expunge import ExpungeError, ExpungeWarning
from expunge.base import registry
from expunge.evaluation.prompt_lists import PromptList
from expunge.evaluation.suite import Suite

BASE = """# One line.
version = 1
score = "H_o"
[templates]
erased = ["a photo of the {}", "a drawing of the {}"]
[concepts]
"cat" = { near = ["cat face"], synonyms = ["feline"] }
"dog" = { also = ["hound"] }
"ship" = {}
"""


@pytest.fixture
def read(tmp_path):
    def read(text=BASE):
        (tmp_path / "own.toml").write_text(text)
        return Suite.read(tmp_path / "own.toml")

    return read


@pytest.mark.parametrize("name", registry.list_names("suites"))
def test_shipped_suites_are_whole(name):
    suite = Suite.read(name)
    assert registry.describe("suites", name).endswith((".", "retained."))
    assert suite.version >= 1
    for concept in suite.concepts:
        assert set(concept.synonyms).isdisjoint(concept.names)
    if any(one.csv or one.dataset for one in suite.prompts):
        return
    quick = suite.cells([suite.concepts[0].name])
    full = suite.cells([suite.concepts[0].name], full=True)
    assert {"erased", "retained"} <= {cell.role for cell in quick}
    images = sum(len(cell.seeds) for cell in quick)
    assert 20 <= images <= 600
    assert sum(len(cell.seeds) for cell in full) > 3 * images
    assert not any("{" in cell.prompt for cell in full)


def test_there_are_suites():
    names, own = registry.list_names("suites"), ("object", "identity", "style", "unsafe", "shared-terms")
    assert {f"{model}/{name}" for model in ("emoji", "miniature") for name in own} <= set(names)
    assert len([name for name in names if name.startswith("mace-")]) == 4


def test_cells_follow_from_what_is_erased(read):
    suite = read(BASE + "[sizes]\nquick = { erased = 5, synonyms = 2, retained = 3 }\n")
    cells = suite.cells(["Cat"])
    shown = [(cell.role, cell.prompt, len(cell.seeds)) for cell in cells]
    assert shown == [
        ("erased", "a photo of the cat", 3),
        ("erased", "a drawing of the cat", 2),
        ("synonyms", "a photo of the feline", 1),
        ("synonyms", "a drawing of the feline", 1),
        ("retained", "a photo of the dog", 2),
        ("retained", "a drawing of the dog", 1),
        ("retained", "a photo of the ship", 2),
        ("retained", "a drawing of the ship", 1),
    ]
    assert cells[0].targets[0].near == ("cat face",)
    both = suite.cells(["hound", "cat"])
    assert {cell.concept for cell in both if cell.role == "erased"} == {"cat", "dog"}
    assert {cell.concept for cell in both if cell.role == "retained"} == {"ship"}


def test_an_edit_that_names_nothing_in_it(read):
    with pytest.raises(ExpungeError, match="knows nothing of 'guitar'; it knows cat, dog, ship"):
        read().cells(["guitar"])


def test_fewer_concepts_get_more_images(read):
    suite = read(BASE + "[sizes]\nquick = { erased = 4, erased_in_all = 30 }\n")

    def each(names):
        cells = [cell for cell in suite.cells(names) if cell.role == "erased"]
        return {name: sum(len(c.seeds) for c in cells if c.concept == name) for name in names}

    assert each(["cat"]) == {"cat": 30}
    assert each(["cat", "dog", "ship"]) == {"cat": 10, "dog": 10, "ship": 10}


def test_others_fill_templates_and_are_asked_for(read):
    text = BASE.replace('"a drawing of the {}"', '"the {} and the {other}"')
    suite = read(text + '[others]\nrole = "retained"\n"bell" = {}\n"pizza" = {}\n')
    cells = [cell for cell in suite.cells(["cat"]) if "and" in cell.prompt and cell.role == "erased"]
    assert [cell.prompt for cell in cells] == ["the cat and the bell", "the cat and the pizza"]
    assert [ask.role for ask in cells[0].targets] == ["erased", "retained"]
    assert cells[0].targets[1].labels == ("bell",)


def test_prompts_of_a_csv_file(read, tmp_path):
    (tmp_path / "list.csv").write_text(
        'prompt,evaluation_seed,evaluation_guidance\n"a cat, sitting",7,5.5\nno cat,8,\n'
    )
    suite = read(BASE + '[[prompts]]\nrole = "erased"\nconcept = "cat"\ncsv = "list.csv"\n')
    cells = suite.cells(["cat"])[-2:]
    assert [(c.prompt, c.seeds, c.guidance) for c in cells] == [
        ("a cat, sitting", (7,), 5.5),
        ("no cat", (8,), None),
    ]
    (tmp_path / "list.csv").write_text("text\nx\n")
    with pytest.raises(ExpungeError, match="no column 'prompt'; it has text"):
        suite.cells(["cat"])
    (tmp_path / "list.csv").write_text("prompt\n")
    with pytest.raises(ExpungeError, match="holds no prompts"):
        suite.cells(["cat"])
    (tmp_path / "list.csv").unlink()
    with pytest.raises(ExpungeError, match="cannot read the prompts"):
        suite.cells(["cat"])


@pytest.mark.parametrize(
    "name", [n for n in registry.list_names("suites") if n.startswith(("mace", "unl"))]
)
def test_suites_for_stable_diffusion(name, tmp_path, monkeypatch):
    """Their prompts are built from small stand-ins of the lists that a user brings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco_30k.csv").write_text("prompt,evaluation_seed\na dog on a bench,17\n")
    (tmp_path / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\na nude, 3,7\na body,4,7.5\n")
    suite = Suite.read(name)
    with_hub = [replace(one, dataset="", csv="i2p.csv") if one.dataset else one for one in suite.prompts]
    suite = replace(suite, prompts=tuple(with_hub))
    cells = suite.cells([suite.concepts[0].name], full=True)
    assert (suite.num_inference_steps, suite.guidance_scale) in ((50, 7.5), (100, 9.0))
    assert suite.scheduler == "DDIM"
    assert not any("{" in cell.prompt for cell in cells)
    assert {"erased", "retained"} <= {cell.role for cell in cells}
    n = {role: sum(len(c.seeds) for c in cells if c.role == role) for role in ("erased", "retained")}
    expected = {
        "mace-object": (200, 9 * 200),
        "mace-celebrity": (250, 2500),
        "mace-style": (250, 2500),
        "mace-explicit": (2, 1),
        "unlearncanvas": (20 * 5, 50 * 20 * 5),
    }
    assert (n["erased"], n["retained"]) == expected[name]
    if name == "mace-explicit":
        shown = [(cell.prompt, cell.seeds, cell.guidance) for cell in cells]
        assert shown == [("a nude", (3,), 7.0), ("a body", (4,), 7.5), ("a dog on a bench", (17,), None)]
    if name == "unlearncanvas":
        assert cells[0].prompt == "A Architectures image in Abstractionism style."
        assert len(suite.concepts) == 51
        assert len(suite.others) == 20


def edit(old, new):
    return BASE.replace(old, new)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (edit("version = 1\n", ""), "needs a version"),
        (edit('"H_o"', '"H_x"'), "score must be"),
        (
            edit("version = 1", 'version = 1\nscheduler = "DIMM"'),
            "no scheduler 'DIMM'; did you mean 'DDIM'",
        ),
        (edit("version = 1", "version = 1\nscheduler = 50"), "scheduler must be text"),
        (edit("version = 1", 'version = 1\nquestion = "there"'), "'there' is named 'present' now"),
        (edit("version = 1", 'version = 1\nmetrics = ["clip_scroe"]'), "did you mean 'clip_score'"),
        (edit("version = 1", 'version = 1\njugde = "detector"'), "did you mean 'judge'"),
        (edit("synonyms", "synonym"), "no field 'synonym'; did you mean 'synonyms'"),
        (BASE.partition("[concepts]")[0], "has no concepts"),
        (edit("erased = [", "retained = ["), "no prompts that call for what is erased"),
        (
            edit('"a photo of the {}", "a drawing of the {}"', ""),
            "no prompts that call for what is erased",
        ),
        (edit("version = 1", 'version = 1\nknown_as = "objct"'), "did you mean 'object'"),
        (edit("version = 1", 'version = 1\nknown_as = "own.toml"'), "names the suite itself"),
        (edit('"a photo of the {}", ', '"a photo", '), "'a photo' has not"),
        (edit("erased = [", "erasd = ["), "did you mean 'erased'"),
        (edit('the {}"]', 'the {other} {}"]'), "asks for others, and the suite has none"),
        (edit('"ship" = {}', '"ship" = { retain = ["dgo"] }'), "no concept 'dgo'; did you mean 'dog'"),
        (BASE + "[sizes]\nfulll = {}\n", "did you mean 'full'"),
        (BASE + "[sizes]\nquick = { erased = 0 }\n", "erased must be at least 1"),
        (BASE + '[[prompts]]\ntexts = ["x"]\n', "must say which concept"),
        (BASE + "[[prompts]]\n", "just one of them"),
        (edit("version = 1", "format = 9\nversion = 1"), "reads up to 1"),
        ("version", "not a TOML file"),
    ],
)
def test_what_is_wrong_is_one_sentence(read, text, says):
    with pytest.raises(ExpungeError) as caught:
        read(text)
    assert says in str(caught.value)
    assert "own" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_suite(tmp_path):
    with pytest.raises(ExpungeError, match="no suite 'objetc'; did you mean 'object'"):
        Suite.read("objetc")
    with pytest.raises(ExpungeError, match="cannot read"):
        Suite.read(tmp_path / "absent.toml")


LIST = BASE + '[[prompts]]\nrole = "erased"\nconcept = "cat"\ncsv = "list.csv"\n'


@pytest.fixture
def rows(read, tmp_path):
    """The prompts of a CSV file: (prompt, seeds, guidance)."""

    def rows(text, more=""):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "list.csv").write_bytes(data)
        cells = read(LIST + more).cells(["cat"])
        join_names = [cell for cell in cells if cell.role == "erased" and "{}" not in cell.prompt][2:]
        return [(cell.prompt, cell.seeds, cell.guidance) for cell in join_names]

    return rows


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt, evaluation_seed, evaluation_guidance\na cat, 77, 1\n", [("a cat", (77,), 1.0)]),
        (' prompt ,evaluation_seed \n"a cat, big", 7\n', [("a cat, big", (7,), None)]),
        ("prompt,sd_seed,sd_guidance_scale\na cat,3,7.5\n", [("a cat", (3,), 7.5)]),
        ("prompt,seed,guidance_scale\na cat,3,7\n", [("a cat", (3,), 7.0)]),
        ("Prompt,Evaluation Seed\na cat,3\n", [("a cat", (3,), None)]),
        (",prompt,evaluation_seed,url\n0,a cat,5,x\n\n", [("a cat", (5,), None)]),
        ("prompt,evaluation_seed,sd_seed\na cat,1,2\n", [("a cat", (1,), None)]),
        ("prompt,seed\na cat,9007199254740993\n", [("a cat", (2**53 + 1,), None)]),
        ("prompt,seed\na cat,9223372036854775807\n", [("a cat", (2**63 - 1,), None)]),
        ("prompt,seed\na cat,5.0\nno cat,\n", [("a cat", (5,), None), ("no cat", (0,), None)]),
        ("\ufeffprompt,seed\r\na cat,5\r\n", [("a cat", (5,), None)]),
        ("prompt,seed\ra cat,5\r", [("a cat", (5,), None)]),
        ('prompt,seed\n"a cat\nin two lines",5\n', [("a cat\nin two lines", (5,), None)]),
        ("prompt\na cat; or two\n", [("a cat; or two", (0,), None)]),
    ],
)
def test_lists_of_prompts_keep_seeds_and_guidance(rows, text, found):
    assert rows(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,seed\na cat,5\n,6\n", "row 2 (line 3): the prompt is empty"),
        ("prompt,seed\na cat,5\n  ,\n", "row 2 (line 3): the prompt is empty"),
        ('prompt\na cat\n" "\n', "row 2 (line 3): the prompt is empty"),
        ("seed,prompt\n5\n6,a cat\n", "row 1 (line 2): 1 cell under 2 columns"),
        ("prompt,seed\na cat, big,5\n", "row 1 (line 2): 3 cells under 2 columns; a prompt with commas"),
        ("prompt,seed\na cat,5.7\n", "row 1 (line 2): a seed is a whole number from 0 to below 2**63"),
        ("prompt,seed\na cat,inf\n", "row 1 (line 2): the seed 'inf' is not a number"),
        ("prompt,seed\na cat,nan\n", "row 1 (line 2): the seed 'nan' is not a number"),
        ("prompt,seed\na cat,1_000\n", "the seed '1_000' is not a number"),
        ("prompt,seed\na cat,-1\n", "row 1 (line 2): a seed is a whole number from 0"),
        ("prompt,seed\na cat,9223372036854775808\n", "row 1 (line 2): a seed is a whole number from 0"),
        ("prompt,seed\na cat,1e999\n", "row 1 (line 2): a seed is a whole number from 0"),
        ("prompt,guidance\na cat,inf\n", "row 1 (line 2): the guidance 'inf' is not a number"),
        ("prompt,guidance\na cat,-1\n", "row 1 (line 2): guidance is at least 0"),
        ("prompt,guidance\na cat,1e999\n", "row 1 (line 2): guidance is at least 0 and finite"),
        ('prompt,seed\nno cat,1\n"a cat,5\na dog,6\n', "row 2 (line 3): a quote is not closed"),
        ('prompt,seed\n"a cat,5\n"a dog",6\n', "row 1 (line 2): a quote is not closed"),
        ('prompt,seed\n"a cat,5\na dog,6\na bird",7\n', "row 1 (line 2): a quote is not closed"),
        ('prompt,seed\na cat,"5\n', "row 1 (line 2): a quote is not closed"),
        ("prompt;seed\na cat;5\n", "separates its columns by semicolons; separate them by commas"),
        ("prompt\tseed\na cat\t5\n", "separates its columns by tabs"),
        ("prompt,seed,seed\na cat,5,6\n", "has two columns 'seed'"),
        ("prompt,evaluation_sed\na cat,5\n", "'evaluation_sed'; did you mean 'evaluation_seed'"),
        ("promt,seed\na cat,5\n", "no column 'prompt'; it has promt, seed; did you mean 'promt'"),
        ("", "holds no prompts"),
        ("prompt,seed\nein Kätzchen,5\n".encode("latin1"), "not text in UTF-8"),
    ],
)
def test_lists_of_prompts_are_read_strictly(rows, text, says):
    with pytest.raises(ExpungeError) as caught:
        rows(text)
    assert says in str(caught.value)
    assert "list.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["seed_column", "guidance_column", "prompt_column"])
def test_a_column_that_is_named_must_be_there(rows, column):
    with pytest.raises(
        ExpungeError, match=r"list.csv has no column 'own'; it has prompt, seed, guidance"
    ):
        rows("prompt,seed,guidance\na cat,5,7\n", f'{column} = "own"\n')


def test_named_columns_count_before_known_ones(rows):
    more = 'seed_column = "mine"\nguidance_column = "strength"\nprompt_column = "text"\n'
    assert rows("text,prompt,seed,mine,strength\na cat,no,5,6,2\n", more) == [("a cat", (6,), 2.0)]


def test_seeds_of_a_data_set_are_exact_or_refused(monkeypatch):
    import sys
    from types import SimpleNamespace

    table = [
        {"prompt": "a", "seed": 2**53 + 1},
        {"prompt": "b", "seed": 5.0},
        {"prompt": "c", "seed": None},
    ]
    hub = SimpleNamespace(load_dataset=lambda *_, **__: table)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prompts = PromptList(dataset="owner/name")
    assert prompts.read_rows(Path()) == [("a", 2**53 + 1, None), ("b", 5, None), ("c", None, None)]
    for seed in (2.0**60, 0.5, float("nan"), True, -1):
        table[1]["seed"] = seed
        with pytest.raises(ExpungeError, match="owner/name, row 2: "):
            prompts.read_rows(Path())
    table[1] = {"prompt": None, "seed": 1}
    with pytest.warns(ExpungeWarning, match="owner/name: row 2 left out, for the prompt is empty"):
        assert len(prompts.read_rows(Path())) == 2


def test_empty_texts_are_refused(read):
    with pytest.raises(ExpungeError, match="prompt 2 of a list of texts is empty"):
        read(BASE + '[[prompts]]\nrole = "erased"\nconcept = "cat"\ntexts = ["a cat", " "]\n')


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_names_are_found_in_any_unicode_form(read, form):
    from unicodedata import normalize

    text = BASE.replace('"dog" = { also = ["hound"] }', '"Türkiye" = { also = ["flag of Türkiye"] }')
    suite = read(normalize(form, text))
    for name in ("Türkiye", "flag of TÜRKIYE", "flag\u200b of Türkiye", "ﬂag of Türkiye"):
        for other in ("NFC", "NFD"):
            assert [c.name for c in suite.find_erased([normalize(other, name)])] == ["Türkiye"]
    with pytest.raises(ExpungeError, match="is there twice"):
        read(text + '"Tu\u0308rkiye" = {}\n')


@pytest.mark.parametrize(
    ("model", "judge"), [("miniature", "miniature"), ("emoji", "detector"), ("other", "detector")]
)
def test_a_suite_without_a_judge_takes_its_models(model, judge):
    table = {"version": 1, "model": model, "templates": {"erased": ["{}"]}, "concepts": {"cat": {}}}
    assert Suite.from_table(table, "told").judge == judge
    assert Suite.from_table({**table, "judge": "clip_score"}, "told").judge == "clip_score"
