"""Every command and code block of the README and the docs runs, and every link leads somewhere."""

import dataclasses
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import expunge
import test_methods
from conftest import tiny_pipeline
from expunge import Concept, Problem
from expunge.base import registry
from expunge.checkpoints.export import export
from expunge.cli.main import main
from expunge.evaluation.cells import Size
from expunge.evaluation.experiment import Experiment
from expunge.evaluation.suite import Suite
from expunge.methods.uce import UCE
from expunge.model import Model
from test_imports import ORDER
from tiny import flux2, single_file, z_image

HERE = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(HERE)) for path in HERE.glob("docs/**/*.md"))]
TEXTS = {page: (HERE / page).read_text("utf-8") for page in PAGES}
ALSO = ["CONTRIBUTING.md", "experiments/README.md", "benchmarks/README.md"]
"""Pages whose links and commands are checked too."""
TEXTS |= {page: (HERE / page).read_text("utf-8") for page in ALSO}

QUICKER = {
    "uce": "--num-retain-words 5",
    "mace": "--stages refine fuse --captions ''",
    "ace": "--stages gate --num-retain-words 20",
    "speed": "--num-retain-words 20",
    "oce": "--captions ''",
    "sluice": "--num-retain-words 20 --num-captions 10",
}
"""What is added to a page's `erase`, so that it takes seconds."""
FEW = Size(erased=2, synonyms=1, retained=1, plain=2, prompts=2)
ATTACKS = {"embedding": {"radius": [0.05, 0.1], "steps": 1}}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    file: str
    """The file that the page says to save it as, or ""."""


def blocks(page):
    """The blocks of a page, in order."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE):
        before = TEXTS[page][: match.start()].rstrip().rpartition("\n")[2]
        named = re.search(r"Save this as `([^`]+)`:$", before)
        found.append(Block(match[1], match[2], named[1] if named else ""))
    return found


def commands(text):
    """The commands of a block, one a line but for those that a backslash continues."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


RUN = [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))]
OWN_MODEL = {"docs/how-to/use-your-own-model.md", "docs/tutorials/lora-to-comfyui.md"}
TINY = {
    "docs/how-to/erase-from-flux2-klein.md": ("FLUX.2-klein-4B", flux2),
    "docs/how-to/erase-from-z-image.md": ("Z-Image-Turbo", z_image),
}
"""Pages on a model of one family: the folder that they speak of, and what makes it tiny."""


def test_there_are_pages_to_run():
    assert len(PAGES) > 30
    assert len(RUN) > 10
    assert set(RUN) > OWN_MODEL


@pytest.fixture(scope="module")
def model_files(tmp_path_factory, folder):
    """The files that pages on models of one's own speak of, tiny."""
    path = tmp_path_factory.mktemp("own")
    single_file(tiny_pipeline(), path / "dream.safetensors")
    shutil.copytree(folder, path / "stable-diffusion-v1-5")
    edit = expunge.erase(expunge.load(folder), Problem((Concept("ship", "sky"),)))
    export(edit, "kohya", folder, path / "style.safetensors")
    return path


