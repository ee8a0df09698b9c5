"""Spread work over a Ray cluster. Ray is imported only when there is work to spread."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from expunge.base.errors import ExpungeError
from expunge.runtime.store import Tensors, copy_to_cpu

Make = Callable[[Sequence[str]], Mapping[str, Mapping[str, torch.Tensor]]]
"""Computes the tensors of some names."""

RETRIES = 3
"""How often a batch is given to another worker when the one that had it dies."""

PATIENCE = 5.0
"""Seconds to wait for an answer from an address."""

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""An empty SETTINGS frame of HTTP/2, which both sides send first; the fourth byte is its type."""


def check_address(address: str) -> None:
    """Check, before the work, that a cluster answers at an address; "" is no cluster and always passes.

    Raises:
        ExpungeError: it is not an address, nobody answers there, or Ray is not installed.
    """
    if not address:
        return
    if address not in ("local", "auto"):
        parts = re.fullmatch(r"(?:ray://)?(?:\[([^\]]+)\]|([^:/\s]+)):(\d{1,5})", address)
        if not parts:
            raise ExpungeError(
                "the address of a Ray cluster is HOST:PORT, ray://HOST:PORT, auto or local,"
                f" not {address!r}"
            )
        try:
            greeting = _exchange_prefaces(parts[1] or parts[2], int(parts[3]))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ExpungeError(f"nobody answers at the Ray address {address}: {reason}") from error
        if greeting[3:4] != SETTINGS[3:4] and not os.environ.get("RAY_USE_TLS"):
            raise ExpungeError(f"what answers at {address} is not a Ray cluster")
    if importlib.util.find_spec("ray") is None:
        raise ExpungeError(
            "spreading work needs Ray, which is not installed: pip install 'expunge[ray]'"
        )


def _exchange_prefaces(host: str, port: int) -> bytes:
    """Return the first bytes that a server answers to HTTP/2's preface.

    Ray itself would wait for minutes at an address where nobody listens.
    """
    with socket.create_connection((host, port), PATIENCE) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
        return connection.recv(len(SETTINGS))


def spread(
    function: Make, batches: Sequence[Sequence[str]], address: str
) -> Iterator[tuple[Sequence[str], dict[str, Tensors]]]:
    """Yield each batch of names with what `function` computes of it, as they are finished, in any order.

    `function` and what it closes over are sent once. A worker computes with as many threads as this
    process would, so that it gets the same result; start with fewer (OMP_NUM_THREADS=1) to run
    more batches at once on a machine. Where this process has a GPU, each worker asks for one.
    A process that is already connected to Ray uses that cluster and stays connected.

    Args:
        function: computes the tensors of some names.
        batches: the names, in batches.
        address: the cluster's address, or "local" to start one on this machine.

    Raises:
        ExpungeError: nobody answers at the address, Ray is not installed, or a batch's workers
            died again and again.
    """
    with _connected(address) as ray:
        threads = torch.get_num_threads()
        room = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        gpus = torch.cuda.is_available() and ray.cluster_resources().get("GPU", 0) >= 1
        remote = ray.remote(num_cpus=min(threads, room), num_gpus=int(gpus), max_retries=RETRIES)(_make)
        box = [ray.put(function)]  # inside a list, Ray leaves the fetching to the worker
        waiting = {remote.remote(box, threads, batch): batch for batch in batches}
        try:
            while waiting:
                (done, *_), _ = ray.wait(list(waiting))
                batch = waiting.pop(done)
                yield batch, _result(ray, done, batch)
        finally:
            for reference in waiting:
                ray.cancel(reference)


def _result(ray: Any, reference: Any, batch: Sequence[str]) -> dict[str, Tensors]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ExpungeError):
            raise ExpungeError(str(error.cause)) from error
        raise
    except ray.exceptions.RayError as error:
        raise ExpungeError(
            f"Ray gave up on {', '.join(batch)} after {RETRIES + 1} tries: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    check_address(address)
    import ray

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no statistics to anybody
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise ExpungeError(f"no Ray cluster answers at {address}: {_first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


_last_function: dict[Any, Make] = {}
"""In a worker: the function of the last batch, so that it is fetched once and not for every batch."""


def _make(box: list[Any], threads: int, names: Sequence[str]) -> dict[str, Tensors]:
    """Compute a batch; runs in a worker."""
    import ray

    (reference,) = box
    if reference not in _last_function:
        _last_function.clear()
        _last_function[reference] = ray.get(reference)
    torch.set_num_threads(threads)
    made = _last_function[reference](names)
    return {name: copy_to_cpu(made[name]) for name in names}
