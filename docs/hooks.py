"""Fill the site's reference pages with what the program itself prints.

On the site, a line `<!-- run: expunge … -->` of a page is followed by the output of that command, so the
reference cannot disagree with the parser. `options` leaves out a method's own options; `help` and
`presets` show these of every method. `<!-- notebook: FILE -->` is followed by a notebook of `docs/`: its
text, its code, and what its cells showed when they were run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

MARK = re.compile(r"^<!-- (run|options|presets|help|notebook): (.*?) -->$", re.MULTILINE)
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|prefetch|icon))[^>]*?"""
    r"""\bhref=["']?(?:https?:)?//[^>]*>""",
    re.IGNORECASE,
)
"""What a browser would fetch from elsewhere when it opens a page; links to follow are none of it."""
OWN = " method options\n"
"""The title of a method's own options in its help."""
WIDTH = 100
"""Columns of the output, so that code blocks do not scroll on a wide screen."""


def output_of(command: str) -> str:
    """Return what a command of the program prints, at a fixed width.

    Args:
        command: as typed, beginning with `expunge`.

    Raises:
        SystemExit: the command failed; the site must not be built from an error.
    """
    program, *arguments = shlex.split(command)
    if program != "expunge":
        raise SystemExit(f"a page may run expunge alone, not {program}")
    main = importlib.import_module("expunge.cli.main").main
    out, err = io.StringIO(), io.StringIO()
    sizes = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict("os.environ", sizes),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(arguments)
    if code != 0:
        raise SystemExit(f"{command} failed: {err.getvalue()}")
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def names(kind: str) -> list[str]:
    """Return the names that `expunge list KIND` prints."""
    # Of methods, a grid of families comes behind a blank line.
    listed = output_of(f"expunge list {kind}").partition("\n\n")[0]
    return [line.split()[0] for line in listed.splitlines()]


def fill(markdown: str) -> str:
    """Return a page with every mark followed by what it asks for."""
    return MARK.sub(lambda found: found[0] + "\n\n" + _asked(found[1], found[2]), markdown)


def show_notebook(path: Path) -> str:
    """Return a notebook as Markdown: text and code as they are, results as they were when it was run."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                # In a block of its own, Markdown leaves it as it is.
                shown = "".join(data["text/html"])
                parts.append(f'<div class="notebook-output">{shown}</div>')
            else:
                parts.append(_block("".join(data.get("text/plain", output.get("text", "")))))
    return "\n\n".join(parts)


def _asked(kind: str, what: str) -> str:
    if kind == "notebook":
        return show_notebook(Path(__file__).parent / what)
    if kind in ("run", "options"):
        text = output_of(what)
        return _block(text if kind == "run" else text.partition(OWN)[0].rstrip())
    parts = []
    for name in names(what):
        command = f"expunge erase {name}" + (" --preset list" if kind == "presets" else " --help")
        text = output_of(command)
        own = re.sub(r"^ *-{9,}\n", "", text.partition(OWN)[2])  # the rule under the title
        parts.append(f"### {name}\n\n{_block(own or text)}")
    return "\n\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' event: a page's Markdown, before it is rendered."""
    return fill(markdown)


def on_post_page(output: str, **_: Any) -> str:
    """MkDocs' event: a page's HTML. It must load nothing from the network."""
    if found := FETCHED.search(output):
        raise SystemExit(f"a page would load from the network: {found[0]}")
    return output
