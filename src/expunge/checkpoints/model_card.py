"""The model card of an export: what was erased, how, from what, and what that does not mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.base.errors import ExpungeError, join_names
from expunge.base.fields import format_values
from expunge.changes import summarize
from expunge.edit import Edit

LIMITS = """\
An erasure is a small change to the weights. It lowers what the model draws of the erased concepts when
it is asked for them by name; it is no proof that nothing can bring them back: other words, other
languages, further training, or whoever takes the change off again. Classifier it for your own use
(`expunge evaluate`) before you rely on it."""


def write_card(
    edit: Edit,
    target: str,
    *,
    notes: Sequence[str] = (),
    licence: str = "",
    report: str | Path | None = None,
) -> str:
    """A model card in Markdown, with the header that the hub reads.

    Args:
        edit: what was exported.
        target: what it was exported to.
        notes: what the export lost, and the like.
        licence: its identifier on the hub; an edited model stays under that of its base.
        report: a folder that `expunge evaluate` wrote, for the figures.

    Raises:
        ExpungeError: the report cannot be read.
    """
    record = edit.record
    header = {
        "license": licence or "other",
        "tags": ["text-to-image", "concept-erasure", "expunge", *(["lora"] if target in LORAS else [])],
    }
    if record.model.count("/") == 1:
        header["base_model"] = record.model
    lines = ["---", *_yaml(header), "---", "", f"# {title(edit)}", ""]
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
        f"{MARK}{__version__} as {target}.",
        *(f"* {note}" for note in notes),
        f"* Licence: {licence or 'that of the base model'}.",
    ]
    lines += ["", "## Figures", "", *(_figures(report) if report else ["None were given."])]
    lines += ["", "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


MARK = "* Written by expunge "
"""How a line of every card begins."""


def is_ours(path: str | Path) -> bool:
    """Whether a file is a card that this module wrote."""
    try:
        return any(line.startswith(MARK) for line in Path(path).read_text("utf8").splitlines())
    except (OSError, ValueError):
        return False


LORAS = ("lora", "kohya")
"""The targets that are LoRA files."""


def title(edit: Edit) -> str:
    """What to call a model that an edit lies on."""
    names = [concept.name for concept in edit.record.problem.erase]
    return f"{edit.record.model or 'A model'} without {join_names(names, 3)}"


def _yaml(header: dict[str, Any]) -> list[str]:
    """A flat table as YAML; JSON's texts and lists are YAML's too."""
    return [f"{key}: {json.dumps(value)}" for key, value in header.items()]


def _figures(report: str | Path) -> list[str]:
    """The rows of a report, as a table."""
    path = Path(report) / "results.json"
    try:
        data = json.loads(path.read_text("utf8"))
        lines = []
        for case in data["cases"]:
            suite, rows = case["suite"], case["rows"]
            terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
            score = suite["score"]
            lines += [f"Suite {suite['name']}, in per cent, with 95 % intervals:", ""]
            lines += [f"| | {' | '.join([score, *terms])} |", "| --- " * (len(terms) + 2) + "|"]
            for row in rows:
                cells = [_figure(row.get(score)), *(_figure(row["terms"].get(term)) for term in terms)]
                lines.append(f"| {row['name']} | {' | '.join(cells)} |")
            lines.append("")
        return lines
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExpungeError(f"{path} is not a report of expunge evaluate") from None


def _figure(estimate: Any) -> str:
    if not estimate or estimate.get("value") is None:
        return "–"
    scale = 100 if abs(estimate["value"]) <= 1 else 1
    value, low, high = (scale * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.0f}–{high:.0f})"
