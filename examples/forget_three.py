"""The main job: erase an object, a person and an artist from the shipped model, look, and measure.

One edit erases all three. Draws them and what must stay before and after, with the same seeds; writes
one image and one page; prints what the recogniser sees.

    python examples/forget_three.py [FOLDER]
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
from rich.table import Table
from torch import Tensor

import expunge
from expunge import Concept, Probe, Problem
from expunge.base.files import replacing
from expunge.base.image_files import save_image, to_pil
from expunge.cli.terminal import show_progress
from expunge.evaluation.contact_sheet import Strip, draw_contact_sheet
from expunge.evaluation.suite import Suite
from expunge.metrics.miniature import MiniatureRecogniser

METHOD = "sluice"
OBJECT, PERSON, ARTIST = "airplane", "Jorvek Ambrask", "Isolmo Lamberque"
WORDS = {word.name: word for word in Suite.read("object").concepts}
"""The ten CIFAR-10 words, their synonyms, and how the recogniser knows them."""
SYNONYMS = WORDS[OBJECT].synonyms  # the method is not told of them
# Each shares a word of its name with the person, or the artist, who is erased.
PEOPLE = ("Jorvek Droskin", "Jorvek Prellick", "Tavrik Ambrask", "Rilvo Ambrask")
ARTISTS = ("Isolmo Tintavelli", "Esparo Lamberque")
DRAWN_BY = "a {} in the style of {}"
ERASED = ("erased: an object", "erased: a person", "erased: an artist")
KEPT = ("kept: people", "kept: artists")
CONTENT = ("cat", "ship", "house")
"""What artists are asked to draw."""


@dataclass(frozen=True)
class Cell:
    """A prompt, what should be seen in it, and how many images of it are drawn."""

    role: str
    label: str
    prompt: str
    n: int
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One prompt's images before and after, and the share of them in which its label is seen."""

    cell: Cell
    before: Tensor
    after: Tensor
    seen_before: float
    seen_after: float
    broken: float
    """The share of the images after that show nothing recognisable."""


def cells_of(n: int) -> list[Cell]:
    """What to draw: what is erased, its synonyms, and what must stay."""

    def thing(role: str, word: str, called: str, n: int) -> Cell:
        (label,) = WORDS[word].labels[:1]
        return Cell(role, label, f"a photo of the {called}", n, WORDS[word].near)

    def portrait(role: str, name: str, n: int) -> Cell:
        return Cell(role, name, f"a portrait of {name}", n)

    def drawn(role: str, artist: str, n: int) -> list[Cell]:
        return [Cell(role, artist, DRAWN_BY.format(what, artist), n) for what in CONTENT]

    cells = [thing("erased: an object", OBJECT, OBJECT, 2 * n)]
    cells += [portrait("erased: a person", PERSON, 2 * n)]
    cells += drawn("erased: an artist", ARTIST, n)
    cells += [thing("its synonyms", OBJECT, word, n) for word in SYNONYMS]
    cells += [thing("kept: objects", word, word, n) for word in WORDS if word != OBJECT]
    cells += [portrait("kept: people", name, n) for name in PEOPLE]
    return cells + [cell for artist in ARTISTS for cell in drawn("kept: artists", artist, n)]


def compare(
    model: expunge.Model,
    edit: expunge.Edit,
    judge: MiniatureRecogniser,
    cells: Sequence[Cell],
    seed: int,
) -> list[Row]:
    """Draw everything twice with the same seeds, and recognise it."""
    wanted = [(cell.prompt, seed + i) for cell in cells for i in range(cell.n)]
    prompts = tuple(prompt for prompt, _ in wanted)
    probe = Probe(prompts, tuple(seed for _, seed in wanted))
    with show_progress() as progress:

        def draw(label: str) -> Tensor:
            return model.draw(probe, progress=lambda _, done, total: progress(label, done, total))

        before = draw("drawing before")
        with model.using(edit):
            after = draw("drawing after")
    answers = judge.measure(before, prompts), judge.measure(after, prompts)
    rows, start = [], 0
    for cell in cells:
        part = slice(start, start := start + cell.n)
        seen_before, seen_after = (
            float(judge.score(each[part], [cell.label], cell.near, "top1").nan_to_num().mean())
            for each in answers
        )
        broken = float(judge.find_broken(answers[1][part]).float().mean())
        rows.append(Row(cell, before[part], after[part], seen_before, seen_after, broken))
    return rows


def mean(rows: Sequence[Row], column: str) -> float:
    """The mean of a column of figures."""
    return sum(getattr(row, column) for row in rows) / len(rows)


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by role."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.cell.role, []).append(row)
    return found


