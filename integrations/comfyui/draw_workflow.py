"""Draw `workflow.json` as `workflow.svg`, for the README: nodes and links where ComfyUI puts them.

    python integrations/comfyui/draw_workflow.py

It is a drawing of the file, not a screenshot: ComfyUI is not started.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

COLORS = {
    "MODEL": "#8b7cf6",
    "CLIP": "#d9a404",
    "VAE": "#e5484d",
    "CONDITIONING": "#e08a3c",
    "LATENT": "#d6589f",
    "IMAGE": "#3b82c4",
}
"""Links and sockets by their type."""

HEAD, ROW, FIRST, MARGIN = 30, 20, 46, 40
"""Pixels: a node's title, a socket, the first socket's place, and the space around all."""


def socket(node: dict[str, Any], place: int, out: bool) -> tuple[float, float]:
    """Return where a node's socket stands: inputs at its left, outputs at its right."""
    x, y = node["pos"]
    return x + node["size"][0] * out, y + FIRST + ROW * place


def draw(workflow: dict[str, Any]) -> str:
    """Return a workflow as SVG."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    left = min(node["pos"][0] for node in nodes.values()) - MARGIN
    top = min(node["pos"][1] for node in nodes.values()) - MARGIN
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + MARGIN
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values()) + 2 * MARGIN
    parts = []
    for _, source, output, target, place, kind in workflow["links"]:
        (x0, y0), (x1, y1) = socket(nodes[source], output, True), socket(nodes[target], place, False)
        bend = max(40, abs(x1 - x0) / 2)
        parts.append(
            f'<path d="M{x0} {y0}C{x0 + bend} {y0} {x1 - bend} {y1} {x1} {y1}" fill="none"'
            f' stroke="{COLORS[kind]}" stroke-width="3"/>'
        )
    parts += [_node(node) for node in nodes.values()]
    note = "Drawn from workflow.json by draw_workflow.py; not a screenshot of ComfyUI."
    parts.append(f'<text x="{left + MARGIN}" y="{bottom - 24}" class="n">{note}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {right - left} {bottom - top}"'
        f' role="img" aria-label="{_describe(nodes)}"><style>'
        "text{font:15px ui-sans-serif,system-ui,sans-serif;fill:#1d2530}.t{font-weight:600}"
        ".s{font-size:13px}.w{font-size:13px;fill:#475467}.n{fill:#596373}</style>"
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="#f6f7f9"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _node(node: dict[str, Any]) -> str:
    (x, y), width = node["pos"], node["size"][0]
    inputs, outputs = node.get("inputs", []), node.get("outputs", [])
    # ComfyUI lets a node grow until its sockets fit.
    height = max(node["size"][1], FIRST + ROW * max(len(inputs), len(outputs)))
    own = node["type"].startswith("Expunge")
    fill, edge = ("#e3f4f1", "#0f766e") if own else ("#ffffff", "#98a2b3")
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}"'
        f' stroke="{edge}" stroke-width="{2.5 if own else 1.5}"/>',
        f'<text x="{x + 14}" y="{y + 22}" class="t">{html.escape(node["type"])}</text>',
    ]
    for out, sockets in ((False, inputs), (True, outputs)):
        for place, one in enumerate(sockets):
            at, down = socket(node, place, out)
            parts.append(f'<circle cx="{at}" cy="{down}" r="5.5" fill="{COLORS[one["type"]]}"/>')
            side = f'x="{at - 12}" text-anchor="end"' if out else f'x="{at + 12}"'
            parts.append(f'<text {side} y="{down + 4}" class="s">{html.escape(one["name"])}</text>')
    down = y + FIRST + ROW * max(len(inputs), len(outputs)) + 4
    for value in node.get("widgets_values", []):
        if down > y + height - 6:
            break
        shown = html.escape(str(value).replace("\n", ", ") or "(empty)")
        parts.append(f'<text x="{x + 14}" y="{down}" class="w">{shown}</text>')
        down += 18
    return "".join(parts)


def _describe(nodes: dict[int, dict[str, Any]]) -> str:
    kinds = ", ".join(dict.fromkeys(node["type"] for node in nodes.values()))
    return html.escape(f"The workflow's nodes and links: {kinds}")


def main() -> None:
    workflow = json.loads((HERE / "workflow.json").read_text(encoding="utf-8"))
    (HERE / "workflow.svg").write_text(draw(workflow), encoding="utf-8")


if __name__ == "__main__":
    main()
