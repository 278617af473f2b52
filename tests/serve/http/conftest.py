"""A server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from latentdiff import Pipeline
from tests.needs import needing
from tests.serve.gate import Gate
from tests.serve.running import started

if TYPE_CHECKING:
    import httpx
    import openai

ELSEWHERE = "LATENTDIFF_TEST_SERVER"  # the address of what tests are to ask that need no server of their own
REAL_REDIS = "LATENTDIFF_TEST_REDIS"  # URL of a Redis that tests may empty, in place of one they start
NEEDED = ("fastapi", "httpx", "multipart", "openai", "prometheus_client", "uvicorn")


pytest_pycollect_makemodule = needing(NEEDED)


@dataclass
class Running:
    """A server that answers.

    Attributes:
        inside: the server itself; None where it is in other processes, see `ELSEWHERE`.
        url: of it, without a path.
    """

    inside: Any
    url: str

    @property
    def server(self) -> Any:
        """The server itself, for tests that look inside."""
        if self.inside is None:
            pytest.skip("looks into the process of the server")
        return self.inside

    def openai(self, **more: Any) -> openai.OpenAI:
        """Return OpenAI's own client, which does not repeat unless it is told to."""
        import openai

        plain = openai.DefaultHttpxClient(verify=False)  # to read certificates takes longer than all else
        return openai.OpenAI(
            base_url=f"{self.url}/v1", http_client=plain, **{"api_key": "none", "max_retries": 0, **more}
        )

    def http(self, **more: Any) -> httpx.Client:
        """Return a plain client."""
        import httpx

        return httpx.Client(base_url=self.url, timeout=30, verify=False, **more)


@contextmanager
def running(pipe: Pipeline, more: Mapping[str, Pipeline] | None = None, **options: Any) -> Iterator[Running]:
    """Serve a model as "tiny", and maybe more by their names."""
    with started({"tiny": pipe, **(more or {})}, **options) as (server, url):
        yield Running(server, url)


Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test: `serve(pipe, limits=...)`; see `running`."""
    if ELSEWHERE in os.environ:
        pytest.skip("needs a server of its own")
    with ExitStack() as stack:
        yield lambda *pipes, **options: stack.enter_context(running(*pipes, **options))


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[Running]:
    """A server for all tests of a module, which leave it as it was."""
    if (elsewhere := os.environ.get(ELSEWHERE)) is not None:
        yield Running(None, elsewhere)
        return
    with running(pipe, batch=4) as answering:
        yield answering


@pytest.fixture
def gate(pipe: Pipeline) -> Iterator[Gate]:
    """A model whose steps wait until they are let through."""
    gate = Gate(pipe)
    yield gate
    gate.open()


@pytest.fixture
def redis() -> Iterator[str]:
    """URL of an empty Redis."""
    if (url := os.environ.get(REAL_REDIS)) is not None:
        from redis import Redis

        with Redis.from_url(url) as client:
            client.flushdb()
        yield url
        return
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join()
