"""The command line: what it does, and how it refuses."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import expunge
from expunge import Edit, ExpungeError
from expunge.base import registry
from expunge.cli.loading_options import LoadingOptions
from expunge.cli.main import main
from expunge.cli.spelling import describe_unknown_words, find_nearest_name, list_suite_names
from expunge.cli.terminal import catch_interrupts
from expunge.runtime.cost import Cost
from quick import options as quick_options
from tiny import flux, sdxl


@pytest.fixture
def run(capsys, folder, monkeypatch, tmp_path):
    """Runs a command in an empty folder on the tiny model; returns (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, model=True):
        if model and arguments[0] in ("draw", "erase"):
            arguments = (*arguments, "--model", str(folder))
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def edit(run):
    assert run("erase", "uce", "--concept", "airplane=sky", "-o", "e.safetensors")[0] == 0
    return "e.safetensors"


def test_draw_one_grid(run):
    code, out, err = run("draw", "a ship", "-n", "3", "-o", "new/grid.png", "--steps", "2")
    assert (code, err) == (0, "")
    assert "3 images of 'a ship'" in out
    assert Image.open("new/grid.png").size == (3 * 196 + 4, 200)


def test_draw_a_folder_with_an_edit(run, edit, tmp_path):
    plain = run("draw", "The airplane!", "-n", "2", "--seed", "5", "-o", "plain/", "--steps", "2")
    edited = run(
        "draw",
        "The airplane!",
        "-n",
        "2",
        "--seed",
        "5",
        "-o",
        "edited/",
        "--steps",
        "2",
        "--edit",
        edit,
    )
    assert plain[0] == edited[0] == 0
    names = [sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in ("plain", "edited")]
    assert not set(names[0]) & set(names[1])
    for seed, *pair in zip((5, 6), *names, strict=True):
        assert all(name.startswith(f"the-airplane-{seed}-") for name in pair)
        before, after = (
            Image.open(f"{folder}/{name}")
            for folder, name in zip(("plain", "edited"), pair, strict=True)
        )
        assert before.size == (16, 16)
        assert before.tobytes() != after.tobytes()


def test_erase_prints_the_anchor_it_chose(run):
    code, out, _ = run(
        "erase", "uce", "--concept", "airplane", "--concept", "horse=the ground", "--retain", "ship",
        "--retain", "bird", "--ridge", "2", "--seed", "7", "-o", "e.safetensors",
    )  # fmt: skip
    assert code == 0
    assert "'airplane' becomes 'sky'" in out
    assert "memory: " in out
    assert "in all " in out
    assert "'horse'" not in out
    record = Edit.load("e.safetensors").record
    assert [c.anchor for c in record.problem.erase] == ["sky", "the ground"]
    assert record.problem.retain == ("ship", "bird")
    assert (record.fields["ridge"], record.seed, record.model) == (2.0, 7, "tiny")


def test_erase_says_when_a_method_reads_no_anchor(run):
    told = ("erase", "ant", *quick_options("ant"), "--concept", "airplane=sky", "-o", "e.safetensors")
    code, out, err = run(*told)
    assert code == 0
    assert "ANT, as it is set, reads no anchor: what 'airplane' becomes is left" in err
    assert "becomes" not in out
    shown = run("info", "e.safetensors")[1]
    assert "its method read no anchor" in shown
    assert "becomes" not in shown
    assert "reads no anchor" not in run(*told, "--turn-to", "anchor")[2]


def test_erase_many_from_a_file(run, tmp_path):
    (tmp_path / "many.toml").write_text(
        'retain = ["bird"]\n[[concept]]\nname = "art"\nanchor = ""\nkind = "style"\n'
        '[[concept]]\nname = "cat"\nanchor = "the ground"\n'
    )
    code, _, err = run(
        "erase", "uce", "--concepts", "many.toml", "--concept", "airplane=sky", "--kind", "identity",
        "--retain", "ship", "-o", "e.safetensors",
    )  # fmt: skip
    assert (code, err) == (0, "")
    problem = Edit.load("e.safetensors").record.problem
    assert [(c.name, c.anchor, c.kind) for c in problem.erase] == [
        ("airplane", "sky", "identity"),
        ("art", "", "style"),
        ("cat", "the ground", "identity"),
    ]
    assert problem.retain == ("ship", "bird")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.safetensors", "many.toml"]


