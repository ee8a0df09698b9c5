"""Show doctests in docstrings as code on the page of the Python API."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fence every example of a docstring, up to the blank line that ends it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe's event: an object and its docstring have been read."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its doctests in fences."""
    shown = re.sub(r" *# doctest: \+\w+", "", text)
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", shown)
