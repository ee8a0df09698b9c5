"""Serving the page on this machine: a free port, nothing from the network, an end by Ctrl+C."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.base.errors import ExpungeError
from expunge.base.shipped import DEFAULT_MODEL

if TYPE_CHECKING:
    from expunge.studio.house import Studio

FIRST_PORT = 7860
TRIED = 100
"""Ports that are tried from the wanted one on."""

LARGEST_UPLOAD = "1gb"

SILENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""What keeps libraries from telling anybody of their use."""


def serve(
    host: str = "127.0.0.1",
    port: int = FIRST_PORT,
    *,
    model: str = DEFAULT_MODEL,
    browser: bool = True,
    folder: str | Path | None = None,
) -> None:
    """Serve the studio until it is interrupted.

    Args:
        host: the address to listen at; other machines reach it only if this is one of theirs to see.
        port: the port; where it is taken, the next free one.
        model: the model that new sessions begin with.
        browser: whether to open a browser on it.
        folder: where sessions keep their work.

    Raises:
        ExpungeError: Gradio is not installed, no port is free, or the address is none of this machine.
    """
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    check_gradio()
    free = free_port(host, port)
    if free != port:
        print(f"port {port} is in use: the studio is at {free}", flush=True)
    studio = make_studio(host, model, folder)
    app = start(host, free, studio)
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{free}"
    print(f"expunge studio: {address}  (Ctrl+C ends it)", flush=True)
    if not is_local(host):
        print(
            "other machines can reach it: whoever does can use it, and models are named by hub id alone"
        )
    if browser:
        webbrowser.open(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nthe studio is closed; sessions are kept")
    finally:
        studio.desk.close()
        app.close()


def make_studio(host: str, model: str = DEFAULT_MODEL, folder: str | Path | None = None) -> Studio:
    """Make what a page at this address serves: where others reach it, models have no paths.

    Raises:
        ExpungeError: there is no such model, or the folder cannot be made.
    """
    from expunge.studio.house import Studio
    from expunge.studio.models import Models

    studio = Studio(folder, Models(local_files=is_local(host)), first=model)
    studio.models.check(model)
    return studio


def start(host: str, port: int, studio: Studio) -> Any:
    """Begin to serve; return Gradio's page, whose `close()` ends it.

    Args:
        host: the address to listen at.
        port: the port.
        studio: what the page shows.
    """
    studio.tidy()
    studio.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(studio.folder / "served"))
    from expunge.studio.jobs import Job
    from expunge.studio.page import build_page
    from expunge.studio.theme import head, theme

    blocks = build_page(studio)
    blocks.queue(default_concurrency_limit=32)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[str(studio.folder)],
        theme=theme(),
        head=head(),
    )
    # The page is there at once; the model comes while somebody reads it.
    studio.desk.submit(Job("studio", "Loading", lambda job: studio.models.get(studio.first, job)))
    return blocks


def check_gradio() -> None:
    """Check that Gradio is there.

    Raises:
        ExpungeError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ExpungeError("the studio needs Gradio: pip install 'expunge[studio]'")


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int) -> int:
    """The first free port from this one on.

    Raises:
        ExpungeError: there is none, or the address is none of this machine.
    """
    if not 1 <= port <= 65535:
        raise ExpungeError(f"a port is 1 to 65535, not {port}")
    last = min(port + TRIED, 65536)
    for one in range(port, last):
        try:
            family = socket.getaddrinfo(host, one, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((host, one))
                return one
        except PermissionError:
            continue
        except socket.gaierror:
            raise ExpungeError(f"{host!r} is no address of this machine") from None
        except OSError as error:
            if error.errno in (99, 10049):  # cannot assign the address
                raise ExpungeError(f"{host!r} is no address of this machine") from None
    raise ExpungeError(f"no port from {port} to {last - 1} is free: give another with --port")