def test_presets(run, monkeypatch):
    from expunge.methods.uce import UCE

    with monkeypatch.context() as without:
        without.setattr(UCE, "presets", {})
        assert "uce has no presets" in run("erase", "uce", "--preset", "list", model=False)[1]
    presets = {
        "soft": {
            "about": "for little things",
            "ridge": 500.0,
            "num_retain_words": 3,
            "templates": ("a {}",),
        }
    }
    monkeypatch.setattr(UCE, "presets", presets)
    code, out, _ = run("erase", "uce", "--preset", "list", model=False)
    assert code == 0
    assert "soft" in out
    assert "for little things" in out
    assert "ridge 500.0, num_retain_words 3, templates a {}" in out
    erase = ("erase", "uce", "--concept", "airplane=sky", "-o", "e.safetensors")
    assert run(*erase, "--preset=soft", "--num-retain-words", "5")[0] == 0
    fields = Edit.load("e.safetensors").record.fields
    assert (fields["ridge"], fields["num_retain_words"], fields["templates"]) == (500.0, 5, ["a {}"])
    code, _, err = run(*erase, "--preset", "soft", "--preset", "sotf")
    assert (code, err) == (2, "expunge: there is no preset 'sotf'; did you mean 'soft'?\n")


def test_info(run, edit, folder):
    code, out, _ = run("info", edit, "--model", str(folder))
    assert code == 0
    for text in (
        "airplane (object); becomes 'sky'",
        "uce: ridge 50",
        "right on 14 layers",
        "made from it",
    ):
        assert text in out
    assert "name the model at hand" in run("info", edit)[1]


def test_info_says_when_it_does_not_fit(run, edit, tmp_path):
    from conftest import tiny_pipeline

    tiny_pipeline(width=48).save_pretrained(tmp_path / "wide")
    code, out, _ = run("info", edit, "--model", "wide")
    assert code == 0
    assert "no: " in out
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    assert "other weights" in run("info", edit, "--model", "other")[1]
    code, _, err = run("draw", "ship", "-o", "x.png", "--edit", edit, "--model", "wide", model=False)
    assert code == 2
    assert "does not fit" in err
    code, _, err = run(
        "draw", "ship", "-o", "x.png", "--steps", "1", "--edit", edit, "--model", "other", model=False
    )
    assert code == 0
    assert err.startswith("note: the edit was made from other weights")


