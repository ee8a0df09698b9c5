"""What metrics by the miniature model's recogniser have in common."""

from __future__ import annotations

from pathlib import Path

from expunge.miniature.recogniser import Recogniser, load_recogniser


class ByRecogniser:
    """A metric that asks the recogniser of a folder, or the one that ships."""

    folder: str
    """The folder; "" for the one that ships. Each metric has the field itself."""

    @property
    def _recogniser(self) -> Recogniser:
        return load_recogniser(Path(self.folder) if self.folder else None)
