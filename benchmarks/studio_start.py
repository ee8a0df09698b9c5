"""How soon the studio's page is there, and how much memory a studio takes that has its model and waits.

The command is started as a user gives it; a headless Chromium that runs already opens the page. *start*
is from the command to the line with the address; *first paint* and *usable* (the examples can be
pressed) are the browser's, from its request on; *memory* is the server's, once the shipped model is
loaded, *idle* the processor time of server and browser while nobody does anything. To reach: a first
paint within 2 s of the start, and 1.5 GB. Wall-clock time depends on what else runs on the machine: so
the load is written beside it, and the processor time of server and browser.

    python benchmarks/studio_start.py [--rounds 3] [--chromium /usr/bin/chromium]

Needs/results/studio_start.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from expunge.base.files import replacing

TICKS = os.sysconf("SC_CLK_TCK")
IDLE = 15
"""Seconds in which nobody does anything."""


def descend(root: int) -> list[int]:
    """A process and all that it started, by their numbers."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(after[1]), []).append(int(place.parent.name))
    found = [root]
    for one in found:
        found += children.get(one, [])
    return found


def processor(pids: Iterable[int]) -> float:
    """Seconds of processor time that some processes have had."""
    total = 0
    for pid in pids:
        try:
            after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(after[11]) + int(after[12])
    return total / TICKS


def memory(pid: int) -> dict[str, float]:
    """The resident memory of a process, now and at most, in GB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {name: int(found[key]) * 1024 / 1e9 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}


def once(browser: Any, cache: str, port: int) -> dict[str, Any]:
    """Start a studio, open its page, load its model, wait, and end it."""
    ours = [pid for pid in descend(os.getpid()) if pid != os.getpid()]
    environment = {**os.environ, "EXPUNGE_CACHE": cache}
    command = [sys.executable, "-m", "expunge", "studio", "--no-browser", "--port", str(port)]
    load, begun = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(text for text in process.stdout if "Ctrl+C" in text)
        started, server_start = time.perf_counter() - begun, processor([process.pid])
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.set_default_timeout(600_000)
        before = processor(ours)
        page.goto(line.split()[2])
        page.wait_for_selector("#x-examples button:enabled")
        timing = page.evaluate(
            "() => { const [paint] = performance.getEntriesByName('first-contentful-paint');"
            " return [paint.startTime / 1000, performance.now() / 1000]; }"
        )
        ours = [pid for pid in descend(os.getpid()) if pid not in (os.getpid(), process.pid)]
        page_seconds = processor(ours) - before
        server_page = processor([process.pid]) - server_start
        page.click("#x-examples button")
        page.wait_for_selector(".x-chip:has-text('in memory')")
        held = memory(process.pid)
        page.wait_for_selector(".x-moves li")  # what a choice sets going has ended
        page.wait_for_function("!document.querySelector('[role=progressbar]')")
        idle = processor([process.pid]), processor(ours)
        time.sleep(IDLE)
        after = processor([process.pid]), processor(ours)
        used = memory(process.pid)
        context.close()
    finally:
        process.terminate()
        process.wait(60)
    return {
        "load before": round(load, 2),
        "start, s": started,
        "start, server's processor s": server_start,
        "first paint, s": timing[0],
        "usable, s": timing[1],
        "until usable, browser's processor s": page_seconds,
        "until usable, server's processor s": server_page,
        "memory with the model, GB": held["now"],
        "memory after a forecast, GB": used["now"],
        "memory at most, GB": used["most"],
        "idle, server's processor share": (after[0] - idle[0]) / IDLE,
        "idle, browser's processor share": (after[1] - idle[1]) / IDLE,
    }


def main() -> None:
    """Run it, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=7960)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    name = Path(__file__).parent / "results" / "studio_start.json"
    parser.add_argument("--to", type=Path, default=name)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    rows = []
    with sync_playwright() as started, tempfile.TemporaryDirectory() as cache:
        browser = started.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for i in range(options.rounds):
            rows.append(once(browser, cache, options.port + i))
            print(json.dumps(rows[-1], indent=1), flush=True)
        browser.close()
    found = {
        "median": {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]},
        "rounds": rows,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("gradio", "torch", "diffusers")},
        },
    }
    with replacing(options.to) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
