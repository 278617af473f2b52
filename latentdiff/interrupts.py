"""Ctrl-C while modules are loaded, which may lose it or end in a traceback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ending_at_once"]


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, without a word, inside a `with` block; nothing may be half done there.

    Where it has another meaning than Python's already, it keeps that.
    """
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