@pytest.fixture
def few(monkeypatch):
    """Suites of a few images in a few steps, and a small attack."""
    read = Suite.read.__func__
    monkeypatch.setattr(
        Suite,
        "read",
        classmethod(
            lambda cls, path, model="": dataclasses.replace(
                read(cls, path, model),
                sizes={"quick": FEW, "full": FEW},
                attacks=ATTACKS,
            )
        ),
    )
    made = Model.__init__

    def quick(self, pipe, name="", settings=None):
        made(self, pipe, name, {**(settings or {}), "num_inference_steps": 2})

    monkeypatch.setattr(Model, "__init__", quick)


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs(page, few, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {}
    if page in OWN_MODEL:
        shutil.copytree(request.getfixturevalue("model_files"), tmp_path, dirs_exist_ok=True)
        before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    if page in TINY:
        name, make = TINY[page]
        make().save_pretrained(tmp_path / name)
        settings = {"sample_size": 8, "max_sequence_length": 64}
        (tmp_path / name / "expunge.json").write_text(json.dumps(settings), "utf-8")
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.file:
            text = block.text.replace('name = "uce"', 'name = "uce"\nnum_retain_words = 5')
            text = text.replace('name = "mace"', 'name = "mace"\ncaptions = ""')
            text = re.sub(r"^concepts = .*", 'concepts = ["airplane"]', text, flags=re.MULTILINE)
            Path(block.file).write_text(text, "utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "bash":
            for command in commands(block.text):
                run(command, capsys)
    assert {path: path.read_bytes() for path in before} == before  # what came in is never written to


def run(command, capsys):
    """Run one command of a page; it must end well and warn of nothing."""
    program, *arguments = shlex.split(command)
    assert program == "expunge", command
    if arguments[0] == "erase":
        arguments += shlex.split(QUICKER.get(arguments[1], ""))
    code = main(arguments)
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if "% done" not in line]
    assert code == 0, (command, notes)
    assert not [note for note in notes if "note: " in note and "no token" not in note], (command, notes)
    for sign in ("-o", "--output"):
        if sign in arguments and "--dry-run" not in arguments:
            assert Path(arguments[arguments.index(sign) + 1]).exists(), command
    return out


def test_the_readme_shows_the_main_job():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 120
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert images
    assert all((HERE / image).is_file() for image in images)
    (block,) = (block for block in blocks("README.md") if block.language == "bash")
    assert len(commands(block.text)) == 5
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 1


@cache
def hooks():
    """What fills the site's reference pages."""
    spec = importlib.util.spec_from_file_location("hooks", HERE / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def help_of(command, method=""):
    """The help of a command, as a person reads it."""
    return hooks().output_of(f"expunge {command} {method} --help")


@cache
def first_words(command):
    """The first words of the lines that a command prints."""
    return {line.split()[0] for line in hooks().output_of(command).splitlines()}


def typed():
    """(page, command) of all that pages name, in blocks that are not run and in their text."""
    for page, text in TEXTS.items():
        for block in blocks(page):
            if block.language == "sh":
                yield from ((page, command) for command in commands(block.text))
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", prose):
            if re.match(r"(expunge|python|make|bash) ", code):
                yield page, " ".join(code.split())


def test_commands_that_are_not_run_are_right():
    seen = list(typed())
    assert len(seen) > 60
    targets = re.findall(r"^([a-z]+):", (HERE / "Makefile").read_text("utf-8"), re.MULTILINE)
    for page, command in seen:
        for one in command.split(" && "):
            program, *arguments = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", one).replace("…", "x"))
            if program == "expunge":
                check(arguments, page)
            elif program.endswith("python") and arguments[0].endswith(".py"):
                assert (HERE / arguments[0]).is_file() or "NAME" in arguments[0], (page, one)
            elif program == "make":
                assert arguments[0] in targets, (page, one)


def check(arguments, page):
    """A command and its options are among those of the program; names of methods and presets too."""
    command = arguments[0]
    if command.isupper() or command.startswith("--"):
        return
    method = ""
    if command == "erase":
        method = arguments[1] if len(arguments) > 1 else "METHOD"
        if method == "METHOD":
            method = "uce"
        elif method == "dim":  # the tutorial's own, which is not in the folder
            return
        assert method in hooks().names("methods"), (page, arguments)
        if "--preset" in arguments:
            preset = arguments[arguments.index("--preset") + 1]
            if preset != "list":
                known = first_words(f"expunge erase {method} --preset list")
                assert preset in known, (page, arguments)
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(command, method)))
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        assert option in known or option == "--help", (page, arguments, option)