def show(console: Console, rows: list[Row]) -> None:
    """Print the figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "seen as", "images", "before", "after", "unrecognisable"):
        table.add_column(name, justify="left" if name in ("", "seen as") else "right")
    for role, group in groups_of(rows).items():
        labels = dict.fromkeys(row.cell.label for row in group)
        columns = ("seen_before", "seen_after", "broken")
        figures = (f"{100 * mean(group, column):.0f} %" for column in columns)
        seen = next(iter(labels)) if len(labels) == 1 else f"itself, {len(labels)} names"
        table.add_row(role, seen, str(sum(row.cell.n for row in group)), *figures)
    console.print(table)


def strips(rows: list[Row]) -> list[Strip]:
    """Strips of nine columns, before above after: what is erased, then what is kept."""
    found = []
    groups = groups_of(rows)
    for title, roles, each in (
        (f"erased: {OBJECT}, {PERSON}, {ARTIST}", ERASED, 3),
        ("synonyms, which the method was not told of", ("its synonyms",), 3),
        ("kept: other objects", ("kept: objects",), 1),
        ("kept: people and artists who share a word of their name with them", KEPT, 1),
    ):
        shown = []
        for role in roles:
            group = groups[role]
            count = max(1, each // len(group)) if role.startswith("erased") else each
            shown += [(row, i % len(row.before)) for row in group for i in range(count)]
        shown, group = shown[:9], [row for role in roles for row in groups[role]]
        found.append(
            Strip(
                title,
                [row.cell.prompt.removeprefix("a photo of the ").removeprefix("a ") for row, _ in shown],
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
TITLES = {
    "erased: an object": f"Erased: {OBJECT}",
    "erased: a person": f"Erased: {PERSON}",
    "erased: an artist": f"Erased: {ARTIST}",
    "its synonyms": f"Other words for {OBJECT}, which the method was not told of",
    "kept: objects": "Kept: other objects",
    "kept: people": "Kept: people who share a word of their name with the erased",
    "kept: artists": "Kept: artists who share a word of their name with the erased",
}


def page(rows: list[Row], edit: expunge.Edit) -> str:
    """The page, in one file."""
    sections = []
    for role, group in groups_of(rows).items():
        figures = " → ".join(f"{100 * mean(group, c):.0f} %" for c in ("seen_before", "seen_after"))
        labels = {row.cell.label for row in group}
        word = "recognised as themselves" if len(labels) > 1 else f"recognised as {group[0].cell.label}"
        shown = 6 if len(group) == 1 else 2
        pairs = "".join(
            f"<figure><div>{tag(row.before[i])}{tag(row.after[i])}</div>"
            f"<figcaption>{html.escape(row.cell.prompt)}</figcaption></figure>"
            for row in group
            for i in range(min(shown, len(row.before)))
        )
        sections.append(
            f'<h2>{TITLES[role]}</h2><p>{word}: <b>{figures}</b></p><div class="pairs">{pairs}</div>'
        )
    becomes = "; ".join(
        f"{html.escape(concept.name)} becomes “{html.escape(concept.anchor or 'nothing')}”"
        for concept in edit.record.problem.erase
    )
    how = f"made with <code>{edit.record.method}</code> in {edit.record.seconds:.1f} seconds"
    made = f"One edit, {how}: {becomes}."
    return PAGE.substitute(
        title="A model that forgot three things", sections="\n".join(sections), made=made
    )


def tag(image: Tensor) -> str:
    """An image inside the page."""
    data = io.BytesIO()
    to_pil(image, 128).save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def main(folder: Path, n: int = 5, seed: int = 0) -> list[Row]:
    """Do the job; returns the figures."""
    console = Console(highlight=False)
    model, judge = expunge.load("miniature"), MiniatureRecogniser()
    erased = (Concept(OBJECT), Concept(PERSON, kind="identity"), Concept(ARTIST, kind="style"))
    retained = (*(word for word in WORDS if word != OBJECT), *PEOPLE, *ARTISTS)
    with show_progress() as progress:
        edit = expunge.erase(model, Problem(erased, retained), METHOD, progress=progress)
    edit.save(folder / "no-three.safetensors")
    for concept in edit.record.problem.erase:
        console.print(f"{concept.name} becomes {concept.anchor!r}")
    console.print(f"erased with {METHOD} in {edit.record.seconds:.1f} s\n")
    rows = compare(model, edit, judge, cells_of(n), seed)
    show(console, rows)
    save_image(draw_contact_sheet(strips(rows)), folder / "before-after.png")
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
