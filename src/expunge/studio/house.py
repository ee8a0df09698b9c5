"""What all sessions share: the models, the desk that works, and the folder."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
import uuid
from pathlib import Path

from expunge.base.files import find_cache_folder
from expunge.base.shipped import DEFAULT_MODEL
from expunge.studio.jobs import Desk
from expunge.studio.models import Models
from expunge.studio.session import Session

KEPT_DAYS = 14
"""How long a session that nobody comes back to is kept."""


class Studio:
    """What all sessions share: the models, the desk that works, and the folder.

    Args:
        folder: where sessions keep their work; by default in the user's cache folder.
        models: what may be loaded.
        first: the model that new sessions begin with.
    """

    desk: Desk
    first: str

    def __init__(
        self, folder: str | Path | None = None, models: Models | None = None, first: str = DEFAULT_MODEL
    ) -> None:
        self.folder: Path = Path(folder) if folder is not None else find_cache_folder() / "studio"
        self.models: Models = models or Models()
        self.desk, self.first = Desk(), first
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def session(self, name: str | None = None) -> Session:
        """The session of a name, as it was left; a new one where there is none of that name."""
        with self._lock:
            known = isinstance(name, str) and re.fullmatch(r"[0-9a-f]{32}", name) is not None
            name = name if known and name else uuid.uuid4().hex
            if name not in self._sessions:
                self._sessions[name] = Session(
                    name, self.models, self.desk, self.folder / name, self.first
                )
            return self._sessions[name]

    def tidy(self) -> None:
        """Delete what sessions left that nobody has come back to for a long time."""
        oldest = time.time() - KEPT_DAYS * 86400
        for place in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                if place.is_dir() and place.stat().st_mtime < oldest:
                    shutil.rmtree(place, ignore_errors=True)
