"""Image files are read as people see them, or refused in one sentence."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from expunge import ExpungeError, pictures
from expunge.examples import folder_of


@pytest.fixture
def corner():
    """An image of 4 × 6 with one red corner, so that every turn of it differs."""
    array = np.zeros((4, 6, 3), np.uint8)
    array[0, 0] = (255, 0, 0)
    array[1, 5] = (0, 255, 0)
    return Image.fromarray(array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_whatever_its_exif_data_say(tmp_path, corner, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner.save(tmp_path / "turned.png", exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")))
    found = pictures.read(tmp_path / "turned.png")
    assert found.shape[1:] == ((4, 6) if orientation < 5 else (6, 4))
    assert torch.equal(found, torch.from_numpy(upright).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_keep_their_greys(tmp_path, mode):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    array = values if mode == "I;16" else values.astype(np.int32)
    file = tmp_path / ("deep.png" if mode == "I;16" else "deep.tiff")
    Image.fromarray(array).save(file)
    found = pictures.read(file)
    assert found.shape == (3, 1, 4)
    torch.testing.assert_close(found[0, 0], torch.tensor([0, 257, 32768, 65535]) / 65535)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image, options = Image.new("RGBA", (2, 1), (200, 0, 0, 0)), {}
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image, options = Image.new("P", (2, 1), 0), {"transparency": 0}
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
    elif mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (200, 0, 0)}
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "clear.png", **options)
    found = pictures.read(tmp_path / "clear.png")
    assert found[:, 0, 0].tolist() == [1, 1, 1]
    assert found[:, 0, 1].tolist() == [0, 0, 0]


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert pictures.read(tmp_path / "half.png").mean() == pytest.approx(127 / 255, abs=2 / 255)


def claims(path, width, height):
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [8100, 10_000, 20_000])
def test_an_image_that_claims_to_be_huge_is_refused(tmp_path, side):
    claims(tmp_path / "huge.png", side, side)
    with pytest.raises(ExpungeError, match=r"huge\.png.*images of up to 64 million are read"):
        pictures.read(tmp_path / "huge.png")


def test_what_is_no_whole_image(tmp_path, corner):
    corner.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("an image")
    for name in ("cut.png", "text.png", "none.png"):
        with pytest.raises(ExpungeError, match=f"cannot read .*{name}"):
            pictures.read(tmp_path / name)
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "fractions.tiff")
    with pytest.raises(ExpungeError, match="its values are fractions"):
        pictures.read(tmp_path / "fractions.tiff")


@pytest.mark.parametrize("written", ["Réunion", "Re\u0301union", "RÉUNION"])
def test_a_concepts_folder_is_found_in_any_unicode_form(tmp_path, written):
    (tmp_path / written).mkdir()
    (tmp_path / "another").mkdir()
    for name in ("Réunion", "Re\u0301union"):
        assert folder_of(name, tmp_path) == tmp_path / written
    assert folder_of("Mauritius", tmp_path) == tmp_path