@pytest.mark.parametrize("name", ["uce", "mace", "ace", "ant"])
def test_a_method_page_names_real_fields(name):
    own = help_of("erase", name).partition("method options")[2]
    known = {option[2:].replace("-", "_") for option in re.findall(r"--[a-z][a-z-]*", own)}
    lines = TEXTS[f"docs/explanation/{name}.md"].splitlines()
    named = set()
    for start, line in enumerate(lines):
        if line.startswith("|") and re.search(r"\| field \|", line):
            column = [cell.strip() for cell in line.split("|")].index("field")
            for row in itertools.takewhile(lambda row: row.startswith("|"), lines[start + 2 :]):
                named |= set(re.findall(r"`(\w+)`", row.split("|")[column]))
    assert len(named) > 3
    assert named <= known


def anchors(text):
    """The anchors of a page's headings, as Markdown's table of contents makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->", "", TEXTS[page], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (HERE / page).parent / path if path else HERE / page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text("utf-8")), link


def test_files_that_pages_name_are_there():
    pattern = r"`((?:tests|src|docs|experiments|benchmarks|training|integrations)/[\w./-]+)`"
    named = {(page, path) for page, text in TEXTS.items() for path in re.findall(pattern, text)}
    assert len(named) > 20
    missing = [
        (page, path)
        for page, path in sorted(named)
        if not re.search(r"NAME|METHOD|SIZE", path) and not (HERE / path).exists()
    ]
    assert missing in ([], [("docs/tutorials/add-a-method.md", "src/expunge/methods/dim.py")])


def test_every_page_is_in_the_contents():
    nav = (HERE / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    for page in PAGES[1:]:
        assert page.removeprefix("docs/") in nav, page


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_every_script_is_listed(folder):
    scripts = [path.relative_to(HERE / folder) for path in sorted((HERE / folder).rglob("*.py"))]
    assert len(scripts) > 10
    missing = [str(path) for path in scripts if str(path) not in TEXTS[f"{folder}/README.md"]]
    assert not missing


@pytest.mark.parametrize("folder", ["experiments", "benchmarks"])
def test_every_script_finds_what_it_imports(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / folder))
    scripts, before = sorted((HERE / folder).glob("*.py")), set(sys.modules)
    assert len(scripts) > 10
    for path in scripts:
        try:
            runpy.run_path(str(path), run_name="imported")
        except ModuleNotFoundError as error:
            if error.name != "ray":  # an extra, in one script
                raise
    for path in scripts:  # they import each other by bare names, which other tests must not find
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def test_the_drawing_names_every_room():
    drawing = (HERE / "docs" / "images" / "architecture-rooms.svg").read_text("utf-8")
    words = set(re.findall(r"\w+", drawing))
    assert set(ORDER) <= words


def test_the_site_loads_nothing_from_the_network():
    config = (HERE / "mkdocs.yml").read_text("utf-8")
    assert "font: false" in config
    assert not re.search(r"https?://", config)
    assert "mermaid" not in config  # the theme fetches it
    here = '<a href="https://arxiv.org"><img src="a.png"><link rel="stylesheet" href="../a.css">'
    assert hooks().on_post_page(here) == here
    for page in (
        '<img alt="" src="https://x.org/a.png">',
        "<script async src=//x.org/a.js></script>",
        '<link href="https://fonts.x.org/css" rel="stylesheet">',
    ):
        with pytest.raises(SystemExit, match="x.org"):
            hooks().on_post_page(here + page)


def test_reference_pages_are_filled_by_the_program():
    page = hooks().fill(TEXTS["docs/reference/cli.md"])
    for command in ("draw", "erase", "evaluate", "run", "export", "merge", "undo", "info", "list"):
        assert f"usage: expunge {command}" in page
    erase = page.partition("## erase")[2].partition("## evaluate")[0]
    assert "--retain" in erase
    assert "--ridge" not in erase
    page = hooks().fill(TEXTS["docs/reference/methods.md"])
    for method in hooks().names("methods"):
        assert f"### {method}\n" in page
    assert "--ridge" in page
    assert "usage:" not in page.partition("## Fields")[2]
    with pytest.raises(SystemExit, match="failed"):
        hooks().output_of("expunge list nothing")


def test_peft_reads_the_lora_of_the_page(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model = expunge.load("emoji")
    edit = expunge.erase(model, Problem((Concept("airplane", "sky"),)), UCE(num_retain_words=5))
    export(edit, "lora", "emoji", "no-airplane-lora.safetensors")
    (block,) = (block for block in blocks("docs/how-to/export.md") if block.language == "py")
    names = {"DiffusionPipeline": DiffusionPipeline}
    exec(
        block.text.replace("OWNER/MODEL", str(Path(expunge.__file__).parent / "emoji" / "pipeline")),
        names,
    )
    assert any("lora" in name for name, _ in names["pipe"].unet.named_parameters())


def test_the_examples_of_judging_mean_what_they_say(tmp_path):
    (suite,) = (block for block in blocks("docs/how-to/judge-an-edit.md") if block.language == "toml")
    (tmp_path / suite.file).write_text(suite.text, "utf-8")
    concepts = Suite.read(tmp_path / suite.file).concepts
    assert [concept.name for concept in concepts] == ["cat", "dog", "horse"]
    (table,) = (block for block in blocks("docs/how-to/compare-methods.md") if block.language == "toml")
    (tmp_path / table.file).write_text(table.text, "utf-8")
    assert len(Experiment.read(tmp_path / table.file).jobs()) == 9
    schema = TEXTS["docs/reference/file-formats.md"].partition("## results.json")[2]
    for key in ("provenance", "cases", "methods", "left out", "differences", "larger than chance"):
        assert f"`{key}`" in schema or f".{key}" in schema or f"[].{key}" in schema


def example():
    """The method of the tutorial."""
    names = {"__name__": "Dim"}  # as what it is recorded as
    block = next(b for b in blocks("docs/tutorials/add-a-method.md") if b.language == "python")
    exec(block.text, names)
    return names["Dim"]


class TestTheExampleKeepsTheContract(test_methods.TestContract):
    """What every method of the folder keeps, of the tutorial's."""

    @pytest.fixture
    def method(self, monkeypatch):
        describe = registry.describe
        monkeypatch.setattr(
            registry, "describe", lambda kind, name: "DIM." if name == "Dim" else describe(kind, name)
        )
        return example()()


