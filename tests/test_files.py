"""Files are whole, or they are refused; and what we write is whole, or it is not there."""

import json

import pytest
import torch
from safetensors.torch import save_file

from expunge import ExpungeError
from expunge.base import image_files
from expunge.base.files import check_weights, check_writable, read_header, replacing


def test_replacing_moves_into_place(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("earlier")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("hal")
        raise error
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "x", tmp_path):
        with pytest.raises(ExpungeError, match="cannot write"):
            check_writable(path)
        with pytest.raises(ExpungeError, match="cannot write"), replacing(path):
            pass
    check_writable(tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()


def test_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path, {"k": "v"})
    header = read_header(path)
    assert header["a"]["shape"] == [3]
    assert header["__metadata__"] == {"k": "v"}
    whole = path.read_bytes()
    for broken in (b"", b"PK\3\4 not a tensor file", whole[:20], whole[:-1], whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(ExpungeError, match=r"x\.safetensors is not a whole safetensors file"):
            read_header(path)
    torch.save({}, path)
    with pytest.raises(
        ExpungeError, match=r"x\.safetensors is not a whole safetensors file but pickled"
    ):
        read_header(path)
    name = 70 * "a"  # a length that begins as pickles do
    save_file({name: torch.zeros(3)}, path)
    assert path.read_bytes()[0] == 0x80
    assert read_header(path)[name]["shape"] == [3]
    with pytest.raises(ExpungeError, match="cannot read"):
        read_header(tmp_path / "absent")


def test_shards(tmp_path):
    index = tmp_path / "unet" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.zeros(3)}, index.parent / "1.safetensors")
    with pytest.raises(ExpungeError, match=r"2\.safetensors is missing"):
        check_weights(tmp_path)
    save_file({"b": torch.zeros(3)}, index.parent / "2.safetensors")
    check_weights(tmp_path)
    (tmp_path / "vae").mkdir()
    torch.save({}, tmp_path / "vae" / "pytorch_model.bin")
    with pytest.raises(ExpungeError, match=r"pytorch_model\.bin is pickled"):
        check_weights(tmp_path)
    save_file({"c": torch.zeros(3)}, tmp_path / "vae" / "model.safetensors")
    check_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ExpungeError, match="not an index"):
        check_weights(tmp_path)


def test_grids():
    assert image_files.make_grid(torch.rand(8, 3, 16, 16), width=16, gap=2).size == (
        4 * 18 + 2,
        2 * 18 + 2,
    )
    assert image_files.make_grid(torch.rand(1, 3, 16, 16)).size == (200, 200)
    assert image_files.make_grid(torch.rand(3, 3, 16, 16), columns=2, width=16, gap=0).size == (32, 32)
    exact = image_files.to_pil(torch.full((3, 2, 2), 128 / 255))
    assert exact.getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ExpungeError, match="should end in"):
        image_files.save_image(exact, "x.txt")
