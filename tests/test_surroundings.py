"""Locales, caches, file names, working directories and Python's own options, as people have them."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import expunge
from conftest import tiny_pipeline
from expunge import Concept, Edit, ExpungeError, Probe, Problem, fingerprint
from expunge.__main__ import speak_in_any_locale
from expunge.base import registry
from expunge.base.files import check_writable, replacing, replacing_folder
from expunge.changes import Applied, LowRank
from expunge.checkpoints.export import export
from expunge.checkpoints.load import load
from expunge.cli.main import main
from expunge.evaluation.image_cache import Cache
from expunge.evaluation.image_source import Request, Source
from expunge.runtime import work_dir

SOURCE = str(Path(expunge.__file__).parents[1])
PROBLEM = Problem((Concept("airplane", "sky"),))


def command(*arguments, options=(), cwd=None, **environment):
    """Run the program as a process, in a locale of plain bytes."""
    keep = {key: os.environ[key] for key in ("PATH", "EXPUNGE_CACHE") if key in os.environ}
    return subprocess.run(
        [sys.executable, *options, "-m", "expunge", *arguments],
        env={**keep, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        cwd=cwd,
        check=False,
    )


# Locales.

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_help_and_lists_in_any_locale(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    speak_in_any_locale()
    for arguments in (
        ["erase", "mace", "--help"],
        ["list", "suites"],
        ["erase", "ace", "--preset", "list"],
    ):
        assert main(arguments) == 0
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert "\\u" in text  # what it cannot write is spelled
    assert "MACE" in text


def test_a_message_in_an_ascii_locale_keeps_its_letters():
    done = command("info", "Türkiye-λ.safetensors", **ASCII)
    assert done.returncode == 2
    assert "Türkiye-λ.safetensors" in done.stderr.decode("utf-8")
    done = command("info", "λ.safetensors", PYTHONIOENCODING="cp1252")
    assert done.returncode == 2
    assert b"\\u03bb.safetensors" in done.stderr


def test_bytes_that_are_no_text_are_one_sentence(model):
    broken = os.fsdecode(b"caf\xe9")
    for read in (model.encode, model.require_window):
        with pytest.raises(ExpungeError, match="'caf.*' is not text in UTF-8"):
            read([broken])


def test_the_registry_reads_utf8_in_any_locale(monkeypatch):
    plain = io.open

    def opened(file, mode="r", buffering=-1, encoding=None, *rest, **more):
        assert "b" in mode or encoding not in (None, "locale"), file
        return plain(file, mode, buffering, encoding, *rest, **more)

    monkeypatch.setattr(io, "open", opened)
    for kind in registry.KINDS:
        for name in registry.list_names(kind):
            assert registry.describe(kind, name)
    assert registry.tabulate_coverage()


# Python's own options.


def test_without_docstrings_an_image_is_drawn(folder, tmp_path):
    output = tmp_path / "x.png"
    how = ["--model", str(folder), "-o", str(output), "--steps", "1"]
    done = command("draw", "a cat", *how, options=["-W", "ignore", "-OO"])
    assert done.returncode == 0, done.stderr
    assert output.is_file()
    assert b"docstring" not in done.stderr


def test_no_assert_stands_for_a_check():
    for path in Path(expunge.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*assert\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_arguments_of_another_type_are_named(model):
    with pytest.raises(TypeError, match="method must be a Method .* not 3"):
        expunge.erase(model, PROBLEM, 3)
    for name in ("pixel_distance", "structure"):
        metric = registry.get("metrics", name)()
        with pytest.raises(TypeError, match="references must be a tensor of images, not None"):
            metric.measure(torch.zeros(1, 3, 8, 8), ["x"])


# The cache.


def test_drawing_needs_no_cache(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    how = ["draw", "a cat", "--model", str(folder), "--steps", "1"]
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "file" / "x"))
    assert main([*how, "-o", str(tmp_path / "one.png")]) == 0
    monkeypatch.delenv("EXPUNGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert main([*how, "-o", str(tmp_path / "two.png")]) == 0
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    assert main([*how, "-o", str(tmp_path / "three.png")]) == 0
    assert len({(tmp_path / f"{n}.png").read_bytes() for n in ("one", "two", "three")}) == 1
    capsys.readouterr()


def test_work_that_needs_the_cache_says_so_before_it_begins(tmp_path, monkeypatch, capsys, model):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "file" / "x"))
    monkeypatch.setattr(
        "expunge.checkpoints.load.load", lambda *_, **__: pytest.fail("the work has begun")
    )
    file = tmp_path / "e.safetensors"
    expunge.erase(model, PROBLEM).save(file)
    assert main(["evaluate", str(file), "--suite", "object", "-o", str(tmp_path / "r")]) == 2
    assert "set EXPUNGE_CACHE to a folder that can be written" in capsys.readouterr().err
    monkeypatch.delenv("EXPUNGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ExpungeError, match="no home folder .* set EXPUNGE_CACHE"):
        Cache()


def test_a_cache_that_may_only_be_read_is_read(model, tmp_path, monkeypatch):
    asked = [Request("cat", 0, 1, 1.0)]
    first = Cache(tmp_path).draw(Source(model), asked)

    def refuse(path):
        raise ExpungeError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr("expunge.evaluation.image_cache.check_writable", refuse)
    monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(PermissionError(30, "read-only")))
    cache = Cache(tmp_path)
    assert torch.equal(cache.draw(Source(model), asked), first)
    monkeypatch.setattr(model, "draw", lambda *_, **__: pytest.fail("a batch was drawn"))
    with pytest.raises(ExpungeError, match="Read-only file system.*EXPUNGE_CACHE"):
        cache.draw(Source(model), [Request("dog", 0, 1, 1.0)])
    assert cache.prune(0) == 0


# Names, links, and folders.


def test_names_that_are_too_long(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = 300 * "n"
    for arguments in (
        ["draw", "cat", "-o", f"{long}.png"],
        ["draw", "cat", "-o", "x.png", "--model", long],
        ["draw", "cat", "-o", "x.png", "--model", f"{long}/{long}"],
        ["draw", "cat", "-o", "x.png", "--edit", long],
        ["info", long],
        ["erase", "uce", "--concept", "cat", "-o", f"{long}.safetensors"],
        ["undo", long, "--original", "emoji", "-o", "x"],
        ["evaluate", long, "--suite", "object", "-o", "r"],
        ["evaluate", "e", "--suite", "object", "-o", long],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "File name too long" in said or "cannot read e" in said
    assert not list(tmp_path.iterdir())


def test_a_work_folder_has_room_for_its_name(model, tmp_path):
    output = tmp_path / ("n" * 243 + ".safetensors")
    place = work_dir.find_work_dir(output)
    assert len(place.name) <= 255
    assert place.name.endswith(".work")
    assert place != work_dir.find_work_dir(tmp_path / ("n" * 242 + "m.safetensors"))
    expunge.erase(model, PROBLEM, work=place).save(output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert work_dir.find_work_dir("a/b.safetensors") == Path("a/b.safetensors.work")


def test_a_folder_that_may_not_be_searched(tmp_path, monkeypatch):
    plain = Path.is_file

    def refuse(path):
        if path.name.startswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    for read in (load, Edit.load):
        with pytest.raises(ExpungeError, match="cannot read .*(Permission denied|No such file)"):
            read(tmp_path / "shut" / ".." / "shut.safetensors")


def test_an_output_that_is_a_symbolic_link(model, folder, tmp_path):
    (tmp_path / "real").mkdir()
    for there in (True, False):
        target, link = tmp_path / "real" / f"{there}.safetensors", tmp_path / f"{there}.safetensors"
        if there:
            target.write_text("earlier")
        link.symlink_to(target)
        check_writable(link)
        expunge.erase(model, PROBLEM).save(link)
        assert link.is_symlink()
        assert Edit.load(target).record.problem.erase[0].name == "airplane"
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == [
        "False.safetensors", "True.safetensors"
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    export(expunge.erase(expunge.load(folder), PROBLEM), "diffusers", folder, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "empty" / "model_index.json").is_file()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for write in (replacing, replacing_folder):
        with (
            pytest.raises(ExpungeError, match="cannot write .*links form a loop"),
            write(tmp_path / "round"),
        ):
            pass
    with pytest.raises(ExpungeError, match="links form a loop"):
        check_writable(tmp_path / "round")


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["draw", "a cat", "-o", "x.png"]) == 2
    assert capsys.readouterr().err.startswith("expunge: the working directory is not there any more")


@pytest.mark.parametrize("ending", [".SAFETENSORS", ".Safetensors"])
def test_endings_in_capitals(folder, tmp_path, monkeypatch, capsys, ending):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LIST.TXT").write_text("airplane=sky\n", "utf-8")
    how = ["--model", str(folder)]
    assert main(["erase", "uce", "--concepts", "LIST.TXT", "-o", f"E{ending}", *how]) == 0
    assert main(["draw", "cat", "-o", "X.PNG", "--edit", f"E{ending}", "--steps", "1", *how]) == 0
    assert main(["erase", "uce", "--concept", "ship=sky", "-o", f"F{ending}", *how]) == 0
    assert main(["export", f"E{ending}", "--to", "kohya", "-o", f"L{ending}", *how]) == 0
    assert main(["merge", f"E{ending}", f"F{ending}", "-o", f"M{ending}", *how]) == 0
    assert main(["draw", "cat", "-o", "Y.JPG", "--lora", f"L{ending}", "--steps", "1", *how]) == 0
    capsys.readouterr()


# A work folder is one model's, and one command's at a time.


@pytest.mark.parametrize(
    "other",
    [
        lambda pipe: pipe.unet.conv_in.weight.data.mul_(1.01),
        lambda pipe: (
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.mul_(2)
        ),
        lambda pipe: (
            pipe.text_encoder.final_layer_norm_bias.add_(1)
            if hasattr(pipe.text_encoder, "final_layer_norm_bias")
            else next(pipe.text_encoder.parameters()).data.add_(0.1)
        ),
        lambda pipe: next(pipe.vae.parameters()).data.add_(0.1),
        lambda pipe: setattr(pipe.tokenizer, "model_max_length", 40),
        lambda pipe: pipe.tokenizer.add_tokens(["zzz"]),
        lambda pipe: pipe.scheduler.register_to_config(prediction_type="v_prediction"),
        lambda pipe: pipe.unet.to(torch.bfloat16),
    ],
)
def test_an_interrupted_erasure_goes_on_with_the_same_model_alone(tmp_path, other):
    class Interrupted(type(registry.get("methods", "uce")())):
        def fit(self, model, problem, run):
            (run.folder / "concepts").mkdir(exist_ok=True)
            raise KeyboardInterrupt

    method, place = registry.get("methods", "uce")(), tmp_path / "e.work"
    stopped = Interrupted()
    Interrupted.__module__ = type(method).__module__
    with pytest.raises(KeyboardInterrupt):
        expunge.erase(load(tiny_pipeline()), PROBLEM, stopped, work=place)
    pipe = tiny_pipeline()
    other(pipe)
    with pytest.raises(ExpungeError, match=r"made by another command \(other model\)"):
        expunge.erase(load(pipe), PROBLEM, method, work=place)
    edit = expunge.erase(load(tiny_pipeline()), PROBLEM, method, work=place)
    assert edit.fits(tiny_pipeline())


def test_settings_and_weights_on_the_disk_count_too(folder):
    from expunge.checkpoints.checkpoint import Checkpoint

    model = load(folder)
    before = fingerprint.hash_model(model)
    assert before == fingerprint.hash_model(load(folder))
    model.guidance_scale = 3.0
    assert fingerprint.hash_model(model) != before
    text = Checkpoint.find(folder).load_text_model()
    one = fingerprint.hash_model(text)
    read, text.stored = text.stored, lambda layer, name: 1.5 * read(layer, name)
    read(text.text_entries()[0].layer, "weight")
    assert fingerprint.hash_model(text) != one


def test_two_equal_commands_at_once(tmp_path):
    place, same = tmp_path / "e.work", {"model": "a"}
    with work_dir.open_work_dir(place, same) as first:
        (first / "pieces").mkdir()
        with pytest.raises(ExpungeError, match="another expunge is at work in .*e.work; wait for it"), \
                work_dir.open_work_dir(place, same):  # fmt: skip
            pytest.fail("both are at work")
        work_dir.remove(place)  # the other one's: it stays
        assert (first / "pieces").is_dir()
    with work_dir.open_work_dir(place, same) as again:
        assert (again / "pieces").is_dir()
    work_dir.remove(place)
    assert not list(tmp_path.iterdir())


def test_a_killed_command_holds_nothing(tmp_path):
    code = (
        "import os, sys; from expunge.runtime import work_dir\n"
        "with work_dir.open_work_dir(sys.argv[1], {'model': 'a'}) as place:\n"
        "    (place / 'pieces').mkdir(); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "e.work")],
        env={**os.environ, "PYTHONPATH": SOURCE},
        check=False,
    )
    assert run.returncode == -9
    with work_dir.open_work_dir(tmp_path / "e.work", {"model": "a"}) as place:
        assert (place / "pieces").is_dir()


# Tensors that share their memory.


def test_an_edit_of_shared_tensors_is_saved(model, tmp_path):
    edit = expunge.erase(model, PROBLEM)
    layers = [entry.layer for entry in model.text_entries()]
    whole = torch.randn(40, 16)
    shared = [
        LowRank((layers[0],), whole[:8, :1], whole[8:, :1].T),
        LowRank((layers[0],), whole[:8, :1], whole[8:, :1].T),
        LowRank((layers[0],), whole[:8].T[:1].T, whole.T[:1, 8:]),
    ]
    Edit(tuple(shared), edit.record).save(tmp_path / "e.safetensors")
    again = Edit.load(tmp_path / "e.safetensors")
    for one, other in zip(shared, again.changes, strict=True):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)
    with Applied(model.pipe, again.changes):
        after = model.draw(Probe.of("airplane", 1, 0, 1))
    with Applied(model.pipe, shared):
        assert torch.equal(model.draw(Probe.of("airplane", 1, 0, 1)), after)
