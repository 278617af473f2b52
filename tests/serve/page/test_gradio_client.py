"""gradio's own client at the door of the page, whose API is closed to programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError

from latentdiff import Pipeline
from tests.serve.page.conftest import Open, Opened

TOKEN = "a-token-of-sixteen-and-more"


@pytest.fixture(autouse=True)
def without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client send none to its maker, which takes this besides its own argument."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")


@contextmanager
def connected(server: Opened, **more: Any) -> Iterator[Client]:
    """Connect, and wait as long as a busy machine takes."""
    patient = {"analytics_enabled": False, "httpx_kwargs": {"timeout": 60}}
    client = Client(f"{server.url}/ui/", verbose=False, ssl_verify=False, **patient, **more)
    try:
        yield client
    finally:
        client.close()


def test_it_is_told_that_the_page_has_no_api(server: Opened) -> None:
    with connected(server) as client:
        assert client.view_api(return_format="dict") == {"named_endpoints": {}, "unnamed_endpoints": {}}
        with pytest.raises(ValueError, match="Cannot find a function with `api_name`: /draw"):
            client.predict("fox", api_name="/draw")
        for dependency in client.config["dependencies"]:
            with pytest.raises(ValueError, match="Invalid function index"):
                client.predict("fox", fn_index=dependency["id"])


def test_it_needs_the_token(pipe: Pipeline, open_page: Open) -> None:
    server = open_page({"tiny": pipe}, token=TOKEN)
    with pytest.raises(AuthenticationError, match="credentials were not provided"), connected(server):
        pass
    with connected(server, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        assert client.config["title"] == "latentdiff"
