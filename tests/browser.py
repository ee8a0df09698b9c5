"""The studio's page in a real Chromium: what the browser tests share."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))

PATIENCE = int(os.environ.get("PATIENCE", "180")) * 1000
"""Milliseconds that a busy machine may take for one step."""

WIDTHS = {"desktop": (1280, 900, "light"), "phone": (400, 860, "dark")}


def need_browser() -> None:
    """Skip a module without Gradio, Playwright or Chromium; under `make check-browser`, fail."""
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if CHROMIUM.exists() else [str(CHROMIUM)]
    if missing and os.environ.get("BROWSER_TESTS") == "required":
        raise RuntimeError(f"the browser tests need {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)


@contextmanager
def launched() -> Iterator:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def pages(browser, address: str) -> Iterator:
    """Opens pages of one address; says at the end that no script failed and nothing else was asked."""
    asked, wrong, contexts = [], [], []

    def open_page(width="desktop", context=None):
        wide, high, scheme = WIDTHS[width]
        context = context or browser.new_context(
            viewport={"width": wide, "height": high},
            color_scheme=scheme,
            accept_downloads=True,
            reduced_motion="reduce",  # or the processor draws what moves, without end
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#x-examples button:enabled")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def choose(page, label="Airplane"):
    """Press an example."""
    page.click(f"#x-examples button:has-text('{label}')")
    page.wait_for_selector(".x-card")


def erase(page):
    """Press Erase, and wait for the first pair."""
    page.click("#x-erase")
    page.wait_for_selector("#x-slider img")


def tab(page, name):
    """Press one of the tabs of the results."""
    page.click(f"button[role=tab]:has-text('{name}')")


def toast(page):
    """The sentence that the page shows, and none of what a program says to its makers."""
    said = page.wait_for_selector("[data-testid=toast-text]").inner_text()
    assert "Traceback" not in said
    # It goes by itself after some seconds, and may do so at any moment.
    page.evaluate("document.querySelectorAll('[data-testid=toast-close]').forEach(one => one.click())")
    page.wait_for_selector("[data-testid=toast-text]", state="detached")
    return said