NOTEBOOK = HERE / "docs" / "tutorials" / "quickstart.ipynb"


def test_the_notebook_is_whole():
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"] >= 5) == (4, True)
    cells = book["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"] * 5
    assert len({cell["id"] for cell in cells}) == len(cells)
    heads = [line.strip("# \n") for cell in cells for line in cell["source"] if re.match("#+ ", line)]
    assert heads == ["Quickstart", "Erase", "Look", "Judge", "Export"]
    for cell in cells:
        keys = {"cell_type", "id", "metadata", "source"}
        code = cell["cell_type"] == "code"
        assert cell.keys() == (keys | {"execution_count", "outputs"} if code else keys)
    # What was shown when it was run loads nothing and names no folder of whoever ran it.
    assert not re.search(r"https?://|/(home|tmp|work)/", NOTEBOOK.read_text("utf-8"))


def test_the_site_shows_the_notebook():
    page = hooks().fill(TEXTS["docs/tutorials/quickstart.md"])
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert "".join(cell["source"]) in page
    assert page.count("```python") == 5
    assert page.count('<div class="notebook-output">') == 3
    assert 'src="data:image/png;base64,' in page


def test_the_notebook_runs(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    written = {"no-airplane.safetensors", "no-airplane-lora.safetensors", "report"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report" / "index.html").is_file()
    assert expunge.Edit.load("no-airplane.safetensors").hash == names["edit"].hash
    assert names["edit"].record.problem.erase[0].name == "airplane"
    (_, before), (_, half), (_, after) = names["rows"]
    assert not any(map(torch.equal, before, after))
    assert not any(map(torch.equal, half, after))