def test_lists_and_help(run):
    assert "uce" in run("list", "methods")[1]
    assert "stable_diffusion" in run("list", "families")[1]
    assert "uce" in run("erase", "--help")[1]
    for command in ("draw", "info", "list", "erase uce"):
        code, out, _ = run(*command.split(), "--help", model=False)
        assert code == 0
        assert f"usage: expunge {command}" in out
    assert "--ridge" in run("erase", "uce", "--help", model=False)[1]
    assert "draw PROMPT" in run("--help")[1]
    assert run("--version")[1].startswith("expunge 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("drow x", "no command 'drow'; did you mean 'draw'"),
        ("list methds", "did you mean 'methods'"),
        ("erase ucee --concept a -o e.safetensors", "no method 'ucee'; did you mean 'uce'"),
        (
            "erase --concept a",
            f"name a method after erase, one of: {', '.join(registry.list_names('methods'))}",
        ),
        ("erase uce --concept a -o e.safetensors --rigde 1", "'--rigde'; did you mean '--ridge'"),
        ("erase uce --concpet a -o e.safetensors", "'--concpet'; did you mean '--concept'"),
        ("erase uce --concpet a", "'--concpet'; did you mean '--concept'"),
        ("draw x --oputut y.png", "'--oputut'; did you mean '--output'"),
        ("draw -o x.png", "draw needs PROMPT"),
        ("erase uce --concept a -o e.safetensors --kind objct", "'objct'; did you mean 'object'"),
        ("erase uce --concept a -o e.safetensors --ridge -1", "ridge must be above 0, not -1"),
        ("erase uce --concept a -o e.safetensors --ridge x", "--ridge must be a number, not 'x'"),
        ("erase uce --concept a -o e.safetensors --positions lst", "'lst'"),
        ("erase uce --concept a -o e.safetensors extra", "does not know what to do with 'extra'"),
        ("erase uce --concept = -o e.safetensors", "needs a name"),
        ("erase uce -o e.safetensors", "no concept to erase"),
        ("erase uce -o e.safetensors --concepts file", ".txt, .csv, .toml or .yaml file, not from file"),
        ("erase uce -o e.safetensors --concepts absent.txt", "cannot read absent.txt"),
        (
            "erase uce --concept a -o e.safetensors --preset --seed 1",
            "missing value for argument '--preset",
        ),
        ("erase uce --concept a -o e.safetensors --preset soft", "no preset 'soft'"),
        ("erase uce --concept a -o e.safetensors --ray nowhere", "HOST:PORT, ray://HOST:PORT"),
        (
            "erase uce --concept a -o e.safetensors --ray 127.0.0.1:1",
            "nobody answers at the Ray address",
        ),
        ("erase uce --concept a", "erase uce needs -o"),
        ("erase uce --concept a -o e.pt", "should end so"),
        ("erase uce --concept a -o file/e.safetensors", "cannot write"),
        ("erase uce --concept cat --retain Cat -o e.safetensors", "both erased and retained"),
        ("erase uce --concept a --model emojy -o e.safetensors", "no model 'emojy'"),
        ("draw x", "draw needs -o"),
        ("draw x -o", "missing value for argument '-o"),
        ("draw x -o x.txt", "should end in"),
        ("draw x -o x.png -n 0", "at least 1"),
        ("draw x -o x.png -n two", "-n/--number must be a whole number, not 'two'"),
        ("draw x -o x.png --seed x", "--seed must be a whole number, not 'x'"),
        ("draw x -o x.png --model emojy", "no model 'emojy'; did you mean 'emoji'"),
        ("draw x -o x.png --steps 0", "num_inference_steps must be 1 to 1000"),
        ("draw x -o file/x.png", "cannot write"),
        ("draw x -o x.png --edit absent.safetensors", "cannot read absent.safetensors"),
        ("draw x -o x.png --edit file", "not a whole safetensors file"),
        ("draw x -o x.png --stpes 3", "did you mean '--steps'"),
        ("info file", "not a whole safetensors file"),
        ("evaluate e.safetensors --suite object", "evaluate needs -o"),
        ("evaluate e.safetensors -o r", "name a suite with --suite, one of: identity, mace-"),
        ("evaluate e.safetensors --suite objects -o r", "did you mean 'object'"),
        ("evaluate e.safetensors --suite object --suite mace-style -o r", "for different models"),
        ("evaluate absent.safetensors --suite object -o r", "cannot read absent.safetensors"),
        ("evaluate file --suite object -o r --metric clip_scor", "file is not a whole safetensors"),
        ("evaluate --suite object -o r --metric clip_scor", "did you mean 'clip_score'"),
        ("evaluate --suite object -o r --model emojy", "no model 'emojy'"),
        ("evaluate e.safetensors --suite object -o r --cache-limit much", "not 'much'"),
        ("run absent.toml", "cannot read absent.toml"),
        ("run file", "is not a TOML file"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, arguments, message):
    (tmp_path / "file").write_text("in the way")
    code, out, err = run(*arguments.split(), model="--model" not in arguments)
    assert code == 2
    assert message in err
    assert err.startswith("expunge: ")
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_name_longer_than_the_window(run, tmp_path):
    code, _, err = run("erase", "uce", "--concept", "ship " * 80 + "=sky", "-o", "e.safetensors")
    assert code == 2
    assert "80 tokens" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["expunge.model.Model.draw", "expunge.methods.uce.UCE.fit"])
def test_an_interrupt_leaves_earlier_files(run, edit, monkeypatch, tmp_path, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "x.png").write_text("earlier")
    earlier = (tmp_path / edit).read_bytes()
    monkeypatch.setattr(where, interrupt)
    command = ("draw", "ship", "-o", "x.png") if "draw" in where else (
        "erase", "uce", "--concept", "horse", "-o", edit
    )  # fmt: skip
    code, _, err = run(*command)
    assert code == 130
    assert err.count("\n") == 1
    assert (tmp_path / "x.png").read_text() == "earlier"
    assert (tmp_path / edit).read_bytes() == earlier
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.safetensors", "x.png"]


