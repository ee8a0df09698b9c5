"""The models that ship, and those of which everything but the weights is here."""

from __future__ import annotations

from expunge.base import registry

DEFAULT_MODEL = "miniature"
"""What commands, suites and experiments work on where no model is named, and whose CLIP metrics take."""


def list_shipped() -> list[str]:
    """Return the names of the models that ship, and of those whose suites came before their weights.

    >>> "miniature" in list_shipped()
    True
    """
    folders = {
        folder.parent for part in ("pipeline", "suites") for folder in registry.HERE.glob(f"*/{part}")
    }
    return sorted(folder.name for folder in folders)
