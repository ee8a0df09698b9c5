"""Image files are read as a viewer shows them."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import ExpungeError, ExpungeWarning
from expunge.base import image_files

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def corner(path, **how):
    """The colour of the first pixel, in 8 bits."""
    return (image_files.read_image(path, **how)[:, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_all_orientations(tmp_path, orientation, ending):
    """What a camera stored, turned or mirrored, comes back as it was seen."""
    seen = np.zeros((16, 32, 3), np.uint8)
    seen[:8, :8] = RED
    seen[8:, 24:] = BLUE
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = (
        {"lossless": True}
        if ending == "webp"
        else {"quality": 100, "subsampling": 0}
        if ending == "jpg"
        else {}
    )
    Image.fromarray(np.ascontiguousarray(turn(seen))).save(
        tmp_path / f"x.{ending}", exif=exif, **lossless
    )
    found = image_files.read_image(tmp_path / f"x.{ending}")
    assert found.shape == (3, 16, 32)
    assert (found - torch.from_numpy(seen).permute(2, 0, 1) / 255).abs().max() < 0.1


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    found = (image_files.read_image(tmp_path / "x.png") * 255).round().int()
    assert found[:, 0].tolist() == [[0, 1, 128, 255]] * 3


def png16(path, colour, pixels, clear=b""):
    """A PNG of one row with 16 bits a channel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", len(pixels) // channels, 1, 16, colour, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(pixels)}H", *pixels)
    body = chunk(b"IHDR", head) + (chunk(b"tRNS", clear) if clear else b"")
    body += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("colour", "pixels", "clear", "shown"),
    [
        (2, [65535, 0, 32896], b"", [255, 0, 128]),
        (6, [65535, 0, 0, 0], b"", WHITE),
        (4, [0, 65535], b"", [0, 0, 0]),
        (4, [0, 0], b"", WHITE),
        (0, [4660], struct.pack(">H", 4660), WHITE),
        (2, [65535, 257, 0], struct.pack(">HHH", 65535, 257, 0), WHITE),
    ],
)
def test_sixteen_bits_of_every_kind(tmp_path, colour, pixels, clear, shown):
    png16(tmp_path / "x.png", colour, pixels, clear)
    assert corner(tmp_path / "x.png") == shown


def test_what_alpha_hides_stays_hidden(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert corner(path) == WHITE
    assert corner(path, background="black") == [0, 0, 0]
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(path)
    assert corner(path) == [255, 204, 204]
    Image.new("LA", (2, 2), (0, 0)).save(path)
    assert corner(path) == WHITE
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(path, transparency=1)
    assert corner(path) == WHITE
    palette.save(path, transparency=0)
    assert corner(path) == RED
    Image.new("RGB", (2, 2), tuple(BLUE)).save(path, transparency=tuple(BLUE))
    assert corner(path) == WHITE
    Image.new("1", (2, 2), 1).save(path)
    assert corner(path) == WHITE


def test_printers_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    assert np.allclose(corner(tmp_path / "x.jpg"), RED, atol=4)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_the_first_frame_of_an_animation_is_read_and_said(tmp_path, ending):
    first, second = (Image.new("RGB", (8, 8), tuple(c)) for c in (RED, BLUE))
    first.save(tmp_path / f"x.{ending}", save_all=True, append_images=[second], lossless=True)
    with pytest.warns(ExpungeWarning, match="is an animation: the first of its 2 frames is read"):
        assert corner(tmp_path / f"x.{ending}") == RED


def test_an_image_of_too_many_pixels_is_one_sentence(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ExpungeError, match=r"x\.png: it has more than \d+ million pixels$"):
        image_files.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF"])
def test_what_is_no_image_is_one_sentence(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ExpungeError, match="it is not a whole image"):
        image_files.read_image(tmp_path / "x.png")
    with pytest.raises(ExpungeError, match="No such file"):
        image_files.read_image(tmp_path / "absent.png")


def test_broken_notes_of_a_camera_spoil_nothing(tmp_path):
    Image.new("RGB", (2, 2), tuple(RED)).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff")
    assert corner(tmp_path / "x.png") == RED