def test_an_interrupt_in_a_finaliser_comes_a_moment_later(capsys):
    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), catch_interrupts() as received:
        one = Finalised()
        del one
        time.sleep(10)
    assert received
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("library", "then"), [("libtorch_cpu", 0), ("libtorch_cpu", 1), ("safetensors", 3)]
)
def test_a_real_interrupt(folder, tmp_path, library, then):
    """While modules are read, and while the model is read or draws."""
    command = [sys.executable, "-m", "expunge", "draw", "ship", "-n", "640", "--steps", "1000"]
    process = subprocess.Popen(
        [*command, "-o", "x.png", "--model", str(folder)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(then)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [None, ["--help"], ["erase", "--help"], ["list", "methods"]])
def test_quick_commands_import_no_torch(command):
    code = f"from expunge.cli.main import main; main({command})" if command else "import expunge"
    program = f"import sys, time\n{code}\n"
    program += "print('torch' in sys.modules, time.process_time())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    torch_there, seconds = result.stdout.split()[-2:]
    assert torch_there == "False"
    assert float(seconds) < 1  # of the processor's time, interpreter and all


@pytest.mark.parametrize(
    "arguments",
    [
        "erase uce --concept a -o e.pt",
        "erase uce --concept a -o e.safetensors --kind objct",
        "erase uce --concept a -o e.safetensors --model emojy",
        "erase ucee --concept a -o e.safetensors",
        "draw x -o x.png --edit absent.safetensors",
        "evaluate absent.safetensors --suite object -o r",
        "evaluate . --suite object -o r",
        "evaluate --suite object -o r --metric clip_scor",
    ],
)
def test_what_needs_no_torch_is_refused_without(arguments, tmp_path):
    program = f"import sys\nfrom expunge.cli.main import main\ncode = main({arguments.split()})\n"
    program += "print(code, 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert result.stdout.split() == ["2", "False"], result.stderr


def test_an_anchor_of_no_known_word_is_said(run):
    code, _, err = run("erase", "uce", "--concept", "airplane=the blorp", "-o", "e.safetensors")
    assert code == 0
    assert err.startswith("note: this model's tokenizer has no token for 'blorp' in the anchor")
    assert err.count("\n") == 1
    assert run("erase", "uce", "--concept", "airplane=", "-o", "n.safetensors")[2] == ""
    assert "becomes what the empty prompt draws" in run("info", "n.safetensors")[1]


def test_a_name_of_no_known_word_is_said(run):
    code, _, err = run("erase", "uce", "--concept", "airplne=sky", "-o", "e.safetensors")
    assert code == 0
    said = "note: this model's tokenizer has no token for"
    assert f"{said} 'airplne' (near: 'airplane'): look whether it is spelled" in err
    # Nothing is near to some; what is retained is misspelt in silence otherwise.
    retained = ("--retain", "brid", "--retain", "the zzyzx", "--retain", "a hores")
    err = run("erase", "uce", "--concept", "qqqq=grond", *retained, "-o", "f.safetensors")[2]
    assert f"{said} 'qqqq', 'brid' (near: 'bird'), 'hores' (near: 'horse'): look" in err
    assert f"{said} 'grond' (near: 'ground') in the anchor" in err
    assert "zzyzx" not in err


def test_the_near_name_is_one_that_the_model_is_asked_for():
    names = list_suite_names("emoji")
    near = {"flag of Frence": "flag of France", "a hrose": "horse", "Pistl": "pistol", "qqqq": ""}
    assert {name: find_nearest_name(name, names) for name in near} == near
    assert list_suite_names("somebody's") == []


def test_what_a_suite_asks_for_is_spelled_as_meant(model, monkeypatch):
    monkeypatch.setattr(
        "expunge.cli.spelling.list_suite_names", lambda name: ["Zaphod Beeblebrox", "horse"]
    )
    assert describe_unknown_words(model, ["Zaphod Beeblebrox", "horse", "an airplane"]) == ""
    assert describe_unknown_words(model, ["zaphod Beeblebrocks"]).startswith(
        "'zaphod' (near: 'Zaphod Beeblebrox')"
    )
    assert (
        describe_unknown_words(model, ["a hrose", "brid"])
        == "'hrose' (near: 'horse'), 'brid' (near: 'bird')"
    )


def test_what_is_piped_has_no_blanks_at_its_lines_ends(run, edit):
    for command in (
        ("list", "methods"),
        ("list", "suites"),
        ("info", edit),
        ("erase", "mace", "--preset", "list"),
    ):
        out = run(*command)[1]
        assert out.count("\n") > 2
        assert all(line == line.rstrip() for line in out.splitlines()), command


def test_one_concept_with_two_anchors_is_not_merged(run, edit, folder):
    def erased(method, concept, file):
        assert run("erase", method, "--concept", concept, "-o", file)[0] == 0
        return file

    def merged(*files):
        return run("merge", *files, "--model", str(folder), "-o", "m.safetensors")

    for concept in ("airplane=ground", "Airplane=", "jet|airplane=street"):
        other = erased("uce", concept, "other.safetensors")
        code, _, err = merged(edit, other)
        assert code == 2
        assert "'sky' in one of the edits to merge and" in err
        assert "merged, it would become neither" in err
        assert not Path("m.safetensors").exists()
    assert merged(edit, erased("oce", "airplane=sky", "same.safetensors"))[0] == 0


def test_info_of_a_shipped_model(run):
    code, out, _ = run("info", "emoji")
    assert code == 0
    assert "emoji, StableDiffusion" in out


def test_a_problem_of_texts():
    with pytest.raises(ExpungeError, match="erase holds concepts, not 'airplane': write Concept\\("):
        expunge.Problem(("airplane",))


def test_progress_off_a_terminal_is_a_line_now_and_then():
    from expunge.cli.terminal import make_line_progress

    now, said = [0.0], []
    tell = make_line_progress(said.append, every=30, clock=lambda: now[0])
    for second in range(0, 101, 10):
        now[0] = float(second)
        tell("drawing", second, 100)
    assert said == [
        "drawing: 30 % done, about 70 s left",
        "drawing: 60 % done, about 40 s left",
        "drawing: 90 % done, about 10 s left",
    ]


def test_evaluate_writes_a_report_and_draws_nothing_twice(run, edit, tmp_path, folder):
    (tmp_path / "own.toml").write_text(
        """# One line.
version = 1
score = "H_c"
model = "emoji"
num_inference_steps = 2
judge = "clip_zeroshot"
templates = { erased = ["a photo of the {}"] }
sizes = { quick = { erased = 2, retained = 1 } }
[concepts]
"airplane" = {}
"ship" = {}
[attacks]
embedding = { radius = [0.1], steps = 1 }
[options]
clip_zeroshot = { classes = ["airplane", "ship"], scale = 1e-9 }
"""
    )
    command = ("evaluate", edit, "--suite", "own.toml", "-o", "report", "--model", str(folder))
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "6 images drawn; look at report/index.html" in out
    assert {p.name for p in Path("report").iterdir()} == {"index.html", "results.json", "results.csv"}
    code, out, _ = run(*command, "--metric", "pixel_distance", "--cache-limit", "0")
    assert "0 images drawn" in out
    assert "pixel_distance retained" in Path("report/results.csv").read_text()
    code, out, _ = run(*command, "--attacks", "embedding", "--cache-limit", "0")
    assert code == 0
    assert "embedding radius 0.1" in out
    assert "original" in out
    assert "embedding radius 0.1 ASR" in Path("report/results.csv").read_text()
    assert {p.name for p in Path("report").iterdir()} == {"index.html", "results.json", "results.csv"}
    code, out, _ = run(*command)
    assert "6 images drawn" in out  # the cache had been emptied


def test_draw_takes_what_has_been_drawn(run, monkeypatch):
    command = ("draw", "a ship", "-n", "2", "--seed", "77", "--steps", "2", "-o")
    assert run(*command, "one.png")[0] == 0
    monkeypatch.setattr("expunge.model.Model.draw", None)
    assert run(*command, "two.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_export_info_undo_and_merge(run, edit, folder, tmp_path):
    copy = ("export", edit, "--model", str(folder), "--to")
    code, out, err = run(*copy, "diffusers", "-o", "erased", "--licence", "openrail")
    assert (code, err) == (0, "")
    assert "erased: diffusers" in out
    assert 'license: "openrail"' in (tmp_path / "erased" / "README.md").read_text()
    out = run("info", "erased")[1]
    assert "airplane (becomes 'sky') by uce" in out
    assert "nothing that it says of" in run("info", str(folder))[1]
    assert (
        "airplane back, 14 tensors" in run("undo", "erased", "--original", str(folder), "-o", "back")[1]
    )
    out = run(*copy, "kohya", "-o", "lora.safetensors", "--rank", "3")[1]
    assert "rank 3 on 14 layers, in float16" in out
    assert "is lost" in out
    assert "airplane (becomes 'sky') by uce" in run("info", "lora.safetensors")[1]
    assert run("erase", "uce", "--concept", "horse=sky", "-o", "f.safetensors")[0] == 0
    out = run("merge", edit, "f.safetensors", "--model", str(folder), "-o", "m.safetensors")[1]
    assert "2 concepts of 2 edits, right on 14 layers" in out
    drawn = run("draw", "ship", "--lora", "lora.safetensors=0.5", "--steps", "1", "-o", "x.png")
    assert drawn[0] == 0


def test_what_only_reads_leaves_the_denoiser_on_the_disk(run, edit, folder):
    whole = expunge.load(folder)
    made = Edit.load(edit)
    assert made.hash == expunge.erase(whole, made.record.problem, "uce").hash
    for work, there in ((Cost(1), False), (Cost(1, 1), True), (Cost(1, 0, 1), True), (None, True)):
        model = LoadingOptions().load(str(folder), work)
        assert all(p.is_meta != there for p in model.network.parameters())
        assert (model.pipe.vae is not None) == there
    said = [
        run("erase", method, "--concept", "airplane=sky", "-o", "f.safetensors", "--dry-run")[1]
        for method in ("uce", "mace")
    ]
    assert ["the rest is left on the disk" in out for out in said] == [True, False]


def test_what_a_family_lacks_is_said_before_it_is_loaded(run, monkeypatch):
    flux().save_pretrained("flux")
    monkeypatch.setattr(LoadingOptions, "load", None)  # not called
    monkeypatch.setattr(LoadingOptions, "print_estimate", None)
    erase = ("erase", "mace", "--concept", "airplane=sky", "-o", "e.safetensors", "--model", "flux")
    for options in ((), ("--dry-run",)):
        code, _, err = run(*erase, *options, model=False)
        assert code == 2
        assert "MACE's suppress needs cross-attention, and Flux has none" in err


def test_a_dry_run_prints_and_does_nothing(run, tmp_path):
    for command in (
        "erase uce --concept airplane=sky -o e.safetensors --dry-run --dtype float16",
        "erase mace --concept airplane=sky -o e.safetensors --dry-run",
        "erase ace --concept airplane=sky -o e.safetensors --dry-run",
        "erase esd --concept airplane=sky -o e.safetensors --dry-run",
        "erase ant --concept airplane=sky -o e.safetensors --dry-run",
        "draw ship -n 2 -o x.png --dry-run",
    ):
        code, out, err = run(*command.split())
        assert (code, err) == (0, "")
        assert "memory: " in out
        assert "in all " in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export e.safetensors --to kohia -o x.safetensors", "did you mean 'kohya'"),
        ("export absent.safetensors --to lora -o x.safetensors", "cannot read absent.safetensors"),
        ("export absent.safetensors --to lora", "export needs -o"),
        ("export e.safetensors --to lora -o x.safetensors --dtype float8", "no number format 'float8'"),
        ("export e.safetensors --to lora -o x.safetensors --push-to-hub a/b", "HF_HUB_OFFLINE"),
        ("export e.safetensors --to lora -o x.safetensors --rank x", "--rank must be a whole number"),
        ("undo absent -o x", "no model 'absent'"),
        ("undo absent.safetensors -o x.safetensors", "no file or folder absent.safetensors"),
        ("merge e.safetensors f.safetensors -o m.pt", "should end so"),
        ("draw x -o x.png --lora a=b --model emoji", "FILE or FILE=STRENGTH, not 'a=b'"),
        ("draw x -o x.png --dtype half --model emoji", "no number format 'half'"),
        ("draw x -o x.png --device gpu --model emoji", "no device 'gpu'"),
        ("draw x -o x.png --device cuda:99 --dry-run --model emoji", "no device 'cuda:99'"),
        ("draw x -o x.png --offlaod --model emoji", "did you mean '--offload'"),
    ],
)
def test_bad_input_of_models_is_one_sentence(run, tmp_path, arguments, message):
    code, out, err = run(*arguments.split(), model=False)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_models_are_one_sentence(run, edit, folder, tmp_path, capsys):
    model = ("--model", str(folder))
    assert run("export", edit, *model, "--to", "kohya", "-o", "lora.safetensors")[0] == 0
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(unet.read_bytes()[:-1])
    torch.save({}, tmp_path / "old.ckpt")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, tmp_path / "other.safetensors")
    sdxl().save_pretrained(tmp_path / "sdxl")
    nan = shutil.copytree(folder, tmp_path / "nan")
    state = load_file(unet)
    state["conv_in.weight"][0] = torch.nan
    save_file(state, nan / "unet" / unet.name, {"format": "pt"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for name, message in (
        ("lora.safetensors", "is a LoRA, not a model"),
        (str(vae), "is a VAE, not a whole model"),
        ("cut.safetensors", "not a whole safetensors file"),
        ("old.ckpt", "but pickled"),
        ("other.safetensors", "of no family that is known"),
        ("nan", "NaN or infinity"),
        (edit, "is an edit, not a model"),
    ):
        for command in (
            ("draw", "x", "-o", "x.png", "--model", name),
            ("erase", "uce", "--concept", "x=y", "-o", "x.safetensors", "--model", name),
            ("export", edit, "--to", "lora", "-o", "x.safetensors", "--model", name),
        ):
            if name == "nan" and command[0] == "export":
                continue  # of the one tensor that a LoRA says nothing of
            code, out, err = run(*command, model=False)
            assert (code, out, err.count("\n")) == (2, "", 1), command
            assert message in err
    for command, message in (
        (("export", edit, "--to", "lora", "-o", "x.safetensors", "--model", "sdxl"), "is for Stable"),
        (("draw", "x", "-o", "x.png", "--model", "sdxl", "--edit", edit), "is for StableDiffusion, and"),
        (("draw", "x", "-o", "x.png", "--model", "sdxl", "--lora", "lora.safetensors"), "is not a LoRA"),
        (("export", edit, "--to", "lora", "-o", "x.safetensors", *model, "--rank", "0"), "not 0"),
        (("export", edit, "--to", "lora", "-o", "x.safetensors"), "say where with --model"),
        (("merge", edit, "-o", "x.safetensors"), "two edits or more"),
    ):
        code, out, err = run(*command, model=False)
        assert (code, out, err.count("\n")) == (2, "", 1), (command, err)
        assert message in err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_no_image_in_a_folder_takes_the_place_of_another(run, edit):
    """Whatever differs: the prompt in any script, its end, the seed, the steps, the edit."""
    long = "a photo of the cat " * 10
    asked = [
        ("飞机",), ("船",), ("!!!",), ("???",), (long + "one",), (long + "two",), ("a/b",), ("a b",),
        ("A b",), ("ship",), ("ship", "--seed", "1"), ("ship", "--guidance", "2"),
        ("ship", "--edit", edit),
    ]  # fmt: skip
    for number, arguments in enumerate(asked, 1):
        assert run("draw", *arguments, "--steps", "1", "-o", "all/")[0] == 0
        assert len(list(Path("all").iterdir())) == number
    assert run("draw", "ship", "--steps", "2", "-o", "all/")[0] == 0
    names = {path.name for path in Path("all").iterdir()}
    assert len(names) == len(asked) + 1
    assert any(name.startswith("飞机-0-") for name in names)
    assert run("draw", "ship", "--steps", "2", "-o", "all/")[0] == 0  # the same once more
    assert {path.name for path in Path("all").iterdir()} == names


def test_a_file_of_another_content_is_not_replaced(run):
    draw = ("draw", "ship", "--steps", "1", "-o", "all/")
    run(*draw)
    (first,) = Path("all").iterdir()
    drawn = first.read_bytes()
    first.write_bytes(b"the user's own")
    run(*draw)
    assert first.read_bytes() == b"the user's own"
    (second,) = set(Path("all").iterdir()) - {first}
    assert second.name == f"{first.stem}-2.png"
    assert second.read_bytes() == drawn


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (("-5 cats",), "-5 cats"),
        (("-5",), "-5"),
        (("-cat",), "-cat"),
        (("--two hyphens",), "--two hyphens"),
        (("--seed", "3", "--", "--cat"), "--cat"),
    ],
)
def test_a_prompt_may_begin_with_a_hyphen(run, arguments, prompt):
    code, out, err = run(
        "draw", "--steps", "1", "-o", "x.png", "--model", "emoji", *arguments, model=False
    )
    assert (code, err) == (0, "")
    assert out == f"x.png: 1 image of {prompt!r}\n"


