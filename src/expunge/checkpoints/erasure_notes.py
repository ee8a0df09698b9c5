"""The notes that an erased model carries: what was erased from it, by which edit, and where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.base.errors import ExpungeError, join_names
from expunge.base.files import parse_json
from expunge.checkpoints.weight_changes import Place
from expunge.edit import Edit, Record
from expunge.fingerprint import list_places

NOTE = "expunge.erased"
"""The entry of a file's metadata that holds the notes."""

FORMER = "expunge.was"
"""The entry that keeps the file's title and hashes from before the first erasure."""

OUTDATED = ("modelspec.title", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries that an erasure makes untrue."""


@dataclass(frozen=True)
class ErasureNote:
    """One erasure of a model on the disk."""

    record: Record
    edit: str
    """The edit's hash."""
    places: tuple[Place, ...]
    """The parameters that were changed."""

    @classmethod
    def of(cls, edit: Edit) -> ErasureNote:
        """Make the note of an edit."""
        # Sorted: places are a set, and the same edit should write the same file.
        return cls(edit.record, edit.hash, tuple(sorted(list_places(edit.changes))))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ErasureNote:
        """Read a note from what `dataclasses.asdict` made of it."""
        record = Record.from_dict(data["record"])
        return cls(record, data["edit"], tuple((layer, name) for layer, name in data["places"]))


def serialise_notes(notes: Sequence[ErasureNote]) -> str:
    """Serialise notes as JSON, as `NOTE` holds them."""
    return json.dumps([{**dataclasses.asdict(n), "record": n.record.to_dict()} for n in notes])


def read_notes(header: Mapping[str, Any]) -> tuple[ErasureNote, ...]:
    """Read the notes in a safetensors header, the latest last; none where there are none.

    Raises:
        ExpungeError: they cannot be read.
    """
    try:
        entries = parse_json(header.get("__metadata__", {}).get(NOTE, "[]"))
    except ValueError:
        # No list, so that `parse_notes` refuses it in its own words.
        entries = None
    return parse_notes(entries, "the file")


def parse_notes(entries: Any, where: object) -> tuple[ErasureNote, ...]:
    """Parse notes from JSON's lists and tables.

    Args:
        entries: what `serialise_notes` wrote, decoded.
        where: the file, for messages.

    Raises:
        ExpungeError: they are no notes.
    """
    try:
        return tuple(ErasureNote.from_dict(entry) for entry in entries)
    except (ValueError, KeyError, TypeError):
        raise ExpungeError(f"what {where} says about its erasures cannot be read") from None


def update_metadata(metadata: Mapping[str, str], notes: Sequence[ErasureNote]) -> dict[str, str | None]:
    """Update a file's title and hashes to the notes; without notes, bring back what was there before.

    Args:
        metadata: the file's metadata before.
        notes: what has been erased from it then.

    Returns:
        the entries to write; None for those to remove.
    """
    try:
        former = parse_json(metadata[FORMER]) if FORMER in metadata else None
    except ValueError:
        former = {}
    if former is None:
        # The first erasure: title and hashes still are those of the model itself.
        former = {name: metadata[name] for name in OUTDATED if name in metadata}
    if not notes:
        return {FORMER: None, **former}
    new: dict[str, str | None] = {name: None for name in OUTDATED if name in metadata}
    if "modelspec.title" in former:
        names = [concept.name for note in notes for concept in note.record.problem.erase]
        new["modelspec.title"] = f"{former['modelspec.title']} without {join_names(names, 3)}"
    return {**new, **({FORMER: json.dumps(former)} if former else {})}
