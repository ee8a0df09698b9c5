"""Pieces: made here, kept, found again; and the folder they are kept in."""

import contextlib
import pickle
import socket
import threading

import pytest
import torch

from expunge import ExpungeError, ExpungeWarning
from expunge.runtime import ray_backend, store, work_dir
from expunge.runtime.context import RunContext

NAMES = ["airplane", "Côte d'Ivoire", "🇨🇮", "a/b\\c:*?", "flag " * 60, "Airplane", ".."]


class Maker:
    """Makes random pieces, and counts what it was asked for."""

    def __init__(self, run):
        self.run, self.asked = run, []

    def __call__(self, names):
        self.asked.append(list(names))
        made = {}
        for name in names:
            g = self.run.generator("piece", name)
            both = torch.randn(2, 3, generator=g, dtype=torch.float64)
            made[name] = {"up": both[0], "down": both[1:].T, "n": torch.tensor(len(name))}
        return made


def equal(first, second):
    return list(first) == list(second) and all(
        first[name].keys() == second[name].keys()
        and all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        for name in first
    )


def test_the_same_whatever_was_kept_and_in_whatever_batches(tmp_path):
    plain = RunContext(seed=5)
    expected = plain.map_cached(Maker(plain), NAMES)
    assert list(expected) == NAMES
    assert not torch.equal(expected["airplane"]["up"], expected["Airplane"]["up"])
    for batch in (1, 3, 100):
        run = RunContext(seed=5, folder=tmp_path / str(batch))
        assert equal(run.map_cached(Maker(run), NAMES, batch_size=batch), expected)
        files = sorted((tmp_path / str(batch)).rglob("[!.]*.safetensors"))
        assert len(files) == len(NAMES)
        assert all(file.name.isascii() and len(file.name) < 100 for file in files)
        maker = Maker(run)
        assert equal(run.map_cached(maker, NAMES, batch_size=batch), expected)
        assert maker.asked == []
        for gone in (files[:1], files[2:5], files):
            for file in gone:
                file.unlink()
            assert equal(run.map_cached(Maker(run), NAMES, batch_size=batch), expected)


def test_a_batch_that_lacks_one_is_made_again_with_the_same_members(tmp_path):
    run = RunContext(folder=tmp_path)
    names = list("abcdefg")
    run.map_cached(Maker(run), names, batch_size=3)
    next(tmp_path.rglob("e-*.safetensors")).unlink()
    maker = Maker(run)
    run.map_cached(maker, names, batch_size=3)
    assert maker.asked == [["d", "e", "f"]]


def test_what_failed_leaves_what_was_finished(tmp_path):
    seen = []
    run = RunContext(folder=tmp_path, progress=lambda *told: seen.append(told))
    maker = Maker(run)

    def fails_at_c(names):
        if "c" in names:
            raise ExpungeError("c is too much")
        return maker(names)

    with pytest.raises(ExpungeError, match="too much"):
        run.map_cached(fails_at_c, list("abcd"), label="training")
    assert seen == [("training", 0, 4), ("training", 1, 4), ("training", 2, 4)]
    seen.clear()
    run.map_cached(maker, list("abcd"), label="training")
    assert seen == [("training", 2, 4), ("training", 3, 4), ("training", 4, 4)]
    assert maker.asked == [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: b"\xff" * 40])
