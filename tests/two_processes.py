"""Two processes that talk to each other."""

from __future__ import annotations

import multiprocessing
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMPORTED_ONCE = [
    "latentdiff.evaluate.run",
    "latentdiff.training.train_autoencoder",
    "latentdiff.training.train_diffusion",
]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function with its number, 0 or 1, and arguments, in each of two new processes, and wait for both."""
    method = "spawn" if sys.platform == "win32" else "forkserver"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method=method)


def processes_called(part: str) -> list[int]:
    """Return the processes of this machine whose command line has a part."""
    found = list[int]()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(place.parent.name)] if part in place.read_text() else []
        except OSError:
            continue
    return found
