"""Who gets to the page, and what its server refuses to do for those who do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.serve.page.files import _names_address
from tests.serve.page.conftest import Open, Opened

TOKEN = "a-token-of-sixteen-and-more"


def test_a_token_is_given_once(pipe: Pipeline, open_page: Open) -> None:
    server = open_page({"tiny": pipe}, token=TOKEN)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        asked = client.get("/", follow_redirects=True)
        assert asked.status_code == 401 and "Token of this server" in asked.text
        assert client.get("/ui/config").status_code == 401
        assert client.post("/ui/gradio_api/queue/join", json={}).status_code == 401
        many = {str(number): TOKEN for number in range(9)}
        for data in ({"token": "another-of-sixteen-and-more"}, {"token": ""}, {}, many):
            wrong = client.post("/ui/token", data=data)
            assert wrong.status_code == 401 and "not the token" in wrong.text and not client.cookies
        right = client.post("/ui/token", data={"token": TOKEN})
        assert (right.status_code, right.headers["location"]) == (303, "/ui/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        assert client.get("/ui/config").status_code == 200
        assert client.get("/v1/models").status_code == 401  # the cookie is for the page
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        assert client.get("/ui/config").status_code == 200


def test_pages_of_others_and_other_names_are_refused(server: Opened) -> None:
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
        assert httpx.get(f"{server.url}/ui/", headers=headers).status_code == 403
        assert httpx.post(f"{server.url}/ui/gradio_api/queue/join", headers=headers, json={}).status_code == 403


def test_a_browser_may_load_nothing_from_elsewhere(server: Opened) -> None:
    answer = httpx.get(f"{server.url}/ui/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "http" not in answer.headers["content-security-policy"]
    loaded = re.findall(r"""(?:src|href)=["'](https?:[^"']+)""", answer.text)
    assert not [address for address in loaded if not address.startswith(server.url)]


@pytest.mark.parametrize(
    "path",
    [
        *("proxy=http://127.0.0.1:1/", "file=http://127.0.0.1:1/", "file=/etc/passwd", "run/draw", "call/draw"),
        *("deep_link", "runs", "vibe-edit", "dev/reload", "process_recording", "file=../../../../etc/passwd"),
    ],
)
def test_what_gradio_could_do_besides_is_closed(server: Opened, path: str) -> None:
    answer = httpx.get(f"{server.url}/ui/gradio_api/{path}")
    assert answer.status_code in (403, 404)
    assert httpx.post(f"{server.url}/ui/gradio_api/{path}", json={}).status_code in (403, 404, 405)


@pytest.mark.parametrize("value", ["http://127.0.0.1:1/a.png", "HTTPS://example.org/a.png", "ftp://example.org/a.png"])
def test_addresses_of_pictures_are_not_fetched(server: Opened, value: str) -> None:
    given: dict[str, Any] = {"path": value, "meta": {"_type": "gradio.FileData"}}
    assert _names_address([1, {"background": given}]) and not _names_address([{"path": "/tmp/a.png"}, "http://x"])
    config = httpx.get(f"{server.url}/ui/config").json()
    boxes = {one["id"] for one in config["components"] if one["type"] in ("image", "imageeditor", "file")}
    reading = next(one for one in config["dependencies"] if len(one["inputs"]) == 1 and one["inputs"][0] in boxes)
    with httpx.Client(base_url=f"{server.url}/ui/gradio_api", timeout=30) as client:
        asked = {"data": [given], "fn_index": reading["id"], "session_hash": "abc"}
        assert client.post("/queue/join", json=asked).status_code == 200
        with client.stream("GET", "/queue/data", params={"session_hash": "abc"}) as events:
            said = next(line for line in events.iter_lines() if "process_completed" in line)
    assert "no address is ever fetched" in said


def test_a_body_that_is_too_large_is_refused(server: Opened) -> None:
    body = {"data": ["x" * 2**20], "fn_index": 0, "session_hash": "abc"}
    assert httpx.post(f"{server.url}/ui/gradio_api/queue/join", json=body).status_code == 413


def test_the_command_opens_a_browser(
    built_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = list[str]()
    monkeypatch.setattr("webbrowser.open", seen.append)
    monkeypatch.setattr("latentdiff.serve.http.server.Server.run", lambda server, sockets: server.scheduler.close())
    assert main(["ui", "--model", str(built_model), "--port", "0"]) == 0
    address = capsys.readouterr().out.strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ui/", address) and seen == [address]


def test_a_missing_extra_is_named(
    built_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("latentdiff.serve.page")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["ui", "--model", str(built_model), "--port", "0"]) == 2
    assert capsys.readouterr().err == (
        'latentdiff: the page needs gradio, got none; install it with `pip install "latentdiff[ui]"`\n'
    )
