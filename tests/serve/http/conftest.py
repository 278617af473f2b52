"""A server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from latentdiff import Pipeline
from tests.serve.gate import Gate, eventually

if TYPE_CHECKING:
    import httpx
    import openai

    from latentdiff.serve.http.server import Server

NEEDED = ("fastapi", "httpx", "multipart", "openai", "prometheus_client", "uvicorn")


class Left(pytest.Module):
    """The tests of a file that are not run."""

    def collect(self) -> Any:
        """Say why not."""
        missing = ", ".join(name for name in NEEDED if find_spec(name) is None)
        pytest.skip(f"needs {missing}, which the extra dev installs", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leave out the files here where the extra `serve`, or a client of the tests, is not installed."""
    installed = all(find_spec(name) is not None for name in NEEDED)
    return None if installed else Left.from_parent(parent, path=module_path)


@dataclass
class Running:
    """A server that answers.

    Attributes:
        server: itself.
        url: of it, without a path.
    """

    server: Server
    url: str

    def openai(self, **more: Any) -> openai.OpenAI:
        """Return OpenAI's own client, which does not repeat unless it is told to."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **more})

    def http(self, **more: Any) -> httpx.Client:
        """Return a plain client."""
        import httpx

        return httpx.Client(base_url=self.url, timeout=30, **more)


@contextmanager
def running(pipe: Pipeline, **options: Any) -> Iterator[Running]:
    """Serve a model as "tiny"."""
    from latentdiff.serve.http.server import Server, listen

    with listen("127.0.0.1", 0) as opened:
        server = Server({"tiny": pipe}, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            eventually(lambda: server.started)
            yield Running(server, f"http://127.0.0.1:{opened.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test: `serve(pipe, limits=...)`."""
    with ExitStack() as stack:
        yield lambda pipe, **options: stack.enter_context(running(pipe, **options))


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    """A server for all tests of a module, which leave it as it was."""
    with running(pipe, batch=4) as started:
        yield started


@pytest.fixture
def gate(pipe: Pipeline) -> Iterator[Gate]:
    """A model whose steps wait until they are let through."""
    gate = Gate(pipe)
    yield gate
    gate.open()
