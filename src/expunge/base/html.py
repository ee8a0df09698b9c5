"""Small tables for notebooks: escaped, and without anything that loads."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def render_table(
    caption: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = (), notes: Sequence[str] = ()
) -> str:
    """Return a table as HTML; the first cell of each row is its head.

    >>> render_table("a & b", [("method", "uce")])
    '<table><caption>a &amp; b</caption><tr><th scope="row">method</th><td>uce</td></tr></table>'

    Args:
        caption: what the table shows.
        rows: the cells of each row, as plain text.
        columns: the heads of the columns; none for a list of properties.
        notes: sentences below the table.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    top = f"<tr>{head}</tr>" if head else ""
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><caption>{escape(caption)}</caption>{top}{body}</table>{below}"
