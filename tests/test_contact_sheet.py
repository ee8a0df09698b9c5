"""Before above after, as one image."""

import base64
import io
import re

import torch
from PIL import Image

from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet


def flat(*colour):
    return torch.tensor(colour).float()[:, None, None].expand(3, 16, 16)


def test_every_image_is_there_in_its_row_and_column():
    colours = [[(1, 0, 0), (0, 1, 0)], [(0, 0, 1), (1, 1, 0)]]
    rows = [
        (name, [flat(*c) for c in row]) for name, row in zip(("before", "after"), colours, strict=True)
    ]
    band = Strip("Türkiye – a flag", ["a ship", "a very long caption of very many words"], rows, "H 1.0")
    paper = draw_contact_sheet([band, band], cell=64)
    found = {}
    for y in range(paper.height):
        for x in range(paper.width):
            found.setdefault(paper.getpixel((x, y)), []).append((x, y))
    places = {}
    for colour in (*colours[0], *colours[1]):
        spots = found[tuple(255 * part for part in colour)]
        assert len(spots) > 2 * 0.9 * 64 * 64
        places[colour] = min(x for x, _ in spots), min(y for _, y in spots)
    (red, green), (blue, yellow) = ([places[c] for c in row] for row in colours)
    assert red[0] == blue[0] < green[0] == yellow[0]
    assert red[1] == green[1] < blue[1] == yellow[1]


def test_what_a_notebook_shows_of_a_strip():
    strip = Strip("A <b>ship</b>", ["seed 0"], [("before", [flat(1, 0, 0)]), ("after", [flat(0, 0, 1)])])
    found = re.fullmatch(r'<img alt="(.*?)" src="data:image/png;base64,(.*)">', strip._repr_html_())
    assert found[1] == "A &lt;b&gt;ship&lt;/b&gt;: before, after; seed 0"
    image = Image.open(io.BytesIO(base64.b64decode(found[2])))
    assert image.convert("RGB").tobytes() == draw_contact_sheet([strip]).tobytes()
