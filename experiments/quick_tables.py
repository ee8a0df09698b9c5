"""The tables of the first edition at quick size, as Markdown, from `results/GROUP/NAME-quick.json`.

python experiments/quick_tables.py mace/objects ace/styles …
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def said(score: Mapping[str, Any]) -> str:
    """In per cent, with its interval where there is one."""
    value, low, high = (score.get(key) for key in ("value", "low", "high"))
    if value is None or value != value:
        return "–"
    bounds = "" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f})"
    return f"{100 * value:.1f}{bounds}"


def mean(scores: list[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of several concepts; without an interval, which the mean H alone has been given."""
    values = [score["value"] for score in scores if score["value"] is not None]
    return {"value": sum(values) / len(values) if values else None}


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """One for each suite: methods, H, its terms, the share that is unrecognisable, images."""
    for suite in dict.fromkeys(case["suite"]["name"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["suite"]["name"] == suite]
        first = cases[0]["rows"][0]
        (score,) = (key for key in first if key.startswith("H_"))
        terms = list(dict.fromkeys(t for case in cases for row in case["rows"] for t in row["terms"]))
        yield "| " + " | ".join(["", score, *terms, "muddle"]) + " |"
        yield "|---" * (3 + len(terms)) + "|"
        groups: dict[str, list[Any]] = {}
        for case in cases:
            for row in case["rows"]:
                groups.setdefault(row["name"].partition(":")[0], []).append(row)
        means = list(results["methods"].get(suite, {}).values())
        for place, (name, rows) in enumerate(groups.items()):
            whole = rows[0][score] if len(rows) == 1 else means[place]
            told = [mean([row["terms"][t] for row in rows if t in row["terms"]]) for t in terms]
            if len(rows) == 1:
                told = [rows[0]["terms"].get(t, {"value": None}) for t in terms]
            broken = mean([row["roles"]["erased"]["unrecognisable"] for row in rows])
            yield "| " + " | ".join([name, *map(said, [whole, *told, broken])]) + " |"
        if len(cases) > 1:
            yield ""
            each = [
                f"{', '.join(case['erased'][:2])} "
                + ", ".join(
                    f"{row['name'].partition(':')[0]} {100 * row[score]['value']:.1f}"
                    for row in case["rows"][1:]
                )
                for case in cases
            ]
            yield f"H of each: {'; '.join(each)}."


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    for name in (options := parser.parse_args()).names:
        results = json.loads((options.results / f"{name}-quick.json").read_text("utf8"))
        print(f"\n### {name}\n\n" + "\n".join(table(results)))


if __name__ == "__main__":
    main()
