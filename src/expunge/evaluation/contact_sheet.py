"""Contact sheets: images of the same prompts and seeds, before above after, as one image."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from expunge.base.image_files import to_pil

GAP = 8
"""Pixels between images."""
INK, GREY, RIM, PAPER = "#16181d", "#5b6270", "#e3e6eb", "#ffffff"
"""Colours of titles, labels, frames and the ground."""


@dataclass(frozen=True, eq=False)
class Strip:
    """Some prompts, and what each model draws for them."""

    title: str
    captions: Sequence[str]
    """A caption for each column."""
    rows: Sequence[tuple[str, Sequence[Tensor]]]
    """For each row its label and its images (3, height, width) in [0, 1], one a column."""
    figures: str = ""
    """A few words at the right of the title."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows of it: the strip as an image, and in words for who sees none."""
        buffer = io.BytesIO()
        draw_contact_sheet([self]).save(buffer, "PNG")
        rows = ", ".join(name for name, _ in self.rows)
        alt = escape(f"{self.title}: {rows}; {', '.join(self.captions)}")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def draw_contact_sheet(strips: Sequence[Strip], cell: int = 128) -> Image.Image:
    """Draw strips one below the other, each image `cell` pixels wide and high."""
    title, label, note = (ImageFont.load_default(size) for size in (cell * 3 // 16, 16, 14))
    head, foot, step = cell * 3 // 8 + 14, 46, cell + GAP
    names = [name for strip in strips for name, _ in strip.rows]
    left = 3 * GAP + max(round(label.getlength(name)) for name in names)
    wide = [
        left + round(title.getlength(b.title) + label.getlength(b.figures)) + 2 * GAP for b in strips
    ]
    columns = max(len(strip.captions) for strip in strips)
    width = max(left + columns * step, *wide) + 2 * GAP
    heights = [head + len(strip.rows) * step + foot for strip in strips]
    paper = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    pen, corners, top = ImageDraw.Draw(paper), _corners(cell), 0
    for strip, height in zip(strips, heights, strict=True):
        base = top + head - 14
        pen.text((left, base), _plain(strip.title), INK, title, anchor="ls")
        pen.text((width - 2 * GAP, base), _plain(strip.figures), GREY, label, anchor="rs")
        for r, (name, images) in enumerate(strip.rows):
            y = top + head + r * step
            pen.text((left - 2 * GAP, y + cell // 2), _plain(name), GREY, label, anchor="rm")
            for c, image in enumerate(images):
                x = left + c * step
                paper.paste(to_pil(image, cell).resize((cell, cell)), (x, y), corners)
                pen.rounded_rectangle((x, y, x + cell - 1, y + cell - 1), 10, outline=RIM)
        for c, caption in enumerate(strip.captions):
            x, y = left + c * step + cell // 2, top + height - foot + 2
            pen.text((x, y), _lines(caption, note, cell), GREY, note, anchor="ma", align="center")
        top += height
    return paper


def _plain(text: str) -> str:
    """A text in ASCII: Pillow's own font has no other letters."""
    return unicodedata.normalize("NFKD", text.replace("–", "-")).encode("ascii", "ignore").decode()


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text in at most two lines, none wider than `width` pixels."""
    words, lines = _plain(text).split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if len(lines) == 2 or not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _corners(size: int) -> Image.Image:
    """A mask with round corners."""
    mask = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * size - 1, 4 * size - 1), 4 * 10, fill=255)
    return mask.resize((size, size), Image.Resampling.LANCZOS)
