"""The model card of an export: what was erased, how, from which model, and what that does not mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.base.errors import ExpungeError, join_names
from expunge.base.fields import format_values
from expunge.base.files import parse_json, replacing
from expunge.changes import summarize
from expunge.edit import Edit

LIMITS = """\
An erasure is a small change to the weights. It lowers what the model draws of the erased concepts when
it is asked for them by name; it is no proof that nothing can bring them back: other words, other
languages, further training, or whoever takes the change off again. Judge it for your own use
(`expunge evaluate`) before you rely on it."""

LORA_FORMS = ("lora", "kohya")
"""The forms of an export that are LoRA files."""

MARK = "* Written by expunge "
"""How one line of every card begins, by which `is_card` knows it."""


def render_card(
    edit: Edit,
    form: str,
    *,
    notes: Sequence[str] = (),
    licence: str = "",
    report: str | Path | None = None,
) -> str:
    """Render a model card in Markdown, with the header that the hub reads.

    Args:
        edit: the edit that was exported.
        form: the form of the export.
        notes: sentences about what the export lost, and the like.
        licence: its identifier on the hub; by default "other", that of the base model.
        report: a folder that `expunge evaluate` wrote, whose figures the card shows.

    Raises:
        ExpungeError: the report cannot be read.
    """
    record = edit.record
    lora = ["lora"] if form in LORA_FORMS else []
    header = {
        "license": licence or "other",
        "tags": ["text-to-image", "concept-erasure", "expunge", *lora],
    }
    if record.model.count("/") == 1:
        header["base_model"] = record.model
    lines = ["---", *_render_yaml(header), "---", "", f"# {make_title(edit)}", ""]
    lines += ["| erased | kind | becomes |", "| --- | --- | --- |"]
    for concept in record.problem.erase:
        also = f" ({', '.join(concept.synonyms)})" if concept.synonyms else ""
        becomes = repr(concept.anchor) if concept.anchor else "what the empty prompt draws"
        lines.append(f"| {concept.name}{also} | {concept.kind} | {becomes} |")
    lines += [
        "",
        f"* Retained by name: {', '.join(record.problem.retain) or 'nothing'}.",
        f"* Method: {record.method} ({format_values(record.fields)}), seed {record.seed}.",
        f"* Base: {record.model or 'unnamed'}; the changed tensors' hash there is `{record.base[:16]}`.",
        f"* Changes: {summarize(edit.changes)}; edit `{edit.hash[:16]}`.",
        f"{MARK}{__version__} as {form}.",
        *(f"* {note}" for note in notes),
        f"* Licence: {licence or 'that of the base model'}.",
    ]
    lines += ["", "## Figures", "", *(_render_figures(report) if report else ["None were given."])]
    lines += ["", "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def write_card(path: Path, text: str) -> None:
    """Write a card's text to a file that is whole or stays as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def choose_card_path(output: Path) -> tuple[Path, tuple[str, ...]]:
    """Choose where an export's card lies, without overwriting a file of the user's.

    Args:
        output: the export, a folder or a `.safetensors` file.

    Returns:
        the card's path, and a note where it is not the usual one.
    """
    if output.is_dir() or output.suffix.lower() != ".safetensors":
        return output / "README.md", ()
    wanted = path = output.with_suffix(".md")
    number = 1
    while (path.exists() or path.is_symlink()) and not is_card(path):
        path = output.with_name(f"{output.stem}.card{'' if number == 1 else f'-{number}'}.md")
        number += 1
    if path == wanted:
        return path, ()
    return path, (f"{wanted.name} is not a card of ours and stays as it is; the card is {path.name}.",)


def is_card(path: str | Path) -> bool:
    """Return whether a file is a card that expunge wrote."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return any(line.startswith(MARK) for line in text.splitlines())


def make_title(edit: Edit) -> str:
    """Make the title of a model with an edit: "emoji without cat"."""
    names = [concept.name for concept in edit.record.problem.erase]
    return f"{edit.record.model or 'A model'} without {join_names(names, 3)}"


def _render_yaml(header: dict[str, Any]) -> list[str]:
    """A flat table as YAML, whose texts and lists may be written as JSON's."""
    return [f"{key}: {json.dumps(value)}" for key, value in header.items()]


def _render_figures(report: str | Path) -> list[str]:
    """The results of a report, as a table for each suite."""
    path = Path(report) / "results.json"
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        lines = []
        for case in data["cases"]:
            suite, rows = case["suite"], case["rows"]
            terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
            score = suite["score"]
            lines += [f"Suite {suite['name']}, in per cent, with 95 % intervals:", ""]
            lines += [f"| | {' | '.join([score, *terms])} |", "| --- " * (len(terms) + 2) + "|"]
            for row in rows:
                figures = [row.get(score), *(row["terms"].get(term) for term in terms)]
                lines.append(f"| {row['name']} | {' | '.join(map(_render_figure, figures))} |")
            lines.append("")
        return lines
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExpungeError(f"{path} is not a report of expunge evaluate") from None


def _render_figure(estimate: Any) -> str:
    if not estimate or estimate.get("value") is None:
        return "–"
    # Shares are shown in per cent; distances, beyond 1, as they are.
    scale = 100 if abs(estimate["value"]) <= 1 else 1
    value, low, high = (scale * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.0f}–{high:.0f})"
