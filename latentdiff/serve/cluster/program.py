"""`latentdiff serve --replicas`: the application on a cluster, from its start to its end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError

from latentdiff.errors import StorageError, printable
from latentdiff.ray_driver import joined, require_ray
from latentdiff.serve.cluster.application import ENDING_SECONDS, build
from latentdiff.serve.cluster.options import Options

__all__ = ["serve_replicas"]

OLDEST = (2, 60)  # version of Ray whose routers and figures for scaling are used
NAME = "latentdiff"
LOOKS = 0.5  # seconds between two looks whether it has ended
# Seconds in which Serve expects its proxy to begin, unless told otherwise; five are too few for a busy machine.
PROXY_SECONDS = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}


def serve_replicas(given: Mapping[str, Any], port: int, address: str | None, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, after which jobs are finished; a second one ends it at once.

    Args:
        given: options of the application.
        port: that Serve listens at.
        address: of a Ray cluster; None for that of RAY_ADDRESS, or else one that is started here.
        ready: called with the address when requests are taken.

    Raises:
        InputError: an option that cannot be used, or there is no such cluster.
        MissingDependencyError: Ray is too old.
        StorageError: the application cannot be started.
        KeyboardInterrupt: it was ended at once.
    """
    options = Options.read(dict(given))
    require_ray("--replicas", "ray.serve", OLDEST)
    with _joined(address), _ending() as told:
        try:
            serve.start(http_options={"host": options.host, "port": port})
            serve.run(build(given), name=NAME, route_prefix="/")
        except (RayError, RuntimeError) as error:
            last = printable(str(error).strip().splitlines()[-1])[:300]
            raise StorageError(f"the application could not be started ({last}); Ray's logs say more") from error
        host = f"[{options.host}]" if ":" in options.host else options.host
        ready(f"http://{host}:{port}")
        told.wait()
        _end()


def _end() -> None:
    """Have the application end, and wait until its replicas have finished their jobs."""
    until = time.monotonic() + 2 * ENDING_SECONDS  # the door first, then replicas
    with suppress(TimeoutError):  # Serve's own patience is shorter
        serve.delete(NAME)
    while NAME in serve.status().applications and time.monotonic() < until:
        time.sleep(LOOKS)


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Be a driver of a cluster; see `ray_driver.joined`. Serve on one that is started here ends with it."""
    for name, value in PROXY_SECONDS.items():
        os.environ.setdefault(name, value)
    with joined(address) as here:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            yield
        finally:
            if here:
                with suppress(RayError):
                    serve.shutdown()


@contextmanager
def _ending() -> Iterator[threading.Event]:
    """Give what is set by the first signal to end; the second one raises KeyboardInterrupt."""
    told = threading.Event()

    def take(number: int, frame: object) -> None:
        if told.is_set():
            raise KeyboardInterrupt("interrupted; what was being drawn is lost")
        told.set()

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
