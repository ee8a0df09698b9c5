"""The layout of `results.json`: written here, and read whatever version wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.base.errors import ExpungeError
from expunge.base.files import parse_json
from expunge.evaluation.candidates import SuiteResult
from expunge.evaluation.cells import RENAMED_QUESTIONS
from expunge.evaluation.comparisons import Comparison
from expunge.evaluation.image_source import describe_sampler
from expunge.evaluation.statistics import Estimate

FORMAT = 3
"""The version of the layout: 2 since a case counts `images`, and a row holds its `attacks`; 3 since a
role holds `present`, and questions are named so."""
RESULTS = "results.json"
"""The file in a report's folder."""
ATTACKED = "robustness.json"
"""The file beside it in which format 1 kept what attacks came to."""


def read_results(path: str | Path) -> dict[str, Any]:
    """Read the results of a report, of this layout or an earlier one, as this one.

    Args:
        path: `results.json`, or the folder that holds it.

    Raises:
        ExpungeError: the file is missing, is no report, or is of a newer layout.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    table = _read(path)
    try:
        if table["format"] > FORMAT:
            raise ExpungeError(
                f"{path} has the format {table['format']}; this expunge reads up to {FORMAT}"
            )
        if table["format"] == 1:
            beside = path.with_name(ATTACKED)
            _gather_attacks(table, _read(beside) if beside.is_file() else [])
        if table["format"] < FORMAT:
            _name_present(table)
    except (KeyError, TypeError, AttributeError):
        raise ExpungeError(f"{path} is not a report of expunge evaluate") from None
    return dict(table)


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpungeError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        raise ExpungeError(f"{path} is not a report of expunge evaluate") from None


def _gather_attacks(table: dict[str, Any], attacked: Sequence[Mapping[str, Any]]) -> None:
    """Make format 2 of format 1: `pictures` are `images`, and attacks belong to their row."""
    for case in table["cases"]:
        case["images"] = case.pop("pictures")
        for row in case["rows"]:
            mine = [
                {key: value for key, value in one.items() if key not in ("suite", "edit")}
                for one in attacked
                if (one["suite"], one["edit"]) == (case["suite"]["name"], row["name"])
            ]
            if mine:
                row["attacks"] = mine
    table["format"] = 2


def _name_present(table: dict[str, Any]) -> None:
    """Make format 3 of format 2: questions and shares have their names of now."""
    for case in table["cases"]:
        if (question := case["suite"].get("question")) in RENAMED_QUESTIONS:
            case["suite"]["question"] = RENAMED_QUESTIONS[question]
        for row in case["rows"]:
            for shares in row.get("roles", {}).values():
                if "there" in shares:
                    shares["present"] = shares.pop("there")
    table["format"] = 3


def comparison_table(one: Comparison) -> dict[str, Any]:
    """Return a comparison, ready for JSON."""
    found: dict[str, Any] = {
        "of": one.of,
        "between": [one.one, one.other],
        **one.difference.to_dict(),
        "comparisons": one.family,
        "p": _rounded(one.p),
        "p corrected": _rounded(one.corrected),
        "larger than chance": one.sure,
    }
    if one.difference.general is not None:
        found |= {
            "p in general": _rounded(one.p_in_general),
            "p in general corrected": _rounded(one.corrected_in_general),
            "larger than chance in general": one.sure_in_general,
        }
    return found


def _rounded(p: float) -> float | None:
    """A p-value to three figures; None where there is none."""
    return None if p != p else float(f"{p:.3g}")


def _numbers(table: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {a: {b: e.to_dict() for b, e in parts.items()} for a, parts in table.items()}


def case_table(case: SuiteResult, differences: Sequence[Comparison]) -> dict[str, Any]:
    """Return all numbers of a case, ready for JSON.

    Args:
        case: the case.
        differences: its comparisons, corrected for their number.
    """
    suite = case.suite
    return {
        "suite": {
            "name": suite.name,
            "version": suite.version,
            "score": suite.score,
            "judge": suite.judge,
            "question": suite.question,
            "notes": suite.notes,
        },
        "erased": list(case.erased),
        "retained": list(case.retained),
        "sampler": _drawn_with(case),
        "images": sum(map(len, case.rows[0].samples)),
        "seeds": [suite.first_seed, max(max(sample.cell.seeds) for sample in case.rows[0].samples)],
        "left out": [
            {"role": role, "words": words, "original": None if share != share else round(share, 4)}
            for role, words, share in case.left_out
        ],
        "rows": [
            {
                "name": row.name,
                "from": row.candidate.record if row.candidate else {"kind": "original"},
                suite.score: row.h.to_dict(),
                "terms": {name: e.to_dict() for name, e in row.terms.items()},
                "published": {name: e.to_dict() for name, e in row.published.items()},
                **({"totals": dict(row.totals)} if row.totals else {}),
                "roles": _numbers(row.roles),
                "metrics": _numbers(row.metrics),
                "each": {
                    role: {k: None if v != v else round(v, 4) for k, v in parts.items()}
                    for role, parts in row.each.items()
                },
                **({"kinds of prompts": _numbers(row.kinds)} if row.kinds else {}),
                **({"attacks": [one.to_dict() for one in row.attacks]} if row.attacks else {}),
            }
            for row in case.rows
        ],
        **({"not tested": dict(case.not_run)} if any(row.attacks for row in case.rows) else {}),
        "differences": [comparison_table(one) for one in differences],
    }


def _drawn_with(case: SuiteResult) -> dict[str, Any]:
    """The scheduler with its settings, the steps and the guidance of a case's images."""
    requests = [request for sample in case.rows[0].samples for request in sample.requests]
    scales = sorted({request.guidance_scale for request in requests})
    return {
        **describe_sampler(case.sources["original"].model),
        "num_inference_steps": requests[0].num_inference_steps,
        "guidance_scale": scales[0] if len(scales) == 1 else scales,
    }
