"""Take the pictures of the studio in the docs, from the page itself.

The studio is started as a user starts it; a headless Chromium chooses, erases, looks and attacks in it.
Writes `choose.png`, `look.png`, `attack.png` and `phone.png` into `docs/images/studio`; look at them.

    python scripts/take_screenshots.py [--to FOLDER]

Needs `expunge[studio]`, Playwright and a Chromium (`scripts/install_chromium.sh`).
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
# High enough for the whole page: the Erase button, which stays in sight, would lie over what it passes.
DESKTOP, PHONE = {"width": 1280, "height": 1400}, {"width": 400, "height": 860}


def save(page: Any, path: Path, **options: Any) -> None:
    """Write what a page shows once nothing is being done."""
    page.wait_for_function("!document.querySelector('[role=progressbar]')")
    page.evaluate("document.activeElement?.blur()")
    page.mouse.move(0, 0)
    taken = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
    taken.save(path, optimize=True)  # every colour: in a palette the images get bands
    print(path, taken.size, flush=True)


def take(page: Any, folder: Path) -> None:
    """Go through the page, and take each picture where it stands.

    Args:
        page: the studio, just opened.
        folder: where the pictures go.
    """
    page.click("#x-examples button:has-text('Airplane')")
    page.wait_for_selector(".x-moves li")
    page.wait_for_selector(".x-now img")
    save(page, folder / "choose.png", full_page=True)
    page.click("#x-erase")
    page.wait_for_selector("[data-place]")
    save(page, folder / "look.png", full_page=True)
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("[data-place]")
    page.wait_for_selector("#x-slider img")
    page.evaluate("document.querySelector('#x-stage').scrollIntoView({behavior: 'instant'})")
    save(page, folder / "phone.png")
    page.set_viewport_size(DESKTOP)
    page.click("button[role=tab]:has-text('Attack')")
    page.click("#x-attack")
    page.wait_for_selector("#x-rungs section:nth-of-type(4)")
    save(page, folder / "attack.png", full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "images" / "studio")
    parser.add_argument("--port", type=int, default=7990)
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "expunge", "studio", "--no-browser", "--port", str(options.port)]
    with tempfile.TemporaryDirectory() as cache, sync_playwright() as started:
        environment = {**os.environ, "EXPUNGE_CACHE": cache}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if "Ctrl+C" in line).split()[2]
            browser = started.chromium.launch(
                executable_path=options.chromium, args=["--no-sandbox", "--hide-scrollbars"]
            )
            page = browser.new_context(viewport=DESKTOP, reduced_motion="reduce").new_page()
            page.set_default_timeout(1_800_000)  # on a busy machine all of it takes long
            page.goto(address)
            page.wait_for_selector("#x-examples button:enabled")
            take(page, options.to)
            browser.close()
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
