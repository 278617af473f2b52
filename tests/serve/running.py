"""A server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from latentdiff import Pipeline
from tests.serve.gate import eventually

if TYPE_CHECKING:
    from latentdiff.serve.http.server import Server


@contextmanager
def started(pipes: Mapping[str, Pipeline], **options: Any) -> Iterator[tuple[Server, str]]:
    """Serve models by their names; give the server and its URL without a path, and end it."""
    from latentdiff.serve.http.server import Server, listen

    with listen("127.0.0.1", 0) as opened:
        server = Server(pipes, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield server, f"http://127.0.0.1:{opened.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(180)  # machines are shared
            assert not thread.is_alive()
