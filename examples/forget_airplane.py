"""The main job: erase the airplane from the emoji model, look at it, and measure it.

Draws the erased word, its synonyms and the nine other CIFAR-10 words before and after, with the
same seeds; writes one image and one page; prints what the detector recognises.

    python examples/forget_airplane.py [FOLDER]
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import expunge
from expunge import Concept, Probe, Problem
from expunge.base.files import replacing
from expunge.base.image_files import save_image, to_pil
from expunge.emoji.detector import Detector
from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet
from expunge.evaluation.suite import Suite

ERASED = "airplane"
WORDS = {word.name: word for word in Suite.read("object").concepts}
"""The ten CIFAR-10 words, their synonyms, and how the detector knows them."""
SYNONYMS = WORDS[ERASED].synonyms  # the method is not told of them
RETAINED = tuple(name for name in WORDS if name != ERASED)


@dataclass(frozen=True)
class Row:
    """One prompt's images before and after, and the share of them recognised as `word`."""

    role: str
    word: str
    prompt: str
    before: Tensor
    after: Tensor
    seen_before: float
    seen_after: float
    broken: float
    """The share of the images after that show nothing recognisable."""


def probe_of(n: int, seed: int) -> tuple[list[tuple[str, str, str, int]], Probe]:
    """What to draw: (role, word that should be seen, prompt, how many) and the probe of it all."""
    cells = [("erased", ERASED, f"a photo of the {ERASED}", 2 * n)]
    cells += [("synonym", ERASED, f"a photo of the {word}", n) for word in SYNONYMS]
    cells += [("retained", word, f"a photo of the {word}", n) for word in RETAINED]
    rows = [(prompt, seed + i) for _, _, prompt, count in cells for i in range(count)]
    return cells, Probe(tuple(p for p, _ in rows), tuple(s for _, s in rows))


def seen(tops: Sequence[str], word: str) -> float:
    """The share of images recognised as a word; those too near to say are left out."""
    told = [top for top in tops if top not in WORDS[word].near]
    return sum(top in WORDS[word].labels for top in told) / max(len(told), 1)


def compare(
    model: expunge.Model, edit: expunge.Edit, detector: Detector, n: int, seed: int
) -> list[Row]:
    """Draw everything twice with the same seeds, and recognise it."""
    cells, probe = probe_of(n, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bars:

        def draw(label: str) -> Tensor:
            task = bars.add_task(label, total=None)
            return model.draw(
                probe, progress=lambda _, done, total: bars.update(task, completed=done, total=total)
            )

        before = draw("before")
        with model.using(edit):
            after = draw("after")
    tops_before, tops_after = detector(before).top(), detector(after).top()
    rows, start = [], 0
    for role, word, prompt, count in cells:
        part = slice(start, start := start + count)
        rows.append(
            Row(
                role,
                word,
                prompt,
                before[part],
                after[part],
                seen(tops_before[part], word),
                seen(tops_after[part], word),
                tops_after[part].count("unrecognisable") / count,
            )
        )
    return rows


def mean(rows: Sequence[Row], column: str) -> float:
    """The mean of a column of figures."""
    return sum(getattr(row, column) for row in rows) / len(rows)


def show(console: Console, rows: list[Row]) -> None:
    """Print the figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "prompt", "seen as", "before", "after", "unrecognisable"):
        table.add_column(
            name, justify="right" if name in ("before", "after", "unrecognisable") else "left"
        )
    for role in ("erased", "synonym", "retained"):
        group = [row for row in rows if row.role == role]
        for row in group:
            figures = (f"{100 * v:.0f} %" for v in (row.seen_before, row.seen_after, row.broken))
            table.add_row(role, row.prompt, row.word, *figures)
        if len(group) > 1:
            columns = ("seen_before", "seen_after", "broken")
            figures = (f"{100 * mean(group, column):.0f} %" for column in columns)
            table.add_row(role, "mean", "", *figures, style="bold", end_section=True)
    console.print(table)


def bands(rows: list[Row]) -> list[Strip]:
    """Three bands of nine columns, before above after."""
    found = []
    for role, title, each in (
        ("erased", f"erased: {ERASED}", 9),
        ("synonym", "its synonyms, which the method was not told of", 3),
        ("retained", "everything else", 1),
    ):
        group = [row for row in rows if row.role == role]
        shown = [(row, i % len(row.before)) for row in group for i in range(each)]
        found.append(
            Strip(
                title,
                [row.prompt.rpartition(" ")[2] for row, _ in shown],
                [
                    ("before", [row.before[i] for row, i in shown]),
                    ("after", [row.after[i] for row, i in shown]),
                ],
                f"recognised {100 * mean(group, 'seen_before'):.0f} % before,"
                f" {100 * mean(group, 'seen_after'):.0f} % after",
            )
        )
    return found


PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def page(rows: list[Row], edit: expunge.Edit) -> str:
    """The page, in one file."""
    titles = {
        "erased": f"Erased: {ERASED}",
        "synonym": "Its synonyms, which the method was not told of",
        "retained": "Everything else",
    }
    sections = []
    for role, title in titles.items():
        group = [row for row in rows if row.role == role]
        figures = " → ".join(f"{100 * mean(group, c):.0f} %" for c in ("seen_before", "seen_after"))
        word = "recognised as themselves" if role == "retained" else f"recognised as {ERASED}"
        shown = 9 if role == "erased" else 3 if role == "synonym" else 2
        pairs = "".join(
            f"<figure><div>{tag(row.before[i])}{tag(row.after[i])}</div>"
            f"<figcaption>{html.escape(row.prompt)}</figcaption></figure>"
            for row in group
            for i in range(min(shown, len(row.before)))
        )
        sections.append(
            f'<h2>{title}</h2><p>{word}: <b>{figures}</b></p><div class="pairs">{pairs}</div>'
        )
    (concept,) = edit.record.problem.erase
    made = (
        f"Made with <code>{edit.record.method}</code> in {edit.record.seconds:.1f} seconds; the airplane"
        f" becomes “{html.escape(concept.anchor or 'nothing')}”."
    )
    return PAGE.substitute(
        title=f"A model that forgot the {ERASED}", sections="\n".join(sections), made=made
    )


def tag(image: Tensor) -> str:
    """An image inside the page."""
    data = io.BytesIO()
    to_pil(image, 128).save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def main(folder: Path, n: int = 5, seed: int = 0) -> list[Row]:
    """Do the job; returns the figures."""
    console = Console(highlight=False)
    model, detector = expunge.load("emoji"), Detector.load()
    edit = expunge.erase(model, Problem((Concept(ERASED),), RETAINED), "uce")
    edit.save(folder / f"no-{ERASED}.safetensors")
    (concept,) = edit.record.problem.erase
    seconds = edit.record.seconds
    console.print(f"{ERASED} erased in {seconds:.1f} s; it becomes {concept.anchor!r}")
    rows = compare(model, edit, detector, n, seed)
    show(console, rows)
    save_image(draw_contact_sheet(bands(rows)), folder / "before-after.png")
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page(rows, edit), encoding="utf-8")
    console.print(f"\nlook at {folder / 'before-after.png'} and {folder / 'index.html'}")
    return rows


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except expunge.ExpungeError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)
