"""`expunge studio`: the page in the browser. Nothing here imports it before it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

ROOM = "expunge.studio.server"
"""It stands above the command line, which knows it by name alone."""


@dataclass(frozen=True)
class Studio:
    """Choose, erase, look, judge and take away in the browser, on this machine."""

    host: str = "127.0.0.1"
    """The address to listen at; by default only this machine can reach it."""
    port: int = 7860
    """The port; where it is taken, the next free one, and this is said."""
    model: str = "emoji"
    """The model to begin with: a shipped model, a diffusers folder, a .safetensors file, or a hub id."""
    browser: bool = True
    """Open a browser on it."""


def studio_command(options: Studio) -> None:
    """`expunge studio`."""
    importlib.import_module(ROOM).serve(
        options.host, options.port, model=options.model, browser=options.browser
    )