def test_a_broken_piece_is_made_again_and_said(tmp_path, damage):
    run = RunContext(folder=tmp_path)
    expected = run.map_cached(Maker(run), ["a", "b"])
    file = next(tmp_path.rglob("a-*.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    maker = Maker(run)
    with pytest.warns(ExpungeWarning, match="of 'a' is broken; it is computed again"):
        assert equal(run.map_cached(maker, ["a", "b"]), expected)
    assert maker.asked == [["a"]]
    assert equal(run.map_cached(Maker(run), ["a", "b"]), expected)


def test_labels_keep_pieces_apart(tmp_path):
    run = RunContext(folder=tmp_path)
    first = run.map_cached(lambda names: {"a": {"x": torch.zeros(1)}}, ["a"], label="pictures")
    second = run.map_cached(lambda names: {"a": {"x": torch.ones(1)}}, ["a"], label="factors")
    assert not equal(first, second)


def test_pieces_are_plain(tmp_path):
    weight = torch.ones(3, requires_grad=True)
    for run in (RunContext(), RunContext(folder=tmp_path), RunContext(folder=tmp_path)):
        (made,) = run.map_cached(lambda names: {"a": {"x": weight * 2, "y": weight[:]}}, ["a"]).values()
        assert not any(t.requires_grad for t in made.values())
        made["y"].zero_()
    assert weight.sum() == 3


def test_a_run_that_is_sent_keeps_its_seed_alone(tmp_path):
    run = RunContext(7, print, tmp_path, "local")
    assert pickle.loads(pickle.dumps(run)) == RunContext(7)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = RunContext(folder=tmp_path / "file")
    with pytest.raises(ExpungeError, match="cannot write"):
        run.map_cached(Maker(run), ["a"])


def test_file_names_never_meet():
    names = [*NAMES, *(f"flag {i}" for i in range(1000)), "", " ", "\udcff"]
    assert len({store.make_stem(name).casefold() for name in names}) == len(names)


COMMAND = {"method": "mace", "fields": {"templates": ("{}",)}, "seed": 0}


def test_a_work_folder_belongs_to_one_command(tmp_path):
    folder = tmp_path / "out.work"
    with work_dir.open_work_dir(folder, COMMAND) as place:
        (place / "pieces").mkdir()
    with work_dir.open_work_dir(folder, COMMAND) as place:
        assert place == folder
    other = {**COMMAND, "seed": 1, "method": "uce"}
    with (
        pytest.raises(ExpungeError, match=r"other method and seed\); delete it, or choose another"),
        work_dir.open_work_dir(folder, other),
    ):
        pass
    (folder / work_dir.COMMAND).write_text("{")
    with (
        pytest.raises(ExpungeError, match=r"no legible command.json"),
        work_dir.open_work_dir(folder, COMMAND),
    ):
        pass
    work_dir.remove(folder)
    assert not folder.exists()


def test_a_work_folder_with_nothing_in_it_goes(tmp_path):
    with pytest.raises(ZeroDivisionError), work_dir.open_work_dir(tmp_path / "out.work", COMMAND):
        assert (tmp_path / "out.work" / work_dir.COMMAND).is_file()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with work_dir.open_work_dir(None, COMMAND) as place:
        assert place is None


def test_somebody_elses_folder_stays(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ExpungeError, match="no work folder"), work_dir.open_work_dir(tmp_path, COMMAND):
        pass
    work_dir.remove(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_was_never_signed_is_taken(tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / ".half.json").write_text("{")
    with work_dir.open_work_dir(tmp_path / "out.work", COMMAND) as place:
        assert (place / work_dir.COMMAND).is_file()


@pytest.mark.parametrize("address", ["here", "host:", "host:x", "http://host:80", "a b:1", "locl"])
def test_no_address(address):
    with pytest.raises(ExpungeError, match="HOST:PORT, ray://HOST:PORT, auto or local, not"):
        ray_backend.check_address(address)


@pytest.mark.parametrize("pattern", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}", "localhost:{}"])
def test_an_address_where_nobody_answers(pattern):
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        address = pattern.format(taken.getsockname()[1])
        with pytest.raises(ExpungeError, match="nobody answers at the Ray address"):
            ray_backend.check_address(address)
        run = RunContext(ray=address)
        with pytest.raises(ExpungeError, match="nobody answers"):
            run.map_cached(Maker(run), ["a"])


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_of_something_else(monkeypatch, says):
    monkeypatch.setattr(ray_backend, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with contextlib.suppress(OSError):  # until the other side has gone
                connection.sendall(says)
                while connection.recv(1000):
                    pass

        threading.Thread(target=answer, daemon=True).start()
        message = "is not a Ray cluster" if says else "nobody answers .*: timed out"
        with pytest.raises(ExpungeError, match=message):
            ray_backend.check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_without_ray(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExpungeError, match=r"pip install 'expunge\[ray\]'"):
        ray_backend.check_address("local")
    ray_backend.check_address("")


def test_a_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    run = RunContext(folder=tmp_path / "work")
    assert run.checkpoint("training") is None
    for step in (1, 2):
        run.save_checkpoint("training", {"step": torch.tensor(step)})
    assert run.checkpoint("training") == {"step": torch.tensor(2)}
    assert run.checkpoint("other") is None
    (file,) = (tmp_path / "work").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(ExpungeWarning, match="is broken; it is computed again"):
        assert run.checkpoint("training") is None
    assert RunContext().checkpoint("training") is None
    RunContext().save_checkpoint("training", {})
