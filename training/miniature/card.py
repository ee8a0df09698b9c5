"""Writes the card of a packed folder from `card.md`: what was measured as tables, and plainly what was not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOT_YET = "not measured yet"
YARDSTICK = ("alone", "empty")  # gates with these words in their names are about the yardstick
TOWER = {  # figure of results/tower.json: what it is, and its gate
    "word-end": ("cosine of a concept's shifts at its word and at the end", "below 0.3"),
    "word-padding": ("the same at its word and in the padding", "below 0.3"),
    "behind": ("words behind the concept move, of their norm", "below 0.4"),
}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def gate_rows(gates: Mapping[str, Any], yardstick: bool) -> list[list[str]]:
    """The rows of gates.json that are about the yardstick, or the others."""
    return [
        [row["gate"], f"{share(row['value'])} ({row['n']})", share(row["least"]), share(row["goal"])]
        for row in gates.get("gates", ())
        if any(word in row["gate"] for word in YARDSTICK) == yardstick
    ]


def describe_gates(gates: Mapping[str, Any]) -> str:
    rows = gate_rows(gates, False)
    if not rows:
        return "They have not been measured yet: its denoiser has not met its gates."
    failed = [row["gate"] for row in gates["gates"] if row["passes"] is False]
    said = f"Not met: {'; '.join(failed)}." if failed else "Every gate is met."
    return f"{said}\n\n{table(('gate', 'now (images)', 'least', 'goal'), rows)}"


def describe_yardstick(gates: Mapping[str, Any], tower: Mapping[str, Any]) -> str:
    rows = [[what, tower.get(key, NOT_YET), gate, ""] for key, (what, gate) in TOWER.items()]
    drawn = gate_rows(gates, True) or [["word alone, end and padding alone, the empty text", NOT_YET, "", ""]]
    return table(("figure", "now", "least", "goal"), [*rows, *drawn])


def describe_judge(held_out: Mapping[str, Any]) -> str:
    if "drawings" not in held_out:
        return f"Its accuracy on unseen drawings: {NOT_YET}."
    after = held_out.get("after the VAE", {})
    rows = [[kind, f"{100 * value:.1f} %", f"{100 * after[kind]:.1f} %" if kind in after else NOT_YET]
            for kind, value in held_out["drawings"].items()]  # fmt: skip
    return table(("right on unseen scenes", "drawings", "after the VAE"), rows)


def write_card(folder: Path, parameters: Mapping[str, int], results: Path = HERE / "results") -> None:
    """Writes README.md into a folder that holds everything else.

    Args:
        parameters: of each part, how many.
        results: where the tower's figures lie.
    """
    parts = {part: load(folder / "pipeline" / part / "config.json") for part in ("text_encoder", "unet", "vae")}
    text, unet, vae = parts.values()
    drawing, gates = load(folder / "pipeline" / "expunge.json"), load(folder / "gates.json")
    sheets = [f"![{name}]({name}.png)" for name in ("drawn", "people", "artists") if (folder / f"{name}.png").exists()]
    values = {
        "objects": sum(one["group"] != "ten" for one in load(folder / "concepts.json")["objects"].values()),
        "width": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "tokens": f"{text['vocab_size']:,}",
        "channels": ", ".join(map(str, unet["block_out_channels"])),
        "side": unet["sample_size"],
        "latents": vae["latent_channels"],
        **{part: f"{count / 1e6:.1f} M" for part, count in parameters.items()},
        "steps": drawing["num_inference_steps"],
        "guidance": f"{drawing['guidance_scale']:g}",
        "sheets": "\n" + "\n\n".join(sheets) + "\n" if sheets else "",
        "gates": describe_gates(gates),
        "yardstick": describe_yardstick(gates, load(results / "tower.json")),
        "judge": describe_judge(load(folder / "recogniser" / "held_out.json")),
    }
    card = (HERE / "card.md").read_text(encoding="utf-8").format(**values)
    (folder / "README.md").write_text(card, encoding="utf-8")
