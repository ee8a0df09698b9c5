"""How the page looks: the system's own letters, so that none are loaded from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

CSS, KEYS = (Path(__file__).with_name(name) for name in ("style.css", "keys.js"))

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

TOGGLE = "() => { document.body.classList.toggle('dark'); }"
"""What the button for light and dark does in the browser."""

SHOW = """
let shown = '';
setInterval(() => {
  const title = document.querySelector('#x-title')?.innerText.trim() ?? '';
  if (title && title !== shown && innerWidth < 760 && performance.now() > 6000)
    document.querySelector('#x-stage').scrollIntoView({behavior: 'smooth'});
  shown = title;
}, 500);
"""
"""Scrolls to new results where they stand below the choice."""


def head() -> str:
    """The styles for the page's head, as they are (Gradio rewrites those it is given), and scripts."""
    style, keys = (path.read_text(encoding="utf-8") for path in (CSS, KEYS))
    return f"<style>\n{style}</style><script>{SHOW}</script><script>\n{keys}</script>"


def theme() -> Any:
    """The page's colours, roundings and letters."""
    made = gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=SANS,
        font_mono=MONO,
    )
    return made.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0d1117",
        block_background_fill="#ffffff",
        block_background_fill_dark="#151b23",
        background_fill_primary_dark="#10161d",
        border_color_primary="#e4e7ec",
        border_color_primary_dark="#2a323d",
        block_border_width="0px",
        block_padding="0px",
        table_even_background_fill="#f6f8fa",
        table_even_background_fill_dark="#1a222c",
        table_odd_background_fill_dark="#151b23",
        block_label_padding="0px",
        body_text_color="#1d2530",
        body_text_color_dark="#e6eaf0",
        body_text_color_subdued="#596373",
        body_text_color_subdued_dark="#9aa5b4",
        block_info_text_color="#596373",
        block_info_text_color_dark="#9aa5b4",
        block_title_text_color="#344054",
        block_title_text_color_dark="#c3cbd6",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        button_secondary_background_fill="#eef1f4",
        button_secondary_background_fill_hover="#e2e7ec",
        button_secondary_background_fill_dark="#222b36",
        button_secondary_background_fill_hover_dark="#2c3745",
        button_secondary_text_color="#344054",
        button_secondary_text_color_dark="#d5dbe4",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#14b8a6",
        button_primary_background_fill_hover_dark="#2dd4bf",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#042f2e",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10161d",
        input_border_width="1px",
        slider_color="#0f766e",
        slider_color_dark="#14b8a6",
    )
