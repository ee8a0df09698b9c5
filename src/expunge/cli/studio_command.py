"""`expunge studio`: the page in the browser, which is imported when the command runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from expunge.base.shipped import DEFAULT_MODEL

ROOM = "expunge.studio.server"
"""The module of the page; it imports this room, so it is imported by name."""


@dataclass(frozen=True)
class StudioOptions:
    """Choose, erase, look, judge and export in the browser, on this machine."""

    host: str = "127.0.0.1"
    """The address to listen on; by default only this machine can reach it."""
    port: int = 7860
    """The port; if it is taken, the next free one, which is printed."""
    model: str = DEFAULT_MODEL
    """The model to begin with: a shipped model, a diffusers folder, a .safetensors file, or a hub id."""
    browser: bool = True
    """Open a browser on it."""


def run_studio(options: StudioOptions) -> None:
    """Run `expunge studio`."""
    importlib.import_module(ROOM).serve(
        options.host, options.port, model=options.model, browser=options.browser
    )
