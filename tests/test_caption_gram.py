"""The prior against its definition, its cache, and where captions come from."""

import sys

import pytest
import torch

import expunge
from conftest import tiny_pipeline
from expunge import ExpungeError, ExpungeWarning
from expunge.erasing.caption_gram import BATCH, WORDS, compute_prior, read_captions, read_captions_for
from expunge.erasing.concept_tokens import vocabulary_words
from expunge.problem import Concept
from expunge.runtime.context import RunContext

SOME = ("a photo of the ship", "bird", "", "a cat and a dog on the street", "bird")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_against_its_definition(model, cache):
    many = (*SOME, *(f"ship number {i}" for i in range(BATCH)))
    made = compute_prior(model, many)
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for caption in many:
        for e in model.encode([caption]).embeddings[0].double():
            expected += torch.outer(e, e)
    assert (made.mean.dtype, made.mean.device.type, made.count) == (torch.float64, "cpu", len(many))
    torch.testing.assert_close(made.mean, expected / len(many), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.mean, made.mean.T)


def test_kept_by_content(model, cache, monkeypatch):
    told = []
    run = RunContext(progress=lambda *what: told.append(what))
    first = compute_prior(model, SOME, run)
    assert told[-1] == ("reading captions", len(SOME), len(SOME))
    told.clear()
    again = compute_prior(model, SOME, run)
    assert told == []
    assert torch.equal(first.mean, again.mean)
    assert first.count == again.count
    (file,) = cache.rglob("[!.]*.safetensors")
    assert file.stat().st_size < 32 * 32 * 8 + 500

    compute_prior(model, SOME[::-1], run)
    compute_prior(expunge.load(tiny_pipeline(seed=1)), SOME, run)
    next(model.pipe.text_encoder.parameters()).data[0, 0] += 1
    compute_prior(model, SOME, run)
    assert len(list(cache.rglob("[!.]*.safetensors"))) == 4
    assert len([what for what in told if what[1] == what[2]]) == 3


def test_a_broken_file_is_made_again(model, cache):
    first = compute_prior(model, SOME)
    (file,) = cache.rglob("[!.]*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(compute_prior(model, SOME).mean, first.mean)
    file.write_bytes(b"")
    assert torch.equal(compute_prior(model, SOME).mean, first.mean)


def test_a_cache_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(ExpungeWarning, match="not kept for another time"):
        assert compute_prior(model, SOME).count == len(SOME)


def test_long_captions_are_cut_with_one_warning(model, cache):
    with pytest.warns(ExpungeWarning, match="2 of 3 captions are longer") as warned:
        compute_prior(model, ("ship " * 90, "bird " * 90, "cat"))
    assert len(warned) == 1


def test_no_captions(model):
    with pytest.raises(ExpungeError, match="there is none"):
        compute_prior(model, ())


def test_the_words_of_a_vocabulary(worded):
    erased = (Concept("airplane", synonyms=("cat dog",)),)
    gone = {"airplane", "cat", "dog"}
    assert gone < set(worded.vocabulary())
    known = vocabulary_words(worded, erased)
    assert known == [word for word in worded.vocabulary() if word not in gone]
    found = read_captions_for(worded, "vocabulary", erased)
    assert found == tuple(f"a depiction of the {word}" for word in known[:WORDS])
    assert read_captions_for(worded, "general", erased) == read_captions("general")
    with pytest.raises(ExpungeError, match="did you mean 'vocabulary'"):
        read_captions_for(worded, "vocabluary", erased)


def test_the_shipped_captions():
    found = read_captions("general")
    assert len(set(found)) == len(found) >= 1000
    assert len({word for caption in found for word in caption.lower().split()}) > 600
    lengths = {len(caption.split()) for caption in found}
    assert min(lengths) <= 3
    assert max(lengths) >= 18
    assert all(caption.isascii() or "é" in caption for caption in found)


def test_a_text_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("\n a cat \n\na dog\n")
    assert read_captions("c.txt") == ("a cat", "a dog")
    assert read_captions(str(tmp_path / "c.txt")) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("generel", "no set of captions 'generel'; did you mean 'general'"),
        ("absent/c.txt", "cannot read absent/c.txt: there is no such file"),
        ("empty.txt", "empty.txt has no captions"),
        ("bytes.txt", "not text in UTF-8"),
    ],
)
def test_no_such_captions(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ExpungeError, match=message):
        read_captions(source)


def test_a_data_set_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExpungeError, match=r"pip install 'expunge\[data\]'"):
        read_captions("owner/name:caption:train")


def test_a_data_set(tmp_path, monkeypatch):
    """A folder beside stands for one of the hub's."""
    pytest.importorskip("datasets", reason="reads data sets only with expunge[data]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = (
        '{"caption": "a cat", "n": 1, "more": ["x", "y"]}\n{"caption": "a dog", "n": 2, "more": ["z"]}\n'
    )
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(rows)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_captions("owner/name") == ("a cat", "a dog")
    assert read_captions("owner/name:caption:train[:1]") == ("a cat",)
    assert read_captions("owner/name:more") == ("x", "y", "z")
    with pytest.raises(ExpungeError, match="no column 'captoin'; did you mean 'caption'"):
        read_captions("owner/name:captoin")
    with pytest.raises(ExpungeError, match="cannot read the data set owner/name"):
        read_captions("owner/name:caption:absent")