def test_values_of_options_may_begin_with_a_hyphen(run):
    code, _, err = run(
        "erase", "uce", "--concept", "-5 cats=-the sky", "--concept=-dogs=sky", "--retain", "-ship",
        "-o", "e.safetensors",
    )  # fmt: skip
    assert code == 0, err
    problem = Edit.load("e.safetensors").record.problem
    assert [(c.name, c.anchor) for c in problem.erase] == [("-5 cats", "-the sky"), ("-dogs", "sky")]
    assert problem.retain == ("-ship",)
    code, _, err = run("draw", "ship", "-seed", "3", "-o", "x.png")
    assert code == 2
    assert "'-seed'; did you mean '--seed'" in err


NAMES = ("cat [sleeping]", "[red]dog[/red]", "[/]", "ship :smile: bird", "[link]horse")


def test_brackets_and_colons_are_no_markup(run, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    erase = [text for name in NAMES for text in ("--concept", f"{name}=sky")]
    assert run("erase", "uce", *erase, "--retain", "[bold]frog " * 9, "-o", "e.safetensors")[0] == 0
    code, out, _ = run("info", "e.safetensors")
    assert code == 0
    for name in NAMES:
        assert f"{name} (object)" in out
    assert ("[bold]frog " * 9).strip() in out  # in a pipe no line is broken or cut
    assert "…" not in out
    code, _, err = run("draw", "x", "-o", "x.png", "--model", "[red]x:cat:", model=False)
    assert (code, err.partition(";")[0]) == (2, "expunge: there is no model '[red]x:cat:'")
    code, _, err = run("erase", "uce", "--concept", "airplane=[bold]blorp :cat:", "-o", "e.safetensors")
    assert "'[bold]blorp :cat:'" in err


def test_progress_shows_names_as_they_are(monkeypatch):
    from rich.console import Console

    from expunge.cli import terminal

    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    own = {"force_terminal": True, "width": 200}
    monkeypatch.setattr(terminal, "Console", lambda **how: Console(**how, **own))
    with terminal.show_progress() as progress:
        progress("drawing [red]cat[/] :smile:", 1, 2)
    assert "drawing [red]cat[/] :smile:" in said.getvalue()


def test_a_report_in_a_pipe_cuts_no_name(monkeypatch, capsys):
    from types import SimpleNamespace

    from expunge.cli import evaluate

    monkeypatch.delenv("COLUMNS", raising=False)
    name = "mace, [a] very long name of an edit " * 12 + "end"
    row = SimpleNamespace(name=name, h=None, attacks=(), terms=dict.fromkeys(["erased", "retained"] * 6))
    suite = SimpleNamespace(name="object", score="H_o")
    case = SimpleNamespace(suite=suite, rows=[row], erased=["[airplane]"], left_out=[])
    evaluate.print_report(SimpleNamespace(cases=[case]))
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("{} list methods | head -n 0; echo ${{PIPESTATUS[0]}}", "0", ""),
        (
            "{} list methods > /dev/full; echo $?",
            "2",
            "cannot write the output: No space left on device",
        ),
        ("{} list methods >&-; echo $?", "0", ""),
        ("{} list methods <&- >&- 2>&-; echo $?", "0", ""),
        ("{} list methds 2> /dev/full; echo $?", "2", ""),
        ("{} list methds 2>&-; echo $?", "2", ""),
        ("{} draw x -o x.txt 2>&1 >&- | cat; echo ${{PIPESTATUS[0]}}", "2", ""),
    ],
)
def test_closed_broken_and_full_pipes(command, code, said):
    done = subprocess.run(
        ["bash", "-c", command.format(f"{sys.executable} -m expunge")], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == code
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)
